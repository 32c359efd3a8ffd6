"""Rows from files or the Hub, to messages, to the datasets that the trainer takes.

Rows are read one by one, each with a name that a person can find again (`data/chat.jsonl:12`). What cannot be used is
a `DataError` that names the row, or, with `data.on_bad_row: skip`, a line in the ledger.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from finetune.chat import IGNORE, Chat, Encoded, LabelError, Message, TemplateError
from finetune.ledger import Ledger
from finetune.recipe import DataSection, Source

if TYPE_CHECKING:
    from datasets import Dataset

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
    message: Message = {"role": role, "content": content}
    train, weight = source.get("train"), source.get("loss_weight")
    if train is None and weight is not None and role == "assistant":
        if not isinstance(weight, int | float):
            raise LabelError(f"a message's loss_weight is {weight!r}, not a number")
        train = bool(weight)
    if train is not None:
        if not isinstance(train, bool):
            raise LabelError(f"a message's train is {train!r}; write true or false")
        message["train"] = train
    return message


def _known_format(source: Source, row: Row) -> str:
    for name, columns in _COLUMNS.items():
        if all(column in row for column in columns):
            return name
    raise DataError(
        f"{source.path}: its format is not known from its columns ({', '.join(map(str, row))}); "
        f"write `format` ({', '.join(FORMATS)}) and `columns`"
    )


def _map_columns(source: Source, row: Row) -> Row:
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


# ---------------------------------------------------------------------------------------------------------------
# Building


@dataclass
class Prepared:
    """Rows ready for the trainer: columns `row` (its name), `input_ids`, `labels`; and their account."""

    dataset: Dataset | None
    ledger: Ledger = field(default_factory=Ledger)


def build(section: DataSection, chat: Chat, max_length: int | None) -> tuple[Prepared, Prepared]:
    """The training and the evaluation rows of a recipe.

    The same recipe gives the same rows in the same order on every machine. With `eval_fraction`, whole rows go to one
    side or the other, chosen by `data.seed`.

    Raises:
        DataError: A source or row cannot be used, or nothing is left to train on.
    """
    train, evaluation = Ledger(), Ledger()
    rows = [_encoded(section, source, chat, max_length, train) for source in section.train]
    kept = [group for source_rows in rows for group in source_rows]
    held_out: list[list[tuple[str, str, Encoded]]] = []
    if section.eval_fraction is not None and kept:
        count = max(1, round(len(kept) * section.eval_fraction))
        if count >= len(kept):
            raise DataError(
                f"data.eval_fraction: {section.eval_fraction} of {len(kept)} rows leaves none to train on"
            )
        chosen = set(random.Random(section.seed).sample(range(len(kept)), count))
        held_out = [kept[i] for i in sorted(chosen)]
        kept = [group for i, group in enumerate(kept) if i not in chosen]
        train.read -= count
        evaluation.read += count
    for source in section.eval:
        held_out += _encoded(section, source, chat, max_length, evaluation)
    prepared = _dataset(kept, train), _dataset(held_out, evaluation)
    if not train.trained_tokens:
        raise DataError(f"no row is left to train on: {train.summary()}")
    if section.eval and not evaluation.trained_tokens:
        raise DataError(f"data.eval: no row is left to evaluate on: {evaluation.summary()}")
    return prepared


def _encoded(
    section: DataSection, source: Source, chat: Chat, max_length: int | None, ledger: Ledger
) -> list[list[tuple[str, str, Encoded]]]:
    """The usable rows of a source, each as the one or several rows that it became."""
    groups = []
    form: str | None = source.format
    read, mapped = ledger.read, False
    for name, row in read_rows(source):
        ledger.read += 1
        try:
            if isinstance(row, LabelError):
                raise row
            row = _map_columns(source, row)
            mapped = True
            form = form or _known_format(source, row)
            pieces = _fit(section, source, form, row, chat, max_length)
        except LabelError as error:
            if not mapped and str(error).startswith("columns: "):
                # No row has had these columns yet: the recipe is wrong, not the row.
                raise DataError(f"{source.path}: {error}") from error
            if section.on_bad_row == "error":
                raise DataError(f"{name}: {error}; mend the row, or write data.on_bad_row: skip") from error
            # What stands behind the semicolon is of this row alone.
            ledger.bad[re.sub(r"message \d+: ", "", str(error)).partition(";")[0]] += 1
            continue
        except _TooLong as error:
            if section.on_overflow == "error":
                raise DataError(f"{name}: {error} (data.on_overflow: error)") from error
            ledger.dropped[str(error)] += 1
            continue
        groups.append([(name, source.path, piece) for piece in pieces])
    if ledger.read == read:
        raise DataError(f"{source.path}: it holds no rows")
    return groups


class _TooLong(ValueError):
    """A row that does not fit and cannot be made to."""


def _fit(
    section: DataSection,
    source: Source,
    form: str,
    row: Row,
    chat: Chat,
    max_length: int | None,
) -> list[Encoded]:
    """One row as rows of at most `max_length` tokens, by `data.on_overflow`."""
    if source.raw or (form == "prompt_completion" and chat.tokenizer.chat_template is None):
        converted: Row = {"prompt": row.get("prompt"), "completion": row.get("completion")}
        if not all(isinstance(text, str) for text in converted.values()):
            raise LabelError("its prompt or completion is not text")
    else:
        converted = FORMATS[form](row)
    if "messages" not in converted:
        encoded = chat.encode_text(converted["prompt"], converted["completion"])
        if section.train_on == "all":
            encoded.labels[1:] = encoded.input_ids[1:]
    else:
        messages, train_on = converted["messages"], section.train_on or "assistant"
        if train_on == "completion":
            if form != "prompt_completion":
                raise DataError(
                    f"{source.path}: data.train_on: completion needs prompt_completion rows, these are {form}; "
                    "write assistant or last_assistant"
                )
            train_on = "assistant"
        if train_on != "all":
            for message in messages[: converted.get("prompt_messages", 0)]:
                if message["role"] == "assistant":
                    message.setdefault("train", False)
        encoded = chat.encode(messages, train_on)
    if max_length is None or len(encoded.input_ids) <= max_length:
        return [encoded]
    over = f"longer than training.max_length {max_length}"
    if section.on_overflow in ("error", "drop"):
        raise _TooLong(over)
    if "messages" not in converted:
        return _cut_text(section, encoded, max_length)
    if section.on_overflow == "truncate_turns":
        return [_cut_turns(encoded, max_length)]
    return _split_turns(messages, train_on, chat, max_length)


def _cut_turns(encoded: Encoded, max_length: int) -> Encoded:
    """The row up to the last trained turn that ends within `max_length`."""
    whole = [turn for turn in encoded.turns if turn.end <= max_length]
    if not whole:
        raise _TooLong(f"with no trained turn that ends within training.max_length {max_length}")
    end = whole[-1].end
    return Encoded(encoded.input_ids[:end], encoded.labels[:end], tuple(whole), cut=True)


def _cut_text(section: DataSection, encoded: Encoded, max_length: int) -> list[Encoded]:
    """A row without turns has no better place to be cut than `max_length`; `split` keeps the rest as further rows."""
    starts = range(0, len(encoded.input_ids), max_length) if section.on_overflow == "split" else [0]
    pieces = []
    for start in starts:
        here = slice(start, start + max_length)
        labels = [IGNORE, *encoded.labels[here][1:]]
        pieces.append(Encoded(encoded.input_ids[here], labels, cut=section.on_overflow == "truncate_turns"))
    pieces = [piece for piece in pieces if piece.trained_tokens]
    if not pieces:
        raise _TooLong(f"with no trained token within training.max_length {max_length}")
    return pieces


def _split_turns(messages: list[Message], train_on: str, chat: Chat, max_length: int) -> list[Encoded]:
    """The conversation as several, each beginning at a user message with the system text before it.

    Each holds as many exchanges as fit; one exchange that alone does not fit is left out, and the row counts as cut.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(system) :]
    # What an assistant says before the first user goes with that user's exchange.
    starts = [0, *[i for i, message in enumerate(body) if message["role"] == "user"][1:]]
    # Only the whole conversation knows which turn is its last.
    last = max(i for i, message in enumerate(body) if message["role"] == "assistant")
    body = [
        message | {"train": message.get("train", train_on != "last_assistant" or i == last)}
        if message["role"] == "assistant"
        else message
        for i, message in enumerate(body)
    ]
    pieces, begin, lost = [], 0, False
    while begin < len(starts):
        best, end = None, begin + 1
        for end_try in range(begin + 1, len(starts) + 1):
            stop = starts[end_try] if end_try < len(starts) else len(body)
            part = system + body[starts[begin] : stop]
            if not any(message.get("train") for message in part):
                if best is None:
                    end = end_try
                continue
            encoded = chat.encode(part, train_on if train_on == "all" else "assistant")
            if len(encoded.input_ids) > max_length:
                lost |= best is None
                break
            best, end = encoded, end_try
        if best is not None:
            pieces.append(best)
        begin = end
    if not pieces:
        raise _TooLong(f"with no exchange that fits into training.max_length {max_length}")
    return [replace(pieces[0], cut=lost), *pieces[1:]]


def _dataset(groups: list[list[tuple[str, str, Encoded]]], ledger: Ledger) -> Prepared:
    import datasets
    import pyarrow as pa

    names, ids, labels = [], [], []
    for group in groups:
        ledger.split += len(group) > 1
        ledger.cut += any(row.cut for _, _, row in group)
    for name, source, row in (piece for group in groups for piece in group):
        if not row.trained_tokens:
            ledger.dropped["with nothing to train on"] += 1
            continue
        ledger.keep(source, len(row.input_ids), row.trained_tokens, len(row.turns))
        names.append(name)
        ids.append(pa.array(row.input_ids, pa.int32()))
        labels.append(pa.array(row.labels, pa.int32()))
    if not names:
        return Prepared(None, ledger)
    columns = {"row": pa.array(names), "input_ids": _lists(ids), "labels": _lists(labels)}
    return Prepared(datasets.Dataset(pa.table(columns)), ledger)


def _lists(arrays: list[Any]) -> Any:
    import pyarrow as pa

    offsets = [0]
    for array in arrays:
        offsets.append(offsets[-1] + len(array))
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.concat_arrays(arrays))


__all__ = ["DataError", "Prepared", "TemplateError", "build", "is_file", "read_rows"]
