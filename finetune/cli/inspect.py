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
from typing import Any, NamedTuple, TextIO

from finetune.data.chat import IGNORE, Chat
from finetune.data.language import language
from finetune.data.ledger import facts, for_page, histogram, reasons, tables
from finetune.data.mixture import Prepared, build_datasets
from finetune.model.load import load_tokenizer
from finetune.recipe.load import Recipe
from finetune.system.errors import DataError
from finetune.system.pages import cell, render, visible
from finetune.system.terminal import Say

Row = dict[str, Any]
Table = list[tuple[Any, ...]]


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
    data = build_datasets(recipe.data, Chat(tokenizer), recipe.training.get("max_length", 1024), say)
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
    shown = []
    for row in rows:
        parts = list(pieces(view.tokenizer, row))
        # Fonts draw many characters otherwise for Japanese than for Chinese.
        lang = "ja" if language("".join(piece.text for piece in parts)) == "Japanese" else None
        runs = [(trained, list(run)) for trained, run in groupby(parts, attrgetter("trained"))]
        shown.append({"name": row["row"], "counted": _counted(row), "runs": runs, "lang": lang})
    accounts = [(title, for_page(account)) for title, account in view.accounts()]
    return render("cli/inspect.html.jinja", name=view.recipe.path.name, rows=shown, accounts=accounts)


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


def _lines(table: Table) -> list[str]:
    """Columns of numbers to the right, the last one, a name of any width, to the left."""
    cells = [tuple(map(cell, row)) for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    return ["  ".join((*map(str.rjust, row, widths), row[-1])).rstrip() for row in cells]
