"""Compares what a program makes of an artefact with what our own transformers makes of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clients.cases import LOSSY, REFUSES, SAME, WRONG

# Sums in another order change a log-probability by 1e-5, llama.cpp's table for GELU by 0.002; a setting that is left
# out changes some by more than 0.1.
_LARGEST = 0.01


@dataclass(frozen=True)
class Comparison:
    """The difference between two readings of an artefact.

    Attributes:
        equal: By `ids` and `prompt`: True if all are equal. Parts that the program has no form of are left out.
        largest: The largest difference of a token's log-probability; None if there are none to compare.
        kl: The mean KL from the reference, nats per token.
        greedy: How many of the greedy tokens are equal up to the first that differs, and of how many.
        error: The first error.
    """

    equal: dict[str, bool]
    largest: float | None
    kl: float | None
    greedy: tuple[int, int] | None
    error: str

    def verdict(self, max_kl: float) -> str:
        """One of `cases.VERDICTS`; `max_kl` above 0 allows for rounded weights."""
        if self.error:
            return REFUSES
        if not all(self.equal.values()):
            return WRONG
        if max_kl:
            return LOSSY if self.kl is not None and self.kl < max_kl else WRONG
        exact = self.largest is not None and self.largest < _LARGEST and self.greedy and len(set(self.greedy)) == 1
        return SAME if exact else WRONG


def compare(reference: dict[str, Any], reference_logits: Path, found: dict[str, Any], logits: Path) -> Comparison:
    """Compares a probe's answer, and its logits, with what `probe_transformers.py` answers in our own environment."""
    assert not reference["errors"], reference["errors"]
    error = next(iter(found["errors"].values()), "")
    equal = {part: found[part] == reference[part] for part in ("ids", "prompt") if part in found}
    largest = kl = greedy = None
    if found.get("logits"):
        with np.load(reference_logits) as wanted, np.load(logits) as got:
            pairs = [tuple(_log_probabilities(wanted[name], got[name])) for name in wanted.files]
        largest = max(float(np.abs(one - other).max()) for one, other in pairs)
        kl = float(np.concatenate([(np.exp(one) * (one - other)).sum(-1) for one, other in pairs]).mean())
    if "greedy" in found:
        same = [one == other for one, other in zip(reference["greedy"], found["greedy"], strict=False)]
        greedy = ([*same, False].index(False), len(reference["greedy"]))
    return Comparison(equal, largest, kl, greedy, error)


def _log_probabilities(wanted: np.ndarray, got: np.ndarray) -> Iterator[np.ndarray]:
    """Yields logits (tokens, vocabulary) as log-probabilities, for the tokens and entries that both arrays have.

    A server tells the last token's alone; a program may fill the vocabulary up, or cut it to the tokenizer's.
    """
    width = min(wanted.shape[1], got.shape[1])
    for logits in (wanted[-len(got) :, :width], got[:, :width]):
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        yield shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
