"""Counts rows (read, kept, mended, cut, split, dropped, bad) and the tokens that are trained on, for `ledger.json`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

from finetune.system.pages import cell

# If `max_length` costs more than this share of the trained tokens, the summary says so.
MUCH_LOST = 0.1
# The change that kto makes to a pair, counted as mended.
PAIRS_AS_RATED = "pairs read as two rated answers"
_ROW_COUNTS = ("read", "kept", "repeated", "cut", "split")
Table = list[tuple[Any, ...]]
Bin = TypedDict("Bin", {"from": int, "to": int, "rows": int})


class Account(TypedDict):
    """One set of rows in `ledger.json`; `first` names the first row for each reason under `dropped` and `bad`."""

    rows: dict[str, int]
    mended: dict[str, int]
    dropped: dict[str, int]
    bad: dict[str, int]
    unread: dict[str, int]
    first: dict[str, str]
    turns_trained: int
    end_of_turns_trained: int
    tokens: int
    trained_tokens: int
    trained_share: float
    lost_trained_tokens: int
    thinking_tokens: int
    trained_thinking_tokens: int
    length: dict[str, int]
    histogram: list[Bin]
    sources: dict[str, dict[str, int]]
    languages: dict[str, dict[str, float]]
    answers: dict[str, dict[str, int]]


class PieceCounts(NamedTuple):
    """The counts of one row for the trainer, which is a row that was read or a piece of one.

    Attributes:
        length: The number of its tokens; of a pair that of its longer side.
        trained_tokens: The number of tokens that have a label.
        turns: The number of assistant turns that are trained on.
        ends: The number of those turns whose end-of-turn token has a label.
        characters: The length of its text.
        thinking: The number of tokens of the thinking in the turns that are trained on.
        trained_thinking: The number of those that have a label.
        shorter_side: The number of tokens of a pair's shorter side.
        chosen: The number of tokens of a chosen or desirable answer; 0 without one.
        rejected: The number of tokens of a rejected or undesirable answer; 0 without one.
        language: Its language; of answers that of their prompt.
    """

    length: int
    trained_tokens: int
    turns: int = 0
    ends: int = 0
    characters: int = 0
    thinking: int = 0
    trained_thinking: int = 0
    shorter_side: int = 0
    chosen: int = 0
    rejected: int = 0
    language: str = "other"


# The counts that are numbers.
NUMBERS_OF_PIECE = PieceCounts._fields[:-1]


@dataclass
class Ledger:
    """The counts of one set of rows (training or evaluation).

    Each row that is `read` is `kept`, `dropped` or `bad`, the latter two with a reason. A split row is kept as several
    rows, and a row may be `repeated` by its source's weight. `lost_tokens` counts the tokens that would have been
    trained on if their rows fitted. `unread` counts the rows with a key that nothing reads. `first` names the
    first row for each reason under `dropped` and `bad`. `answers` counts by language the chosen (or desirable) and the
    rejected (or undesirable) answers and their tokens, and of the pairs those whose chosen answer is longer.
    """

    read: int = 0
    kept: int = 0
    repeated: int = 0
    cut: int = 0
    split: int = 0
    mended: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    turns: int = 0
    ends: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lost_tokens: int = 0
    thinking_tokens: int = 0
    trained_thinking_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    answers: dict[str, Counter[str]] = field(default_factory=dict)

    def keep(self, source: str, counts: PieceCounts) -> None:
        """Counts one row for the trainer; `source` is the path of its source."""
        self.kept += 1
        self.lengths[counts.length] += 1
        tokens = counts.length + counts.shorter_side
        self.tokens += tokens
        self.trained_tokens += counts.trained_tokens
        self.turns += counts.turns
        self.ends += counts.ends
        self.thinking_tokens += counts.thinking
        self.trained_thinking_tokens += counts.trained_thinking
        of_source = {"rows": 1, "tokens": tokens, "trained_tokens": counts.trained_tokens}
        self.sources.setdefault(source, Counter()).update(of_source)
        of_language = {"rows": 1, "tokens": tokens, "characters": counts.characters}
        self.languages.setdefault(counts.language, Counter()).update(of_language)
        chosen, rejected = counts.chosen, counts.rejected
        if chosen or rejected:
            answers: dict[str, int] = {
                "pairs": min(chosen, rejected) > 0,
                "chosen": chosen > 0,
                "rejected": rejected > 0,
            }
            answers |= {"chosen_tokens": chosen, "rejected_tokens": rejected, "chosen_longer": chosen > rejected > 0}
            self.answers.setdefault(counts.language, Counter()).update({name: int(n) for name, n in answers.items()})

    def keep_row(self, source: str, pieces: Sequence[PieceCounts], cut: bool, lost: int, is_pair: bool = False) -> None:
        """Counts a row that was read and all its pieces, which are rows for the trainer.

        Args:
            source: The path of its source.
            pieces: The counts of each piece.
            cut: True if a part of the row was left out.
            lost: The number of tokens to train on in that part.
            is_pair: True for a pair, whose two answers are rows for the trainer.
        """
        self.split += len(pieces) > 1 and not is_pair
        self.cut += cut
        self.lost_tokens += lost
        for counts in pieces:
            self.keep(source, counts)

    def percentile(self, share: float) -> int:
        """The length in tokens that `share` (0 to 1) of the kept rows do not exceed; 0 without rows."""
        rank = max(1, math.ceil(share * self.kept))
        for length in sorted(self.lengths):
            rank -= self.lengths[length]
            if rank <= 0:
                return length
        return 0

    @property
    def answer_totals(self) -> Counter[str]:
        """The counts of `answers` over all languages."""
        return sum(self.answers.values(), Counter[str]())

    def histogram(self, bins: int = 10) -> list[tuple[int, int, int]]:
        """The kept rows by length: `(from, to, rows)`, both ends included, in at most `bins` bins of one width."""
        longest = self.percentile(1.0)
        width = max(1, math.ceil(longest / bins))
        counts = Counter[int]()
        for length, rows in self.lengths.items():
            counts[(length - 1) // width * width + 1] += rows
        return [(low, low + width - 1, counts[low]) for low in range(1, longest + 1, width)]

    def as_dict(self) -> Account:
        """The counts as `ledger.json` holds them."""
        languages = {
            name: {**counts, "tokens_per_character": round(counts["tokens"] / max(1, counts["characters"]), 4)}
            for name, counts in sorted(self.languages.items())
        }
        return {
            "rows": {name: getattr(self, name) for name in _ROW_COUNTS},
            "mended": dict(self.mended),
            "dropped": dict(self.dropped),
            "bad": dict(self.bad),
            "unread": dict(self.unread),
            "first": dict(self.first),
            "turns_trained": self.turns,
            "end_of_turns_trained": self.ends,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": round(self.trained_tokens / self.tokens, 4) if self.tokens else 0,
            "lost_trained_tokens": self.lost_tokens,
            "thinking_tokens": self.thinking_tokens,
            "trained_thinking_tokens": self.trained_thinking_tokens,
            "length": {f"p{round(p * 100)}": self.percentile(p) for p in (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)},
            "histogram": [{"from": low, "to": high, "rows": rows} for low, high, rows in self.histogram()],
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "languages": languages,
            "answers": {name: dict(counts) for name, counts in sorted(self.answers.items())},
        }

    def summary(self) -> str:
        """The counts in one line."""
        parts = [f"{n:,} {reason}" for reason, n in self.mended.items()]
        parts += [f"{self.repeated:,} repeated"] if self.repeated else []
        parts += [f"{self.cut:,} cut at a turn's end"] if self.cut else []
        parts += [f"{self.split:,} split"] if self.split else []
        parts += [f"{n:,} {reason}" for reason, n in (*self.dropped.items(), *self.bad.items())]
        if self.unread:
            names = [f"{key} ({n:,})" for key, n in self.unread.items()]
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            parts.append(f"keys that are not read: {', '.join(names[:8])}{more}")
        share = self.trained_tokens / self.tokens if self.tokens else 0
        total = self.answer_totals
        answers = " answers" if PAIRS_AS_RATED in self.mended else ""
        noun = "pairs" if total["pairs"] else "rows"
        if total["pairs"]:
            chosen, rejected = _mean(total, "chosen"), _mean(total, "rejected")
            longer = f"the chosen one is longer in {total['chosen_longer'] / total['pairs']:.0%}"
            parts.append(f"answers of {chosen} tokens chosen, {rejected} rejected; {longer}")
        elif total:
            good, bad = (f"{total[name]:,} {word}" for name, word in _RATINGS.items())
            parts.append(f"{good} and {bad} answers")
        if self.thinking_tokens:
            untrained = self.thinking_tokens - self.trained_thinking_tokens
            share_of = f", {untrained:,} not trained on" if untrained else ""
            parts.append(f"{self.thinking_tokens:,} tokens of thinking{share_of}")
        lost = self.lost_tokens / max(1, self.lost_tokens + self.trained_tokens)
        if lost > MUCH_LOST:
            parts.append(
                f"{lost:.0%} of the tokens to train on are lost to training.max_length "
                "(raise it, or see data.on_overflow)"
            )
        first = (
            f"{self.kept:,}{answers} of {self.read:,} {noun}, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} trained on ({share:.0%}), longest {self.percentile(1.0):,}"
        )
        return "; ".join([first, *parts])


_RATINGS = {"chosen": "desirable", "rejected": "undesirable"}


def _mean(counts: Mapping[str, int], side: str) -> str:
    """The mean tokens of the chosen or the rejected answers."""
    return f"{counts[f'{side}_tokens'] / max(1, counts[side]):,.1f}"


# ---------------------------------------------------------------------------------------------------------------
# The counts of `ledger.json` as tables


def facts(account: Account) -> Table:
    """The account's totals, as (count, name); those that are 0 are left out."""
    rows, turns, ends = account["rows"], account["turns_trained"], account["end_of_turns_trained"]
    trained, lost = account["trained_tokens"], account["lost_trained_tokens"]
    thinking = account.get("thinking_tokens", 0)
    noun = "pairs" if any(counts.get("pairs") for counts in account.get("answers", {}).values()) else "rows"
    counts = [(rows[name], f"{noun} {name}") for name in _ROW_COUNTS]
    counts += [
        (account["tokens"], "tokens"),
        (trained, f"tokens trained on ({trained / max(1, account['tokens']):.0%})"),
        (lost, f"tokens to train on are lost to training.max_length ({lost / max(1, lost + trained):.0%})"),
        # A run of an earlier version has no such counts.
        (
            thinking,
            f"tokens of thinking ({account.get('trained_thinking_tokens', 0) / max(1, thinking):.0%} trained on)",
        ),
        (turns, f"turns trained on, {'all' if ends == turns else f'{ends:,}'} with their end-of-turn token"),
    ]
    return [(count, name) for count, name in counts if count]


