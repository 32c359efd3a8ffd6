"""The rows of one source to encoded rows of at most `max_length` tokens; what becomes of each is told as a `RowResult`.

Rendering and labels are Python's work and go on while the tokenizer, which needs none, is busy with the rows before.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from finetune.data.chat import IGNORE, Chat, Encoded, Ids, RenderedChat
from finetune.data.formats import FORMATS, Row, detect_format, map_columns, matches_filter
from finetune.data.language import language
from finetune.data.ledger import Ledger
from finetune.data.readers import read_rows
from finetune.data.turns import Message, is_text_only
from finetune.recipe.schema import DataSection, DataSource
from finetune.system.errors import DataError, LabelError, TurnRewrittenLater

# Rows that are tokenised together: enough to keep every core busy, few enough to hold.
_CHUNK = 64

# What a piece weighs in the ledger: the arguments of `Ledger.keep` behind the source.
LEDGER_VALUES = ("length", "trained", "turns", "ends", "characters", "language")

OPENING = "rows without an opening assistant message"
CLOSING = "rows without what follows the last answer"
UNTOLD = "rows whose tools the chat template leaves out"
ALONE = "rows with a row for each exchange, because the chat template writes earlier turns otherwise"
MERGED = "rows with messages of one role merged"


@dataclass(slots=True)
class RowResult:
    """What became of one row that was read.

    It has become `pieces` (several when split), or was `dropped` or `bad` for the reason given, at the `place` given.
    `lost` is how many tokens would have been trained on had they fitted.
    """

    row: str
    pieces: list[Encoded] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    dropped: str = ""
    bad: str = ""
    place: str = ""
    lost: int = 0
    language: str = "other"

    def count_into(self, ledger: Ledger) -> None:
        """Counts the row as read, with all that became of it but its pieces and what these lost."""
        ledger.read += 1
        ledger.lost_tokens += 0 if self.pieces else self.lost
        ledger.mended.update(self.mended)
        for reason, account in ((self.dropped, ledger.dropped), (self.bad, ledger.bad)):
            if reason:
                account[reason] += 1
                ledger.first.setdefault(reason, f"{self.row}{self.place}")

    def ledger_values(self, piece: Encoded) -> tuple[Any, ...]:
        """The `LEDGER_VALUES` of one of the pieces."""
        ends = sum(int(piece.labels[turn.end - 1] == piece.input_ids[turn.end - 1]) for turn in piece.turns)
        trained, turns = piece.trained_tokens, len(piece.turns)
        return len(piece.input_ids), trained, turns, ends, piece.characters, self.language

    @property
    def digests(self) -> tuple[bytes, bytes]:
        """What the row says, and what it is to the trainer, where labels count as well."""
        text = hashlib.blake2b(digest_size=16)
        for piece in self.pieces:
            text.update(piece.input_ids.tobytes())
        row = text.copy()
        for piece in self.pieces:
            row.update(piece.labels.tobytes())
        return text.digest(), row.digest()


def prepare(
    section: DataSection, source: DataSource, chat: Chat, max_length: int | None
) -> Iterator[RowResult]:
    """The fate of each row of a source, in its order.

    Raises:
        DataError: The source cannot be used; or a row cannot, and `data.on_bad_row` is `error`.
    """
    rows = _started(section, source, chat)
    waiting: deque[tuple[list[_Started], Future[list[Ids]]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            while chunk := list(islice(rows, _CHUNK)):
                texts = [draft.text for _, item in chunk if isinstance(item, list) for draft in item]
                waiting.append((chunk, pool.submit(chat.tokenize, texts)))
                if len(waiting) > 2:
                    yield from _finished(section, source, chat, max_length, *waiting.popleft())
            while waiting:
                yield from _finished(section, source, chat, max_length, *waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# A row's fate so far, and what is still to be done with it: nothing when it is decided.
_Started = tuple[RowResult, "list[RenderedChat] | Encoded | Exception | None"]


def _started(section: DataSection, source: DataSource, chat: Chat) -> Iterator[_Started]:
    """Each row rendered; what is wrong with one is kept until its turn comes, so that faults are told in order."""
    form: str | None = source.format
    mapped = False
    for name, row in read_rows(source):
        fate = RowResult(name)
        try:
            if isinstance(row, LabelError):
                raise row
            if source.filter and not matches_filter(source.filter, row):
                fate.dropped = "left out by filter"
                yield fate, None
                continue
            row = map_columns(source, row)
            mapped = True
            form = form or detect_format(source, row)
            yield fate, _start(section, source, form, row, chat, fate)
        except LabelError as error:
            if not mapped and str(error).startswith(("columns: ", "filter: ")):
                # No row has had these columns yet: the recipe is wrong, not the row.
                yield fate, DataError(f"{source.path}: {error}")
                return
            yield fate, error
        except ValueError as error:
            yield fate, error
            return


def _start(
    section: DataSection, source: DataSource, form: str, row: Row, chat: Chat, fate: RowResult
) -> list[RenderedChat] | Encoded:
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
        text = converted["prompt"] + converted["completion"]
        fate.language = language(text)
        encoded = chat.encode_text(converted["prompt"], converted["completion"])
        if section.train_on == "all":
            encoded.labels[1:] = encoded.input_ids[1:]
        return encoded
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
    messages = _mended(section, messages, train_on, fate)
    _ = chat.end_of_turn_id  # what is wrong with the template is no row's fault
    try:
        drafts = [chat.draft(messages, train_on, converted.get("tools"))]
    except TurnRewrittenLater:
        if train_on != "assistant":
            raise
        drafts = [chat.draft(part, train_on, converted.get("tools")) for part in _exchanges(messages)]
        fate.mended.append(ALONE)
    for i, message in enumerate(messages):
        spoken = (message["content"], message.get("reasoning_content"), message.get("tool_calls"))
        if message["role"] == "assistant" and not any(part and str(part).strip() for part in spoken):
            raise LabelError(f"message {i + 1}: the assistant's text is empty")
    if drafts[-1].tools and chat.render(messages) == drafts[-1].text:
        fate.mended.append(UNTOLD)
    fate.language = language("".join(message["content"] for message in messages))
    return drafts


def _exchanges(messages: list[Message]) -> Iterator[list[Message]]:
    """The conversation up to the end of each exchange, in which that one alone is trained on."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start, end in zip(users, [*users[1:], len(messages)], strict=True):
        part = [
            message | {"train": i > start and message.get("train", True)}
            if message["role"] == "assistant"
            else message
            for i, message in enumerate(messages[:end])
        ]
        if any(message.get("train") for message in part):
            yield part


