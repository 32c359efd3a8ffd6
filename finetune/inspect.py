"""What of the data is trained on, for a person to see: rows with their trained tokens marked, and the ledger."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from finetune.chat import IGNORE, Chat
from finetune.data import Prepared, build
from finetune.ledger import language
from finetune.model import load_tokenizer
from finetune.recipe import Recipe
from finetune.rows import DataError
from finetune.store import Say

Row = dict[str, Any]
Table = list[tuple[Any, ...]]

# What steers a terminal, what breaks lines or turns the direction of writing, and what nobody sees. Joiners stay: emoji
# and several scripts are written with them.
_UNSEEN = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff"
    r"\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with its control and unseen characters written out, as in Python: `\\x1b`, `\\u202e`."""
    return _UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)


class Piece(NamedTuple):
    """Whole characters and the tokens that spell them: as a rule one token, for a rare character several."""

    ids: list[int]
    text: str
    trained: bool


def pieces(tokenizer: Any, row: Row) -> Iterator[Piece]:
    """A row's text from its first to its last token; half a character stands only where the row itself was cut so."""
    ids, labels = row["input_ids"], row["labels"]
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Each piece is decoded behind the one before it: by itself it may lose a leading space.
    before = begin = 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[before:end])
        # Half a character, or one that the data hold? It has four bytes at most: the next three tokens tell.
        after = [n for n in (1, 2, 3) if end + n <= len(ids)] if text.endswith("\ufffd") else []
        if any(decode(ids[before : end + n]) != text + decode(ids[end : end + n]) for n in after):
            continue
        yield Piece(ids[begin:end], text[len(decode(ids[before:begin])) :], labels[end - 1] != IGNORE)
        before, begin = begin, end


@dataclass(frozen=True)
class View:
    """A recipe's rows, encoded as training would take them."""

    recipe: Recipe
    tokenizer: Any
    train: Prepared
    evaluation: Prepared

    @property
    def streamed(self) -> bool:
        """Whether rows and their account come only while one goes through them."""
        return not hasattr(self.train.dataset, "__len__")

    def rows(self, count: int | None = None, name: str | None = None) -> Iterator[Row]:
        """The first `count` training rows (None: all) in training's order, or those called `name` or ending so.

        Raises:
            DataError: `name` fits no row, or rows of several names.
        """
        dataset: Any = self.train.dataset
        if name is None:
            return islice(dataset, count)
        if self.streamed:
            raise DataError(f"--row {name}: streamed rows are not looked up; --rows N shows the first N")
        names = list(dataset["row"])
        end = re.compile(rf"(?<!\d){re.escape(name)}\]?$")
        found = {name} & set(names) or {there for there in names if end.search(there)}
        if len(found) != 1:
            why = "the names of several rows end so" if found else "no training row is called so"
            examples = sorted(found)[:2] or list(dict.fromkeys(names))[:2]
            raise DataError(f"--row {name}: {why}; write one such as {' or '.join(map(visible, examples))}")
        return (dataset[i] for i, there in enumerate(names) if there in found)

    def accounts(self) -> Iterator[tuple[str, Row]]:
        """The ledgers that have rows, each with a title; to be asked for once the rows have gone by."""
        so_far = ", so far (they are streamed)" if self.streamed else ""
        yield f"training rows{so_far}", self.train.ledger.as_dict()
        if self.evaluation.ledger.read:
            yield "evaluation rows", self.evaluation.ledger.as_dict()


def load(recipe: Recipe, say: Say = lambda line: None) -> View:
    """The view of a recipe's data; needs its tokenizer and rows, and no weights.

    Raises:
        ModelError, TemplateError, DataError: From the rooms that raise them.
    """
    tokenizer = load_tokenizer(recipe.model)
    data = build(recipe.data, Chat(tokenizer), recipe.training.get("max_length", 1024), say)
    return View(recipe, tokenizer, *data)


# ---------------------------------------------------------------------------------------------------------------
# The three ways of showing it


def as_json(view: View, rows: Iterable[Row]) -> Iterator[str]:
    """A row a line, `{"row", "input_ids", "labels"}`; at last `{"ledger": {"train", "eval"}}`."""
    for row in rows:
        yield json.dumps({name: row[name] for name in ("row", "input_ids", "labels")})
    ledgers = {"train": view.train.ledger.as_dict(), "eval": view.evaluation.ledger.as_dict()}
    yield json.dumps({"ledger": ledgers})


