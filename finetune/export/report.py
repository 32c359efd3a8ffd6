"""report.json and report.md of an export: the figures of every model that was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Before Python 3.12 pydantic accepts only the TypedDict of this package.
from typing_extensions import TypedDict

from finetune.system.numbers import file_size, markdown_table
from finetune.system.pages import markdown

# Written as calls because `in` and `llama.cpp` are not Python identifiers.
Activations = TypedDict("Activations", {"largest": float, "in": str | None, "overflow": str | None})
TokenDifference = TypedDict("TokenDifference", {"text": str, "at": int, "trained": list[int], "llama.cpp": list[int]})


class ScoreFigures(TypedDict, total=False):
    """Figures on some rows; loss and KL in nats per token."""

    perplexity: float
    tokens: int
    loss: float
    compared: int
    kl: float | None
    kl_p99: float | None
    top1: float | None


class Agreement(TypedDict):
    """How many of `count` texts have the trained token ids, and the first ones that do not."""

    count: int
    equal: int
    differences: list[TokenDifference]


class Question(TypedDict):
    """A prompt in words and the greedy answer to it."""

    prompt: str
    ids: list[int]
    answer: str
    ended: bool


class ModelFigures(ScoreFigures, total=False):
    """One model of the report. With the key `error` the model could not be measured, and figures are missing."""

    name: str
    against: str | None
    """The model that it is compared with."""
    dtype: str
    """The type that it was measured in; gguf for a file in llama.cpp."""
    bytes: int
    error: str
    load_seconds: float
    groups: dict[str, ScoreFigures]
    answers: list[list[int]]
    """Token ids; like `conversations` they are not in report.json."""
    answered: int
    answers_equal: int
    stopped: int
    conversations: list[list[int]]
    conversations_equal: int
    perplexity_ratio: float
    activations: Activations
    # For files that are made with and without an importance matrix: GGUF files and w4a16.
    kind: str
    matrix: bool
    kept: bool
    # For GGUF files only.
    largest: float | None
    same_texts: Agreement
    same_prompts: Agreement
    question: Question
    prompt_speed: float
    speed: float
    file: str


class Report(TypedDict):
    """The content of report.json."""

    title: str
    finetune: str
    model: str
    record_sha256: str
    base: str
    rows: str
    machine: str
    gate: dict[str, float]
    models: list[ModelFigures]
    notes: list[str]
    missed: list[str]


def mean_kl(figures: ModelFigures) -> float:
    """A model's mean KL (less is better); infinity if it could not be measured."""
    kl = figures.get("kl")
    return math.inf if kl is None or math.isnan(kl) else kl


def as_markdown(report: Report) -> str:
    """The report as one table of the models, one of the GGUF files, and its notes."""
    files = [model for model in report["models"] if model.get("dtype") == "gguf"]
    header = ("", "size", "load", "perplexity", "KL mean", "KL 99%", "top-1", "answers equal", "they stop")
    rows: list[tuple[str, ...]] = [(*header, "token ids", "compared with")]
    rows += [_row(model, _folder_cells(model), 11, _title(model)) for model in report["models"] if model not in files]
    lines = [f"# {markdown(report['title'])}", "", *markdown_table(rows)]
    lines += _gguf_table(files) if files else []
    # A note that begins with a line break is a paragraph.
    lines += ["", *("\n" * note.startswith("\n") + markdown(note.strip()) for note in report["notes"])]
    if report["missed"]:
        lines += ["", "It falls short:", "", *(f"- {markdown(line)}" for line in report["missed"])]
    return "\n".join(lines) + "\n"


def _title(model: ModelFigures) -> str:
    """A model's name in a table, without the format of all rows; in parentheses if it was not kept."""
    name = model["name"].removeprefix("gguf:")
    return name if model.get("kept", True) else f"({name})"


def _row(model: ModelFigures, cells: Sequence[str], columns: int, title: str) -> tuple[str, ...]:
    """A model's row of a table: its name, size and other cells, or the error in their place."""
    start = (title, file_size(model["bytes"]))
    return (*start, model["error"], *[""] * (columns - 3)) if "error" in model else (*start, *cells)


