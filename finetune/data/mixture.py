"""The rows that a recipe trains and evaluates on: mixed from its sources, held out, counted; or streamed.

What is drawn from the prepared sources is decided anew at each start, the same on every rank and machine.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from finetune.data.cache import CachedSource
from finetune.data.chat import Chat
from finetune.data.ledger import Ledger
from finetune.data.prepare import RowResult, prepare
from finetune.recipe.schema import DataSection, DataSource
from finetune.system.errors import DataError
from finetune.system.terminal import Say

if TYPE_CHECKING:
    import datasets

# What the trainer takes; the other columns of a prepared file are the ledger's.
COLUMNS = ["row", "input_ids", "labels"]
DUPLICATE = "exact duplicates"
LEAKED = "also in the evaluation rows"
# Rows of a stream are mixed among this many.
_BUFFER = 1000


@dataclass
class Prepared:
    """Rows ready for the trainer: columns `row` (its name), `input_ids`, `labels`; and their account.

    Of a stream the rows, and their account with them, come while it is read.
    """

    dataset: datasets.Dataset | datasets.IterableDataset | None
    ledger: Ledger = field(default_factory=Ledger)
    # Of what the rows are to the trainer, in their order; of a stream, of where they come from.
    digest: str = ""
    # Of evaluation rows, each one's source and language.
    origins: list[tuple[str, str]] = field(default_factory=list)


def build_datasets(
    section: DataSection, chat: Chat, max_length: int | None, say: Say = lambda line: None
) -> tuple[Prepared, Prepared]:
    """The training and the evaluation rows of a recipe.

    The same recipe gives the same rows in the same order on every machine. With `eval_fraction`, whole rows go to one
    side or the other, chosen by `data.seed`; a row and its copies go to the same side.

    Raises:
        DataError: A source or row cannot be used, or nothing is left to train on.
    """
    evaluated = [CachedSource(section, source, chat, max_length, say) for source in section.eval]
    if any(source.streaming for source in section.train):
        evaluation, texts = _evaluation(section, evaluated, {})
        return _stream(section, chat, max_length, texts), evaluation
    parts = [CachedSource(section, source, chat, max_length, say) for source in section.train]
    ledger = Ledger()
    for part in parts:
        part.count_into(ledger)
    rows = _distinct(section, parts, ledger)
    held_out = _held_out(section, rows)
    evaluation, texts = _evaluation(section, evaluated, held_out)
    ledger.read -= len(held_out)

    chosen: list[tuple[CachedSource, int]] = []
    for part, own in groupby(rows, key=lambda row: row[0]):
        left = []
        for _, row in own:
            if (part, row) in held_out:
                continue
            if part.digests(row)[0] in texts:
                if not section.deduplicate:
                    raise _leak(part.name(row))
                ledger.dropped[LEAKED] += 1
                continue
            left.append(row)
        chosen += [(part, row) for row in _drawn(section, part, left, ledger)]
    train = Prepared(_dataset(chosen, ledger), ledger, _digest(chosen))
    if not ledger.trained_tokens:
        raise DataError(f"no row is left to train on: {ledger.summary()}")
    return train, evaluation


def evaluation_rows(section: DataSection, chat: Chat, max_length: int | None) -> Prepared:
    """The evaluation rows of a recipe, as `build` has them; rows to train on are read only where these are of them.

    Raises:
        DataError: A source or row cannot be used.
    """
    if section.eval_fraction is not None:
        return build_datasets(section, chat, max_length)[1]
    parts = [CachedSource(section, source, chat, max_length, lambda line: None) for source in section.eval]
    return _evaluation(section, parts, {})[0]


def _distinct(
    section: DataSection, parts: list[CachedSource], ledger: Ledger
) -> list[tuple[CachedSource, int]]:
    seen: set[bytes] = set()
    rows = []
    for part in parts:
        for row in range(len(part)):
            _, digest = part.digests(row)
            if section.deduplicate and digest in seen:
                ledger.dropped[DUPLICATE] += 1
                continue
            seen.add(digest)
            rows.append((part, row))
    return rows


def _held_out(
    section: DataSection, rows: list[tuple[CachedSource, int]]
) -> dict[tuple[CachedSource, int], None]:
    """The rows that `eval_fraction` sets aside, in their order."""
    if section.eval_fraction is None or not rows:
        return {}
    texts = list(dict.fromkeys(part.digests(row)[0] for part, row in rows))
    count = max(1, round(len(texts) * section.eval_fraction))
    if count >= len(texts):
        raise DataError(
            f"data.eval_fraction: {section.eval_fraction} of {len(texts)} rows leaves none to train on"
        )
    chosen = set(random.Random(section.seed).sample(texts, count))
    return {(part, row): None for part, row in rows if part.digests(row)[0] in chosen}


def _evaluation(
    section: DataSection, parts: list[CachedSource], held_out: dict[tuple[CachedSource, int], None]
) -> tuple[Prepared, set[bytes]]:
    ledger = Ledger()
    for part in parts:
        part.count_into(ledger)
    ledger.read += len(held_out)
    drawn = [(part, row) for part in parts for row in _drawn(section, part, list(range(len(part))), ledger)]
    rows = [*held_out, *drawn]
    origins = [origin for part, row in rows for origin in part.origins(row)]
    evaluation = Prepared(_dataset(rows, ledger), ledger, _digest(rows), origins)
    if section.eval and not ledger.trained_tokens:
        raise DataError(f"data.eval: no row is left to evaluate on: {ledger.summary()}")
    return evaluation, {part.digests(row)[0] for part, row in rows}


def _drawn(section: DataSection, part: CachedSource, rows: list[int], ledger: Ledger) -> list[int]:
    """The rows of a source as often as `weight` or `samples` say: whole passes, and of the last one a drawn share."""
    source = part.source
    wanted = source.samples or round(len(rows) * (source.weight or 1))
    if not rows or wanted == len(rows):
        return rows
    passes, rest = divmod(wanted, len(rows))
    rng = random.Random(f"{section.seed} {[*section.train, *section.eval].index(source)}")
    ledger.repeated += max(0, wanted - len(rows))
    if not passes:
        ledger.dropped["not drawn (weight or samples)"] += len(rows) - rest
    return rows * passes + [rows[i] for i in sorted(rng.sample(range(len(rows)), rest))]


def _digest(rows: list[tuple[CachedSource, int]]) -> str:
    every = hashlib.blake2b(digest_size=16)
    for part, row in rows:
        every.update(part.digests(row)[1])
    return every.hexdigest() if rows else ""


def _dataset(rows: list[tuple[CachedSource, int]], ledger: Ledger) -> datasets.Dataset | None:
    import datasets

    tables: list[Any] = []
    chosen: list[int] = []
    starts: dict[CachedSource, int] = {}
    for part, row in rows:
        if part not in starts:
            starts[part] = sum(map(len, tables))
            tables.append(part.dataset)
        chosen.extend(starts[part] + piece for piece in part.keep(row, ledger))
    if not chosen:
        return None
    whole = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    return whole.select(chosen).select_columns(COLUMNS)


# ---------------------------------------------------------------------------------------------------------------
# Streams


def _stream(section: DataSection, chat: Chat, max_length: int | None, evaluated: set[bytes]) -> Prepared:
    """The sources read while training, each drawn from by its `weight`."""
    import datasets

    ledger = Ledger()
    rows = partial(_streamed, section, chat, max_length, evaluated)
    # What is wrong with the first rows is told now, and a stream without rows does not start.
    if next(rows(tried := Ledger()), None) is None:
        raise DataError(f"no row is left to train on: {tried.summary()}")
    ints = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"row": datasets.Value("string"), "input_ids": ints, "labels": ints})
    stream = datasets.IterableDataset.from_generator(lambda: rows(ledger), features=features)
    where = section.model_dump_json(exclude={"eval", "eval_fraction", "on_bad_row"}).encode()
    return Prepared(stream, ledger, hashlib.blake2b(where, digest_size=16).hexdigest())


def _streamed(
    section: DataSection, chat: Chat, max_length: int | None, evaluated: set[bytes], ledger: Ledger
) -> Iterator[dict[str, Any]]:
    """The rows of the streams, mixed, each counted as it leaves."""
    rng = random.Random(section.seed)
    waiting: list[tuple[DataSource, RowResult]] = []
    for kept in _kept(section, chat, max_length, evaluated, ledger, rng):
        waiting.append(kept)
        if len(waiting) > _BUFFER:
            yield from _leaving(waiting, rng, ledger)
    while waiting:
        yield from _leaving(waiting, rng, ledger)


def _leaving(
    waiting: list[tuple[DataSource, RowResult]], rng: random.Random, ledger: Ledger
) -> Iterator[dict[str, Any]]:
    i = rng.randrange(len(waiting))
    waiting[i], waiting[-1] = waiting[-1], waiting[i]
    source, fate = waiting.pop()
    ledger.keep_row(
        source.path, [fate.ledger_values(piece) for piece in fate.pieces], fate.pieces[0].cut, fate.lost
    )
    for piece in fate.pieces:
        yield {"row": fate.row, "input_ids": piece.input_ids.tolist(), "labels": piece.labels.tolist()}


def _kept(
    section: DataSection,
    chat: Chat,
    max_length: int | None,
    evaluated: set[bytes],
    ledger: Ledger,
    rng: random.Random,
) -> Iterator[tuple[DataSource, RowResult]]:
    """The rows that are trained on, drawn from the sources by `weight`; what becomes of the others is counted."""
    streams = {i: prepare(section, source, chat, max_length) for i, source in enumerate(section.train)}
    left = [source.samples or math.inf for source in section.train]
    seen: set[bytes] = set()
    while streams:
        [i] = rng.choices(list(streams), [section.train[i].weight or 1 for i in streams])
        for fate in streams[i] if left[i] else ():
            fate.count_into(ledger)
            if not fate.pieces:
                continue
            text, digest = fate.digests
            if text in evaluated and not section.deduplicate:
                raise _leak(fate.row)
            if text in evaluated or (section.deduplicate and digest in seen):
                ledger.dropped[LEAKED if text in evaluated else DUPLICATE] += 1
                continue
            seen.add(digest)
            left[i] -= 1
            yield section.train[i], fate
            break
        else:
            del streams[i]


def _leak(row: str) -> DataError:
    return DataError(
        f"{row}: this row is also in the evaluation rows; take it out, or write data.deduplicate: true"
    )
