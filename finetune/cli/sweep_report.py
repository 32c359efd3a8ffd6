"""The runs of a sweep side by side: what each folder says, as a table, as `sweep.json` and as an HTML page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.system.charts import Line, chart, points
from finetune.system.errors import RunError
from finetune.system.files import read_records
from finetune.system.numbers import clock
from finetune.system.pages import render
from finetune.train import checkpoint
from finetune.train.outcome import Outcome

FINISHED, FAILED, CUT, NOT_RUN = "finished", "failed", "not finished", "not yet run"
# The most runs whose curves are drawn, the best ones.
_CURVES = 8


@dataclass(frozen=True)
class RunRow:
    """One run as its folder is now.

    Attributes:
        name: The name of its folder.
        values: The values that differ between runs as they were written, by key.
        folder: The run directory.
        state: `FINISHED`, `FAILED`, `CUT` or `NOT_RUN`.
        error: Why it failed, in one line.
        note: An early stop, and which weights are saved where that is a question.
        held_out: The evaluation loss of the saved weights.
        loss: The last training loss.
        seconds: The time of its steps, without evaluations.
        speed: Tokens per second (median).
        memory: The peak memory in GiB.
        held_out_rows: The rows, tokens and labels that it was evaluated on, which decide if losses can be compared.
        records: What it logged.
    """

    name: str
    values: Mapping[str, str]
    folder: Path
    state: str
    error: str | None
    note: str
    held_out: float | None
    loss: float | None
    seconds: float | None
    speed: float | None
    memory: float | None
    held_out_rows: tuple[int, ...] | None
    records: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, name: str, values: Mapping[str, str], folder: Path, error: str | None) -> RunRow:
        """The row of a run.

        Args:
            name: Its name.
            values: Its values.
            folder: Its folder, which need not exist.
            error: Why it failed the last time.

        Raises:
            RunError: A file of the run is damaged.
        """
        records = read_records(folder / "metrics.jsonl")
        outcome = Outcome.of(records)
        finished = checkpoint.is_finished(folder)
        begun = finished or bool(records) or bool(checkpoint.checkpoints(folder))
        speeds = [value for _, value in points(records, "tokens_per_second")]
        memory = [value for _, value in points(records, "peak_memory_gib")]
        return cls(
            name=name,
            values=values,
            folder=folder,
            state=FINISHED if finished else FAILED if error else CUT if begun else NOT_RUN,
            error=None if finished else error,
            note="; ".join(outcome.notes()),
            held_out=outcome.held_out,
            loss=outcome.loss,
            seconds=_seconds(records),
            speed=statistics.median(speeds) if speeds else None,
            memory=max(memory) if memory else None,
            held_out_rows=_held_out_rows(folder / "ledger.json"),
            records=records,
        )

    def measured(self) -> dict[str, Any]:
        """The figures by their names in `sweep.json`."""
        return {
            "eval_loss": self.held_out,
            "loss": self.loss,
            "seconds": self.seconds,
            "tokens_per_second": self.speed,
            "peak_memory_gib": self.memory,
        }


def _seconds(records: Sequence[dict[str, Any]]) -> float | None:
    """The time of the steps, from the tokens and the speed of each record: it holds for a resumed run, too."""
    logged = [(r["num_tokens"], r["tokens_per_second"]) for r in records if r.get("tokens_per_second")]
    spans = [(after[0] - before[0]) / after[1] for before, after in pairwise([(0, 1), *logged])]
    return round(sum(spans), 1) if spans else None


def _held_out_rows(ledger: Path) -> tuple[int, ...] | None:
    if not ledger.is_file():
        return None
    try:
        account = json.loads(ledger.read_text(encoding="utf-8"))["eval"]
        return (account["rows"]["kept"], account["tokens"], account["trained_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{ledger} is damaged; remove the run's folder, and it is trained again") from error


def differ_in_held_out_rows(rows: Sequence[RunRow]) -> bool:
    """True if runs were evaluated on other rows, or on other tokens of them."""
    return len({row.held_out_rows for row in rows if row.held_out_rows and row.held_out is not None}) > 1


def best_of(rows: Sequence[RunRow]) -> RunRow | None:
    """The finished run with the lowest held-out loss, or training loss where no rows are held out."""
    finished = [row for row in rows if row.state == FINISHED]
    for losses in ([(row.held_out, row) for row in finished], [(row.loss, row) for row in finished]):
        if known := [(loss, row) for loss, row in losses if loss is not None]:
            return min(known, key=lambda pair: pair[0])[1]
    return None


# ---------------------------------------------------------------------------------------------------------------
# sweep.json


def as_json(rows: Sequence[RunRow], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `sweep.json`.

    Args:
        rows: The runs.
        saved: What the file holds beside them: the recipe, wandb's group, the fingerprints of the rows, notes.
    """
    best = best_of(rows)
    runs = [
        {
            "name": row.name,
            "values": dict(row.values),
            "state": row.state,
            "step": row.records[-1]["step"] if row.records else 0,
            **row.measured(),
            "note": row.note or None,
            "error": row.error,
        }
        for row in rows
    ]
    return {**saved, "keys": list(rows[0].values), "best": best.name if best else None, "runs": runs}


