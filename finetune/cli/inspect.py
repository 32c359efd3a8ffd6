"""Shows the prepared rows of a recipe with their trained tokens marked, and the ledger: as text, JSON or HTML."""

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

from finetune.data.cache import trainer_columns
from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE, first_label
from finetune.data.language import language
from finetune.data.ledger import Account, facts, for_page, histogram, reasons, tables
from finetune.data.mixture import Prepared, build_datasets
from finetune.model.load import load_tokenizer
from finetune.recipe.load import Recipe
from finetune.system.errors import DataError
from finetune.system.pages import cell, render, visible
from finetune.system.terminal import Say

Row = dict[str, Any]
Table = list[tuple[Any, ...]]


class Piece(NamedTuple):
    """Whole characters and the ids of their tokens: most often one token, for a rare character several."""

    ids: list[int]
    text: str
    trained: bool


def pieces(tokenizer: Any, row: Row) -> Iterator[Piece]:
    """Splits a row's text into pieces of whole characters, each with its tokens and whether they are trained on.

    Together they are the whole text. Only where the row itself was cut inside a character does a piece hold half of it.
    """
    ids, labels = row["input_ids"], row["labels"]
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # Each piece is decoded together with the one before it, because alone it may lose a leading space.
    before = begin = 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[before:end])
        # U+FFFD stands for half a character, or is in the data. A character has four bytes at most, so if this is half
        # of one, the text changes with one of the next three tokens.
        after = [n for n in (1, 2, 3) if end + n <= len(ids)] if text.endswith("\ufffd") else []
        if any(decode(ids[before : end + n]) != text + decode(ids[end : end + n]) for n in after):
            continue
        yield Piece(ids[begin:end], text[len(decode(ids[before:begin])) :], labels[end - 1] != IGNORE)
        before, begin = begin, end


def sides(row: Row) -> dict[str, Row]:
    """The sides of a pair by their names, `chosen` and `rejected`; empty for a row that is no pair."""
    if "rejected_input_ids" not in row:
        return {}
    rejected = {name: row[f"rejected_{name}"] for name in ("input_ids", "labels")}
    return {"chosen": row, "rejected": rejected}


@dataclass(frozen=True)
class InspectedData:
    """The rows of a recipe, rendered and labelled as training uses them, with their ledgers."""

    recipe: Recipe
    tokenizer: Any
    train: Prepared
    evaluation: Prepared

    @property
    def streamed(self) -> bool:
        """True if the rows are read, and counted in the ledger, only while they are iterated over."""
        return not hasattr(self.train.dataset, "__len__")

    def rows(self, count: int | None = None, name: str | None = None) -> Iterator[Row]:
        """Training rows in the order of training.

        Args:
            count: The first so many; None: all.
            name: Instead the row with this name, or with the only name that ends with it.

        Raises:
            DataError: No row has such a name, or rows of several names do; or the rows are streamed.
        """
        dataset: Any = self.train.dataset
        if name is None:
            return islice(dataset, count)
        if self.streamed:
            raise DataError(f"--row {name}: streamed rows have no index; write --rows N, which shows the first N")
        names = list(dataset["row"])
        end = re.compile(rf"(?<!\d){re.escape(name)}\]?$")
        found = {name} & set(names) or {there for there in names if end.search(there)}
        if len(found) != 1:
            why = "several rows have names that end so" if found else "no training row has this name"
            examples = sorted(found)[:2] or list(dict.fromkeys(names))[:2]
            raise DataError(f"--row {name}: {why}; write one such as {' or '.join(map(visible, examples))}")
        return (dataset[i] for i, there in enumerate(names) if there in found)

    def ledgers(self) -> Iterator[tuple[str, Account]]:
        """The ledgers that have rows, each with a title; to be called after the rows were iterated over."""
        so_far = ", so far (streamed)" if self.streamed else ""
        yield f"training rows{so_far}", self.train.ledger.as_dict()
        if self.evaluation.ledger.read:
            yield "evaluation rows", self.evaluation.ledger.as_dict()


def load(recipe: Recipe, say: Say = lambda line: None) -> InspectedData:
    """Prepares a recipe's rows, for which its tokenizer is needed, and no weights.

    Raises:
        ModelError: The tokenizer cannot be loaded.
        TemplateError: The chat template cannot be read or used.
        DataError: A source cannot be read.
    """
    tokenizer = load_tokenizer(recipe.model)
    prepared = build_datasets(recipe.data, Chat(tokenizer), recipe.max_length, say, recipe.method)
    return InspectedData(recipe, tokenizer, *prepared)


# ---------------------------------------------------------------------------------------------------------------
# Text, JSON, HTML


