"""Reads rows from files or the Hub, one at a time, each with the name of its place (`data/chat.jsonl:12`).

A source that cannot be read raises `DataError`; one row that cannot be read is yielded as a `LabelError`. Files are
read in pieces, so only a few rows are in memory. A file that is cut off yields its complete rows, then a `LabelError`
for the incomplete one.
"""

from __future__ import annotations

import contextlib
import csv
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

from finetune.data import json_rows
from finetune.data.hub_rows import hub_fingerprint, read_hub, without_null_keys
from finetune.data.json_rows import CutOff, Row, cut_off, lines_of, read_json, read_jsonl, too_large
from finetune.recipe.schema import DataSource
from finetune.system.errors import DataError, LabelError, reworded
from finetune.system.files import open_regular

# The rows of a Parquet file that are in memory at once.
_BATCH = 32


def read_rows(source: DataSource) -> Iterator[tuple[str, Row | LabelError]]:
    """Yields each row with its name; in place of a row that cannot be read, a `LabelError` with the reason.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    if not is_file(source.path):
        yield from read_hub(source)
        return
    for name in _files(source):
        shown = source.shown(name)
        with _readable(shown):
            for row_name, row in _read_file(name):
                yield row_name.replace(name, shown, 1), row


def fingerprint(source: DataSource) -> str:
    """A hash that changes with the rows: of the names (without folders) and contents of files, or of the Hub's commit.

    Raises:
        DataError: The source cannot be read.
    """
    parts: list[object] = []
    if not is_file(source.path):
        parts = [source.path, source.config, source.split, source.revision, hub_fingerprint(source)]
    else:
        for name in _files(source):
            with _readable(source.shown(name)), open_regular(name) as file:
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
        raise DataError(f"{source.name}: there is no such file")
    return names


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns the system's errors at reading a file into a `DataError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: the file cannot be read: {reason}") from error


# ---------------------------------------------------------------------------------------------------------------
# Files


def _read_file(name: str) -> Iterator[tuple[str, Row | LabelError]]:
    readers = {".jsonl": read_jsonl, ".json": read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    read = readers.get(Path(name.removesuffix(".gz")).suffix)
    if read is None:
        raise DataError(
            f"{name}: not a file of rows by its name, which must end in {', '.join(readers)} or these and .gz"
        )
    with open_regular(name) as packed:
        if not packed.peek(1):
            raise DataError(f"{name}: the file is empty")
        if not name.endswith(".gz"):
            yield from read(name, packed)
            return
        file = gzip.GzipFile(fileobj=packed)
        if read is _read_parquet:
            yield from read(name, cast("IO[bytes]", file))
            return
        unpacked, row = _Unpacked(file), None
        for row_name, row in read(name, io.BufferedReader(unpacked)):
            yield row_name, row
        if unpacked.cut and not isinstance(row, CutOff):
            yield name, CutOff("the compressed file is cut off behind its last whole row")


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


class _Lines:
    """The lines of a CSV file as text, each decoded alone, so that an error names its own line."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self._name, self._file, self.offset = name, file, 0
        # Where the current row begins: its line, and the offset in bytes.
        self.start = (1, 0)
        self.ended = False
        # About the current line: the file ends in it; the file is known to be cut off in it.
        self.last = self.cut = False

    def __iter__(self) -> Iterator[str]:
        for line in lines_of(self._name, self._file):
            self.last = not line.endswith(b"\n")
            self.cut = self.last and getattr(getattr(self._file, "raw", None), "cut", False)
            try:
                text = line.decode("utf-8" if self.offset else "utf-8-sig")
            except UnicodeDecodeError as error:
                if not self.last or error.reason != "unexpected end of data":
                    raise
                text, self.cut = line[: error.start].decode(), True
            self.offset += len(line)
            if self.offset - self.start[1] > json_rows.MAX_ROW_BYTES:
                raise too_large(f"{self._name}:{self.start[0]}")
            yield text
        self.ended = True


def _read_csv(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    lines = _Lines(name, file)
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    while True:
        line, offset = lines.start = reader.line_num + 1, lines.offset
        # The csv module's limit of a cell (131,072 characters) is global, so it is restored for other code.
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
            yield f"{name}:{line}", cut_off(", inside a quoted cell", line, offset)
            return
        finally:
            csv.field_size_limit(limit)
        row: Row | LabelError = dict(zip(header, cells, strict=False))
        if lines.cut or (lines.last and len(cells) < len(header)):
            row = cut_off("", line, offset)
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

    with reworded(DataError, f"{name}: not a whole Parquet file", pyarrow.ArrowException, OSError, ValueError):
        table = parquet.ParquetFile(file)
        if len(set(table.schema_arrow.names)) < len(table.schema_arrow.names):
            raise DataError(f"{name}: two columns have one name: {', '.join(table.schema_arrow.names)}")
        for group in (table.metadata.row_group(i) for i in range(table.num_row_groups)):
            size = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
            if size > json_rows.MAX_ROW_BYTES * max(1, group.num_rows):
                raise too_large(name)
        # A value that many rows share is small in the file, and in memory once for each row of a batch.
        rows = (row for batch in table.iter_batches(batch_size=_BATCH) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{name}[{number}]", {column: without_null_keys(cell) for column, cell in row.items()}
