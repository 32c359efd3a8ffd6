"""The rows that a recipe trains and evaluates on: prepared once, mixed, split, counted.

Each source is prepared into a file of its own under the cache, keyed by everything that decides what is in it, so a
changed template or row never meets old tokens. What is drawn from the sources is decided anew at each start, the same on
every rank and machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.base import cache_dir
from finetune.chat import Chat, Encoded
from finetune.ledger import Ledger
from finetune.prepare import Fate, prepare
from finetune.recipe import DataSection, Source
from finetune.rows import DataError, fingerprint

if TYPE_CHECKING:
    import datasets

Say = Callable[[str], None]

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


def build(
    section: DataSection, chat: Chat, max_length: int | None, say: Say = lambda line: None
) -> tuple[Prepared, Prepared]:
    """The training and the evaluation rows of a recipe.

    The same recipe gives the same rows in the same order on every machine. With `eval_fraction`, whole rows go to one
    side or the other, chosen by `data.seed`; a row and its copies go to the same side.

    Raises:
        DataError: A source or row cannot be used, or nothing is left to train on.
    """
    evaluated = [_Part(section, source, chat, max_length, say) for source in section.eval]
    if any(source.streaming for source in section.train):
        evaluation, digests = _evaluation(section, evaluated, {})
        return _stream(section, chat, max_length, digests), evaluation
    parts = [_Part(section, source, chat, max_length, say) for source in section.train]
    ledger, rng = Ledger(), random.Random(section.seed)
    for part in parts:
        part.count_into(ledger)
    rows = _distinct(section, parts, ledger)
    held_out = _held_out(section, rows, rng)
    evaluation, digests = _evaluation(section, evaluated, held_out)
    ledger.read -= len(held_out)

    chosen: list[tuple[_Part, int]] = []
    for part, own in groupby(rows, key=lambda row: row[0]):
        left = []
        for _, row in own:
            if (part, row) in held_out:
                continue
            if part.digest(row) in digests:
                if not section.deduplicate:
                    raise _leak(part.name(row))
                ledger.dropped[LEAKED] += 1
                continue
            left.append(row)
        chosen += [(part, row) for row in _drawn(section, part, left, ledger)]
    train = Prepared(_dataset(chosen, ledger), ledger)
    if not ledger.trained_tokens:
        raise DataError(f"no row is left to train on: {ledger.summary()}")
    return train, evaluation


def _distinct(section: DataSection, parts: list[_Part], ledger: Ledger) -> list[tuple[_Part, int]]:
    seen: set[bytes] = set()
    rows = []
    for part in parts:
        for row in range(len(part)):
            digest = part.digest(row)
            if section.deduplicate and digest in seen:
                ledger.dropped[DUPLICATE] += 1
                continue
            seen.add(digest)
            rows.append((part, row))
    return rows


def _held_out(
    section: DataSection, rows: list[tuple[_Part, int]], rng: random.Random
) -> dict[tuple[_Part, int], None]:
    """The rows that `eval_fraction` sets aside, in their order."""
    if section.eval_fraction is None or not rows:
        return {}
    digests = list(dict.fromkeys(part.digest(row) for part, row in rows))
    count = max(1, round(len(digests) * section.eval_fraction))
    if count >= len(digests):
        raise DataError(
            f"data.eval_fraction: {section.eval_fraction} of {len(digests)} rows leaves none to train on"
        )
    chosen = set(rng.sample(digests, count))
    return {(part, row): None for part, row in rows if part.digest(row) in chosen}


def _evaluation(
    section: DataSection, parts: list[_Part], held_out: dict[tuple[_Part, int], None]
) -> tuple[Prepared, set[bytes]]:
    ledger = Ledger()
    for part in parts:
        part.count_into(ledger)
    ledger.read += len(held_out)
    drawn = [(part, row) for part in parts for row in _drawn(section, part, list(range(len(part))), ledger)]
    rows = [*held_out, *drawn]
    evaluation = Prepared(_dataset(rows, ledger), ledger)
    if section.eval and not ledger.trained_tokens:
        raise DataError(f"data.eval: no row is left to evaluate on: {ledger.summary()}")
    return evaluation, {part.digest(row) for part, row in rows}


def _drawn(section: DataSection, part: _Part, rows: list[int], ledger: Ledger) -> list[int]:
    """The rows of a source as often as `weight` or `samples` say: whole passes, and of the last one a drawn share."""
    source = part.source
    wanted = source.samples or round(len(rows) * (source.weight or 1))
    if not rows or wanted == len(rows):
        return rows
    passes, rest = divmod(wanted, len(rows))
    rng = random.Random(f"{section.seed} {source.path} {source.split}")
    ledger.repeated += max(0, wanted - len(rows))
    if not passes:
        ledger.dropped["not drawn (weight or samples)"] += len(rows) - rest
    return rows * passes + [rows[i] for i in sorted(rng.sample(range(len(rows)), rest))]


def _dataset(rows: list[tuple[_Part, int]], ledger: Ledger) -> datasets.Dataset | None:
    import datasets

    tables, chosen, start = [], [], 0
    starts: dict[_Part, int] = {}
    for part, row in rows:
        if part not in starts:
            starts[part] = start
            tables.append(part.dataset)
            start += len(part.dataset)
        chosen.extend(starts[part] + piece for piece in part.keep(row, ledger))
    if not chosen:
        return None
    whole = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    return whole.select(chosen).select_columns(COLUMNS)


# ---------------------------------------------------------------------------------------------------------------
# A prepared source on disk


class _Part:
    """The prepared rows of one source: tokens on disk, in memory only what a row weighs.

    A row is what was read; it has one or, when split, several pieces, which are the trainer's rows.
    """

    def __init__(
        self, section: DataSection, source: Source, chat: Chat, max_length: int | None, say: Say
    ) -> None:
        import datasets

        self.source = source
        folder = _prepared(section, source, chat, max_length, say)
        self._account: dict[str, Any] = json.loads((folder / "account.json").read_text(encoding="utf-8"))
        if not self._account["read"]:
            raise DataError(f"{source.path}: it holds no rows")
        self.dataset = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        number = self._column("number")
        self._edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1)).tolist() if len(number) else [0]
        self._digests = self.dataset.data.column("digest").to_pylist()

    def __len__(self) -> int:
        return len(self._edges) - 1

    def _column(self, name: str) -> Any:
        return self.dataset.data.column(name).to_numpy()

    @cached_property
    def _columns(self) -> Any:
        return [self._column(name).tolist() for name in _WEIGHTS]

    def pieces(self, row: int) -> range:
        return range(self._edges[row], self._edges[row + 1])

    def name(self, row: int) -> str:
        return str(self.dataset[self._edges[row]]["row"])

    def digest(self, row: int) -> bytes:
        return bytes(self._digests[self._edges[row]])

    def cut(self, row: int) -> bool:
        return bool(self._column("cut")[self._edges[row]])

    def count_into(self, ledger: Ledger) -> None:
        """Adds what became of the rows of which nothing is left, and how the others were mended."""
        ledger.read += self._account["read"]
        ledger.lost_tokens += self._account["lost_tokens"]
        for reasons in ("mended", "dropped", "bad"):
            getattr(ledger, reasons).update(self._account[reasons])

    def keep(self, row: int, ledger: Ledger) -> range:
        """Counts a row that is trained on; gives its pieces."""
        pieces = self.pieces(row)
        ledger.split += len(pieces) > 1
        ledger.cut += self.cut(row)
        for piece in pieces:
            ledger.keep(self.source.path, *(column[piece] for column in self._columns))
        return pieces


# What a piece weighs in the ledger: the arguments of `Ledger.keep` behind the source.
_WEIGHTS = ("length", "trained", "turns", "ends", "characters", "language")


def _weigh(piece: Encoded, language: str) -> tuple[Any, ...]:
    ends = sum(int(piece.labels[turn.end - 1] == piece.input_ids[turn.end - 1]) for turn in piece.turns)
    length, turns = len(piece.input_ids), len(piece.turns)
    return length, piece.trained_tokens, turns, ends, piece.characters, language


def _prepared(section: DataSection, source: Source, chat: Chat, max_length: int | None, say: Say) -> Path:
    """The folder that holds the prepared rows of a source; prepared now if it is not there, by one process alone."""
    from filelock import FileLock

    root = cache_dir() / "data"
    folder = root / _key(section, source, chat, max_length)
    if (folder / "account.json").exists():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        # The lock goes with the process that holds it, whatever becomes of that.
        with FileLock(f"{folder}.lock"):
            if not (folder / "account.json").exists():
                beside = folder.with_suffix(".part")
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
                try:
                    _write(beside, section, source, chat, max_length, say)
                    beside.replace(folder)
                finally:
                    shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{folder}: the prepared rows cannot be written: {error.strerror or error}") from error
    return folder


def _key(section: DataSection, source: Source, chat: Chat, max_length: int | None) -> str:
    """A hash of everything that decides what the prepared rows of a source are."""
    options = section.model_dump(include={"train_on", "on_overflow", "on_bad_row", "merge_same_role"})
    reading = source.model_dump(include={"path", "format", "columns", "raw", "filter"})
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    parts = [chat.fingerprint, fingerprint(source), options, reading, max_length, hashlib.blake2b(b"".join(code))]
    parts[-1] = parts[-1].hexdigest()  # type: ignore[attr-defined]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _write(
    folder: Path, section: DataSection, source: Source, chat: Chat, max_length: int | None, say: Say
) -> None:
    import pyarrow as pa

    ints, texts = ("number", *_WEIGHTS[:-1]), ("row", "language")
    fields = [(name, pa.int32()) for name in ints] + [(name, pa.string()) for name in texts]
    fields += [("cut", pa.bool_()), ("digest", pa.binary(16))]
    fields += [(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")]
    schema = pa.schema(fields)
    ledger = Ledger()
    waiting: list[tuple[Any, ...]] = []
    ids: list[Any] = []
    labels: list[Any] = []

    def flush(writer: Any) -> None:
        columns = dict(zip((*ints, *texts, "cut", "digest"), zip(*waiting, strict=True), strict=True))
        arrays = [pa.array(columns[name], kind) for name, kind in fields[:-2]]
        writer.write_batch(pa.record_batch([*arrays, _lists(ids), _lists(labels)], schema=schema))
        for rows in (waiting, ids, labels):
            rows.clear()

    begun = told = time.monotonic()
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for number, fate in enumerate(prepare(section, source, chat, max_length)):
            _count(fate, ledger)
            if fate.pieces:
                digest = _digest(fate)
            for piece in fate.pieces:
                *weights, language = _weigh(piece, fate.language)
                waiting.append((number, *weights, fate.row, language, fate.pieces[0].cut, digest))
                ids.append(piece.input_ids)
                labels.append(piece.labels)
            if len(waiting) >= 256:
                flush(writer)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                rate = ledger.read / (told - begun)
                say(f"data: {source.path}: {account['read']:,} rows prepared, {rate:,.0f} a second")
        if waiting:
            flush(writer)
    account = {name: getattr(ledger, name) for name in ("read", "lost_tokens", "mended", "dropped", "bad")}
    (folder / "account.json").write_text(json.dumps(account, ensure_ascii=False), encoding="utf-8")


def _count(fate: Fate, ledger: Ledger) -> None:
    """Counts a row that was read, all but what is kept of it."""
    ledger.read += 1
    ledger.lost_tokens += fate.lost
    ledger.mended.update(fate.mended)
    ledger.dropped.update([fate.dropped] if fate.dropped else [])
    ledger.bad.update([fate.bad] if fate.bad else [])


def _digest(fate: Fate) -> bytes:
    """What a row is to the trainer: rows alike in it are duplicates."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in fate.pieces:
        digest.update(piece.input_ids.tobytes())
        digest.update(piece.labels.tobytes())
    return digest.digest()


