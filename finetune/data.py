"""Rows to the datasets that the trainer takes: encoded, fitted to `max_length`, split, counted.

What cannot be used is a `DataError` that names the row, or, with `data.on_bad_row: skip`, a line in the ledger.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from finetune.chat import IGNORE, Chat, Encoded, LabelError, Message
from finetune.ledger import Ledger
from finetune.recipe import DataSection, Source
from finetune.rows import FORMATS, DataError, Row, known_format, map_columns, read_rows

if TYPE_CHECKING:
    from datasets import Dataset


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
            row = map_columns(source, row)
            mapped = True
            form = form or known_format(source, row)
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
        if section.train_on in ("assistant", "last_assistant"):
            raise DataError(
                f"{source.path}: data.train_on: {section.train_on} needs chats, these rows have no turns; "
                "write completion or all"
            )
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
