"""Measures the models of an export, each in a fresh process, and compares each with the one that it was made from.

The measured values are those that a user would notice: predictions on held-out rows, greedy answers, whether they end,
and the token ids of conversations. The fresh process also proves that the folder is complete, and keeps two models out
of one memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from finetune.data.samples import LabelledRow, sample_rows
from finetune.evaluate.perplexity import score, score_groups
from finetune.export.report import Activations, ModelFigures, ScoreFigures
from finetune.system import fresh_process
from finetune.system.errors import FinetuneError, LabelError, TemplateError, first_line
from finetune.system.files import is_full

# An answer that has not ended after so many tokens counts as one that does not end.
ANSWER_TOKENS = 64
# The number of prompts that are answered, and of sample conversations that are tokenised.
ANSWERS = 10
CONVERSATIONS = 10
# Nats per token. A larger mean KL between adapter and merged model means a wrong merge, if the base was not quantised:
# the rounding of bfloat16 alone gives less than a tenth of this.
_MAX_MERGE_KL = 0.02

# Each limit of `--gate`: the figure that it limits, and the figure's name in messages.
LIMITS: dict[str, tuple[Literal["kl", "kl_p99", "top1", "perplexity_ratio"], str]] = {
    "max_kl": ("kl", "mean KL"),
    "max_kl_p99": ("kl_p99", "99th percentile KL"),
    "min_top1": ("top1", "top-1 agreement"),
    "max_perplexity_ratio": ("perplexity_ratio", "perplexity ratio"),
}


Reader = Literal["transformers", "mlx-lm", "dequantised"]


@dataclass(frozen=True)
class Job:
    """One model to measure.

    Attributes:
        name: Its name in the report.
        folder: The run or whole model.
        dtype: The dtype to load it in, such as `bfloat16`.
        against: The report's name for the model that it is compared with.
        reference: The file with that model's predictions.
        keep: The file to write this model's predictions to.
        base: The path or id of a run's base, in place of the one that its files name.
        groups: Further rows, by name; the result has figures for each group.
        trust_remote_code: True if the user lets Python files of the model's repository run.
        reader: The program that measures it; `dequantised` is transformers, with the weights of an
            mlx format dequantised into a temporary folder.
    """

    name: str
    folder: Path
    dtype: str
    against: str | None = None
    reference: Path | None = None
    keep: Path | None = None
    base: str | None = None
    groups: dict[str, list[LabelledRow]] = field(default_factory=dict)
    trust_remote_code: bool = False
    reader: Reader = "transformers"


@dataclass(frozen=True)
class _Task:
    """The argument of the fresh process."""

    job: Job
    rows: list[LabelledRow]


def measure(job: Job, rows: list[LabelledRow]) -> ModelFigures:
    """Loads a model in a fresh process and measures it; the result has `error` if it cannot be loaded or run.

    Args:
        job: The model.
        rows: The rows to compute the loss on. The prompts of the first ten are answered.

    Raises:
        OSError: The disk is full, which is no fault of the model.
    """
    size = sum(path.stat().st_size for path in job.folder.glob("*.safetensors"))
    model: ModelFigures = {"name": job.name, "against": job.against, "dtype": job.dtype, "bytes": size}
    try:
        model |= fresh_process.call(_load_and_measure, _Task(job, rows))
    except fresh_process.ProcessFailed as error:
        model["error"] = str(error)
    except (FinetuneError, OSError) as error:
        if is_full(error):
            raise
        model["error"] = f"{type(error).__name__}: {first_line(error)}"
    return model


def _load_and_measure(task: _Task) -> ModelFigures:
    """Loads a model in this process; returns its figures."""
    job = task.job
    started = time.monotonic()
    generator = _load(job)
    seconds = time.monotonic() - started
    activations = _watch_activations(generator.model) if job.dtype == "float16" else None
    result = score(generator.model, task.rows, job.reference, job.keep)
    groups = score_groups(generator.model, job.groups, job.reference, job.keep)
    answers = generator.answers([row.prompt for row in task.rows[:ANSWERS]], ANSWER_TOKENS)
    model = cast("ModelFigures", asdict(result))
    model |= ModelFigures(
        load_seconds=round(seconds, 2),
        perplexity=result.perplexity,
        groups=cast("dict[str, ScoreFigures]", groups),
        answers=answers,
        stopped=sum(bool(ids) and ids[-1] in generator.stop_ids for ids in answers),
        conversations=_token_ids(generator),
    )
    if activations:
        model["activations"] = activations
    return model


def _load(job: Job) -> Any:
    """The `Generator` of a job's model, or mlx-lm's in its place."""
    from finetune.export import mlx
    from finetune.model.load_generator import LoadOptions, load_generator

    if job.reader == "mlx-lm":
        return mlx.load_mlx(job.folder)
    with contextlib.ExitStack() as stack:
        folder = job.folder
        if job.reader == "dequantised":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=".dequantised-")))
            mlx.write_dequantised(job.folder, folder)
        options = LoadOptions(dtype=job.dtype, as_is=True)
        return load_generator(str(folder), options, base_model=job.base, trust_remote_code=job.trust_remote_code)


def _token_ids(generator: Any) -> list[list[int]]:
    """Sample conversations, rendered and tokenized by the folder's chat template and tokenizer, or as plain text."""
    tokenizer = generator.chat.tokenizer
    ids = []
    for line in sample_rows().read_text(encoding="utf-8").splitlines()[:CONVERSATIONS]:
        messages = json.loads(line)["messages"]
        try:
            text, plain = generator.chat.render(messages), False
        except (LabelError, TemplateError):  # it has no template, or one that needs more than these messages have
            text, plain = "\n".join(message["content"] for message in messages), True
        ids.append(list(tokenizer(text, add_special_tokens=plain)["input_ids"]))
    return ids


