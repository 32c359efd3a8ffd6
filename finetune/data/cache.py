"""The prepared rows of each source on disk, keyed by everything that decides what they are.

So a changed template, tokenizer, row or option never meets old tokens. One process prepares a source, the others wait
for it; what is not whole is never seen.
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

from finetune.data.chat import Chat
from finetune.data.ledger import Ledger
from finetune.data.prepare import LEDGER_VALUES, prepare
from finetune.data.readers import fingerprint
from finetune.recipe.schema import DataSection, DataSource
from finetune.system.errors import DataError
from finetune.system.files import cache_dir, made_once
from finetune.system.terminal import Say


class CachedSource:
    """The prepared rows of one source: tokens on disk, in memory only what a row weighs.

    A row is what was read; it has one or, when split, several pieces, which are the trainer's rows.
    """

    def __init__(
        self, section: DataSection, source: DataSource, chat: Chat, max_length: int | None, say: Say
    ) -> None:
        import datasets

        self.source = source
        folder = _prepared(section, source, chat, max_length, say)
        self._account: dict[str, Any] = json.loads((folder / "account.json").read_text(encoding="utf-8"))
        if not self._account["read"]:
            raise DataError(f"{source.path}: it holds no rows")
        self.dataset = datasets.Dataset.from_file(str(folder / "rows.arrow"))
        number = self.dataset.data.column("number").to_numpy()
        self._edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1)).tolist() if len(number) else [0]

    def __len__(self) -> int:
        return len(self._edges) - 1

    @cached_property
    def _columns(self) -> dict[str, Any]:
        table = self.dataset.data
        columns = {name: table.column(name).to_numpy() for name in ("cut", "lost", *LEDGER_VALUES[:-1])}
        # As arrays, which take less memory than lists of bytes; of each language there is one string.
        for name in ("text", "digest"):
            columns[name] = np.array(table.column(name).to_pylist(), "V16")
        return columns | {"language": [sys.intern(word) for word in table.column("language").to_pylist()]}

    def name(self, row: int) -> str:
        """What the row is called, such as `rows.jsonl:12`."""
        return str(self.dataset[self._edges[row]]["row"])

    def origins(self, row: int) -> list[tuple[str, str]]:
        """Of each of the row's pieces, the source's path and the language."""
        pieces = range(self._edges[row], self._edges[row + 1])
        return [(self.source.path, self._columns["language"][piece]) for piece in pieces]

    def digests(self, row: int) -> tuple[bytes, bytes]:
        """As `RowResult.digests`."""
        first = self._edges[row]
        return self._columns["text"][first].tobytes(), self._columns["digest"][first].tobytes()

    def count_into(self, ledger: Ledger) -> None:
        """Adds what became of the rows of which nothing is left, and how the others were mended."""
        ledger.read += self._account["read"]
        ledger.lost_tokens += self._account["lost_tokens"]
        for reasons in ("mended", "dropped", "bad"):
            getattr(ledger, reasons).update(self._account[reasons])
        ledger.first = self._account["first"] | ledger.first

    def keep(self, row: int, ledger: Ledger) -> range:
        """Counts a row that is trained on; gives its pieces."""
        pieces = range(self._edges[row], self._edges[row + 1])
        weights = []
        for piece in pieces:
            *numbers, language = (self._columns[name][piece] for name in LEDGER_VALUES)
            weights.append([*map(int, numbers), language])
        cut, lost = (self._columns[name][pieces[0]] for name in ("cut", "lost"))
        ledger.keep_row(self.source.path, weights, bool(cut), int(lost))
        return pieces


def _prepared(section: DataSection, source: DataSource, chat: Chat, max_length: int | None, say: Say) -> Path:
    """The folder that holds the prepared rows of a source; prepared now if it is not there, by one process alone."""
    name = f"data/{_key(section, source, chat, max_length)}"
    try:
        return made_once(name, lambda folder: _write(folder, section, source, chat, max_length, say))
    except OSError as error:
        raise DataError(
            f"{cache_dir() / name}: the prepared rows cannot be written: {error.strerror or error}"
        ) from error


def _key(section: DataSection, source: DataSource, chat: Chat, max_length: int | None) -> str:
    """A hash of everything that decides what the prepared rows of a source are."""
    options = section.model_dump(include={"train_on", "on_overflow", "on_bad_row", "merge_same_role"})
    reading = source.model_dump(include={"path", "format", "columns", "raw", "filter"})
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    sources = hashlib.blake2b(b"".join(code)).hexdigest()
    parts = [chat.fingerprint, fingerprint(source), options, reading, max_length, sources]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _write(
    folder: Path, section: DataSection, source: DataSource, chat: Chat, max_length: int | None, say: Say
) -> None:
    import pyarrow as pa

    ints, texts = ("number", "lost", *LEDGER_VALUES[:-1]), ("row", "language")
    fields = [(name, pa.int32()) for name in ints] + [(name, pa.string()) for name in texts]
    fields += [("cut", pa.bool_()), ("text", pa.binary(16)), ("digest", pa.binary(16))]
    fields += [(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")]
    schema = pa.schema(fields)
    ledger = Ledger()
    waiting: list[tuple[Any, ...]] = []
    ids: list[Any] = []
    labels: list[Any] = []

    def flush(writer: Any) -> None:
        columns = dict(zip((*ints, *texts, "cut", "text", "digest"), zip(*waiting, strict=True), strict=True))
        arrays = [pa.array(columns[name], kind) for name, kind in fields[:-2]]
        writer.write_batch(pa.record_batch([*arrays, _lists(ids), _lists(labels)], schema=schema))
        for rows in (waiting, ids, labels):
            rows.clear()

    begun = told = time.monotonic()
    with open(folder / "rows.arrow", "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for number, fate in enumerate(prepare(section, source, chat, max_length)):
            fate.count_into(ledger)
            digests = fate.digests if fate.pieces else ()
            for piece in fate.pieces:
                *weights, language = fate.ledger_values(piece)
                waiting.append(
                    (number, fate.lost, *weights, fate.row, language, fate.pieces[0].cut, *digests)
                )
                ids.append(piece.input_ids)
                labels.append(piece.labels)
            if len(waiting) >= 256:
                flush(writer)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                rate = ledger.read / (told - begun)
                say(f"data: {source.path}: {ledger.read:,} rows prepared, {rate:,.0f} a second")
        if waiting:
            flush(writer)
    account = {
        name: getattr(ledger, name) for name in ("read", "lost_tokens", "mended", "dropped", "bad", "first")
    }
    (folder / "account.json").write_text(json.dumps(account, ensure_ascii=False), encoding="utf-8")


def _lists(arrays: list[Any]) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