def _mended(section: DataSection, messages: list[Message], train_on: str, fate: RowResult) -> list[Message]:
    """The messages as a chat template can take them and labels can be had from them; counted where it changes them."""
    if section.merge_same_role:
        merged: list[Message] = []
        for message in messages:
            before = merged[-1] if merged else {"role": None}
            plain = is_text_only(before) and is_text_only(message) and message["role"] != "tool"
            plain &= isinstance(before.get("content"), str) and isinstance(message["content"], str)
            if plain and before["role"] == message["role"] and before.get("train") == message.get("train"):
                merged[-1] = before | {"content": f"{before['content']}\n\n{message['content']}"}
            else:
                merged.append(message)
        if len(merged) < len(messages):
            fate.mended.append(MERGED)
        messages = merged
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return messages
    first = 1 if roles[0] == "system" else 0
    asked = next((i for i in range(first, len(roles)) if roles[i] != "assistant"), first)
    last = len(roles) - roles[::-1].index("assistant")
    if first < asked < last:
        # What nobody has asked for is no answer: inference has nothing to feed before it.
        fate.mended.append(OPENING)
    else:
        asked = first
    if last < len(roles) and train_on != "all":
        # Nothing that is trained on ever sees it.
        fate.mended.append(CLOSING)
    else:
        last = len(roles)
    return [*messages[:first], *messages[asked:last]]


def _finished(
    section: DataSection,
    source: DataSource,
    chat: Chat,
    max_length: int | None,
    chunk: list[_Started],
    tokenized: Future[list[Ids]],
) -> Iterator[RowResult]:
    ids = iter(tokenized.result())
    for fate, item in chunk:
        if item is None:
            yield fate
            continue
        try:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Encoded):
                fate.pieces = _fit(section, item, item, chat, max_length, fate)
            else:
                # First each with its tokens, so that a fault in one leaves the others' in place.
                for draft, tokens in [(draft, next(ids)) for draft in item]:
                    fate.pieces += _fit(section, draft, chat.label(draft, tokens), chat, max_length, fate)
            fate.dropped = "" if fate.pieces else fate.dropped
        except LabelError as error:
            if section.on_bad_row == "error":
                raise DataError(
                    f"{fate.row}: {error}; mend the row, or write data.on_bad_row: skip"
                ) from error
            # What stands behind the semicolon is of this row alone.
            fate.pieces, fate.lost = [], 0
            fate.bad, place, more = re.sub(r"message \d+: ", "", str(error)).partition(";")
            fate.place = place + more
        yield fate


