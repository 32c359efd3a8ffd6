"""Reads rows from files or the Hub, one at a time, each with a name that a person can find (`data/chat.jsonl:12`).

A source that cannot be read raises `DataError`; one row that cannot be read is yielded as a `LabelError`. Files are
read in pieces, so memory is that of a few rows however long the file is. A file that ends too early yields its whole
rows, then a `LabelError` for the row in which it ends.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from finetune.data.formats import Row
from finetune.recipe.schema import DataSource
from finetune.system import hub_errors
from finetune.system.errors import DataError, LabelError, first_line, reworded

_PIECE = 1 << 20  # bytes that are read at once


class _CutOff(LabelError):
    """The row in which a file ends."""


def _cut_off(inside: str, line: int, offset: int) -> _CutOff:
    start = f"the row starts at line {line}, byte offset {offset}"
    return _CutOff(f"the file ends in the middle of a row{inside}", start)


def read_rows(source: DataSource) -> Iterator[tuple[str, Row | LabelError]]:
    """Yields each row with its name; in place of a row that cannot be read, a `LabelError` with the reason.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    if not is_file(source.path):
        yield from _read_hub(source)
        return
    for name in _files(source):
        with _readable(name):
            yield from _read_file(name)


def fingerprint(source: DataSource) -> str:
    """A hash that changes with the rows: of the names (without folders) and contents of files, or of the Hub's commit.

    Raises:
        DataError: The source cannot be read.
    """
    parts: list[object] = []
    if not is_file(source.path):
        parts = [source.path, source.config, source.split, source.revision, _hub(source)[1]]
    else:
        for name in _files(source):
            with _readable(name), open(name, "rb") as file:
                parts += [Path(name).name, hashlib.file_digest(file, "blake2b").hexdigest()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def is_file(path: str) -> bool:
    """True if a source's `path` means files on this machine, not a dataset on the Hub."""
    suffixes = r"\.(jsonl?|parquet|csv)(\.gz)?$"
    return bool(re.search(suffixes, path) or glob.has_magic(path) or path[:1] in "/.~" or Path(path).exists())


def _files(source: DataSource) -> list[str]:
    path = Path(source.path).expanduser()
    names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    if not names:
        raise DataError(f"{source.path}: there is no such file")
    return names


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Raises what the system says of a file that cannot be read as `DataError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: the file cannot be read: {reason}") from error


# ---------------------------------------------------------------------------------------------------------------
# The Hub


def _read_hub(source: DataSource) -> Iterator[tuple[str, Row]]:
    rows = _hub(source)[0]
    # A column of JSON holds its maps as they were written.
    exact = {column for column, kind in (rows.features or {}).items() if "Json(" in repr(kind)}
    # A stream may break off in any of the libraries that fetch and unpack it.
    with reworded(DataError, f"{source.path}: the Hub dataset cannot be read", Exception):
        for number, row in enumerate(rows):
            cells = {
                column: cell if column in exact else _without_null_keys(cell) for column, cell in row.items()
            }
            yield f"{source.path}[{source.split}]:{number}", cells


def _hub(source: DataSource) -> tuple[Any, str]:
    """A dataset of the Hub, loaded once, and a hash of its commit."""
    return _load_hub(source.path, source.config, source.split, source.revision, source.streaming)


@functools.cache
def _load_hub(
    path: str, config: str | None, split: str, revision: str | None, stream: bool
) -> tuple[Any, str]:
    import datasets

    try:
        rows = datasets.load_dataset(path, config, split=split, revision=revision, streaming=stream)
        if not stream:
            return rows, rows._fingerprint
        # A stream has no fingerprint of its own; a builder's hash is the commit of its repository (datasets 5.2).
        return rows, datasets.load_dataset_builder(path, config, revision=revision).hash
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if words := hub_errors.hub_problem(f"datasets/{path}", error):
            raise DataError(f"{path} {words}") from error
        raise DataError(f"{path}: the Hub dataset cannot be loaded: {first_line(error)}") from error


def _without_null_keys(cell: object) -> object:
    """A cell without the null keys of its maps: Arrow gives each map the keys of all others."""
    if isinstance(cell, dict):
        return {key: _without_null_keys(value) for key, value in cell.items() if value is not None}
    return [_without_null_keys(value) for value in cell] if isinstance(cell, list) else cell


# ---------------------------------------------------------------------------------------------------------------
# Files


def _read_file(name: str) -> Iterator[tuple[str, Row | LabelError]]:
    if Path(name).stat().st_size == 0:
        raise DataError(f"{name}: the file is empty")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    read = readers.get(Path(name.removesuffix(".gz")).suffix)
    if read is None:
        raise DataError(
            f"{name}: not a file of rows by its name, which must end in {', '.join(readers)} or these and .gz"
        )
    with cast("IO[bytes]", gzip.open(name) if name.endswith(".gz") else open(name, "rb")) as file:
        if not isinstance(file, gzip.GzipFile) or read is _read_parquet:
            yield from read(name, file)
            return
        unpacked, row = _Unpacked(file), None
        for row_name, row in read(name, io.BufferedReader(unpacked)):
            yield row_name, row
        if unpacked.cut and not isinstance(row, _CutOff):
            yield name, _CutOff("the compressed file is cut off behind its last whole row")


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a .gz file; one that is cut off ends there and sets `cut`."""

    def __init__(self, packed: gzip.GzipFile) -> None:
        self._packed, self.cut = packed, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._packed.read1(len(buffer))
        except EOFError:
            self.cut, data = True, b""
        buffer[: len(data)] = data
        return len(data)


def _read_jsonl(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    offset = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{name}:{number}", _parse(line, number, offset)
        offset += len(line)


def _parse(line: bytes, number: int, offset: int) -> Row | LabelError:
    is_last = not line.endswith(b"\n")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        if is_last and error.reason == "unexpected end of data":
            return _cut_off(", inside a string", number, offset)
        byte, place = error.object[error.start], error.start + 1
        return LabelError(f"not UTF-8: byte {byte:#04x} at place {place} of the line")
    except json.JSONDecodeError as error:
        inside = _unfinished(error) if is_last else None
        if inside is not None:
            return _cut_off(inside, number, offset)
        return LabelError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        # A number of more than 4300 digits, or too many nested lists.
        return LabelError(f"not JSON that can be read: {error}")
    return row if isinstance(row, dict) else LabelError(f"a {type(row).__name__} where a row (a map) belongs")


_decode = json.JSONDecoder().raw_decode
_NOT_BLANK = re.compile(r"[^ \t\n\r]")
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
# Where a JSON text that goes on may end: in an escape; in a word, before a number's fraction or exponent. Each with its
# beginnings, so that an error does not depend on where a piece of the file ends.
_ESCAPE = re.compile(r"\\?u[0-9a-fA-F]{0,4}")
_UNFINISHED_TOKEN = re.compile(
    "|".join(word[:n] for word in _WORDS for n in range(1, len(word))) + r"|\.|[eE][+-]?|[ \t\n\r]*"
)


def _unfinished(error: json.JSONDecodeError) -> str | None:
    """Words for an error on where a JSON text ends; None where more text could not make it valid."""
    if error.msg.startswith("Invalid \\"):
        return ", inside a string" if _ESCAPE.fullmatch(error.doc, error.pos) else None
    if error.msg.startswith("Unterminated string"):
        return ", inside a string"
    return "" if _UNFINISHED_TOKEN.fullmatch(error.doc, error.pos) else None


class _Window:
    """The text of a file from the place at which it is read, `pos`; what comes before is dropped."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.text, self.pos = "", 0
        self._name, self._file, self.read = name, file, 0
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        # The number of line breaks in the dropped text, and of characters behind the last of them.
        self._lines, self._column = 0, 0

    def more(self) -> bool:
        """Reads at least as much again as is left, so that a long row is parsed a few times only; False at the end."""
        data = self._file.read(max(_PIECE, len(self.text) - self.pos))
        (line, self._column, _), self.text = self.place(self.pos), self.text[self.pos :]
        self._lines, self._column, self.pos = line - 1, self._column - 1, 0
        self.read += len(data)
        try:
            self.text += self._decoder.decode(data)
        except UnicodeDecodeError as error:
            line += self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            byte, offset = error.object[error.start], self.read - len(error.object) + error.start
            there = f"byte {byte:#04x} at byte offset {offset}"
            raise DataError(f"{self._name}:{line}: not UTF-8: {there}") from error
        return bool(data)

    def place(self, pos: int) -> tuple[int, int, int]:
        """Line and column of a character, counted from 1, and its offset in bytes."""
        before = self.text[:pos]
        column = len(before) - before.rfind("\n") if "\n" in before else self._column + pos + 1
        waiting = len(self.text[pos:].encode()) + len(self._decoder.getstate()[0])
        return self._lines + before.count("\n") + 1, column, self.read - waiting

    def peek(self) -> str:
        """The next character that is not white space, where `pos` moves to; empty at the end."""
        while not (match := _NOT_BLANK.search(self.text, self.pos)):
            self.pos = len(self.text)
            if not self.more():
                return ""
        self.pos = match.start()
        return match[0]

    def value(self, number: int) -> object:
        """The value at `pos`, which is row `number`; a `_CutOff` where the file ends in it."""
        if not self.peek():
            line, _, offset = self.place(self.pos)
            detail = f"a row or ] belongs at line {line}, byte offset {offset}"
            return _CutOff("the file ends before its list is closed", detail)
        while True:
            try:
                value, end = _decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                inside = _unfinished(error)
                if inside is None:
                    raise self.fault(error.msg, error.pos, f"in row [{number}]") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._name}[{number}]: not JSON that can be read: {error}") from error
            else:
                # A number may go on behind the text that was read.
                if type(value) not in (int, float) or not _UNFINISHED_TOKEN.fullmatch(self.text, end):
                    self.pos = end
                    return value
                inside = ""
            if not self.more():
                line, _, offset = self.place(self.pos)
                return _cut_off(inside, line, offset)

    def fault(self, reason: str, pos: int, where: str) -> DataError:
        """The error for a text that is not JSON, with its line, column and byte offset."""
        line, column, offset = self.place(pos)
        there = f"{reason.removesuffix(' at')} at column {column}, byte offset {offset}, {where}"
        return DataError(f"{self._name}:{line}: not JSON: {there}")


def _read_json(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    text = _Window(name, file)
    if (first := text.peek()) not in ("", "["):
        raise DataError(
            f"{name}: it begins with {first!r}, not with the [ of a list of rows; "
            "if it holds a row a line, name it .jsonl"
        )
    if not first:
        return
    text.pos, number = text.pos + 1, 0
    while (mark := text.peek()) != "]":
        if number and mark == ",":
            text.pos += 1
        elif number and mark:
            raise text.fault("Expecting ',' delimiter", text.pos, f"before row [{number}]")
        row = text.value(number)
        if not isinstance(row, dict | LabelError):
            row = LabelError(f"a {type(row).__name__} where a map belongs")
        yield f"{name}[{number}]", row
        if isinstance(row, _CutOff):
            return
        number += 1
    text.pos += 1
    if text.peek() or text.place(text.pos)[2] < text.read:
        raise text.fault("Extra data", text.pos, "behind the list")


class _Lines:
    """The lines of a CSV file as text, each decoded alone, so that an error names its own line."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.offset = file, 0
        self.ended = False
        # Of the current line: the file ends in it; the file is known to be cut off in it.
        self.last = self.cut = False

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.last = not line.endswith(b"\n")
            self.cut = self.last and getattr(getattr(self._file, "raw", None), "cut", False)
            try:
                text = line.decode("utf-8" if self.offset else "utf-8-sig")
            except UnicodeDecodeError as error:
                if not self.last or error.reason != "unexpected end of data":
                    raise
                text, self.cut = line[: error.start].decode(), True
            self.offset += len(line)
            yield text
        self.ended = True


def _read_csv(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    lines = _Lines(file)
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    while True:
        line, offset = reader.line_num + 1, lines.offset
        # The limit of a cell (131,072 characters) holds for the whole process, so it is set back for other code.
        limit = csv.field_size_limit(2**31 - 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{reader.line_num + 1}: not a CSV of UTF-8 text: {error}") from error
        except csv.Error as error:
            if not lines.ended:
                raise DataError(f"{name}:{line}: not a CSV of UTF-8 text: {error}") from error
            yield f"{name}:{line}", _cut_off(", inside a quoted cell", line, offset)
            return
        finally:
            csv.field_size_limit(limit)
        row: Row | LabelError = dict(zip(header, cells, strict=False))
        if lines.cut or (lines.last and len(cells) < len(header)):
            row = _cut_off("", line, offset)
        elif len(cells) != len(header):
            row = LabelError("the number of cells differs from the header's")
        if header and cells:
            yield f"{name}:{line}", row
        if not header and len(set(cells)) < len(cells):
            raise DataError(f"{name}:{line}: two columns have one name: {', '.join(cells)}")
        header = header or cells


def _read_parquet(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet as parquet

    with reworded(
        DataError, f"{name}: not a whole Parquet file", pyarrow.ArrowException, OSError, ValueError
    ):
        table = parquet.ParquetFile(file)
        rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{name}[{number}]", {column: _without_null_keys(cell) for column, cell in row.items()}
