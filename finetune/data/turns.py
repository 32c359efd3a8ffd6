"""Finds the assistant turns of a rendered conversation, in characters, by rendering parts of it with its chat template.

A turn begins where the prompt that inference would feed ends. Where the turn is the message's text and an end-of-turn
token, its end is read from the text. Otherwise the conversation is rendered once more with a marker behind each text of
the message. A conversation whose turns cannot be proved so raises `LabelError`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from os.path import commonprefix
from typing import Any, Protocol

from finetune.data.tool_answers import check_answer_rendered
from finetune.system.errors import LabelError, TurnRewrittenLater

Message = dict[str, Any]
Tool = dict[str, Any]  # a function that may be called, in OpenAI's form

ROLES = ("system", "user", "assistant", "tool")
# Is put behind each text of an assistant message. It has only letters, so that no template's filter escapes it.
_MARK = "qjxvzwkqy"
_MARKS = re.compile(f"{_MARK}[a-j]+z")
_FENCE = "xwqvkjzwx"  # is put before the texts of other messages
_LAST_ONLY = "data.train_on: last_assistant trains on the last turn alone"


class Render(Protocol):
    """A chat template with its tools."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the messages as the template writes them."""


def is_text_only(message: Message) -> bool:
    """True for a message that has text, but no reasoning and no tool calls."""
    return message.keys() <= {"role", "content", "train"}


def texts_in(value: object) -> Iterator[str]:
    """Yields each string in a value of JSON, keys of maps too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from texts_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_in(part)


def without_train_key(message: Message) -> Message:
    """The message without its `train` key, which templates must not see."""
    return {k: v for k, v in message.items() if k != "train"} if "train" in message else message


def authored_texts(message: Message) -> Iterable[str]:
    """The strings of a message that its author wrote: all but its role."""
    if is_text_only(message) and isinstance(message["content"], str):
        return [message["content"]]
    return texts_in([value for key, value in message.items() if key != "role"])


def message_holding(messages: Sequence[Message], text: str) -> int | None:
    """The index of the first message that holds a text; None where none does."""
    return next((i for i, m in enumerate(messages) if any(text in part for part in authored_texts(m))), None)


def check_unicode(messages: Sequence[Message], text: str) -> None:
    """Refuses lone surrogates, which JSON can hold and UTF-8 cannot.

    Raises:
        LabelError: The text, rendered from the messages, holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        i = message_holding(messages, surrogate)
        whose = "" if i is not None else "the text: "
        reason = f"{whose}its text holds a lone surrogate ({surrogate!r}), which is no character"
        raise LabelError(reason, message=i) from error


def trained_messages(messages: Sequence[Message], train_on: str) -> list[int]:
    """The indices of the messages to train on.

    Raises:
        LabelError: A role or a content is not valid, a message that is no assistant's has `train`, or no message is an
            assistant's.
    """
    assistant = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise LabelError(f"unknown role {role!r}", f"known are {', '.join(ROLES)}", i)
        if not isinstance(content, str) and not (role == "tool" and isinstance(content, dict | list)):
            raise LabelError(f"its content is {type(content).__name__}, not text", message=i)
        if role == "assistant":
            assistant.append(i)
        elif message.get("train") or (train_on == "all" and "train" in message):
            detail = "only an assistant's can be chosen or left out"
            raise LabelError(f"`train` on a {role} message", detail, i)
    if not assistant:
        raise LabelError("there is no assistant message")
    wanted = assistant[-1:] if train_on == "last_assistant" else assistant
    return [i for i in assistant if messages[i].get("train", i in wanted)]


