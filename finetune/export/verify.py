"""What became of a model: each one is loaded in a process of its own and compared with the one before it.

Compared is what a user meets: predictions on rows that were held out, greedy answers, whether they end, and the token
ids of conversations. A fresh process also shows that the folder holds all that it needs, and no two models share the
memory.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.data.samples import LabelledRow, sample_rows
from finetune.evaluate.perplexity import score, score_groups
from finetune.system import fresh_process
from finetune.system.errors import FinetuneError, first_line

# An answer that has not ended by then is taken for one that does not end.
_ANSWER_TOKENS = 64
_PROMPTS = 10
_CONVERSATIONS = 10
# Nats a token. Above it, a model that was merged without rounding its base does not answer as its adapter does: the
# rounding of bfloat16 alone gives less than a tenth of this.
_MAX_MERGE_KL = 0.02

LIMITS = {
    "max_kl": ("kl", "mean KL"),
    "max_kl_p99": ("kl_p99", "99th percentile KL"),
    "min_top1": ("top1", "top-1 agreement"),
    "max_perplexity_ratio": ("perplexity_ratio", "perplexity ratio"),
}


@dataclass(frozen=True)
class Job:
    """One model to measure.

    `reference` and `keep` are files of predictions; `against` is the report's name for the model that made `reference`.
    """

    name: str
    folder: Path
    dtype: str
    against: str | None = None
    reference: Path | None = None
    keep: Path | None = None


@dataclass(frozen=True)
class _Task:
    """What the fresh process gets."""

    job: Job
    rows: list[LabelledRow]
    groups: dict[str, list[LabelledRow]]


def measure(
    job: Job, rows: list[LabelledRow], groups: dict[str, list[LabelledRow]] | None = None
) -> dict[str, Any]:
    """Loads a model in a fresh process and measures it; `error` in the result where it cannot be loaded or run.

    Args:
        job: The model.
        rows: The rows that it predicts; it also answers the prompts of the first ten.
        groups: More rows, by name; the result's `groups` holds the figures of each.
    """
    size = sum(path.stat().st_size for path in job.folder.glob("*.safetensors"))
    found: dict[str, Any] = {"name": job.name, "against": job.against, "dtype": job.dtype, "bytes": size}
    try:
        return found | fresh_process.call(_load_and_measure, _Task(job, rows, groups or {}))
    except fresh_process.ProcessFailed as error:
        return found | {"error": str(error)}
    except (FinetuneError, OSError) as error:
        return found | {"error": f"{type(error).__name__}: {first_line(error)}"}


def _load_and_measure(task: _Task) -> dict[str, Any]:
    """Loads a model in this process; returns its figures."""
    from finetune.model import generate

    job = task.job
    started = time.monotonic()
    generator = generate.load_generator(str(job.folder), dtype=job.dtype, as_is=True)
    seconds = time.monotonic() - started
    activations = _watch_activations(generator.model) if job.dtype == "float16" else {}
    result = score(generator.model, task.rows, job.reference, job.keep)
    by_group = score_groups(generator.model, task.groups, job.reference, job.keep)
    answers = generator.answers([row.prompt for row in task.rows[:_PROMPTS]], _ANSWER_TOKENS)
    found = {"load_seconds": round(seconds, 2), "perplexity": result.perplexity} | asdict(result)
    found |= {
        "groups": by_group,
        "answers": answers,
        "stopped": sum(bool(ids) and ids[-1] in generator.stop_ids for ids in answers),
        "conversations": _token_ids(generator),
    }
    return found | ({"activations": activations} if activations else {})


def _token_ids(generator: Any) -> list[list[int]]:
    """Ten of the project's own conversations as this folder's tokenizer and template turn them into ids."""
    lines = sample_rows().read_text(encoding="utf-8").splitlines()[:_CONVERSATIONS]
    found = []
    for line in lines:
        messages = json.loads(line)["messages"]
        if generator.chat.tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages)
            found.append(list(generator.chat.tokenizer(text)["input_ids"]))
        else:
            text = generator.chat.render(messages)
            found.append(list(generator.chat.tokenizer(text, add_special_tokens=False)["input_ids"]))
    return found


def _watch_activations(model: Any) -> dict[str, Any]:
    """Watches what every module gives, for values that float16 cannot hold."""
    import torch

    seen: dict[str, Any] = {"largest": 0.0, "in": None, "overflow": None}

    def look(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if not isinstance(out, torch.Tensor) or not out.is_floating_point() or not out.numel():
                return
            largest = float(out.abs().max())
            if not math.isfinite(largest):
                # Masked scores are minus infinity by design; a value that overflows is in what a layer passes on.
                seen["overflow"] = seen["overflow"] or name
            elif largest > seen["largest"]:
                seen.update({"largest": largest, "in": name})

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(look(name))
    return seen


# ---------------------------------------------------------------------------------------------------------------
# The report


def add_comparison(found: dict[str, Any], reference: dict[str, Any], tokens: dict[str, Any]) -> None:
    """Puts into `found` what only shows beside another model.

    Args:
        found: A model's measurements.
        reference: Those of the model that it is compared with.
        tokens: Those of the model whose token ids are training's.
    """
    if "error" in found:
        return
    if "error" not in tokens:
        found["conversations_equal"] = _equal(found["conversations"], tokens["conversations"])
    if "error" not in reference:
        found["perplexity_ratio"] = found["perplexity"] / reference["perplexity"]
        found["answers_equal"] = _equal(found["answers"], reference["answers"])


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def missed_limits(found: dict[str, Any], gate: dict[str, float], same: bool = False) -> list[str]:
    """What a model falls short of, a line each.

    Args:
        found: Its measurements.
        gate: Limits by the names of `LIMITS`.
        same: Whether it must predict what its reference predicts, up to rounding.
    """
    name = found["name"]
    if "error" in found:
        return [f"{name}: cannot be used: {found['error']}"]
    lines = []
    if overflow := found.get("activations", {}).get("overflow"):
        lines.append(f"{name}: activations overflow float16, first in {overflow}; export bf16")
    elif not math.isfinite(found["loss"]) or not math.isfinite(found.get("kl") or 0.0):
        lines.append(f"{name}: its predictions are not finite")
    if found.get("conversations_equal", _CONVERSATIONS) < len(found["conversations"]):
        other = len(found["conversations"]) - found["conversations_equal"]
        lines.append(
            f"{name}: {other} of {len(found['conversations'])} conversations give other token ids than in training; "
            "its tokenizer or chat template was changed"
        )
    if same and (found.get("kl") or 0.0) > _MAX_MERGE_KL:
        lines.append(
            f"{name}: does not predict as its adapter does: mean KL is {found['kl']:.3g}, and rounding alone gives "
            f"less than {_MAX_MERGE_KL}"
        )
    for limit, value in gate.items():
        key, word = LIMITS[limit]
        got = found.get(key)
        if got is None:
            lines.append(f"{name}: {word} could not be measured, and {limit} is {value:g}")
        elif not (got <= value if limit.startswith("max") else got >= value):
            lines.append(f"{name}: {word} is {got:.4g}, and {limit} is {value:g}")
    return lines
