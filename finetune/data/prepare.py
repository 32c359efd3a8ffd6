"""Prepares the rows of one source: encoded rows of at most `max_length` tokens, with a `RowResult` for each row read.

This thread renders and labels rows while a second thread tokenises the next ones; the tokenizer releases Python's lock.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from finetune.data.adapt import adapt
from finetune.data.bad_rows import BadRows
from finetune.data.chat import Chat
from finetune.data.encoded import Encoded, Ids
from finetune.data.formats import (
    FORMATS,
    check_columns,
    detect_format,
    map_columns,
    matches_filter,
    pair_note,
    unread_columns,
    with_known_pair,
)
from finetune.data.json_rows import Row
from finetune.data.language import language
from finetune.data.ledger import PAIRS_AS_RATED
from finetune.data.mending import answer_by_answer, exchanges, mended
from finetune.data.overflow import shorten
from finetune.data.preference import (
    EMPTY_ANSWER,
    EQUAL_ANSWERS,
    UNTRAINED_ANSWER,
    check_same_prompt,
    is_empty,
    on_side,
    without_tail,
)
from finetune.data.readers import read_rows
from finetune.data.rendering import RenderedChat
from finetune.data.row_result import RowResult
from finetune.data.turns import texts_in
from finetune.recipe.schema import DataSection, DataSource
from finetune.system.errors import DataError, LabelError, TurnRewrittenLater

# The number of rows that are tokenised in one call, by the tokenizer's own threads. At most four chunks are in memory.
_CHUNK = 64

# Rows of more characters are not tokenised, unless `max_length` tokens may be as long: tokenizers 0.23 takes 150 bytes
# of memory for each.
_MAX_CHARACTERS = 1 << 23

# The changes to rows that the ledger counts as mended.
TOOLS_NOT_RENDERED = "rows whose tools the chat template leaves out"
ROW_PER_EXCHANGE = "rows split into one row per exchange, because the chat template renders earlier turns differently"


@dataclass(frozen=True)
class Preparation:
    """The settings for preparing rows.

    Attributes:
        section: The recipe's section `data`.
        chat: The tokenizer and its chat template.
        max_length: The most tokens of a row, or of each side of a pair; None: no limit.
        method: The recipe's method, which decides the formats that are read.
    """

    section: DataSection
    chat: Chat
    max_length: int | None
    method: str = "sft"

    def fits(self, characters: int) -> bool:
        """False for a row with more characters than a row of `max_length` tokens can have.

        A token has at most as many characters as its name in the vocabulary, which has one or more for each byte.
        A tokenizer or a template may drop white space besides, so four times as many are allowed, and any row of up to
        `_MAX_CHARACTERS`.
        """
        if characters <= _MAX_CHARACTERS:
            return True
        longest = max(map(len, self.chat.tokenizer.get_vocab()))
        return characters <= 4 * longest * (self.max_length or 0)


def prepare(preparation: Preparation, source: DataSource) -> Iterator[RowResult]:
    """Yields the result of each row of a source, in the order of the source.

    Raises:
        DataError: The source cannot be used; or a row cannot, and `data.on_bad_row` is `error`.
        TemplateError: The chat template cannot be used with this tokenizer.
    """
    rows, bad = _rendered(preparation, source), BadRows(preparation.chat, source)
    waiting: deque[tuple[list[_Rendered], Future[list[Ids]]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            while chunk := list(_chunk(rows)):
                texts = [rendered.text for _, item in chunk if isinstance(item, list) for rendered in item]
                waiting.append((chunk, pool.submit(preparation.chat.tokenize, texts)))
                if len(waiting) > 2:
                    yield from _labelled(preparation, bad, *waiting.popleft())
            while waiting:
                yield from _labelled(preparation, bad, *waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    bad.check()


def _chunk(rows: Iterator[_Rendered]) -> Iterator[_Rendered]:
    """Yields the next rows to tokenise in one call: at most `_CHUNK`, fewer where they are long."""
    characters = 0
    for result, item in islice(rows, _CHUNK):
        yield result, item
        characters += sum(len(rendered.text) for rendered in item) if isinstance(item, list) else 0
        if characters > _MAX_CHARACTERS:
            return


# A row's result so far, and its chats to tokenise, its encoded text, or the error to raise; None: the result is final.
_Rendered = tuple[RowResult, "list[RenderedChat] | Encoded | Exception | None"]


def _rendered(preparation: Preparation, source: DataSource) -> Iterator[_Rendered]:
    """Yields each row rendered, or the error in its place, so that errors are raised in the order of the rows."""
    form: str | None = source.format
    mapped, checked = False, ""
    note: list[str] = []  # of a source whose columns are read without `columns`
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
                if form is None and (known := with_known_pair(source, row, preparation.method)) is not source:
                    source, note = known, [pair_note(known)]
                result.mended += note
                whole, row = row, map_columns(source, row)
            except LabelError as error:
                if mapped:
                    raise
                # No row before had these columns either: the recipe is wrong, not the row.
                raise DataError(f"{source.name}: {error}") from error
            mapped = True
            form = form or detect_format(source, row, preparation.method)
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
    if not preparation.fits(characters := _characters(converted)):
        if preparation.section.on_overflow == "drop" and preparation.max_length:
            result.dropped = f"longer than training.max_length {preparation.max_length}"
            return []
        raise LabelError("it has too many characters to be tokenised", f"{characters:,}, divide it")
    if "messages" in converted:
        if source.special_tokens:
            raise DataError(
                f"{source.name}: special_tokens is for text without a chat template, these rows are {form}; remove it"
            )
        if train_on == "completion" and form != "prompt_completion":
            raise DataError(
                f"{source.name}: data.train_on: completion needs prompt_completion rows, these are {form}; "
                "write assistant or last_assistant"
            )
        if "rejected" in converted or "desirable" in converted:
            return _render_answers(preparation, converted, result)
        return _render_messages(preparation, converted, train_on or "assistant", result)
    if train_on in ("assistant", "last_assistant"):
        raise DataError(
            f"{source.name}: data.train_on: {train_on} needs chats, these rows have no turns; write completion or all"
        )
    result.language = language(converted["prompt"] + converted["completion"])
    encoded = chat.encode_text(converted["prompt"], converted["completion"], source.special_tokens)
    if train_on == "all":
        encoded.labels[1:] = encoded.input_ids[1:]
    return encoded


def _characters(value: Any) -> int:
    """The number of characters of all texts in a value."""
    count, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, dict | list):
            left += item.values() if isinstance(item, dict) else item
    return count


def _render_answers(preparation: Preparation, converted: Row, result: RowResult) -> list[RenderedChat]:
    """The chats of a rated answer, or of a pair: with the chosen answer and with the rejected one."""
    messages, count = converted["messages"], converted["prompt_messages"]
    prompt, answers = messages[:count], {"chosen": messages[count:]}
    if any(message.get("train") for message in prompt):
        raise LabelError("`train` on a message of the prompt", "only the answer is trained on")
    if "rejected" in converted:
        answers["rejected"] = converted["rejected"]
        result.mended += [PAIRS_AS_RATED] if preparation.method == "kto" else []
    if any(map(is_empty, answers.values())):
        result.dropped = EMPTY_ANSWER
        return []
    result.desirable = [True, False] if "rejected" in converted else [converted["desirable"]]
    chats: list[RenderedChat] = []
    for name, answer in answers.items():
        side = converted | {"messages": [*prompt, *answer]}
        with on_side(name) if len(answers) > 1 else contextlib.nullcontext():
            chats += _render_messages(preparation, side, "assistant", result, may_split=False)
    for told in (result.mended, result.unread):
        told[:] = dict.fromkeys(told)  # once for both sides
    result.language = language("".join("".join(texts_in(message["content"])) for message in prompt))
    return chats


def _render_messages(
    preparation: Preparation, converted: Row, train_on: str, result: RowResult, may_split: bool = True
) -> list[RenderedChat]:
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
    messages = mended(preparation.section, messages, train_on, result)
    render = partial(chat.render_turns, train_on=train_on, tools=tools, variables=variables)
    try:
        chats = [render(messages)]
    except TurnRewrittenLater as error:
        if not may_split:
            raise LabelError(error.reason, "an answer is not divided", error.message) from error
        if train_on != "assistant":
            raise
        chats = []
        for exchange in exchanges(messages):
            try:
                chats.append(render(exchange))
            except TurnRewrittenLater:
                chats += map(render, answer_by_answer(exchange))
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


def _labelled(
    preparation: Preparation, bad: BadRows, chunk: list[_Rendered], tokenized: Future[list[Ids]]
) -> Iterator[RowResult]:
    ids = iter(tokenized.result())
    for result, item in chunk:
        bad.read += 1
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
                chats = [(rendered, next(ids)) for rendered in item]
                if result.desirable:
                    result.pieces = _answer_rows(preparation, chats, result)
                    chats = []
                for rendered, tokens in chats:
                    encoded = preparation.chat.label(rendered, tokens, preparation.section.train_on_thinking)
                    result.pieces += _fit(preparation, rendered, encoded, result)
            result.dropped = "" if result.pieces else result.dropped
        except LabelError as error:
            if preparation.section.on_bad_row == "error":
                bad.add(result.row, error)
            result.pieces, result.unread, result.lost = [], [], 0
            result.bad, result.detail = error.reason, error.detail
        yield result


def _answer_rows(preparation: Preparation, chats: list[tuple[RenderedChat, Ids]], result: RowResult) -> list[Encoded]:
    """The rows for the trainer of a pair or a rated answer; none if it is dropped, with the reason in the result."""
    sides = []
    for name, (rendered, tokens) in zip(("chosen", "rejected"), chats, strict=False):
        with on_side(name) if len(chats) > 1 else contextlib.nullcontext():
            sides.append(preparation.chat.label(rendered, tokens))
    if not all(side.trained_tokens for side in sides):
        result.dropped = UNTRAINED_ANSWER
        return []
    sides = [without_tail(side) for side in sides]
    if len(sides) > 1:
        check_same_prompt(*sides)
        if np.array_equal(sides[0].input_ids, sides[1].input_ids):
            result.dropped = EQUAL_ANSWERS
            return []
    if _is_too_long(preparation, max(len(side.input_ids) for side in sides), result.row):
        result.dropped = f"longer than training.max_length {preparation.max_length}"
        result.lost = sum(side.trained_tokens for side in sides)
        return []
    if preparation.method == "kto":
        return [replace(side, desirable=good) for side, good in zip(sides, result.desirable, strict=True)]
    return [replace(sides[0], rejected=sides[1])]


def _fit(preparation: Preparation, rendered: RenderedChat | None, encoded: Encoded, result: RowResult) -> list[Encoded]:
    """The row as rows of at most `max_length` tokens."""
    max_length, trained = preparation.max_length, encoded.trained_tokens
    if not trained:
        result.dropped = "with nothing to train on"
        return []
    if max_length is None or not _is_too_long(preparation, len(encoded.input_ids), result.row):
        return [encoded]
    pieces, result.dropped = shorten(encoded, rendered, preparation.chat, preparation.section, max_length)
    result.lost += max(0, trained - sum(piece.trained_tokens for piece in pieces))
    return pieces


def _is_too_long(preparation: Preparation, length: int, row: str) -> bool:
    """True if a row of this many tokens does not fit; raises if the recipe says so."""
    if preparation.max_length is None or length <= preparation.max_length:
        return False
    if preparation.section.on_overflow == "error":
        raise DataError(
            f"{row}: {length:,} tokens, longer than training.max_length {preparation.max_length} "
            "(data.on_overflow: error)"
        )
    return True
