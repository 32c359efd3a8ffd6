"""A tokenised row with its labels: what a `Chat` makes and the trainer takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]

IGNORE = -100  # the label that torch's cross entropy ignores


def first_label(labels: Sequence[int]) -> int:
    """The number of tokens before the first one that has a label; all of them if none has."""
    return next((i for i, label in enumerate(labels) if label != IGNORE), len(labels))


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn that is trained on: `input_ids[start:end]` is its text and its end-of-turn token.

    `message` is the index of its message.
    """

    start: int
    end: int
    message: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row of T tokens for the trainer.

    `labels[i]` is `input_ids[i]` where that token is trained on, else -100; both have the shape (T,).
    """

    input_ids: Ids
    labels: Ids
    turns: tuple[Turn, ...] = ()
    characters: int = 0  # the length of the text that became these tokens
    cut: bool = False  # the end of the row, or an exchange of it, was left out
    thinking: tuple[tuple[int, int], ...] = ()  # `input_ids[start:end]` are the tokens of a thinking text
    rejected: Encoded | None = None  # of a pair, whose chosen side is this row
    desirable: bool | None = None  # for `method: kto`

    @property
    def sides(self) -> tuple[Encoded, ...]:
        """The row; of a pair its chosen side and its rejected side."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first one that has a label."""
        return int(np.argmax(self.labels != IGNORE))

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that have a label."""
        return int(np.count_nonzero(self.labels != IGNORE))

    @property
    def thinking_tokens(self) -> tuple[int, int]:
        """The number of tokens of thinking, and the number of those that have a label."""
        labels = [self.labels[start:end] for start, end in self.thinking]
        return sum(map(len, labels)), sum(int(np.count_nonzero(part != IGNORE)) for part in labels)
