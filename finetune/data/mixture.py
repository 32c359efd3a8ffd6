"""Builds the training and the evaluation rows of a recipe: mixed from its sources, held out, counted; or streamed.

The sources are prepared once and cached. The rows to use are chosen at each start, with the same result on every rank
and machine.
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

from finetune.data.bad_rows import check_template
from finetune.data.cache import CachedSource, trainer_columns
from finetune.data.chat import Chat
from finetune.data.ledger import Ledger
from finetune.data.prepare import Preparation, prepare
from finetune.data.row_result import RowResult
from finetune.recipe.schema import DataSection, DataSource
from finetune.system.errors import DataError
from finetune.system.terminal import Say

if TYPE_CHECKING:
    import datasets

DUPLICATE = "exact duplicates"
LEAKED = "also in the evaluation rows"
PROMPT_LEAKED = "whose prompt is also in the evaluation rows"
# A source and the index of one of its rows.
SourceRow = tuple[CachedSource, int]
# The size of the buffer in which the rows of a stream are shuffled.
_SHUFFLE_BUFFER = 1000


@dataclass
class Prepared:
    """Rows for the trainer, with the columns of `trainer_columns`, among them `row` (its name), and their ledger.

    The rows of a stream are read and counted in the ledger during iteration.
    """

    dataset: datasets.Dataset | datasets.IterableDataset | None
    ledger: Ledger = field(default_factory=Ledger)
    # A hash of the token ids and labels of all rows, in order; for a stream, a hash of its sources.
    digest: str = ""
    # The source and language of each evaluation row.
    origins: list[tuple[str, str]] = field(default_factory=list)

    def highest_token_id(self) -> int:
        """The highest token id in the rows; 0 where there are none, and for a stream, which is not read yet."""
        import datasets
        import pyarrow.compute as pc

        if not isinstance(self.dataset, datasets.Dataset):
            return 0
        names = [name for name in self.dataset.column_names if name.endswith("input_ids")]
        batches = self.dataset.select_columns(names).with_format("arrow").iter(batch_size=1000)
        columns = (batch[name] for batch in batches for name in names)
        return max((pc.max(pc.list_flatten(column)).as_py() for column in columns), default=0)


def build_datasets(
    section: DataSection, chat: Chat, max_length: int | None, say: Say = lambda line: None, method: str = "sft"
) -> tuple[Prepared, Prepared]:
    """The training and the evaluation rows of a recipe.

    The same recipe gives the same rows in the same order on every machine. With `eval_fraction`, whole rows go to one
    side or the other, chosen by `data.seed`; a row and its copies, and all answers to one prompt, go to the same side.

    Args:
        section: The recipe's `data` section.
        chat: The tokenizer and its chat template.
        max_length: The most tokens of a row; None: no limit.
        say: Called with lines on the progress of a long preparation.
        method: The recipe's method.

    Raises:
        DataError: A source or row cannot be used, nothing is left to train on, or all answers of kto are rated alike.
        TemplateError: The chat template cannot be used with this tokenizer.
    """
    preparation = Preparation(section, chat, max_length, method)
    leaked = LEAKED if method == "sft" else PROMPT_LEAKED
    eval_sources = _cached(preparation, section.eval, say)
    if any(source.streaming for source in section.train):
        evaluation, eval_texts = _evaluation(section, chat, eval_sources, {})
        return _stream(preparation, eval_texts), evaluation
    sources = _cached(preparation, section.train, say)
    ledger = Ledger()
    for cached in sources:
        cached.count_into(ledger)
    rows = _distinct(section, sources, ledger)
    held_out = _held_out(section, rows)
    evaluation, eval_texts = _evaluation(section, chat, eval_sources, held_out)
    ledger.read -= len(held_out)

    chosen: list[SourceRow] = []
    for cached, cached_rows in groupby(rows, key=lambda row: row[0]):
        left = []
        for _, row in cached_rows:
            if (cached, row) in held_out:
                continue
            if cached.digests(row)[0] in eval_texts:
                if not section.deduplicate:
                    raise _leak(cached.name(row), leaked)
                ledger.dropped[leaked] += 1
                continue
            left.append(row)
        chosen += [(cached, row) for row in _drawn(section, cached, left, ledger)]
    train = Prepared(_dataset(chosen, ledger), ledger, _digest(chosen))
    if not ledger.trained_tokens:
        raise _no_rows(chat, "no row is left to train on", ledger)
    if method == "kto":
        _check_ratings(ledger)
    return train, evaluation


def _check_ratings(ledger: Ledger) -> None:
    """Refuses rows for kto that are all good or all bad, which no comparison can be learned from."""
    total = ledger.answer_totals
    for rated, other in (("chosen", "undesirable"), ("rejected", "desirable")):
        if total[rated] == ledger.kept:
            raise DataError(f"data.train: none of {ledger.kept:,} answers is {other}, and kto needs both; add some")


def evaluation_rows(section: DataSection, chat: Chat, max_length: int | None, method: str = "sft") -> Prepared:
    """The evaluation rows of `build_datasets`; reads the training rows only if they are held out of them.

    Args:
        section: The recipe's `data` section.
        chat: The tokenizer and its chat template.
        max_length: The most tokens of a row; None: no limit.
        method: The recipe's method.

    Raises:
        DataError: A source or row cannot be used.
        TemplateError: The chat template cannot be used with this tokenizer.
    """
    if section.eval_fraction is not None:
        return build_datasets(section, chat, max_length, method=method)[1]
    return _evaluation(section, chat, _cached(Preparation(section, chat, max_length, method), section.eval), {})[0]


def _cached(preparation: Preparation, sources: list[DataSource], say: Say = lambda line: None) -> list[CachedSource]:
    """The prepared rows of `data.train` or `data.eval`."""
    train = preparation.section.train
    # Rows are drawn by the index of their source, because two sources may be equal.
    first = 0 if sources is train else len(train)
    return [CachedSource(preparation, source, place, say) for place, source in enumerate(sources, first)]


def _distinct(section: DataSection, sources: list[CachedSource], ledger: Ledger) -> list[SourceRow]:
    """The rows of all sources, without exact duplicates if the recipe says so."""
    seen: set[bytes] = set()
    rows = []
    for cached in sources:
        for row in range(len(cached)):
            _, digest = cached.digests(row)
            if section.deduplicate and digest in seen:
                ledger.dropped[DUPLICATE] += 1
                continue
            seen.add(digest)
            rows.append((cached, row))
    return rows


def _held_out(section: DataSection, rows: list[SourceRow]) -> dict[SourceRow, None]:
    """The rows that `eval_fraction` sets aside, in their order."""
    if section.eval_fraction is None or not rows:
        return {}
    texts = list(dict.fromkeys(cached.digests(row)[0] for cached, row in rows))
    count = max(1, round(len(texts) * section.eval_fraction))
    if count >= len(texts):
        raise DataError(f"data.eval_fraction: {section.eval_fraction} of {len(texts)} rows leaves none to train on")
    chosen = set(random.Random(section.seed).sample(texts, count))
    return {(cached, row): None for cached, row in rows if cached.digests(row)[0] in chosen}


def _evaluation(
    section: DataSection, chat: Chat, sources: list[CachedSource], held_out: dict[SourceRow, None]
) -> tuple[Prepared, set[bytes]]:
    """The evaluation rows, and the digests of their texts."""
    ledger = Ledger()
    for cached in sources:
        cached.count_into(ledger)
    ledger.read += len(held_out)
    drawn = [(cached, row) for cached in sources for row in _drawn(section, cached, list(range(len(cached))), ledger)]
    rows = [*held_out, *drawn]
    origins = [origin for cached, row in rows for origin in cached.origins(row)]
    evaluation = Prepared(_dataset(rows, ledger), ledger, _digest(rows), origins)
    if section.eval and not ledger.trained_tokens:
        raise _no_rows(chat, "data.eval: no row is left to evaluate on", ledger)
    return evaluation, {cached.digests(row)[0] for cached, row in rows}


def _drawn(section: DataSection, cached: CachedSource, rows: list[int], ledger: Ledger) -> list[int]:
    """The rows of a source as often as `weight` or `samples` say: whole passes, then a random part of one more."""
    wanted = cached.source.samples or round(len(rows) * (cached.source.weight or 1))
    if not rows or wanted == len(rows):
        return rows
    passes, rest = divmod(wanted, len(rows))
    rng = random.Random(f"{section.seed} {cached.place}")
    ledger.repeated += max(0, wanted - len(rows))
    if not passes:
        ledger.dropped["not drawn (weight or samples)"] += len(rows) - rest
    return rows * passes + [rows[i] for i in sorted(rng.sample(range(len(rows)), rest))]


def _digest(rows: list[SourceRow]) -> str:
    """A hash of the token ids and labels of all rows; empty without rows."""
    digest = hashlib.blake2b(digest_size=16)
    for cached, row in rows:
        digest.update(cached.digests(row)[1])
    return digest.hexdigest() if rows else ""


def _dataset(rows: list[SourceRow], ledger: Ledger) -> datasets.Dataset | None:
    """The rows as a dataset, counted in the ledger; None without rows."""
    import datasets

    tables: list[datasets.Dataset] = []
    chosen: list[int] = []
    starts: dict[CachedSource, int] = {}
    for cached, row in rows:
        if cached not in starts:
            starts[cached] = sum(map(len, tables))
            tables.append(cached.dataset)
        chosen.extend(starts[cached] + piece for piece in cached.keep(row, ledger))
    if not chosen:
        return None
    whole = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    return whole.select(chosen).select_columns(trainer_columns(rows[0][0].method))


# ---------------------------------------------------------------------------------------------------------------
# Streams


def _stream(preparation: Preparation, eval_texts: set[bytes]) -> Prepared:
    """The rows of sources that are read while training, each drawn from by its `weight`."""
    import datasets

    ledger = Ledger()
    rows = partial(_streamed, preparation, eval_texts)
    # Errors in the first rows, and a stream without rows, are reported before training starts.
    if next(rows(tried := Ledger()), None) is None:
        raise _no_rows(preparation.chat, "no row is left to train on", tried)
    ints = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"row": datasets.Value("string"), "input_ids": ints, "labels": ints})
    stream = datasets.IterableDataset.from_generator(lambda: rows(ledger), features=features)
    sources = preparation.section.model_dump_json(exclude={"eval", "eval_fraction", "on_bad_row"}).encode()
    return Prepared(stream, ledger, hashlib.blake2b(sources, digest_size=16).hexdigest())


def _streamed(preparation: Preparation, eval_texts: set[bytes], ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yields the rows of the streams, shuffled; each is counted when it is yielded."""
    rng = random.Random(preparation.section.seed)
    waiting: list[tuple[DataSource, RowResult]] = []
    for kept in _kept(preparation, eval_texts, ledger, rng):
        waiting.append(kept)
        if len(waiting) > _SHUFFLE_BUFFER:
            yield from _yielded(waiting, rng, ledger)
    while waiting:
        yield from _yielded(waiting, rng, ledger)