def reasons(account: Account) -> Table:
    """The number of rows that were mended, dropped or bad, by reason, each with the first such row."""
    by_kind = {"mended": account["mended"], "dropped": account["dropped"], "bad": account["bad"]}
    by_kind["not read"] = account.get("unread", {})  # a run of an earlier version has none
    first = {reason: f" (first: {row})" for reason, row in account["first"].items()}
    return [
        (count, f"{kind}: {reason}{first.get(reason, '')}")
        for kind, counts in by_kind.items()
        for reason, count in counts.items()
    ]


def tables(account: Account) -> list[Table]:
    """Sources, languages and lengths as tables; the first row of each is its header."""

    def table(title: str, counts_by_name: Mapping[str, Mapping[str, float]], *columns: str) -> Table:
        header = tuple(column.replace("_", " ") for column in (*columns, title))
        return [header, *((*map(counts.get, columns), name) for name, counts in counts_by_name.items())]

    lengths = [(n, f"at most, in {p[1:]}% of the rows") for p, n in account["length"].items()]
    return [
        table("sources", account["sources"], "rows", "tokens", "trained_tokens"),
        table("languages", account["languages"], "rows", "tokens", "tokens_per_character"),
        *_of_answers(account.get("answers", {})),
        [("tokens", "in a row"), *lengths],
    ]


