"""Rows from files or the Hub, and each to messages.

Rows are read one by one, each with a name that a person can find again (`data/chat.jsonl:12`). What cannot be read is
a `DataError` where it is the source, a `LabelError` where it is one row.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from finetune.chat import LabelError, Message
from finetune.recipe import Source

Row = dict[str, Any]


class DataError(ValueError):
    """A source or one of its rows cannot be used."""


# ---------------------------------------------------------------------------------------------------------------
# Formats: a row of somebody's dataset to {"messages": [...]} or, without chat turns, {"prompt": str, "completion": str}


def _messages(row: Row) -> Row:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise LabelError("it has no messages")
    return {"messages": [_message(m, m.get("role"), m.get("content")) for m in _maps(messages)]}


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def _sharegpt(row: Row) -> Row:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise LabelError("it has no conversations")
    roles = [t.get("from") for t in _maps(turns)]
    roles = [_SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role for role in roles]
    messages = [_message(t, role, t.get("value")) for t, role in zip(turns, roles, strict=True)]
    if system := row.get("system"):
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def _alpaca(row: Row) -> Row:
    parts = [part for part in (row.get("instruction"), row.get("input")) if part]
    if not all(isinstance(part, str) for part in parts):
        raise LabelError("its instruction or input is not text")
    prompt = "\n\n".join(parts)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": row.get("output")}]
    if system := row.get("system"):
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        raise LabelError("it has no prompt and completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = [_message(m, m.get("role"), m.get("content")) for m in (*_maps(prompt), *_maps(completion))]
    return {"messages": messages, "prompt_messages": len(prompt)}


def _text(row: Row) -> Row:
    if not isinstance(row.get("text"), str):
        raise LabelError("it has no text")
    return {"prompt": "", "completion": row["text"]}


FORMATS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
# The columns by which a format is known, looked for in this order.
_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


def _maps(items: Any) -> list[Row]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise LabelError("its messages are not a list of maps")
    return items


def _message(source: Row, role: Any, content: Any) -> Message:
    """One message of ours; typed text parts are joined, `train` and a `loss_weight` of 0 are kept as `train`."""
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise LabelError("a message has parts that are not text")
        # LLaMA-Factory writes the text under `value`.
        texts = [part.get("text", part.get("value")) for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise LabelError("a message has a text part without text")
        content = "".join(texts)
    if source.get("tool_calls"):
        raise LabelError("a message has tool_calls, which are not read")
    message: Message = {"role": role, "content": content}
    train, weight = source.get("train"), source.get("loss_weight")
    if train is None and weight is not None and role == "assistant":
        if weight not in (0, 1):
            raise LabelError(f"a message's loss_weight is {weight!r}; only 0 and 1 can be obeyed")
        train = bool(weight)
    if train is not None:
        if not isinstance(train, bool):
            raise LabelError(f"a message's train is {train!r}; write true or false")
        message["train"] = train
    return message


def known_format(source: Source, row: Row) -> str:
    """The format that a row's columns tell of.

    Raises:
        DataError: None does.
    """
    for name, columns in _COLUMNS.items():
        if all(column in row for column in columns):
            return name
    raise DataError(
        f"{source.path}: its format is not known from its columns ({', '.join(map(str, row))}); "
        f"write `format` ({', '.join(FORMATS)}) and `columns`"
    )


def map_columns(source: Source, row: Row) -> Row:
    """`columns` applied: a column's value, or a format string filled in once over the row."""
    mapped = dict(row)
    for ours, spec in source.columns.items():
        names = re.findall(r"\{(\w+)\}", spec)
        for name in names or [spec]:
            if name not in row:
                there = ", ".join(map(str, row))
                raise LabelError(f"columns: {ours}: there is no column {name!r}; there are {there}")
        for name in names:
            if not isinstance(row[name], str | int | float):
                raise LabelError(
                    f"columns: {ours}: the column {name!r} holds {type(row[name]).__name__}, not text"
                )
        mapped[ours] = re.sub(r"\{(\w+)\}", lambda m: str(row[m[1]]), spec) if names else row[spec]
    return mapped


# ---------------------------------------------------------------------------------------------------------------
# Reading


def read_rows(source: Source) -> Iterator[tuple[str, Row | LabelError]]:
    """Each row with its name; a row that could not be read comes as the `LabelError` that says why.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    if not is_file(source.path):
        yield from _read_hub(source)
        return
    path = Path(source.path).expanduser()
    names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    if not names:
        raise DataError(f"{source.path}: there is no such file")
    for name in names:
        try:
            yield from _read_file(name)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{name}: the file cannot be read: {reason}") from error


def is_file(path: str) -> bool:
    """Whether a source's `path` means files on this machine and not a dataset on the Hub."""
    suffixes = r"\.(jsonl?|parquet|csv)(\.gz)?$"
    return bool(re.search(suffixes, path) or glob.has_magic(path) or path[:1] in "/.~" or Path(path).exists())


def _read_hub(source: Source) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source.path}: the Hub dataset cannot be loaded: {reason}") from error
    for i, row in enumerate(rows):
        yield f"{source.path}[{source.split}]:{i}", row


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
        yield from read(name, file)


def _read_jsonl(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{name}:{number}", _parse(line)


def _parse(line: bytes) -> Row | LabelError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return LabelError(
            f"not UTF-8: byte {error.object[error.start]:#04x} at place {error.start + 1} of the line"
        )
    except json.JSONDecodeError as error:
        end = " (the file ends in the middle of a row)" if not line.endswith(b"\n") else ""
        return LabelError(f"not JSON: {error.msg} at column {error.colno}{end}")
    except (ValueError, RecursionError) as error:
        # A number of more than 4300 digits, or lists within lists without end.
        return LabelError(f"not JSON that can be read: {error}")
    return row if isinstance(row, dict) else LabelError(f"a {type(row).__name__} where a row (a map) belongs")


def _read_json(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8: byte {error.object[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}; "
            "if the file holds a row a line, name it .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON that can be read: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{name}: it holds a {type(rows).__name__}, not a list of rows")
    for i, row in enumerate(rows):
        yield (
            f"{name}[{i}]",
            row if isinstance(row, dict) else LabelError(f"a {type(row).__name__} where a map belongs"),
        )


def _read_csv(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row | LabelError]]:
    # Decoded line by line, so that a fault is told on its own line.
    reader = csv.DictReader((line.decode("utf-8-sig") for line in file), strict=True)
    try:
        for row in reader:
            cells = None in row or None in row.values()
            yield (
                f"{name}:{reader.line_num}",
                LabelError("the number of cells differs from the header's") if cells else row,
            )
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name}:{reader.line_num + 1}: not a CSV of UTF-8 text: {error}") from error


def _read_parquet(name: str, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield f"{name}[{number}]", row
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name}: not a whole Parquet file: {str(error).split(chr(10))[0]}") from error
