"""What became of every row: read, kept, mended, cut, split, dropped, bad; and which tokens are trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.system.pages import cell

# A set of rows that loses more than this share of its trained tokens to `max_length` says so.
MUCH_LOST = 0.1
Table = list[tuple[Any, ...]]


@dataclass
class Ledger:
    """The account of one set of rows (training or evaluation).

    `read` rows become `kept` ones or stand under `bad` or `dropped` with the reason; a row that is split gives several,
    and a row may be `repeated` by its source's weight. `lost_tokens` would have been trained on had they fitted.
    `first` names the first row for each reason under `dropped` and `bad`.
    """

    read: int = 0
    kept: int = 0
    repeated: int = 0
    cut: int = 0
    split: int = 0
    mended: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    turns: int = 0
    ends: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lost_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    languages: dict[str, Counter[str]] = field(default_factory=dict)

    def keep(
        self,
        source: str,
        length: int,
        trained_tokens: int,
        turns: int = 0,
        ends: int = 0,
        characters: int = 0,
        language: str = "other",
    ) -> None:
        """Counts one row that will be trained on; `ends` of its `turns` have their end-of-turn token trained."""
        self.kept += 1
        self.lengths[length] += 1
        self.tokens += length
        self.trained_tokens += trained_tokens
        self.turns += turns
        self.ends += ends
        account = {"rows": 1, "tokens": length, "trained_tokens": trained_tokens}
        self.sources.setdefault(source, Counter()).update(account)
        account = {"rows": 1, "tokens": length, "characters": characters}
        self.languages.setdefault(language, Counter()).update(account)

    def keep_row(self, source: str, pieces: Sequence[Sequence[Any]], cut: bool, lost: int) -> None:
        """Counts a row with all its pieces, for each the arguments of `keep` behind the source."""
        self.split += len(pieces) > 1
        self.cut += cut
        self.lost_tokens += lost
        for weights in pieces:
            self.keep(source, *weights)

    def percentile(self, share: float) -> int:
        """The row length in tokens that `share` (0 to 1) of the kept rows do not exceed; 0 without rows."""
        rank = max(1, math.ceil(share * self.kept))
        for length in sorted(self.lengths):
            rank -= self.lengths[length]
            if rank <= 0:
                return length
        return 0

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """The kept rows by length: `(from, to, rows)` with both ends within, in at most `bins` bins of one width."""
        longest = self.percentile(1.0)
        width = max(1, math.ceil(longest / bins))
        return [
            (
                low,
                low + width - 1,
                sum(n for length, n in self.lengths.items() if low <= length < low + width),
            )
            for low in range(1, longest + 1, width)
        ]

    def as_dict(self) -> dict[str, Any]:
        """The account as `ledger.json` holds it."""
        rows = {
            "read": self.read,
            "kept": self.kept,
            "repeated": self.repeated,
            "cut": self.cut,
            "split": self.split,
        }
        languages = {
            name: {
                **account,
                "tokens_per_character": round(account["tokens"] / max(1, account["characters"]), 4),
            }
            for name, account in sorted(self.languages.items())
        }
        return {
            "rows": rows,
            "mended": dict(self.mended),
            "dropped": dict(self.dropped),
            "bad": dict(self.bad),
            "first": dict(self.first),
            "turns_trained": self.turns,
            "end_of_turns_trained": self.ends,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": round(self.trained_tokens / self.tokens, 4) if self.tokens else 0,
            "lost_trained_tokens": self.lost_tokens,
            "length": {f"p{round(p * 100)}": self.percentile(p) for p in (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)},
            "histogram": [{"from": low, "to": high, "rows": rows} for low, high, rows in self.histogram()],
            "sources": {name: dict(account) for name, account in self.sources.items()},
            "languages": languages,
        }

    def summary(self) -> str:
        """The account in one line."""
        what = [f"{n:,} {why}" for why, n in self.mended.items()]
        what += [f"{self.repeated:,} repeated"] if self.repeated else []
        what += [f"{self.cut:,} cut at a turn's end"] if self.cut else []
        what += [f"{self.split:,} split"] if self.split else []
        what += [f"{n:,} {why}" for why, n in (*self.dropped.items(), *self.bad.items())]
        share = self.trained_tokens / self.tokens if self.tokens else 0
        lost = self.lost_tokens / max(1, self.lost_tokens + self.trained_tokens)
        if lost > MUCH_LOST:
            what.append(
                f"{lost:.0%} of the tokens to train on are lost to training.max_length "
                "(raise it, or see data.on_overflow)"
            )
        return (
            f"{self.kept:,} of {self.read:,} rows, {self.tokens:,} tokens, {self.trained_tokens:,} trained on "
            f"({share:.0%}), longest {self.percentile(1.0):,}" + "".join(f"; {part}" for part in what)
        )


# ---------------------------------------------------------------------------------------------------------------
# An account of `ledger.json`, for a person


def facts(account: dict[str, Any]) -> Table:
    """An account's counts, each with what it counts; what did not happen is left out."""
    rows, turns, ends = account["rows"], account["turns_trained"], account["end_of_turns_trained"]
    trained, lost = account["trained_tokens"], account["lost_trained_tokens"]
    counts = [(rows[what], f"rows {what}") for what in ("read", "kept", "repeated", "cut", "split")]
    counts += [
        (account["tokens"], "tokens"),
        (trained, f"tokens trained on ({trained / max(1, account['tokens']):.0%})"),
        (lost, f"tokens to train on are lost to training.max_length ({lost / max(1, lost + trained):.0%})"),
        (turns, f"turns trained on, {'all' if ends == turns else f'{ends:,}'} with their end-of-turn token"),
    ]
    return [(count, what) for count, what in counts if count]


def reasons(account: dict[str, Any]) -> Table:
    """How many rows were mended, dropped or bad, why, and which was the first."""
    fates, first = ("mended", "dropped", "bad"), account["first"]
    told = {
        why: f"{why} (first: {first[why]})" if why in first else why
        for fate in fates
        for why in account[fate]
    }
    return [(count, f"{fate}: {told[why]}") for fate in fates for why, count in account[fate].items()]


def tables(account: dict[str, Any]) -> list[Table]:
    """Sources, languages and lengths, each with a header."""

    def by(what: str, *columns: str) -> Table:
        header = tuple(column.replace("_", " ") for column in (*columns, what))
        return [header, *((*map(counts.get, columns), name) for name, counts in account[what].items())]

    lengths = [(n, f"at most, in {p[1:]}% of the rows") for p, n in account["length"].items()]
    return [
        by("sources", "rows", "tokens", "trained_tokens"),
        by("languages", "rows", "tokens", "tokens_per_character"),
        [("tokens", "in a row"), *lengths],
    ]


def histogram(account: dict[str, Any]) -> Table:
    """Rows by their length: the bounds, the rows, and how many these are for one row of the largest bin."""
    bins = account["histogram"]
    most = max((bin["rows"] for bin in bins), default=1)
    return [(f"{bin['from']:,}-{bin['to']:,}", bin["rows"], bin["rows"] / most) for bin in bins]


def for_page(account: dict[str, Any]) -> dict[str, Any]:
    """All of that as texts, as pages show it."""
    became = [("rows", "what became of them"), *reasons(account)]
    every = [became, *tables(account)] if len(became) > 1 else tables(account)
    return {
        "facts": [(cell(count), what) for count, what in facts(account)],
        "tables": [[tuple(map(cell, row)) for row in table] for table in every],
        "histogram": [(what, cell(n), f"{100 * share:.1f}") for what, n, share in histogram(account)],
    }
