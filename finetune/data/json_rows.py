"""Reads rows of JSON and JSON Lines from a file, in pieces, each with the name of its place.

A row is bad if an object in it has a key twice, because `json` would silently keep only the last value.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from finetune.system.errors import DataError, LabelError
from finetune.system.files import with_repeated_key

Row = dict[str, Any]

# The most bytes of a row, in any kind of file. Its values take up to thirty times as much memory as its JSON.
MAX_ROW_BYTES = 1 << 26
_PIECE = 1 << 20  # bytes that are read at once


class CutOff(LabelError):
    """The row in which a file ends."""


def cut_off(inside: str, line: int, offset: int) -> CutOff:
    """The error for a row that starts at a line, counted from 1, and a byte offset."""
    start = f"the row starts at line {line}, byte offset {offset}"
    return CutOff(f"the file ends in the middle of a row{inside}", start)


def too_large(place: str) -> DataError:
    """The error for a row of more than `MAX_ROW_BYTES`, after which a file is not read on."""
    return DataError(f"{place}: the row is larger than {MAX_ROW_BYTES:,} bytes, the most that is read; divide it")


def lines_of(name: str, file: IO[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file.

    Raises:
        DataError: A line is longer than `MAX_ROW_BYTES`.
    """
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise too_large(f"{name}:{number}")
        yield line


class _Decoder(json.JSONDecoder):
    """Decodes JSON, and notes a key that an object has twice, of which `json` keeps only the last value."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self._twice: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> Row:
        row, twice = with_repeated_key(pairs)
        if twice is not None:
            self._twice = self._twice or repr(twice)
        return row

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """The value at `idx` and the index after it; sets `fault`."""
        self._twice = None
        return super().raw_decode(s, idx)

    @property
    def fault(self) -> LabelError | None:
        """The error for the value decoded last; None if no object in it has a key twice."""
        return LabelError(f"the key {self._twice} is written twice in one object") if self._twice else None


def decode_json(text: str) -> Any:
    """The value of a text of JSON.

    Raises:
        LabelError: An object in it has a key twice.
        ValueError: The text is not JSON, or Python cannot hold its value.
        RecursionError: It is nested too deeply.
    """
    decoder = _Decoder()
    value = decoder.decode(text)
    if fault := decoder.fault:
        raise fault
    return value


def read_jsonl(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    """Yields the row of each line that is not blank; in place of one that cannot be read, a `LabelError`.

    Raises:
        DataError: A line is longer than `MAX_ROW_BYTES`.
    """
    decoder, offset = _Decoder(), 0
    for number, line in enumerate(lines_of(name, file), 1):
        if line.strip():
            yield f"{name}:{number}", _parse(decoder, line, number, offset)
        offset += len(line)


def _parse(decoder: _Decoder, line: bytes, number: int, offset: int) -> Row | LabelError:
    is_last = not line.endswith(b"\n")
    try:
        row = decoder.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        if is_last and error.reason == "unexpected end of data":
            return cut_off(", inside a string", number, offset)
        byte, place = error.object[error.start], error.start + 1
        return LabelError(f"not UTF-8: byte {byte:#04x} at place {place} of the line")
    except json.JSONDecodeError as error:
        inside = _unfinished(error) if is_last else None
        if inside is not None:
            return cut_off(inside, number, offset)
        return LabelError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        # A number of more than 4300 digits, or too many nested lists.
        return LabelError(f"not JSON that can be read: {error}")
    if not isinstance(row, dict):
        return LabelError(f"a {type(row).__name__} where a row (a map) belongs")
    return decoder.fault or row


_NOT_BLANK = re.compile(r"[^ \t\n\r]")
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
# The ends of a JSON text that the next piece may continue: inside an escape, a word, or a number before its fraction or
# exponent. Each beginning is listed, so that an error does not depend on where a piece of the file ends.
_ESCAPE = re.compile(r"\\?u[0-9a-fA-F]{0,4}")
_UNFINISHED_TOKEN = re.compile(
    "|".join(word[:n] for word in _WORDS for n in range(1, len(word))) + r"|\.|[eE][+-]?|[ \t\n\r]*"
)


def _unfinished(error: json.JSONDecodeError) -> str | None:
    """Words for an error on where a JSON text ends; None if more text could not make it valid."""
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
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = _Decoder()
        # The number of line breaks in the dropped text, and of characters after the last of them.
        self._lines, self._column = 0, 0

    def more(self) -> bool:
        """Reads at least as much again as is left, so that a long row is parsed a few times only; False at the end."""
        data = self._file.read(max(_PIECE, len(self.text) - self.pos))
        (line, self._column, _), self.text = self.place(self.pos), self.text[self.pos :]
        self._lines, self._column, self.pos = line - 1, self._column - 1, 0
        self.read += len(data)
        try:
            self.text += self._utf8.decode(data)
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
        waiting = len(self.text[pos:].encode()) + len(self._utf8.getstate()[0])
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
        """The value at `pos`, which is row `number`; a `LabelError` for a row that has a key twice or is cut off."""
        if not self.peek():
            line, _, offset = self.place(self.pos)
            detail = f"a row or ] belongs at line {line}, byte offset {offset}"
            return CutOff("the file ends before its list is closed", detail)
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                inside = _unfinished(error)
                if inside is None:
                    raise self.fault(error.msg, error.pos, f"in row [{number}]") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._name}[{number}]: not JSON that can be read: {error}") from error
            else:
                # A number may continue after the text that was read.
                if type(value) not in (int, float) or not _UNFINISHED_TOKEN.fullmatch(self.text, end):
                    self.pos = end
                    return (isinstance(value, dict) and self._decoder.fault) or value
                inside = ""
            if len(self.text) - self.pos > MAX_ROW_BYTES:
                raise too_large(f"{self._name}[{number}]")
            if not self.more():
                line, _, offset = self.place(self.pos)
                return cut_off(inside, line, offset)

    def fault(self, reason: str, pos: int, where: str) -> DataError:
        """The error for a text that is not JSON, with its line, column and byte offset."""
        line, column, offset = self.place(pos)
        there = f"{reason.removesuffix(' at')} at column {column}, byte offset {offset}, {where}"
        return DataError(f"{self._name}:{line}: not JSON: {there}")


def read_json(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    """Yields the rows of a JSON list; in place of one that cannot be read, a `LabelError`.

    Raises:
        DataError: The file is not a list, or not JSON, or a row is larger than `MAX_ROW_BYTES`.
    """
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
        if isinstance(row, CutOff):
            return
        number += 1
    text.pos += 1
    if text.peek() or text.place(text.pos)[2] < text.read:
        raise text.fault("Extra data", text.pos, "behind the list")
