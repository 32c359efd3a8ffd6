"""Perplexity on rows, and the KL divergence of one model's predictions from another's on the same tokens."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.data.encoded import IGNORE
from finetune.data.samples import LabelledRow
from finetune.model.predictions import log_probs_at, token_kl

# The most bytes of predictions in a file: 2,048 tokens with a vocabulary of 262,144.
_KEPT_BYTES = 2**31


@dataclass(frozen=True)
class LossSum:
    """The loss summed over some predicted tokens, in nats, and how many of them the model predicted correctly."""

    tokens: int = 0
    nats: float = 0.0
    correct: int = 0

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.tokens + other.tokens, self.nats + other.nats, self.correct + other.correct)

    @property
    def perplexity(self) -> float:
        """e to the mean loss; NaN without tokens."""
        return _exp(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def accuracy(self) -> float:
        """The share of tokens that were the most likely one; NaN without tokens."""
        return self.correct / self.tokens if self.tokens else math.nan


def row_losses(model: Any, rows: Sequence[LabelledRow]) -> Iterator[LossSum]:
    """The loss of each row, in order."""
    for log_probs, targets in _predictions(model, rows):
        nats = -log_probs.gather(1, targets.unsqueeze(1)).double().sum()
        yield LossSum(len(targets), float(nats), int((log_probs.argmax(-1) == targets).sum()))


@dataclass(frozen=True)
class Score:
    """A model's loss and its distance from a reference; the distance is None without a reference.

    Attributes:
        tokens: The number of predicted tokens.
        loss: Mean cross-entropy, in nats per token; NaN where a prediction is not finite.
        compared: The number of tokens compared with the reference.
        kl: Mean of KL(reference || this), in nats per token; NaN where a prediction is not finite.
        kl_p99: The 99th percentile of the same KL.
        top1: The share of tokens for which both models predict the same most likely token.
    """

    tokens: int
    loss: float
    compared: int = 0
    kl: float | None = None
    kl_p99: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return _exp(self.loss)


def score(model: Any, rows: Sequence[LabelledRow], reference: Path | None = None, keep: Path | None = None) -> Score:
    """A model's loss on rows, computed one row at a time, and its distance from a reference.

    Args:
        model: A causal language model, on its device.
        rows: Each must have a token to predict.
        reference: The file of predictions that `keep` wrote for another model, on the same rows.
        keep: The file to write this model's predictions to: float32 log-probabilities (N, V), with their shape in a
            JSON file next to it. N is as large as fits 2 GiB.

    Raises:
        ValueError: The reference has another vocabulary.
        OSError: The disk has no room for the predictions.

    Source: KL divergence as in llama.cpp's `perplexity --kl-divergence`: of each token's whole distribution.
    """
    reference_NV = _open(reference) if reference else None
    room, kept = 0, None
    total, count = 0.0, 0
    divergences: list[torch.Tensor] = []
    agreed = 0
    for log_probs, targets in _predictions(model, rows):
        total -= float(log_probs.gather(1, targets.unsqueeze(1)).double().sum())
        if keep and kept is None:
            wanted = sum(sum(label != IGNORE for label in r.labels[1:]) for r in rows)
            room = max(1, min(wanted, _KEPT_BYTES // (4 * log_probs.shape[1])))
            kept = _new_file(keep, (room, log_probs.shape[1]))
            keep.with_suffix(".json").write_text(json.dumps([room, log_probs.shape[1]]), encoding="utf-8")
        if kept is not None and count < room:
            part = log_probs[: room - count]
            kept[count : count + len(part)] = part.numpy()
        if reference_NV is not None and count < len(reference_NV):
            if reference_NV.shape[1] != log_probs.shape[1]:
                raise ValueError(
                    f"vocabularies of {reference_NV.shape[1]:,} and {log_probs.shape[1]:,} cannot be compared"
                )
            expected = torch.from_numpy(reference_NV[count : count + len(log_probs)])
            found = log_probs[: len(expected)]
            divergences.append(token_kl(expected, found))
            agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())
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
    model: Any, groups: Mapping[str, Sequence[LabelledRow]], reference: Path | None = None, keep: Path | None = None
) -> dict[str, dict[str, Any]]:
    """The fields of a model's `Score`, and its perplexity, on each of several groups of rows.

    Args:
        model: As for `score`.
        groups: Rows, by name.
        reference: The file of another model's predictions. Those on a group are in a file next to it with the group's
            name, if the group was measured.
        keep: The file of this model's predictions; those on a group are written next to it, too.
    """
    scores = {}
    for name, rows in groups.items():
        before, after = (path and path.with_name(f"{path.stem}-{name}{path.suffix}") for path in (reference, keep))
        existing = before if before and before.exists() else None
        result = score(model, rows, existing, after)
        scores[name] = {"perplexity": result.perplexity, **asdict(result)}
    return scores


def _predictions(model: Any, rows: Sequence[LabelledRow]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each row: log-probabilities (N, V) of its N predicted tokens, float32 on the CPU, and these tokens (N)."""
    for row in rows:
        places = [i - 1 for i, label in enumerate(row.labels) if label != IGNORE and i > 0]
        yield log_probs_at(model, row.input_ids, places), torch.tensor([row.labels[i + 1] for i in places])


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _new_file(keep: Path, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A new file for predictions, mapped to memory. It gets its room at once: a disk that fills up would kill us."""
    with keep.open("wb") as file:
        file.truncate(4 * math.prod(shape))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
    return np.memmap(keep, np.float32, "r+", shape=shape)


def _open(reference: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    shape = tuple(json.loads(reference.with_suffix(".json").read_text(encoding="utf-8")))
    return np.memmap(reference, np.float32, "c", shape=shape)