def _watch_activations(model: Any) -> Activations:
    """Records each module's outputs from now on: the largest value, and the first module that overflows float16."""
    import torch

    seen: Activations = {"largest": 0.0, "in": None, "overflow": None}

    def hook_for(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if not isinstance(out, torch.Tensor) or not out.is_floating_point() or not out.numel():
                return
            largest = float(out.abs().max())
            if not math.isfinite(largest):
                # Masked attention scores are minus infinity by design, and no module returns them.
                seen["overflow"] = seen["overflow"] or name
            elif largest > seen["largest"]:
                seen.update({"largest": largest, "in": name})

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(hook_for(name))
    return seen


# ---------------------------------------------------------------------------------------------------------------
# Comparison and limits


def add_comparison(model: ModelFigures, reference: ModelFigures, trained: ModelFigures) -> None:
    """Adds the figures that compare a model with another one.

    Args:
        model: The model's figures, which are changed.
        reference: The figures of the model that it is compared with.
        trained: The figures of the model that was trained, for the token ids.
    """
    if "error" in model:
        return
    if "error" not in trained:
        model["conversations_equal"] = _equal(model["conversations"], trained["conversations"])
    if "error" not in reference:
        model["perplexity_ratio"] = model["perplexity"] / reference["perplexity"]
        model["answers_equal"] = _equal(model["answers"], reference["answers"])


def _equal(ids: list[list[int]], other_ids: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(ids, other_ids, strict=True))


def missed_limits(model: ModelFigures, gate: dict[str, float], must_match: bool = False) -> list[str]:
    """A line for each limit that a model misses.

    Args:
        model: Its figures.
        gate: Limits by the names of `LIMITS`.
        must_match: Its predictions must also equal those of its reference, up to rounding.
    """
    name = model["name"]
    if "error" in model:
        return [f"{name}: cannot be used: {model['error']}"]
    lines = []
    activations = model.get("activations")
    kl = model.get("kl") or 0.0
    if activations and activations["overflow"]:
        lines.append(f"{name}: activations overflow float16, first in {activations['overflow']}; export bf16")
    elif not math.isfinite(model["loss"]) or not math.isfinite(kl):
        lines.append(f"{name}: its predictions are not finite")
    count = len(model["conversations"])
    if different := count - model.get("conversations_equal", count):
        lines.append(
            f"{name}: {different} of {count} conversations give other token ids than in training; "
            "its tokenizer or chat template was changed"
        )
    if must_match and kl > _MAX_MERGE_KL:
        lines.append(
            f"{name}: does not predict as its adapter does: mean KL is {kl:.3g}, above "
            f"{_MAX_MERGE_KL}; rounding alone gives less than a tenth of that"
        )
    for limit, value in gate.items():
        key, words = LIMITS[limit]
        figure = model.get(key)
        if figure is None:
            lines.append(f"{name}: {words} could not be measured, and {limit} is {value:g}")
        elif not (figure <= value if limit.startswith("max") else figure >= value):
            lines.append(f"{name}: {words} is {figure:.4g}, and {limit} is {value:g}")
    return lines
