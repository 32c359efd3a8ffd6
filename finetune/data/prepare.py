"""Prepares the rows of one source: encoded rows of at most `max_length` tokens, with a `RowResult` for each row read.

This thread renders and labels rows while a second thread tokenises the next ones; the tokenizer releases Python's lock.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from finetune.data.adapt import adapt
from finetune.data.chat import Chat, RenderedChat
from finetune.data.encoded import Encoded, Ids
from finetune.data.formats import FORMATS, check_columns, detect_format, map_columns, matches_filter, unread_columns
from finetune.data.json_rows import Row
from finetune.data.language import language
from finetune.data.ledger import Ledger
from finetune.data.overflow import shorten
from finetune.data.readers import read_rows
from finetune.data.turns import INSTRUCTING, Message, is_text_only, texts_in
from finetune.recipe.schema import DataSection, DataSource
from finetune.system.errors import DataError, LabelError, TemplateError, TurnRewrittenLater

# The number of rows that are tokenised in one call, by the tokenizer's own threads. At most four chunks are in memory.
_CHUNK = 64

# The arguments of `Ledger.keep` after `source`, in order.
LEDGER_VALUES = ("length", "trained", "turns", "ends", "characters", "thinking", "trained_thinking", "language")

# The changes to rows that the ledger counts as mended.
OPENING_REMOVED = "rows whose opening assistant message was removed"
CLOSING_REMOVED = "rows whose messages after the last assistant turn were removed"
TOOLS_NOT_RENDERED = "rows whose tools the chat template leaves out"
ROW_PER_EXCHANGE = "rows split into one row per exchange, because the chat template renders earlier turns differently"
SAME_ROLE_MERGED = "rows with messages of one role merged"


@dataclass(slots=True)
class RowResult:
    """The result of one row that was read.

    Attributes:
        row: The row's name, such as `data/chat.jsonl:12`.
        pieces: The encoded rows that it became; several if it was split.
        mended: The changes that were made to it.
        unread: Its keys that hold a value and that are ignored.
        dropped: The reason for which it was dropped, or "".
        bad: The reason for which it cannot be used, or "".
        detail: What is particular to this row, in addition to the reason in `bad`.
        lost: The trained tokens that did not fit `max_length`.
        language: The language of its text: `ja`, `en` or `other`.
    """

    row: str
    pieces: list[Encoded] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    dropped: str = ""
    bad: str = ""
    detail: str = ""
    lost: int = 0
    language: str = "other"

    def count_into(self, ledger: Ledger) -> None:
        """Counts the row as read, and as mended, dropped or bad; its pieces are counted by `Ledger.keep_row`."""
        ledger.read += 1
        ledger.lost_tokens += 0 if self.pieces else self.lost
        ledger.mended.update(self.mended)
        ledger.unread.update(self.unread)
        for reason, account in ((self.dropped, ledger.dropped), (self.bad, ledger.bad)):
            if reason:
                account[reason] += 1
                ledger.first.setdefault(reason, f"{self.row}{self.detail and f'; {self.detail}'}")

    def ledger_values(self, piece: Encoded) -> tuple[Any, ...]:
        """The `LEDGER_VALUES` of one of the pieces."""
        ends = sum(int(piece.labels[turn.end - 1] == piece.input_ids[turn.end - 1]) for turn in piece.turns)
        trained, turns = piece.trained_tokens, len(piece.turns)
        return len(piece.input_ids), trained, turns, ends, piece.characters, *piece.thinking_tokens, self.language

    @property
    def digests(self) -> tuple[bytes, bytes]:
        """Two hashes of 16 bytes: one of the token ids, one of the token ids and the labels."""
        text = hashlib.blake2b(digest_size=16)
        for piece in self.pieces:
            text.update(piece.input_ids.tobytes())
        row = text.copy()
        for piece in self.pieces:
            row.update(piece.labels.tobytes())
        return text.digest(), row.digest()


@dataclass(frozen=True)
class Preparation:
    """The settings for preparing rows: the `data` section, the chat template, the longest row in tokens (None: any)."""

    section: DataSection
    chat: Chat
    max_length: int | None


def prepare(preparation: Preparation, source: DataSource) -> Iterator[RowResult]:
    """Yields the result of each row of a source, in the order of the source.

    Raises:
        DataError: The source cannot be used; or a row cannot, and `data.on_bad_row` is `error`.
        TemplateError: The chat template cannot be used with this tokenizer.
    """
    rows = _rendered(preparation, source)
    waiting: deque[tuple[list[_Rendered], Future[list[Ids]]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            while chunk := list(islice(rows, _CHUNK)):
                texts = [rendered.text for _, item in chunk if isinstance(item, list) for rendered in item]
                waiting.append((chunk, pool.submit(preparation.chat.tokenize, texts)))
                if len(waiting) > 2:
                    yield from _labelled(preparation, *waiting.popleft())
            while waiting:
                yield from _labelled(preparation, *waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# A row's result so far, and its chats to tokenise, its encoded text, or the error to raise; None: the result is final.
_Rendered = tuple[RowResult, "list[RenderedChat] | Encoded | Exception | None"]


def _rendered(preparation: Preparation, source: DataSource) -> Iterator[_Rendered]:
    """Yields each row rendered, or the error in its place, so that errors are raised in the order of the rows."""
    form: str | None = source.format
    mapped, checked = False, ""
    for name, row in read_rows(source):
        result = RowResult(name)
        try:
            if isinstance(row, LabelError):
                raise row
            try:
                if source.filter and not matches_filter(source.filter, row):
                    result.dropped = "left out by filter"
                    yield result, None
                    continue
                whole, row = row, map_columns(source, row)
            except LabelError as error:
                if mapped:
                    raise
                # No row before had these columns either: the recipe is wrong, not the row.
                raise DataError(f"{source.path}: {error}") from error
            mapped = True
            form = form or detect_format(source, row)
            # Plain text has no place for a system text or tools.
            read_as = "raw" if _is_raw(preparation, source, form) else form
            if checked != read_as:
                check_columns(source, read_as)
                checked = read_as
            result.unread = unread_columns(source, read_as, whole)
            yield result, _render(preparation, source, form, row, result)
        except LabelError as error:
            yield result, error
        except ValueError as error:
            yield result, error
            return


def _is_raw(preparation: Preparation, source: DataSource, form: str) -> bool:
    """True if prompts and completions are plain text, without the chat template."""
    return source.raw or (form == "prompt_completion" and preparation.chat.tokenizer.chat_template is None)


def _render(
    preparation: Preparation, source: DataSource, form: str, row: Row, result: RowResult
) -> list[RenderedChat] | Encoded:
    chat, train_on = preparation.chat, preparation.section.train_on
    if _is_raw(preparation, source, form):
        converted: Row = {"prompt": row.get("prompt"), "completion": row.get("completion")}
        if not all(isinstance(text, str) for text in converted.values()):
            raise LabelError("its prompt or completion is not text")
    else:
        converted = FORMATS[form](row)
        result.unread += converted.get("unread", [])
    if "messages" in converted:
        if source.special_tokens:
            raise DataError(
                f"{source.path}: special_tokens is for text without a chat template, these rows are {form}; remove it"
            )
        if train_on == "completion" and form != "prompt_completion":
            raise DataError(
                f"{source.path}: data.train_on: completion needs prompt_completion rows, these are {form}; "
                "write assistant or last_assistant"
            )
        return _render_messages(preparation, converted, train_on or "assistant", result)
    if train_on in ("assistant", "last_assistant"):
        raise DataError(
            f"{source.path}: data.train_on: {train_on} needs chats, these rows have no turns; write completion or all"
        )
    result.language = language(converted["prompt"] + converted["completion"])
    encoded = chat.encode_text(converted["prompt"], converted["completion"], source.special_tokens)
    if train_on == "all":
        encoded.labels[1:] = encoded.input_ids[1:]
    return encoded


def _render_messages(preparation: Preparation, converted: Row, train_on: str, result: RowResult) -> list[RenderedChat]:
    chat = preparation.chat
    if train_on != "all":
        for message in converted["messages"][: converted.get("prompt_messages", 0)]:
            if message["role"] == "assistant":
                message.setdefault("train", False)
    train_on = "assistant" if train_on == "completion" else train_on
    tools = converted.get("tools")
    chat.check_tokens()
    messages, variables, changes = adapt(chat.render, converted["messages"], tools, converted.get("variables"))
    result.mended += changes
    messages = _mended(preparation.section, messages, train_on, result)
    render = partial(chat.render_turns, train_on=train_on, tools=tools, variables=variables)
    try:
        chats = [render(messages)]
    except TurnRewrittenLater:
        if train_on != "assistant":
            raise
        chats = []
        for exchange in _exchanges(messages):
            try:
                chats.append(render(exchange))
            except TurnRewrittenLater:
                chats += map(render, _answers(exchange))
        result.mended.append(ROW_PER_EXCHANGE)
    for i, message in enumerate(messages):
        parts = (message["content"], message.get("reasoning_content"), message.get("tool_calls"))
        if message["role"] == "assistant" and not any(part and str(part).strip() for part in parts):
            raise LabelError("the assistant's text is empty", message=i)
    if chats[-1].tools and _leaves_out_tools(chat, chats[-1]):
        result.mended.append(TOOLS_NOT_RENDERED)
    result.unread += _keys_not_rendered(chat, chats[-1])
    result.language = language("".join("".join(texts_in(message["content"])) for message in messages))
    return chats


def _keys_not_rendered(chat: Chat, rendered: RenderedChat) -> Iterator[str]:
    """Yields the keys of messages that the template gets and does not render."""
    render = partial(chat.render, tools=rendered.tools, variables=rendered.variables)
    for key in ("name", "tool_call_id"):
        if any(key in message for message in rendered.messages):
            messages = [{k: v for k, v in m.items() if k != key} for m in rendered.messages]
            # A template that fails without a key reads it.
            with contextlib.suppress(LabelError):
                if render(messages) == render(rendered.messages):
                    yield f"messages.{key}"


def _leaves_out_tools(chat: Chat, rendered: RenderedChat) -> bool:
    render = partial(chat.render, rendered.messages, variables=rendered.variables)
    try:
        return render() == render(tools=rendered.tools)
    except LabelError:
        return False  # the template fails without them


def _exchanges(messages: list[Message]) -> Iterator[list[Message]]:
    """Yields the conversation up to the end of each exchange, with labels on that exchange only."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start, end in zip(users, [*users[1:], len(messages)], strict=True):
        part = [
            message | {"train": i > start and message.get("train", True)} if message["role"] == "assistant" else message
            for i, message in enumerate(messages[:end])
        ]
        if any(message.get("train") for message in part):
            yield part