def _yielded(
    waiting: list[tuple[DataSource, RowResult]], rng: random.Random, ledger: Ledger
) -> Iterator[dict[str, Any]]:
    i = rng.randrange(len(waiting))
    waiting[i], waiting[-1] = waiting[-1], waiting[i]
    source, result = waiting.pop()
    counts = [result.counts(piece) for piece in result.pieces]
    ledger.keep_row(source.name, counts, result.pieces[0].cut, result.lost)
    for piece in result.pieces:
        yield {"row": result.row, "input_ids": piece.input_ids.tolist(), "labels": piece.labels.tolist()}


def _kept(
    preparation: Preparation, eval_texts: set[bytes], ledger: Ledger, rng: random.Random
) -> Iterator[tuple[DataSource, RowResult]]:
    """Yields the rows to train on, drawn from the sources by `weight`; counts the others."""
    section = preparation.section
    streams = {i: prepare(preparation, source) for i, source in enumerate(section.train)}
    left = [source.samples or math.inf for source in section.train]
    seen: set[bytes] = set()
    while streams:
        [i] = rng.choices(list(streams), [section.train[i].weight or 1 for i in streams])
        for result in streams[i] if left[i] else ():
            result.count_into(ledger)
            if not result.pieces:
                continue
            text, digest = result.digests
            if text in eval_texts and not section.deduplicate:
                raise _leak(result.row)
            if text in eval_texts or (section.deduplicate and digest in seen):
                ledger.dropped[LEAKED if text in eval_texts else DUPLICATE] += 1
                continue
            seen.add(digest)
            left[i] -= 1
            yield section.train[i], result
            break
        else:
            del streams[i]


def _no_rows(chat: Chat, fault: str, ledger: Ledger) -> DataError:
    """The error for rows of which none is left.

    Raises:
        TemplateError: The chat template has the fault of the bad rows with any conversation.
    """
    for reason in ledger.bad:
        check_template(chat, reason)
    return DataError(f"{fault}: {ledger.summary()}")


def _leak(row: str, reason: str = LEAKED) -> DataError:
    found = "this row is" if reason == LEAKED else "the prompt of this row is"
    return DataError(f"{row}: {found} also in the evaluation rows; take it out, or write data.deduplicate: true")
