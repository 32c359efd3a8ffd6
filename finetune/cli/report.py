"""The HTML page of a run, made from its own files: curves, ledger, samples, evaluations, exports, recipe."""

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
from finetune.system.errors import RunError, first_line
from finetune.system.files import read_records
from finetune.system.numbers import clock, file_size
from finetune.system.pages import cell, render, visible
from finetune.train import checkpoint
from finetune.train.outcome import Outcome

T = TypeVar("T")
Record = dict[str, Any]
TableRows = list[list[str]]

# The most answers to one prompt that stand side by side; `samples.jsonl` has all.
_SIDE_BY_SIDE = 6


def as_html(run: Path) -> str:
    """The page of a run, finished or not: self-contained HTML, in which text from files is never markup.

    Raises:
        RunError: `run` is not a run, or one of its files is damaged.
    """
    if not any((run / name).is_file() for name in ("recipe.yaml", "metrics.jsonl")):
        raise RunError(f"{run} is not a run; write the training.output_dir of a recipe that was trained")
    newest, state = _newest(run)
    records = _read_lines(run / "metrics.jsonl", _logged) or state.get("log_history", [])
    return render(
        "cli/report.html.jinja",
        name=run.resolve().name,
        version=__version__,
        progress=_progress(run, records, newest, state),
        figures=_figures(records),
        charts=_charts(records, _sampled(run / "samples.jsonl", "tokens"), _sampled(run / "samples.jsonl", "kl")),
        ledgers=_read(run / "ledger.json", _ledgers) or [],
        samples=_samples(run / "samples.jsonl"),
        evaluations=_read_each(run, "*/report.json", _evaluation),
        merged=_read_each(run, "*/merge.json", _merged),
        exports=_read_each(run, "*/report.json", _exported),
        model=_read(run / "recipe.yaml", _model, yaml.safe_load),
        recipe=_read(run / "recipe.yaml", _recipe, str) or [],
        environment=_read(run / "environment.json", _environment) or [],
    )


# ---------------------------------------------------------------------------------------------------------------
# Reading