def _answers(exchange: list[Message]) -> Iterator[list[Message]]:
    """Yields the conversation up to each assistant message that is trained on, with labels on that message only."""
    for end, message in enumerate(exchange):
        if message["role"] == "assistant" and message.get("train", True):
            before = [m | {"train": False} if m["role"] == "assistant" else m for m in exchange[:end]]
            yield [*before, message]


def _mended(section: DataSection, messages: list[Message], train_on: str, result: RowResult) -> list[Message]:
    """The messages that training can use, merged by role if the recipe says so; counts each change in the result."""
    if section.merge_same_role:
        merged: list[Message] = []
        for message in messages:
            before = merged[-1] if merged else {"role": None}
            mergeable = is_text_only(before) and is_text_only(message) and message["role"] != "tool"
            mergeable &= isinstance(before.get("content"), str) and isinstance(message["content"], str)
            if mergeable and before["role"] == message["role"] and before.get("train") == message.get("train"):
                merged[-1] = before | {"content": f"{before['content']}\n\n{message['content']}"}
            else:
                merged.append(message)
        if len(merged) < len(messages):
            result.mended.append(SAME_ROLE_MERGED)
        messages = merged
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return messages
    first = 1 if roles[0] in INSTRUCTING else 0
    asked = next((i for i in range(first, len(roles)) if roles[i] != "assistant"), first)
    last = len(roles) - roles[::-1].index("assistant")
    if first < asked < last:
        # An opening assistant message answers no prompt, so inference could never produce it.
        result.mended.append(OPENING_REMOVED)
    else:
        asked = first
    if last < len(roles) and train_on != "all":
        # Messages after the last assistant turn hold no trained token and precede none.
        result.mended.append(CLOSING_REMOVED)
    else:
        last = len(roles)
    return [*messages[:first], *messages[asked:last]]