def _fit(
    section: DataSection,
    item: RenderedChat | Encoded,
    encoded: Encoded,
    chat: Chat,
    max_length: int | None,
    fate: RowResult,
) -> list[Encoded]:
    """One row as rows of at most `max_length` tokens, by `data.on_overflow`."""
    trained = encoded.trained_tokens
    if not trained:
        fate.dropped = "with nothing to train on"
        return []
    if max_length is None or len(encoded.input_ids) <= max_length:
        return [encoded]
    why = f"longer than training.max_length {max_length}"
    if section.on_overflow == "error":
        raise DataError(f"{fate.row}: {len(encoded.input_ids):,} tokens, {why} (data.on_overflow: error)")
    pieces: list[Encoded] = []
    if section.on_overflow != "drop":
        if isinstance(item, Encoded):
            pieces = _cut_text(section.on_overflow, encoded, max_length, chat.tokenizer.bos_token_id)
            why = f"with no trained token within training.max_length {max_length}"
        elif section.on_overflow == "truncate_turns":
            pieces = _cut_turns(encoded, max_length)
            why = f"with no trained turn that ends within training.max_length {max_length}"
        else:
            pieces = _split_turns(item, encoded, chat, max_length)
            why = f"with no exchange that fits into training.max_length {max_length}"
    fate.lost += max(0, trained - sum(piece.trained_tokens for piece in pieces))
    fate.dropped = why
    return pieces


def _cut_turns(encoded: Encoded, max_length: int) -> list[Encoded]:
    """The row up to the last trained turn that ends within `max_length`."""
    whole = tuple(turn for turn in encoded.turns if turn.end <= max_length)
    if not whole:
        return []
    return [_slice(encoded, 0, whole[-1].end, turns=whole, cut=True)]


def _slice(encoded: Encoded, start: int, end: int, **changes: Any) -> Encoded:
    ids = encoded.input_ids[start:end]
    labels = encoded.labels[start:end].copy()
    labels[:1] = IGNORE
    characters = round(encoded.characters * len(ids) / len(encoded.input_ids))
    return replace(encoded, input_ids=ids, labels=labels, characters=characters, **changes)


def _cut_text(on_overflow: str, encoded: Encoded, max_length: int, bos: int | None) -> list[Encoded]:
    """A row without turns has no better place to be cut than `max_length`; `split` keeps the rest as further rows.

    A further row begins with BOS where the text did, and with the token that the one before ended with, so that each
    token is trained on once, and from a token before it.
    """
    if on_overflow != "split":
        pieces = [_slice(encoded, 0, max_length, turns=(), cut=True)]
        return [piece for piece in pieces if piece.trained_tokens]
    first = [bos] if bos is not None and encoded.input_ids[0] == bos else []
    pieces = [_slice(encoded, 0, max_length, turns=())]
    step = max_length - len(first) - 1
    for start in range(max_length - 1, len(encoded.input_ids) - 1, max(1, step)):
        piece = _slice(encoded, start, start + step + 1, turns=())
        ids = np.concatenate([first, piece.input_ids])
        labels = np.concatenate([[IGNORE] * len(first), piece.labels])
        pieces.append(replace(piece, input_ids=ids.astype(np.int32), labels=labels.astype(np.int32)))
    return [piece for piece in pieces if piece.trained_tokens]


def _split_turns(item: RenderedChat, whole: Encoded, chat: Chat, max_length: int) -> list[Encoded]:
    """The conversation as several, each beginning at a user message with the system text before it.

    Each holds as many exchanges as fit; one exchange that alone does not fit is left out, and the row counts as cut.
    """
    messages = list(item.messages)
    system = messages[:1] if messages[0]["role"] == "system" else []
    body = messages[len(system) :]
    # What an assistant says before the first user goes with that user's exchange.
    starts = [0, *[i for i, message in enumerate(body) if message["role"] == "user"][1:]]
    # Only the whole conversation knows which turn is its last.
    trained = {turn.message - len(system) for turn in whole.turns}
    body = [
        message | {"train": i in trained} if message["role"] == "assistant" else message
        for i, message in enumerate(body)
    ]
    train_on = item.train_on if item.train_on == "all" else "assistant"

    def encode(begin: int, end: int) -> Encoded | None:
        part = body[starts[begin] : starts[end] if end < len(starts) else len(body)]
        if not any(message.get("train") for message in part):
            return None
        return chat.encode(system + part, train_on, item.tools)

    def too_long(begin: int, end: int) -> bool:
        encoded = encode(begin, end)
        return encoded is not None and len(encoded.input_ids) > max_length

    pieces, begin, lost = [], 0, False
    while begin < len(starts):
        ends = range(begin + 1, len(starts) + 1)
        fitting = bisect_left(ends, True, key=lambda end: too_long(begin, end))
        if not fitting:
            lost, fitting = True, 1
        elif piece := encode(begin, begin + fitting):
            pieces.append(piece)
        begin += fitting
    if pieces:
        pieces[0] = replace(pieces[0], cut=lost)
    return pieces
