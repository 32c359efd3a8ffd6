"""Caches the prepared rows of each source on disk, under a hash of all that they depend on.

So a changed template, tokenizer, row or option never gets old tokens. One process prepares a source while others wait
for it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.encoded import Encoded, Ids
from finetune.data.ledger import NUMBERS_OF_PIECE, Ledger, PieceCounts
from finetune.data.prepare import Preparation, prepare
from finetune.data.readers import fingerprint
from finetune.recipe.schema import DataSource
from finetune.system.cache import cache_dir, made_once
from finetune.system.errors import DataError
from finetune.system.terminal import Say


def trainer_columns(method: str) -> list[str]:
    """The columns of the trainer's rows: for pairs those of the chosen side, then those of the rejected side."""
    columns = ["row", "input_ids", "labels"]
    return columns + {"sft": [], "kto": ["desirable"]}.get(method, ["rejected_input_ids", "rejected_labels"])


class CachedSource:
    """The prepared rows of one source: their tokens are on disk, only their counts are in memory.

    A row here is one that was read. It has one piece, or several if it was split; a piece is a row for the trainer, in
    `trainer_columns`.

    Args:
        preparation: The settings for preparing rows.
        source: The source.
        place: The index of the source in `[*data.train, *data.eval]`.
        say: Called with lines on the progress of a long preparation.

    Raises:
        DataError: The source cannot be used or has no rows, a row cannot be used and `data.on_bad_row` is `error`, or
            the cache cannot be written.
        TemplateError: The chat template cannot be used with this tokenizer.
    """

    def __init__(self, preparation: Preparation, source: DataSource, place: int, say: Say) -> None:
        import datasets

        self.source, self.place, self.method = source, place, preparation.method
        folder = _prepared(preparation, source, say)
        self._account: dict[str, Any] = json.loads((folder / "account.json").read_text(encoding="utf-8"))
        if not self._account["read"]:
            raise DataError(f"{source.name}: it holds no rows")
        self.dataset = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        number = self.dataset.data.column("number").to_numpy()
        # The index of each row's first piece, and at the end the number of all pieces.
        self._edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1)).tolist() if len(number) else [0]

    def __len__(self) -> int:
        return len(self._edges) - 1

    @cached_property
    def _columns(self) -> dict[str, Any]:
        table = self.dataset.data
        columns = {name: table.column(name).to_numpy() for name in ("cut", "lost", *NUMBERS_OF_PIECE)}
        # Arrays take less memory than lists of bytes; interned, each language is one string.
        for name in ("text", "digest"):
            columns[name] = np.array(table.column(name).to_pylist(), "V16")
        return columns | {"language": [sys.intern(word) for word in table.column("language").to_pylist()]}

    def name(self, row: int) -> str:
        """The name of a row, such as `rows.jsonl:12`."""
        return str(self.dataset[self._edges[row]]["row"])

    def origins(self, row: int) -> list[tuple[str, str]]:
        """The source's path and the language of each of a row's pieces."""
        pieces = range(self._edges[row], self._edges[row + 1])
        return [(self.source.name, self._columns["language"][piece]) for piece in pieces]

    def digests(self, row: int) -> tuple[bytes, bytes]:
        """The two hashes of a row, as `RowResult.digests`."""
        first = self._edges[row]
        return self._columns["text"][first].tobytes(), self._columns["digest"][first].tobytes()

    def count_into(self, ledger: Ledger) -> None:
        """Counts the rows that were read, and which of them were mended, dropped or bad."""
        ledger.read += self._account["read"]
        ledger.lost_tokens += self._account["lost_tokens"]
        for name in ("mended", "dropped", "bad", "unread"):
            getattr(ledger, name).update(self._account[name])
        ledger.first = self._account["first"] | ledger.first

    def keep(self, row: int, ledger: Ledger) -> range:
        """Counts a row as kept; returns the range of its pieces in `dataset`."""
        pieces = range(self._edges[row], self._edges[row + 1])
        columns = self._columns
        counts = [
            PieceCounts._make([*(int(columns[name][piece]) for name in NUMBERS_OF_PIECE), columns["language"][piece]])
            for piece in pieces
        ]
        cut, lost = (columns[name][pieces[0]] for name in ("cut", "lost"))
        ledger.keep_row(self.source.name, counts, bool(cut), int(lost), is_pair=self.method != "sft")
        return pieces