def check_all_rendered(messages: Sequence[Message], text: str) -> None:
    """Checks that a rendered conversation holds the text of each message but the assistant's, which `turn_end` checks.

    Raises:
        LabelError: The template leaves out or changes a message's text.
    """
    for i, message in enumerate(messages):
        if not isinstance(message["content"], str):
            check_answer_rendered(message["content"], text, i)
            continue
        content = message["content"].strip()
        if message["role"] == "assistant" or content in text:
            continue
        # A template may write tool results as JSON, and may change the white space inside a text.
        quoted = (json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
        squeezed = _without_whitespace(content)
        if squeezed not in _without_whitespace(text) and not any(form in text for form in quoted):
            reason = f"the chat template leaves out or changes the {message['role']}'s text"
            raise LabelError(reason, message=i)


def turn_start(render: Render, messages: Sequence[Message], i: int, text: str) -> int:
    """The index of the first character of turn `i`, right behind the prompt that inference would feed.

    Args:
        render: The chat template.
        messages: The conversation.
        i: The index of an assistant message.
        text: The rendered conversation.

    Raises:
        TurnRewrittenLater: Messages that follow the turn change what comes before it.
        LabelError: That prompt is no prefix of the text.
    """
    prefix = render(messages[:i], add_generation_prompt=True)
    if text.startswith(prefix):
        return len(prefix)
    reason = (
        "what inference would feed before this turn is not what stands before it in the whole conversation"
    )
    if i + 1 < len(messages):
        raise TurnRewrittenLater(reason, _LAST_ONLY, i)
    raise LabelError(reason, message=i)


def turn_end(
    render: Render,
    special_tokens: Iterable[str],
    endings: Sequence[str],
    messages: Sequence[Message],
    i: int,
    text: str,
    start: int,
) -> int:
    """The index of the character behind the end-of-turn token of turn `i`.

    Args:
        render: The chat template.
        special_tokens: The strings of the tokenizer's special tokens.
        endings: The texts that are known to end a turn, longest first.
        messages: The conversation.
        i: The index of an assistant message.
        text: The rendered conversation.
        start: The index of the turn's first character, from `turn_start`.

    Raises:
        TurnRewrittenLater: The template leaves out a part of the message because a user speaks after it.
        LabelError: The template leaves out or changes a part of the message, writes another message inside the turn, or
            ends it with no special token.
    """
    message, later = messages[i], messages[i + 1 :]
    if is_text_only(message) and (end := _known_end(message["content"], endings, text, start)):
        return end
    marked, part_of_mark = _marked(message)
    before = render(messages[:i]) if i else ""
    as_last = render([*messages[:i], marked])
    whole = render([*messages[:i], marked, *later])
    # A template may write a tool's name in the call and again in the result: the marks of the turn are those that it
    # has as the last one.
    marks = _MARKS.findall(as_last)
    head, tail = _split_behind_marks(whole, len(marks))
    rendered_marks = _MARKS.findall(whole)[: len(marks)]
    # White space before a mark is not trimmed, so texts are compared without it. A generation prompt may hold the first
    # word already (`<think>`).
    turn = _without_whitespace(text[start : len(text) - len(tail)])
    shown = _without_whitespace(text[len(commonprefix([text, before])) : len(text) - len(tail)])  # noqa: RUF071 - characters
    lacking = [part for mark, part in part_of_mark.items() if mark not in rendered_marks]
    lacking += [part for part, said in _assistant_parts(message) if _without_whitespace(said) not in shown]
    if lacking:
        reason = f"the chat template leaves out its {lacking[0]}"
        if any(m["role"] == "user" for m in later):
            raise TurnRewrittenLater(reason, _LAST_ONLY, i)
        raise LabelError(reason, message=i)
    if rendered_marks != marks or _without_whitespace(head[start:]) != turn or not text.endswith(tail):
        reason = "the chat template changes the assistant's text, so its tokens cannot be found"
        raise LabelError(reason, message=i)
    # An assistant message without text stays so: gpt-oss's template takes none beside reasoning and a call.
    empty = [
        not isinstance(m["content"], str) or (m["role"] == "assistant" and not m["content"].strip())
        for m in later
    ]
    fenced = [m if e else m | {"content": _FENCE + m["content"]} for m, e in zip(later, empty, strict=True)]
    if fenced and _FENCE in _split_behind_marks(render([*messages[:i], marked, *fenced]), len(marks))[0]:
        raise LabelError("the chat template writes a later message inside its turn", message=i)
    elsewhere = as_last
    if not later:
        role = "tool" if message.get("tool_calls") else "user"
        with contextlib.suppress(LabelError):
            elsewhere = render([*messages[:i], marked, {"role": role, "content": "Hello there"}])
    # The turn ends with what follows its text both here and elsewhere: as the last turn where it is not the last, and
    # before another message where it is. What a template writes only at the end of a conversation, or before the next
    # message, does not belong to the turn. A special token may be cut at the end of what is shared: whole ones count.
    shared = commonprefix([tail, _split_behind_marks(elsewhere, len(marks))[1]])  # noqa: RUF071 - characters are meant
    spans = special_spans(special_tokens, tail)
    ends = [end for _, end in spans if end <= len(shared)]
    if not ends and spans and spans[0][0] <= len(shared):
        first, end = spans[0]
        ends = [end] if _closes_turn(render, tail[first:end], text[len(before) : start], not later) else []
    if not ends:
        raise LabelError(
            f"the template ends the turn with {shared[:40]!r}, in which this tokenizer has no special token, so the "
            "model could not learn to stop",
            message=i,
        )
    return len(text) - len(tail) + ends[-1]


def _known_end(content: str, endings: Sequence[str], text: str, start: int) -> int:
    """The index behind the ending of a turn that is its message's text and a known ending; 0 where it is not that."""
    for written in (content, content.strip()):
        # Mistral's templates write a blank before the text.
        for first in (start, start + 1) if text[start : start + 1] == " " else (start,):
            if text.startswith(written, first):
                for ending in endings:
                    if text.startswith(ending, first + len(written)):
                        return first + len(written) + len(ending)
    return 0


def _closes_turn(render: Render, token: str, prompt: str, is_last: bool) -> bool:
    """True if a token ends this turn, although not the turns at another place of a conversation.

    gpt-oss ends the last turn with a token of its own, and the others with the one that ends a user's turn.
    """
    asked = render([{"role": "user", "content": _FENCE}], add_generation_prompt=True)
    closing = asked.rpartition(_FENCE)[2].removesuffix(prompt)
    return token not in prompt and (is_last or token in closing)


def _split_behind_marks(text: str, count: int) -> tuple[str, str]:
    """Splits a text behind its `count`-th mark; both parts come without any mark."""
    ends = [match.end() for match in _MARKS.finditer(text)][:count]
    cut = ends[-1] if ends else 0
    return _MARKS.sub("", text[:cut]), _MARKS.sub("", text[cut:])


def special_spans(special_tokens: Iterable[str], text: str) -> list[tuple[int, int]]:
    """The (start, end) of each special token that a text spells out, in its order."""
    names = sorted((name for name in special_tokens if name in text), key=len, reverse=True)
    return [m.span() for m in re.finditer("|".join(map(re.escape, names)), text)] if names else []


def _assistant_parts(message: Message) -> Iterator[tuple[str, str]]:
    """Yields each part of an assistant message: its name for an error, and its text."""
    yield "text", message["content"]
    yield "thinking", message.get("reasoning_content") or ""
    yield "tool plan", message.get("tool_plan") or ""
    for call in message.get("tool_calls") or ():
        yield "tool call", str(call.get("function", call).get("name", ""))


def _marked(message: Message) -> tuple[Message, dict[str, str]]:
    """The message with a mark behind each of its texts, and for each mark the name of that part of the message.

    What follows the last mark in a rendered conversation ends the turn.
    """
    marked = dict(message)
    part_of_mark: dict[str, str] = {}

    def mark(text: str, part: str) -> str:
        number = "".join(chr(ord("a") + int(digit)) for digit in str(len(part_of_mark)))
        part_of_mark[f"{_MARK}{number}z"] = part
        return f"{text}{_MARK}{number}z"

    def call(function: Tool) -> Tool:
        arguments = function.get("arguments")
        if isinstance(arguments, dict) and any(isinstance(value, str) for value in arguments.values()):
            mapped = {k: mark(v, "tool call") if isinstance(v, str) else v for k, v in arguments.items()}
            return function | {"arguments": mapped}
        return function | {"name": mark(str(function.get("name", "")), "tool call")}

    calls = message.get("tool_calls")
    if message["content"].strip() or not calls:  # a template may treat white space as no text
        marked["content"] = mark(message["content"], "text")
    if message.get("reasoning_content"):
        marked["reasoning_content"] = mark(message["reasoning_content"], "thinking")
    if message.get("tool_plan"):
        marked["tool_plan"] = mark(message["tool_plan"], "tool plan")
    if calls:
        marked["tool_calls"] = [
            each | {"function": call(each["function"])} if "function" in each else call(each)
            for each in calls
        ]
    return marked, part_of_mark


def _without_whitespace(text: str) -> str:
    return "".join(text.split())
