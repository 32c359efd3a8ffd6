"""Perplexity on rows, and the distance of one model's predictions from another's on the same tokens."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.data.chat import IGNORE
from finetune.data.samples import LabelledRow

# What the kept predictions of a reference may take on the disk; of a vocabulary of 262,144 it is 2,048 tokens.
_KEPT_BYTES = 2**31


@dataclass(frozen=True)
class LossSum:
    """Some predicted tokens: how many, their loss in nats together, how many were the likeliest one."""

    tokens: int = 0
    nats: float = 0.0
    correct: int = 0

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.tokens + other.tokens, self.nats + other.nats, self.correct + other.correct)

    @property
    def perplexity(self) -> float:
        """e to the mean loss; not a number of no tokens."""
        return _exp(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def accuracy(self) -> float:
        """The share of tokens that were the likeliest one."""
        return self.correct / self.tokens if self.tokens else math.nan


def row_losses(model: Any, rows: Sequence[LabelledRow]) -> Iterator[LossSum]:
    """A model's row_losses of each row, in their order."""
    for logs, targets in _predictions(model, rows):
        nats = -logs.gather(1, targets.unsqueeze(1)).double().sum()
        yield LossSum(len(targets), float(nats), int((logs.argmax(-1) == targets).sum()))


@dataclass(frozen=True)
class Score:
    """A model on some rows; the distances are from the reference's predictions of the first `compared` tokens."""

    tokens: int
    loss: float
    """Mean over all predicted tokens, in nats; not a number where any prediction is not finite."""
    compared: int = 0
    kl: float | None = None
    """Mean of KL(reference || this), in nats a token."""
    kl_p99: float | None = None
    top1: float | None = None
    """The share of tokens on which both predict the same."""

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return _exp(self.loss)


def score(
    model: Any, rows: Sequence[LabelledRow], reference: Path | None = None, keep: Path | None = None
) -> Score:
    """A model's loss on rows, one row at a time, and its distance from a reference.

    Args:
        model: A causal language model, on its device.
        rows: Each must have a token to predict.
        reference: Predictions that a model kept before, on the same rows.
        keep: Where to keep this model's predictions: float32 log-probabilities (N, V), and their shape beside them.

    Source: KL divergence as in llama.cpp's `perplexity --kl-divergence`: of each token's whole distribution.
    """
    theirs = _open(reference) if reference else None
    room, kept = 0, None
    total, count = 0.0, 0
    divergences: list[torch.Tensor] = []
    agreed = 0
    for logs, targets in _predictions(model, rows):
        total -= float(logs.gather(1, targets.unsqueeze(1)).double().sum())
        if keep and kept is None:
            wanted = sum(sum(label != IGNORE for label in r.labels[1:]) for r in rows)
            room = max(1, min(wanted, _KEPT_BYTES // (4 * logs.shape[1])))
            kept = np.memmap(keep, np.float32, "w+", shape=(room, logs.shape[1]))
            keep.with_suffix(".json").write_text(json.dumps([room, logs.shape[1]]), encoding="utf-8")
        if kept is not None and count < room:
            part = logs[: room - count]
            kept[count : count + len(part)] = part.numpy()
        if theirs is not None and count < len(theirs):
            if theirs.shape[1] != logs.shape[1]:
                raise ValueError(
                    f"vocabularies of {theirs.shape[1]:,} and {logs.shape[1]:,} cannot be compared"
                )
            before = torch.from_numpy(theirs[count : count + len(logs)])
            ours = logs[: len(before)]
            likely = before.exp()
            # What the reference holds for impossible adds nothing.
            terms = (likely * (before - ours)).masked_fill_(likely == 0, 0.0)
            divergences.append(terms.sum(dim=-1, dtype=torch.float64))
            agreed += int((before.argmax(-1) == ours.argmax(-1)).sum())
        count += len(targets)
    if not divergences:
        return Score(count, total / count)
    every = torch.cat(divergences).clamp(min=0)  # rounding alone can make it negative
    finite = bool(every.isfinite().all())
    return Score(
        count,
        total / count,
        compared=len(every),
        kl=float(every.mean()) if finite else math.nan,
        kl_p99=float(every.quantile(0.99)) if finite else math.nan,
        top1=agreed / len(every) if finite else math.nan,
    )


def score_groups(
    model: Any,
    groups: Mapping[str, Sequence[LabelledRow]],
    reference: Path | None = None,
    keep: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """A model's score on each of several lists of rows, as plain data; predictions lie beside the given files.

    Args:
        model: As `score` takes it.
        groups: Rows, by name.
        reference: The file of another model's predictions on other rows; compared is where it kept these, too.
        keep: The file of this model's.
    """
    found = {}
    for name, rows in groups.items():
        theirs, ours = (
            path and path.with_name(f"{path.stem}-{name}{path.suffix}") for path in (reference, keep)
        )
        known = theirs if theirs and theirs.exists() else None
        result = score(model, rows, known, ours)
        found[name] = {"perplexity": result.perplexity, **asdict(result)}
    return found


def _predictions(model: Any, rows: Sequence[LabelledRow]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each row, log-probabilities (N, V) at its predicted tokens, float32 in memory, and these tokens (N)."""
    only_some = "logits_to_keep" in inspect.signature(_forward_of(model)).parameters
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        places = [i - 1 for i, label in enumerate(row.labels) if label != IGNORE and i > 0]
        index = torch.tensor(places, device=model.device)
        with torch.inference_mode():
            options = {"logits_to_keep": index} if only_some else {}
            logits = model(input_ids=ids, use_cache=False, **options).logits[0]
            logits = (logits if only_some else logits[index]).float()
            logs = torch.log_softmax(logits, dim=-1).cpu()
        yield logs, torch.tensor([row.labels[i + 1] for i in places])


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _forward_of(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).forward


def _open(reference: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    shape = tuple(json.loads(reference.with_suffix(".json").read_text(encoding="utf-8")))
    return np.memmap(reference, np.float32, "c", shape=shape)