def as_text(view: View, rows: Iterable[Row], out: TextIO, tokens: bool = False) -> Iterator[str]:
    """Rows and ledger as lines to print on `out`: trained text in colour on a terminal, in brackets elsewhere."""
    mark, bar = _pen(out)
    for i, row in enumerate(rows):
        if i == 0:
            yield f"{'*' if tokens else mark('like this')}: trained on"
        yield f"\n== {visible(row['row'])}: {_counted(row)}"
        parts = pieces(view.tokenizer, row)
        if tokens:
            for ids, text, trained in parts:
                yield f"{' '.join(map(str, ids)):>8} {'*' if trained else ' '} {text!r}"
            continue
        line = ""
        for trained, run in groupby(parts, attrgetter("trained")):
            text = visible("".join(piece.text for piece in run))
            line += mark(text) if trained else text
        yield line.removesuffix("\n")
    for title, account in view.accounts():
        lengths = [(what, n, bar * max(n > 0, round(40 * share))) for what, n, share in histogram(account)]
        yield f"\n== {title}"
        yield from _lines([*facts(account), *reasons(account)])
        for table in (*tables(account), [("tokens in a row", "rows", ""), *lengths]):
            yield ""
            yield from _lines(table)


def as_html(view: View, rows: Iterable[Row]) -> str:
    """Rows and ledger as one page that needs nothing else and runs nothing of the data's."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.filters["cell"] = _cell
    environment.globals |= {"facts": facts, "reasons": reasons, "tables": tables, "histogram": histogram}
    shown = []
    for row in rows:
        parts = list(pieces(view.tokenizer, row))
        # Fonts draw many characters otherwise for Japanese than for Chinese.
        lang = "ja" if language("".join(piece.text for piece in parts)) == "Japanese" else None
        runs = [(trained, list(run)) for trained, run in groupby(parts, attrgetter("trained"))]
        shown.append({"name": row["row"], "counted": _counted(row), "runs": runs, "lang": lang})
    template = environment.get_template("inspect.html.jinja")
    return template.render(name=view.recipe.path.name, rows=shown, accounts=view.accounts())


def facts(account: Row) -> Table:
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


def reasons(account: Row) -> Table:
    """How many rows were mended, dropped or bad, why, and which was the first."""
    fates, first = ("mended", "dropped", "bad"), account["first"]
    told = {
        why: f"{why} (first: {first[why]})" if why in first else why
        for fate in fates
        for why in account[fate]
    }
    return [(count, f"{fate}: {told[why]}") for fate in fates for why, count in account[fate].items()]


def tables(account: Row) -> list[Table]:
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


def histogram(account: Row) -> Table:
    """Rows by their length: the bounds, the rows, and how many these are for one row of the largest bin."""
    bins = account["histogram"]
    most = max((bin["rows"] for bin in bins), default=1)
    return [(f"{bin['from']:,}-{bin['to']:,}", bin["rows"], bin["rows"] / most) for bin in bins]


def _counted(row: Row) -> str:
    count, trained = len(row["input_ids"]), sum(label != IGNORE for label in row["labels"])
    return f"{count:,} tokens, {trained:,} trained on ({trained / max(1, count):.0%})"


def _pen(out: TextIO) -> tuple[Callable[[str], str], str]:
    """How trained text is marked on `out`, and what bars are drawn with."""
    left, right, bar = "⟦", "⟧", "▇"
    try:
        f"{left}{right}{bar}".encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        left, right, bar = "[[", "]]", "#"
    if out.isatty() and not os.environ.get("NO_COLOR"):
        # Line by line, as pagers want it.
        return lambda text: re.sub(r"[^\n]+", "\x1b[1;32m\\g<0>\x1b[0m", text), bar
    return lambda text: f"{left}{text}{right}", bar


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return visible(value)
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _lines(table: Table) -> list[str]:
    """Columns of numbers to the right, the last one, a name of any width, to the left."""
    cells = [tuple(map(_cell, row)) for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    return ["  ".join((*map(str.rjust, row, widths), row[-1])).rstrip() for row in cells]