def _lists(arrays: list[Any]) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


# ---------------------------------------------------------------------------------------------------------------
# Streams


def _stream(section: DataSection, chat: Chat, max_length: int | None, evaluated: set[bytes]) -> Prepared:
    """The sources read while training, each drawn from by its `weight`; when all are at their end, from the start."""
    import datasets

    ledger = Ledger()
    rows = partial(_streamed, section, chat, max_length, evaluated)
    # What is wrong with the first rows is told now, and a stream without rows does not start.
    if next(rows(tried := Ledger()), None) is None:
        raise DataError(f"no row is left to train on: {tried.summary()}")
    ints = datasets.List(datasets.Value("int32"))
    features = datasets.Features({"row": datasets.Value("string"), "input_ids": ints, "labels": ints})
    stream = datasets.IterableDataset.from_generator(lambda: rows(ledger), features=features)
    return Prepared(stream.shuffle(section.seed, buffer_size=_BUFFER), ledger)


def _streamed(
    section: DataSection, chat: Chat, max_length: int | None, evaluated: set[bytes], ledger: Ledger
) -> Iterator[dict[str, Any]]:
    rng, seen = random.Random(section.seed), set[bytes]()
    streams = [prepare(section, source, chat, max_length) for source in section.train]
    left = [source.samples or math.inf for source in section.train]
    open_ones = list(range(len(streams)))
    while open_ones:
        [i] = rng.choices(open_ones, [section.train[i].weight or 1 for i in open_ones])
        fate = next(streams[i], None) if left[i] > 0 else None
        if fate is None:
            open_ones.remove(i)
            continue
        _count(fate, ledger)
        if not fate.pieces:
            continue
        digest = _digest(fate)
        if digest in evaluated and not section.deduplicate:
            raise _leak(fate.row)
        if digest in evaluated or (section.deduplicate and digest in seen):
            ledger.dropped[LEAKED if digest in evaluated else DUPLICATE] += 1
            continue
        seen.add(digest)
        left[i] -= 1
        ledger.split += len(fate.pieces) > 1
        ledger.cut += fate.pieces[0].cut
        for piece in fate.pieces:
            ledger.keep(section.train[i].path, *_weigh(piece, fate.language))
            yield {"row": fate.row, "input_ids": piece.input_ids, "labels": piece.labels}


def _leak(row: str) -> DataError:
    return DataError(
        f"{row}: this row is also in the evaluation rows; take it out, or write data.deduplicate: true"
    )