def _folder_cells(model: ModelFigures) -> Sequence[str]:
    if "error" in model:
        return ()
    count, texts = len(model["answers"]), len(model["conversations"])
    return (
        f"{model['load_seconds']:.1f} s",
        *_score_cells(model),
        f"{model['answers_equal']} of {count}" if "answers_equal" in model else "",
        f"{model['stopped']} of {count}",
        f"{model['conversations_equal']} of {texts}" if "conversations_equal" in model else "",
        model["against"] or "",
    )


def _gguf_table(files: list[ModelFigures]) -> list[str]:
    """The table of GGUF files, with the KL by language; files that were not kept are in parentheses."""
    languages = sorted({name for file in files for name in file.get("groups", {})})
    header = ("GGUF", "size", "perplexity", "KL mean", "KL 99%", "top-1", *(f"KL {name}" for name in languages))
    rows: list[tuple[str, ...]] = [(*header, "they stop", "token ids", "prompts", "tokens/s, prompt", "answer")]
    rows += [_row(file, _gguf_cells(file, languages), len(rows[0]), _title(file)) for file in files]
    against = next((file["against"] for file in files if file.get("against")), "")
    note = f"GGUF files are measured by llama.cpp, against {against}; in parentheses: not kept."
    return ["", *markdown_table(rows), "", note]


def _gguf_cells(file: ModelFigures, languages: Sequence[str]) -> Sequence[str]:
    if "error" in file:
        return ()
    return (
        *_score_cells(file),
        *(_number(file["groups"].get(language, {}).get("kl")) for language in languages),
        f"{file['stopped']} of {len(file['answers'])}",
        _agreement(file.get("same_texts")),
        _agreement(file.get("same_prompts")),
        f"{file['prompt_speed']:,.0f}",
        f"{file['speed']:,.0f}",
    )


def _score_cells(model: ModelFigures) -> Sequence[str]:
    distances = (_number(model.get("kl")), _number(model.get("kl_p99")), _number(model.get("top1"), ".2%"))
    return (f"{model['perplexity']:.4g}", *distances)


def _agreement(same: Agreement | None) -> str:
    return f"{same['equal']} of {same['count']}" if same and same["count"] else ""


def notes_on(models: Sequence[ModelFigures], source: str) -> list[str]:
    """Notes below the table: the meaning of its columns, and which merged model is nearer to the adapter."""
    tokens = max((model.get("tokens", 0) for model in models), default=0)
    compared = max((model.get("compared", 0) for model in models), default=0)
    distances = (
        f"KL (nats per token) and top-1: on the first {compared:,}, against the model named in the last column. "
    )
    notes = [
        f"Perplexity: on {tokens:,} trained tokens of {source}. {distances if compared else ''}"
        "Answers: greedy, to the prompts of at most ten rows, each at most 64 tokens. "
        "Token ids: of ten conversations."
    ]
    merges = [model for model in models if model["name"].startswith("merged, ") and model.get("kl") is not None]
    if len(merges) == 2:
        near, far = sorted(merges, key=lambda model: model["kl"] or 0.0)
        low, high = sorted(merges, key=lambda model: model["perplexity"])
        notes.append(
            f"\nNearer to the adapter as trained: {near['name']} (mean KL {near['kl']:.3g} against {far['kl']:.3g})."
            f" Lower perplexity: {low['name']} ({low['perplexity']:.4g} against {high['perplexity']:.4g})."
        )
    notes += [
        f"\n{model['name']}: the largest activation is {seen['largest']:,.0f}, in {seen['in']} (at most: 65,504)"
        for model in models
        if (seen := model.get("activations"))
    ]
    return notes


def as_json(report: Report) -> str:
    """The report without the token ids that were compared; a number that is not finite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items() if k not in ("answers", "conversations")}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(report), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _number(value: float | None, form: str = ".2g") -> str:
    if value is None or math.isnan(value):
        return "" if value is None else "nan"
    return "< 1e-6" if value < 1e-6 and form == ".2g" else format(value, form)
