"""What became of every row: read, kept, cut, split, dropped, bad, and how many tokens are trained on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Ledger:
    """The account of one set of rows (training or evaluation), filled while the rows are prepared.

    `read` rows become `kept` ones or stand under `bad` or `dropped` with the reason; a row that `split` gives several.
    """

    read: int = 0
    kept: int = 0
    cut: int = 0
    split: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)

    def keep(self, source: str, length: int, trained_tokens: int, turns: int) -> None:
        """Counts one row that will be trained on."""
        self.kept += 1
        self.sources[source] += 1
        self.lengths[length] += 1
        self.tokens += length
        self.trained_tokens += trained_tokens
        self.turns += turns

    def percentile(self, share: float) -> int:
        """The row length in tokens that `share` (0 to 1) of the kept rows do not exceed; 0 without rows."""
        rank = max(1, math.ceil(share * self.kept))
        for length in sorted(self.lengths):
            rank -= self.lengths[length]
            if rank <= 0:
                return length
        return 0

    def as_dict(self) -> dict[str, Any]:
        """The account as `ledger.json` holds it."""
        return {
            "rows": {"read": self.read, "kept": self.kept, "cut": self.cut, "split": self.split},
            "dropped": dict(self.dropped),
            "bad": dict(self.bad),
            "turns_trained": self.turns,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "length": {f"p{round(p * 100)}": self.percentile(p) for p in (0.5, 0.9, 1.0)},
            "rows_by_source": dict(self.sources),
        }

    def summary(self) -> str:
        """The account in one line."""
        lost = [f"{n:,} {why}" for why, n in (*self.dropped.items(), *self.bad.items())]
        cut = [f"{self.cut:,} cut at a turn's end"] if self.cut else []
        cut += [f"{self.split:,} split"] if self.split else []
        share = self.trained_tokens / self.tokens if self.tokens else 0
        return (
            f"{self.kept:,} of {self.read:,} rows, {self.tokens:,} tokens, {self.trained_tokens:,} trained on "
            f"({share:.0%}), longest {self.percentile(1.0):,}"
            + "".join(f"; {part}" for part in (*cut, *lost))
        )