def _prepared(preparation: Preparation, source: DataSource, say: Say) -> Path:
    """The folder with the prepared rows of a source; prepares them if they are not there."""
    name = f"data/{_key(preparation, source)}"
    try:
        return made_once(name, lambda folder: _write(folder, preparation, source, say))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{cache_dir() / name}: the prepared rows cannot be written: {reason}") from error


def _key(preparation: Preparation, source: DataSource) -> str:
    """A hash of all that a source's prepared rows depend on: settings, template, tokenizer, rows, and this code."""
    section = preparation.section
    names = {"train_on", "train_on_thinking", "on_overflow", "on_bad_row", "merge_same_role"}
    options = section.model_dump(include=names)
    reading = source.model_dump(include={"path", "format", "columns", "raw", "special_tokens", "filter"})
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    chat, max_length = preparation.chat, preparation.max_length
    parts = [chat.fingerprint, fingerprint(source), options, reading, max_length, preparation.method, code]
    if source.name != source.path:
        parts.append(source.name)  # which the names of the rows begin with
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _write(folder: Path, preparation: Preparation, source: DataSource, say: Say) -> None:
    """Prepares the rows of a source and writes them to a folder, with the counts of those that are left out."""
    import pyarrow as pa

    ints, texts = ("number", "lost", *NUMBERS_OF_PIECE), ("row", "language")
    fields = [(name, pa.int32()) for name in ints] + [(name, pa.string()) for name in texts]
    fields += [("cut", pa.bool_()), ("text", pa.binary(16)), ("digest", pa.binary(16))]
    fields += [("desirable", pa.bool_())] if preparation.method == "kto" else []
    lists = [name for name in trainer_columns(preparation.method) if name.endswith(("input_ids", "labels"))]
    schema = pa.schema([*fields, *((name, pa.list_(pa.int32())) for name in lists)])
    ledger = Ledger()
    waiting: list[tuple[tuple[Any, ...], Encoded]] = []

    def flush(writer: Any) -> None:
        values, pieces = zip(*waiting, strict=True)
        columns = zip(*values, strict=True)
        arrays = [pa.array(column, kind) for column, (_, kind) in zip(columns, fields, strict=True)]
        for sides in zip(*(piece.sides for piece in pieces), strict=True):
            arrays += [_lists([side.input_ids for side in sides]), _lists([side.labels for side in sides])]
        writer.write_batch(pa.record_batch(arrays, schema=schema))
        waiting.clear()

    begun = said = time.monotonic()
    with open(folder / "rows.arrow", "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for number, result in enumerate(prepare(preparation, source)):
            result.count_into(ledger)
            digests = result.digests if result.pieces else ()
            for piece in result.pieces:
                *counts, language = result.counts(piece)
                cut = result.pieces[0].cut
                values = (number, result.lost, *counts, result.row, language, cut, *digests)
                values += () if piece.desirable is None else (piece.desirable,)
                waiting.append((values, piece))
            if len(waiting) >= 256:
                flush(writer)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                rate = ledger.read / (said - begun)
                say(f"data: {source.name}: {ledger.read:,} rows prepared, {rate:,.0f} a second")
        if waiting:
            flush(writer)
    account = {
        name: getattr(ledger, name) for name in ("read", "lost_tokens", "mended", "dropped", "bad", "unread", "first")
    }
    (folder / "account.json").write_text(json.dumps(account, ensure_ascii=False), encoding="utf-8")


def _lists(arrays: list[Ids]) -> Any:
    """A column of lists from arrays of integers, without a Python object for each integer."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
