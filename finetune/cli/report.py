"""A run as one page: curves, ledger, samples, evaluation, recipe; from its own files alone, finished or not."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune import __version__
from finetune.data.language import language
from finetune.data.ledger import for_page
from finetune.evaluate.report import intro, tables
from finetune.system.charts import Line, chart, number, points
from finetune.system.errors import RunError
from finetune.system.pages import cell, render, visible
from finetune.train import checkpoint

T = TypeVar("T")
Record = dict[str, Any]
Rows = list[list[str]]

# Answers to one prompt that stand side by side; `samples.jsonl` has all.
_SIDE_BY_SIDE = 6


def as_html(run: Path) -> str:
    """One page that needs nothing else and runs nothing of the data's.

    Raises:
        ReportError: There is no run, or one of its files is damaged.
    """
    if not any((run / name).is_file() for name in ("recipe.yaml", "metrics.jsonl")):
        raise RunError(f"{run} is no run; write the training.output_dir of a recipe that was trained")
    newest, state = _newest(run)
    records = _lines(run / "metrics.jsonl", _logged) or state.get("log_history", [])
    return render(
        "cli/report.html.jinja",
        name=run.resolve().name,
        version=__version__,
        told=_told(run, records, newest, state),
        cards=_cards(records, state),
        charts=_charts(records),
        ledgers=_shown(run / "ledger.json", _ledgers) or [],
        samples=_samples(run / "samples.jsonl"),
        evaluations=_each(run, "*/report.json", _evaluation),
        merged=_each(run, "*/merge.json", _merged),
        exports=_each(run, "*/report.json", _exported),
        model=_shown(run / "recipe.yaml", _model, yaml.safe_load),
        recipe=_shown(run / "recipe.yaml", _recipe, str) or [],
        environment=_shown(run / "environment.json", _environment) or [],
    )


# ---------------------------------------------------------------------------------------------------------------
# Reading


def _shown(file: Path, show: Callable[[Any], T], read: Callable[[str], Any] = json.loads) -> T | None:
    """What a file holds, as `show` makes it; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        return show(read(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception, line: int | None = None) -> RunError:
    if isinstance(error, KeyError):
        why = f"it has no {error}"
    elif isinstance(error, json.JSONDecodeError | UnicodeDecodeError | yaml.YAMLError):
        why = str(error).splitlines()[0]
    else:
        why = "it holds something else than finetune writes there"
    place = file if line is None else f"{file}:{line}"
    return RunError(f"{place}: is damaged ({why}); mend it, or move it away: the page is made without it")


def _each(run: Path, pattern: str, show: Callable[[Any], T | None]) -> list[tuple[str, T]]:
    """What `show` makes of each such file, by the name of its folder; what it does not know is left out."""
    found = [(file.parent.name, _shown(file, show)) for file in sorted(run.glob(pattern))]
    return [(name, shown) for name, shown in found if shown is not None]


def _lines(file: Path, sound: Callable[[Any], Record]) -> list[Record]:
    """The records of a JSON Lines file; a line that is being written is not one yet."""
    if not file.is_file():
        return []
    found = []
    for i, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(sound(json.loads(line.decode("utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, error, i) from error
    return found


def _logged(record: Any) -> Record:
    """A record of the trainer: its step, and numbers or nothing."""
    numbers = all(isinstance(value, int | float | None) for value in record.values())
    if not numbers or not isinstance(record["step"], int) or record["step"] < 0:
        raise TypeError
    return dict(record)


def _sample(record: Any) -> Record:
    """An answer of the run, with the language that it is in for a browser."""
    text = visible(record["prompt"]), visible(record["answer"])
    if not isinstance(record["step"], int):
        raise TypeError
    lang = "ja" if language("".join(text)) == "Japanese" else None
    return {
        "step": record["step"],
        "prompt": text[0],
        "answer": text[1],
        "stopped": record["stopped"],
        "lang": lang,
    }


def _state(state: Any) -> Record:
    """What the trainer said of itself in a checkpoint."""
    return {"max_steps": int(state["max_steps"]), "log_history": [_logged(r) for r in state["log_history"]]}


def _newest(run: Path) -> tuple[str | None, Record]:
    """The name of the newest whole checkpoint, and what the trainer said in it."""
    for folder in reversed(checkpoint.checkpoints(run)):
        # A run that goes on removes old ones meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if checkpoint.is_whole(folder):
                return folder.name, _shown(folder / "trainer_state.json", _state) or {}
    return None, {}


# ---------------------------------------------------------------------------------------------------------------
# Parts of the page


def _told(run: Path, records: list[Record], newest: str | None, state: Record) -> list[str]:
    """How far the run is."""
    step = records[-1]["step"] if records else 0
    if checkpoint.is_finished(run):
        return [f"Finished at step {step:,}."]
    most = state.get("max_steps") or 0
    told = [f"Not finished: it goes on, or was stopped. Step {step:,}{f' of {most:,}' if most else ''}."]
    with contextlib.suppress(FileNotFoundError):
        at = datetime.fromtimestamp((run / "metrics.jsonl").stat().st_mtime, UTC)
        told.append(f"The last record was written at {at:%Y-%m-%d %H:%M} UTC.")
    if newest:
        told.append(f"training.resume_from_checkpoint=true goes on from {newest}, the newest whole one.")
    else:
        told.append("It has no whole checkpoint.")
    return told


def _cards(records: list[Record], state: Record) -> list[tuple[str, str]]:
    """The run in a few figures, each with what it is."""
    if not records:
        return []
    losses, evaluated = points(records, "loss"), points(records, "eval_loss")
    speeds, memory = points(records, "tokens_per_second"), points(records, "peak_memory_gib")
    cards = [(f"{records[-1]['step']:,}", "steps")]
    if epochs := points(records, "epoch"):
        cards.append((number(epochs[-1][1]), "epochs"))
    if losses:
        cards.append((f"{losses[-1][1]:.3f}", f"training loss at step {losses[-1][0]:,}"))
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        best = min(evaluated, key=lambda point: point[1])
        what = f"evaluation loss at step {last[0]:,}"
        what += f"; {first[1]:.3f} at step {first[0]:,}" if first != last else ""
        what += f"; lowest {best[1]:.3f} at step {best[0]:,}" if best not in (first, last) else ""
        cards.append((f"{last[1]:.3f}", what))
    if trained := points(records, "trained_tokens"):
        cards.append((f"{trained[-1][1]:,.0f}", "tokens trained on, repeats counted"))
    if speeds:
        cards.append((number(statistics.median(value for _, value in speeds)), "tokens per second (median)"))
    if shares := points(records, "mfu"):
        share = statistics.median(value for _, value in shares)
        cards.append((f"{share:.0%}", "model FLOPs utilisation (median)"))
    if energy := points(records, "energy_wh"):
        cards.append((f"{number(energy[-1][1])} Wh", "energy of the cards"))
    if memory:
        cards.append((f"{max(value for _, value in memory):.2f} GiB", "peak memory"))
    if took := points(records, "train_runtime"):
        cards.append((_clock(took[-1][1]), "from its last start to its end"))
    return cards


def _charts(records: list[Record]) -> list[dict[str, Any]]:
    """The curves that there are."""

    def line(name: str, key: str, smooth: bool = False, dots: bool = False) -> Line:
        return Line(name, points(records, key), smooth, dots)

    lost = sum("grad_norm" in r and r["grad_norm"] is None for r in records)
    norm = "Gradient norm" + (f"; not finite in {lost:,} of {len(records):,} records" if lost else "")
    loss = [line("training", "loss", smooth=True), line("evaluation", "eval_loss", dots=True)]
    charts = [
        chart("Loss (nats per trained token)", loss, (960, 330)),
        chart("Learning rate", [line("learning rate", "learning_rate")]),
        chart(norm, [line("norm", "grad_norm", smooth=True)]),
        chart("Tokens per second", [line("tokens/s", "tokens_per_second", smooth=True)]),
        chart("Model FLOPs utilisation (share of the cards' speed)", [line("share", "mfu", smooth=True)]),
        chart("Peak memory (GiB)", [line("GiB", "peak_memory_gib")]),
    ]
    return [drawn for drawn in charts if drawn]


def _ledgers(ledgers: Any) -> list[tuple[str, Any]]:
    titles = (("train", "Training rows"), ("eval", "Evaluation rows"))
    return [(title, for_page(ledgers[name])) for name, title in titles if ledgers[name]["rows"]["read"]]


def _samples(file: Path) -> dict[str, Any] | None:
    """The same prompts as the run learns: for each its answers by step, from the first to the last evaluation."""
    samples = _lines(file, _sample)
    if not samples:
        return None
    steps = sorted({sample["step"] for sample in samples})
    apart = (len(steps) - 1) / max(1, _SIDE_BY_SIDE - 1)
    chosen = steps if apart <= 1 else [steps[round(i * apart)] for i in range(_SIDE_BY_SIDE)]
    prompts: dict[str, list[Record]] = {}
    for sample in samples:
        if sample["step"] in chosen:
            prompts.setdefault(sample["prompt"], []).append(sample)
    return {"prompts": list(prompts.items()), "shown": len(chosen), "all": len(steps)}


def _evaluation(report: Any) -> dict[str, Any] | None:
    if "answers" not in report:
        return None
    return {
        "intro": visible(intro(report)),
        "tables": [(title, _seen(rows)) for title, rows in tables(report)],
    }


def _merged(record: Any) -> Rows:
    """What a merged model was made of; paths of this machine are left out."""
    adapters = [f"{Path(item['path']).name} × {item['weight']:g}" for item in record["adapters"]]
    rows = [
        ["base", record["base"]],
        ["merged into", f"the {record['base_weights']} weights"],
        ["adapters", ", ".join(adapters)],
        ["dtype", record["dtype"]],
    ]
    return _seen(rows)


def _exported(report: Any) -> dict[str, Any] | None:
    """What each format lost."""
    if "missed" not in report:
        return None
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "size": ("bytes", lambda n: f"{n / 1e6:,.1f} MB"),
        "perplexity": ("perplexity", "{:.4g}".format),
        "KL mean": ("kl", lambda value: f"{value:.2g}" if value >= 1e-6 else "< 1e-6"),
        "top-1": ("top1", "{:.2%}".format),
        "they stop": ("stops", str),
        "compared with": ("against", str),
    }
    rows = [["", *columns, ""]]
    for found in report["models"]:
        if found.get("stopped") is not None:
            of = f" of {found['answered']}" if found.get("answered") else ""
            found = found | {"stops": f"{found['stopped']}{of}"}
        cells = [show(found[key]) if found.get(key) is not None else "" for key, show in columns.values()]
        name = f"{found['name']} (not kept)" if found.get("kept") is False else found["name"]
        rows.append([name, *cells, found.get("error", "")])
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    notes, missed = _seen([report["notes"], report["missed"]])
    return {"rows": _seen(rows), "notes": notes, "missed": missed}


def _seen(rows: Rows) -> Rows:
    """Texts of others, with nothing in them that is not seen."""
    return [[visible(text) for text in row] for row in rows]


def _model(recipe: Any) -> str:
    """What was trained, in words."""
    bits = recipe.get("quantization") or {}
    kind = "full fine-tuning" if not recipe.get("lora") else "QLoRA" if any(bits.values()) else "LoRA"
    return f"{recipe['model']['name_or_path']}, {kind}"


def _recipe(text: str) -> list[tuple[str, str]]:
    """Each line of the recipe, and where its value came from."""
    split = (line.rpartition("  # ") for line in text.splitlines())
    return [(left, origin) if mark else (origin, "") for left, mark, origin in split]


def _environment(found: Any) -> Rows:
    flat = {k: v for k, v in found.items() if k != "versions"} | found.get("versions", {})
    return [[visible(name), cell(value)] for name, value in flat.items() if value is not None]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