def as_json(data: InspectedData, rows: Iterable[Row]) -> Iterator[str]:
    """One JSON line per row with the columns that the trainer gets, then `{"ledger": {"train", "eval"}}`."""
    columns = trainer_columns(data.recipe.method)
    for row in rows:
        yield json.dumps({name: row[name] for name in columns})
    ledgers = {"train": data.train.ledger.as_dict(), "eval": data.evaluation.ledger.as_dict()}
    yield json.dumps({"ledger": ledgers})


def as_text(data: InspectedData, rows: Iterable[Row], out: TextIO, tokens: bool = False) -> Iterator[str]:
    """Rows and ledgers as lines to print on `out`: trained text in colour on a terminal, in brackets elsewhere.

    Args:
        data: The prepared rows.
        rows: Those to show.
        out: Where the lines will be printed.
        tokens: Prints one token per line, with its ids.
    """
    mark, bar = _marker_and_bar(out)
    for i, row in enumerate(rows):
        if i == 0:
            yield f"{'*' if tokens else mark('like this')}: trained on"
        yield f"\n== {visible(row['row'])}: {_token_counts(row)}"
        for title, parts in _parts(data.tokenizer, row):
            if title:
                yield f"-- {title}"
            if tokens:
                for ids, text, trained in parts:
                    yield f"{' '.join(map(str, ids)):>8} {'*' if trained else ' '} {text!r}"
                continue
            line = ""
            for trained, run in groupby(parts, attrgetter("trained")):
                text = visible("".join(piece.text for piece in run))
                line += mark(text) if trained else text
            yield line.removesuffix("\n")
    for title, ledger in data.ledgers():
        lengths = [(what, n, bar * max(n > 0, round(40 * share))) for what, n, share in histogram(ledger)]
        yield f"\n== {title}"
        yield from _lines([*facts(ledger), *reasons(ledger)])
        for table in (*tables(ledger), [("tokens in a row", "rows", ""), *lengths]):
            yield ""
            yield from _lines(table)


def as_html(data: InspectedData, rows: Iterable[Row]) -> str:
    """Rows and ledgers as one self-contained HTML page, in which text of the rows is never markup."""
    shown = []
    for row in rows:
        blocks = []
        for title, parts in _parts(data.tokenizer, row):
            # Fonts draw many characters differently for Japanese and for Chinese.
            lang = "ja" if language("".join(piece.text for piece in parts)) == "Japanese" else None
            runs = [(trained, list(run)) for trained, run in groupby(parts, attrgetter("trained"))]
            blocks.append({"title": title, "runs": runs, "lang": lang})
        shown.append({"name": row["row"], "counted": _token_counts(row), "blocks": blocks})
    ledgers = [(title, for_page(ledger)) for title, ledger in data.ledgers()]
    return render("cli/inspect.html.jinja", name=data.recipe.path.name, rows=shown, ledgers=ledgers)


def _parts(tokenizer: Any, row: Row) -> Iterator[tuple[str, list[Piece]]]:
    """The pieces of a row, without a title; of a pair those of the prompt, and those of each answer with its name."""
    prompt_shown = False
    for name, side in (sides(row) or {"": row}).items():
        parts = list(pieces(tokenizer, side))
        start = next(i for i, piece in enumerate(parts) if piece.trained) if name else 0
        if name and not prompt_shown:
            yield "", parts[:start]
            prompt_shown = True
        yield name, parts[start:]


def _token_counts(row: Row) -> str:
    count, trained = len(row["input_ids"]), sum(label != IGNORE for label in row["labels"])
    rating = {None: "", True: "desirable, ", False: "undesirable, "}[row.get("desirable")]
    if both := sides(row):
        answers = [sum(label != IGNORE for label in side["labels"]) for side in both.values()]
        before = first_label(row["labels"])
        told = [f"{n:,} {name}" for n, name in zip(answers, both, strict=True)]
        return f"{before:,} tokens of the prompt, {', '.join(told)}"
    return f"{rating}{count:,} tokens, {trained:,} trained on ({trained / max(1, count):.0%})"


def _marker_and_bar(out: TextIO) -> tuple[Callable[[str], str], str]:
    """A function that marks trained text, and the character of a histogram's bars, as `out` can show them."""
    left, right, bar = "⟦", "⟧", "▇"
    try:
        f"{left}{right}{bar}".encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        left, right, bar = "[[", "]]", "#"
    if out.isatty() and not os.environ.get("NO_COLOR"):
        # Each line for itself: a pager resets colours at the end of a line.
        return lambda text: re.sub(r"[^\n]+", "\x1b[1;32m\\g<0>\x1b[0m", text), bar
    return lambda text: f"{left}{text}{right}", bar


def _lines(table: Table) -> list[str]:
    """Lines of aligned columns: numbers to the right, the last column, a name, to the left."""
    cells = [tuple(map(cell, row)) for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    return ["  ".join((*map(str.rjust, row, widths), row[-1])).rstrip() for row in cells]