def _labelled(preparation: Preparation, chunk: list[_Rendered], tokenized: Future[list[Ids]]) -> Iterator[RowResult]:
    ids = iter(tokenized.result())
    for result, item in chunk:
        if item is None:
            yield result
            continue
        try:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Encoded):
                result.pieces = _fit(preparation, None, item, result)
            else:
                # All ids of the row are taken before a chat is labelled: an error must not leave some for the next row.
                for rendered, tokens in [(rendered, next(ids)) for rendered in item]:
                    encoded = preparation.chat.label(rendered, tokens, preparation.section.train_on_thinking)
                    result.pieces += _fit(preparation, rendered, encoded, result)
            result.dropped = "" if result.pieces else result.dropped
        except LabelError as error:
            if preparation.section.on_bad_row == "error":
                check_template(preparation.chat, error.reason)
                raise DataError(f"{result.row}: {error}; mend the row, or write data.on_bad_row: skip") from error
            result.pieces, result.unread, result.lost = [], [], 0
            result.bad, result.detail = error.reason, error.detail
        yield result


def check_template(chat: Chat, reason: str) -> None:
    """Checks that a fault of a row is the row's: the shortest conversations do not all have it.

    Args:
        chat: The tokenizer and its chat template.
        reason: The fault of a row that is a conversation.

    Raises:
        TemplateError: The fault is the template's.
    """
    if chat.tokenizer.chat_template is None:
        return
    try:
        _ = chat.end_of_turn_id
    except TemplateError as fault:
        if isinstance(fault.__cause__, LabelError) and fault.__cause__.reason == reason:
            raise


def _fit(preparation: Preparation, rendered: RenderedChat | None, encoded: Encoded, result: RowResult) -> list[Encoded]:
    """The row as rows of at most `max_length` tokens."""
    max_length, trained = preparation.max_length, encoded.trained_tokens
    if not trained:
        result.dropped = "with nothing to train on"
        return []
    length = len(encoded.input_ids)
    if max_length is None or length <= max_length:
        return [encoded]
    if preparation.section.on_overflow == "error":
        raise DataError(
            f"{result.row}: {length:,} tokens, longer than training.max_length {max_length} (data.on_overflow: error)"
        )
    pieces, result.dropped = shorten(encoded, rendered, preparation.chat, preparation.section, max_length)
    result.lost += max(0, trained - sum(piece.trained_tokens for piece in pieces))
    return pieces
