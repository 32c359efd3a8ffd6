"""The request for the plan of a merge; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The folder inside the output for adapters that are not stored as PEFT loads them; it is removed at the end.
CONVERTED = ".adapters"


@dataclass(frozen=True)
class MergeRequest:
    """A merge or export to plan.

    Attributes:
        model: A whole model; or a run, if there are adapters.
        adapters: The adapters' folders and weights.
        into: The folder that the config, the tokenizer and other small files are written to.
        dtype: The name of the type to write; None keeps the one that the run trained in.
        quantization: The export's arguments of `transformers.BitsAndBytesConfig`; None takes the run's, for its base.
        stream: True leaves the weights of a base on the Hub there.
        base: The path or id of the base, in place of the one that the run's files name.
        dequantised: True merges into the rounded weights of a base that is stored quantised.
        trust_remote_code: True if the user lets Python files of the model's repository run.
    """

    model: str
    adapters: tuple[tuple[str, float], ...]
    into: str
    dtype: str | None = None
    quantization: dict[str, Any] | None = None
    stream: bool = False
    base: str | None = None
    dequantised: bool = False
    trust_remote_code: bool = False


def adapters_of(run: Path, others: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """The adapters of a merge: the run's own with weight 1, unless `others` names it, and `others`."""
    if any(Path(path).resolve() == run.resolve() for path, _ in others):
        return tuple(others)
    return ((str(run), 1.0), *others)