def _read(file: Path, convert: Callable[[Any], T], parse: Callable[[str], Any] = json.loads) -> T | None:
    """`convert(parse(text))` of a file; None if there is no such file."""
    if not file.is_file():
        return None
    try:
        return convert(parse(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError) as error:
        raise _damaged(str(file), error) from error


def _read_lines(file: Path, convert: Callable[[Any], Record]) -> list[Record]:
    """`convert` of each record of a JSON Lines file."""
    converted = []
    for i, record in enumerate(read_records(file), 1):
        try:
            converted.append(convert(record))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(f"{file}:{i}", error) from error
    return converted


def _read_each(run: Path, pattern: str, convert: Callable[[Any], T | None]) -> list[tuple[str, T]]:
    """The name of its folder and `convert` of each file that matches; files for which that is None are left out."""
    files = sorted(run.glob(pattern))
    return [(file.parent.name, made) for file in files if (made := _read(file, convert)) is not None]


def _damaged(place: str, error: Exception) -> RunError:
    if isinstance(error, KeyError):
        why = f"it has no {error}"
    elif isinstance(error, json.JSONDecodeError | UnicodeDecodeError | yaml.YAMLError):
        why = first_line(error)
    else:
        why = "it holds something else than finetune writes there"
    return RunError(f"{place} is damaged ({why}); mend it, or move it away: the page is made without it")


def _logged(record: Any) -> Record:
    """A record of metrics.jsonl or of the trainer: a step, and numbers or None."""
    numbers = all(isinstance(value, int | float | None) for value in record.values())
    if not numbers or not isinstance(record["step"], int) or record["step"] < 0:
        raise TypeError
    return dict(record)


def _sampled(file: Path, key: str) -> list[tuple[float, float]]:
    """The mean of a figure of the sampled answers, by step; a run of an earlier version has none."""
    values: dict[int, list[float]] = {}
    for record in read_records(file):
        if key in record:
            values.setdefault(record["step"], []).append(record[key])
    return [(step, statistics.mean(found)) for step, found in values.items()]


def _sample(record: Any) -> Record:
    """A record of samples.jsonl, with the language of its text for the browser."""
    text = visible(record["prompt"]), visible(record["answer"])
    if not isinstance(record["step"], int):
        raise TypeError
    lang = "ja" if language("".join(text)) == "Japanese" else None
    return {"step": record["step"], "prompt": text[0], "answer": text[1], "stopped": record["stopped"], "lang": lang}


def _state(state: Any) -> Record:
    """The parts of trainer_state.json that the page shows."""
    return {"max_steps": int(state["max_steps"]), "log_history": [_logged(r) for r in state["log_history"]]}


def _newest(run: Path) -> tuple[str | None, Record]:
    """The name of the newest complete checkpoint, and its trainer state."""
    for folder in reversed(checkpoint.checkpoints(run)):
        # A run in progress may remove it meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if checkpoint.is_whole(folder):
                return folder.name, _read(folder / "trainer_state.json", _state) or {}
    return None, {}


# ---------------------------------------------------------------------------------------------------------------
# Parts of the page


def _progress(run: Path, records: list[Record], newest: str | None, state: Record) -> list[str]:
    """Sentences about how far the run is."""
    step = records[-1]["step"] if records else 0
    if checkpoint.is_finished(run):
        outcome = Outcome.of(records)
        head = "Finished:" if outcome.stopped_early else f"Finished at step {step:,}"
        notes = "; ".join(outcome.notes())
        return [f"{head} {notes}." if outcome.stopped_early else f"{head}{f'; {notes}' if notes else ''}."]
    last = state.get("max_steps") or 0
    sentences = [f"Not finished: in progress, or stopped. Step {step:,}{f' of {last:,}' if last else ''}."]
    with contextlib.suppress(FileNotFoundError):
        at = datetime.fromtimestamp((run / "metrics.jsonl").stat().st_mtime, UTC)
        sentences.append(f"The last record was written at {at:%Y-%m-%d %H:%M} UTC.")
    if newest:
        sentences.append(f"training.resume_from_checkpoint=true resumes from {newest}, the newest complete checkpoint.")
    else:
        sentences.append("It has no complete checkpoint.")
    return sentences


def _figures(records: list[Record]) -> list[tuple[str, str]]:
    """The most important figures of the run, each with its caption."""
    if not records:
        return []
    losses, evaluated = points(records, "loss"), points(records, "eval_loss")
    speeds, memory = points(records, "tokens_per_second"), points(records, "peak_memory_gib")
    figures = [(f"{records[-1]['step']:,}", "steps")]
    if epochs := points(records, "epoch"):
        figures.append((number(epochs[-1][1]), "epochs"))
    if losses:
        figures.append((f"{losses[-1][1]:.3f}", f"training loss at step {losses[-1][0]:,}"))
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        best = min(evaluated, key=lambda point: point[1])
        caption = f"evaluation loss at step {last[0]:,}"
        caption += f"; {first[1]:.3f} at step {first[0]:,}" if first != last else ""
        caption += f"; lowest {best[1]:.3f} at step {best[0]:,}" if best not in (first, last) else ""
        figures.append((f"{last[1]:.3f}", caption))
    if trained := points(records, "trained_tokens"):
        figures.append((f"{trained[-1][1]:,.0f}", "tokens trained on, repetitions included"))
    if speeds:
        figures.append((number(statistics.median(value for _, value in speeds)), "tokens per second (median)"))
    if shares := points(records, "mfu"):
        share = statistics.median(value for _, value in shares)
        figures.append((f"{share:.0%}", "model FLOPs utilisation (median)"))
    if energy := points(records, "energy_wh"):
        figures.append((f"{number(energy[-1][1])} Wh", "energy of the GPUs"))
    if memory:
        figures.append((f"{max(value for _, value in memory):.2f} GiB", "peak memory"))
    if runtime := points(records, "train_runtime"):
        figures.append((clock(runtime[-1][1]), "from its last start to its end"))
    return figures


def _charts(
    records: list[Record], lengths: list[tuple[float, float]], divergences: list[tuple[float, float]]
) -> list[dict[str, Any]]:
    """The curves of which there are values.

    Args:
        records: The records of metrics.jsonl.
        lengths: Mean tokens of the sampled answers, by step.
        divergences: Their mean divergence from the model at the start, by step.
    """

    def line(name: str, key: str, smooth: bool = False, dots: bool = False) -> Line:
        return Line(name, points(records, key), smooth, dots)

    lost = sum("grad_norm" in r and r["grad_norm"] is None for r in records)
    norm = "Gradient norm" + (f"; not finite in {lost:,} of {len(records):,} records" if lost else "")
    loss = [line("training", "loss", smooth=True), line("evaluation", "eval_loss", dots=True)]
    answers = (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected"))
    rewards = [line(name, key, smooth=True) for name, key in answers]
    rewards += [line(f"{name}, evaluation", f"eval_{key}", dots=True) for name, key in answers]

    def logged(title: str, key: str) -> dict[str, Any] | None:
        both = [line("training", key, smooth=True), line("evaluation", f"eval_{key}", dots=True)]
        return chart(title, both)

    def sampled(name: str, values: list[tuple[float, float]]) -> Line:
        return Line(name, values, False, True)

    preferences = any(curve.points for curve in rewards)
    charts = [
        chart("Loss" if preferences else "Loss (nats per trained token)", loss, (960, 330)),
        logged("Reward margin: chosen less rejected", "rewards/margins"),
        logged("Share of pairs whose chosen answer has the higher reward", "rewards/accuracies"),
        chart("Rewards: log-probability gained since the start, times beta", rewards),
        chart("KL divergence of the sampled answers from the reference (nats per token)", [sampled("KL", divergences)]),
        logged("KTO's estimate of the KL divergence (nats per answer)", "kl"),
        chart("Tokens of the sampled answers (mean)", [sampled("tokens", lengths)] if preferences else []),
        chart("Learning rate", [line("learning rate", "learning_rate")]),
        chart(norm, [line("norm", "grad_norm", smooth=True)]),
        chart("Tokens per second", [line("tokens/s", "tokens_per_second", smooth=True)]),
        chart("Model FLOPs utilisation (share of the GPUs' speed)", [line("share", "mfu", smooth=True)]),
        chart("Peak memory (GiB)", [line("GiB", "peak_memory_gib")]),
    ]
    return [drawn for drawn in charts if drawn]


def _ledgers(ledgers: Any) -> list[tuple[str, Any]]:
    titles = (("train", "Training rows"), ("eval", "Evaluation rows"))
    return [(title, for_page(ledgers[name])) for name, title in titles if ledgers[name]["rows"]["read"]]


def _samples(file: Path) -> Record | None:
    """The answers to each prompt by step, of at most `_SIDE_BY_SIDE` evaluations evenly spaced over the run."""
    samples = _read_lines(file, _sample)
    if not samples:
        return None
    steps = sorted({sample["step"] for sample in samples})
    spacing = (len(steps) - 1) / max(1, _SIDE_BY_SIDE - 1)
    chosen = steps if spacing <= 1 else [steps[round(i * spacing)] for i in range(_SIDE_BY_SIDE)]
    prompts: dict[str, list[Record]] = {}
    for sample in samples:
        if sample["step"] in chosen:
            prompts.setdefault(sample["prompt"], []).append(sample)
    return {"prompts": list(prompts.items()), "shown": len(chosen), "all": len(steps)}


def _evaluation(report: Any) -> Record | None:
    if "answers" not in report:
        return None
    return {"intro": visible(intro(report)), "tables": [(title, _visible(rows)) for title, rows in tables(report)]}


def _merged(record: Any) -> TableRows:
    """The table of a merge; only the names of adapters' folders are shown, not paths of this machine."""
    adapters = [f"{Path(item['path']).name} × {item['weight']:g}" for item in record["adapters"]]
    rows = [
        ["base", record["base"]],
        ["merged into", f"the {record['base_weights']} weights"],
        ["adapters", ", ".join(adapters)],
        ["dtype", record["dtype"]],
    ]
    return _visible(rows)


def _exported(report: Any) -> Record | None:
    """The table of an export: what each format lost."""
    if "missed" not in report:
        return None
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "size": ("bytes", file_size),
        "perplexity": ("perplexity", "{:.4g}".format),
        "KL mean": ("kl", lambda value: f"{value:.2g}" if value >= 1e-6 else "< 1e-6"),
        "top-1": ("top1", "{:.2%}".format),
        "they stop": ("stops", str),
        "compared with": ("against", str),
    }
    rows = [["", *columns, ""]]
    for model in report["models"]:
        if model.get("stopped") is not None:
            of = f" of {model['answered']}" if model.get("answered") else ""
            model = model | {"stops": f"{model['stopped']}{of}"}
        cells = [show(model[key]) if model.get(key) is not None else "" for key, show in columns.values()]
        name = f"{model['name']} (not kept)" if model.get("kept") is False else model["name"]
        rows.append([name, *cells, model.get("error", "")])
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    notes, missed = _visible([report["notes"], report["missed"]])
    return {"rows": _visible(rows), "notes": notes, "missed": missed}


def _visible(rows: TableRows) -> TableRows:
    """The rows with control and invisible characters written out."""
    return [[visible(text) for text in row] for row in rows]


def _model(recipe: Any) -> str:
    """The base model and the kind of training."""
    bits = recipe.get("quantization") or {}
    kind = "full fine-tuning" if not recipe.get("lora") else "QLoRA" if any(bits.values()) else "LoRA"
    return f"{recipe['model']['name_or_path']}, {kind}"


def _recipe(text: str) -> list[tuple[str, str]]:
    """Each line of the resolved recipe, and the origin of its value."""
    split = (line.rpartition("  # ") for line in text.splitlines())
    return [(left, origin) if mark else (origin, "") for left, mark, origin in split]


def _environment(environment: Any) -> TableRows:
    flat = {k: v for k, v in environment.items() if k != "versions"} | environment.get("versions", {})
    return [[visible(name), cell(value)] for name, value in flat.items() if value is not None]