def read_sweep(file: Path) -> dict[str, Any] | None:
    """The content of `sweep.json`; None if there is no such file.

    Raises:
        RunError: It is damaged.
    """
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(saved["sources"], dict) or not isinstance(saved["group"], str):
            raise TypeError
        for run in saved["runs"]:
            saved["keys"], run["name"], run["error"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged; restore it, or write another training.output_dir") from error
    return dict(saved)


# ---------------------------------------------------------------------------------------------------------------
# Table and page


def table(rows: Sequence[RunRow]) -> list[list[str]]:
    """The runs as a table: a header, then one row each; the best one has a star."""
    best = best_of(rows)
    head = ["run", *_short(list(rows[0].values)), "held out", "loss", "time", "tokens/s", "GiB", "state"]
    lines = []
    for row in rows:
        figures = [
            _figure(row.held_out, "{:.4f}"),
            _figure(row.loss, "{:.4f}"),
            "" if row.seconds is None else clock(row.seconds),
            _figure(row.speed, "{:,.0f}"),
            _figure(row.memory, "{:.2f}"),
        ]
        star = "* " if best is row else ""
        lines.append([star + row.name, *row.values.values(), *figures, _state(row)])
    return [head, *lines]


def _short(keys: Sequence[str]) -> list[str]:
    lasts = [key.rpartition(".")[2] for key in keys]
    return [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _state(row: RunRow) -> str:
    if row.state == FAILED:
        return f"failed: {row.error}"
    if row.state == CUT:
        return f"not finished: step {row.records[-1]['step']:,}" if row.records else row.state
    return f"{row.state}{f', {row.note}' if row.note else ''}"


def as_text(rows: Sequence[RunRow]) -> list[str]:
    """The table as lines of a terminal: texts to the left, figures to the right; the best run has a star."""
    lines = table(rows)
    texts = len(rows[0].values) + 1
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    indent = "  " if any(line[0].startswith("* ") for line in lines) else ""
    shown = []
    for line in lines:
        first = line[0] if line[0].startswith("* ") else indent + line[0]
        cells = [first, *line[1:]]
        padded = [
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells[:-1], [widths[0] + len(indent), *widths[1:]], strict=True))
        ]
        shown.append("  ".join([*padded, cells[-1]]).rstrip())
    return shown


def as_html(output: Path, rows: Sequence[RunRow], notes: Sequence[str]) -> str:
    """The page of a sweep, self-contained HTML, in which text from files is never markup.

    Args:
        output: The folder of the sweep.
        rows: The runs.
        notes: Sentences about the comparison.
    """
    best = best_of(rows)
    lines = table(rows)
    return render(
        "cli/sweep.html.jinja",
        name=output.resolve().name,
        version=__version__,
        progress=_progress(rows),
        best=best,
        best_values=", ".join(f"{key} {value}" for key, value in best.values.items()) if best else "",
        notes=notes,
        head=lines[0],
        runs=[(row, [row.name, *cells[1:]], row is best) for row, cells in zip(rows, lines[1:], strict=True)],
        linked={row.name for row in rows if row.state == FINISHED},
        failed=FAILED,
        charts=_charts(rows, best),
    )


def _progress(rows: Sequence[RunRow]) -> str:
    counts = {state: sum(row.state == state for row in rows) for state in (FINISHED, FAILED, CUT, NOT_RUN)}
    return f"{len(rows)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def _charts(rows: Sequence[RunRow], best: RunRow | None) -> list[dict[str, Any]]:
    """The curves of the best runs, the best of them last and with dots."""
    ranked = sorted(rows, key=lambda row: (row is best, -(row.held_out or row.loss or 0)))[-_CURVES:]

    def drawn(title: str, key: str) -> dict[str, Any] | None:
        return chart(title, [Line(row.name, points(row.records, key), dots=row is best) for row in ranked], (960, 330))

    of = f" of the {_CURVES} best runs" if len(rows) > _CURVES else ""
    charts = (drawn(f"Held-out loss{of}", "eval_loss"), drawn(f"Training loss{of}", "loss"))
    return [made for made in charts if made]