def _of_answers(by_language: Mapping[str, Mapping[str, int]]) -> list[Table]:
    """The table of chosen and rejected, or desirable and undesirable, answers by language; none without answers."""
    if not by_language:
        return []
    total = sum(map(Counter, by_language.values()), Counter[str]())
    named = {**by_language, **({"all": total} if len(by_language) > 1 else {})}
    if not total["pairs"]:
        columns = (f"{word}{kind}" for word in _RATINGS.values() for kind in ("", ", mean tokens"))
        header = (*columns, "answers")
        rows = [(*(n for side in _RATINGS for n in (c[side], _mean(c, side))), name) for name, c in named.items()]
        return [[header, *rows]]
    header = ("pairs", "mean tokens chosen", "mean tokens rejected", "chosen is longer", "answers")
    return [
        [
            header,
            *(
                (c["pairs"], _mean(c, "chosen"), _mean(c, "rejected"), f"{c['chosen_longer'] / c['pairs']:.0%}", name)
                for name, c in named.items()
            ),
        ]
    ]


def histogram(account: Account) -> Table:
    """Rows by length: the bounds of a bin, its rows, and their ratio to those of the largest bin."""
    bins = account["histogram"]
    most = max((bin["rows"] for bin in bins), default=1)
    return [(f"{bin['from']:,}-{bin['to']:,}", bin["rows"], bin["rows"] / most) for bin in bins]


def for_page(account: Account) -> dict[str, Any]:
    """All tables of an account with their cells as strings, for a page of HTML."""
    by_reason = [("rows", "what became of them"), *reasons(account)]
    every = [by_reason, *tables(account)] if len(by_reason) > 1 else tables(account)
    return {
        "facts": [(cell(count), name) for count, name in facts(account)],
        "tables": [[tuple(map(cell, row)) for row in table] for table in every],
        "histogram": [(bounds, cell(n), f"{100 * share:.1f}") for bounds, n, share in histogram(account)],
    }
