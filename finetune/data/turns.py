"""Where the assistant turns of a rendered conversation lie, in characters; asked of the template, whatever it is.

`render` is the template: it takes messages and whether a generation prompt follows them. A turn begins where what
inference would feed ends. Where its text ends is plain where the turn is the message and then an end-of-turn token;
else the conversation is rendered once more with a mark behind each text of the message. A row on which this cannot be
shown raises `LabelError` with the message and the reason.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from os.path import commonprefix
from typing import Any, Protocol

from finetune.system.errors import LabelError, TurnRewrittenLater

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# Stands behind each text of an assistant message in a second rendering. Letters only, so that no filter escapes it.
_MARK = "qjxvzwkqy"
_MARKS = re.compile(f"{_MARK}[a-j]+z")
_FENCE = "xwqvkjzwx"  # stands before texts of other messages
_LAST_ALONE = "; data.train_on: last_assistant trains on the last turn alone"


class Render(Protocol):
    """A chat template with its tools."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The messages as the template writes them."""


def is_text_only(message: Message) -> bool:
    """Whether a message is its text alone, without thinking or tool calls."""
    return message.keys() <= {"role", "content", "train"}


def texts_in(value: Any) -> Iterator[str]:
    """Each text that a message, or a part of one, holds."""
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
    """The message as the template gets it: what is trained on is none of its business."""
    return {k: v for k, v in message.items() if k != "train"} if "train" in message else message


def authored_texts(message: Message) -> Iterable[str]:
    """The texts of a message that come from the row and not from this code."""
    return (
        [message["content"]]
        if is_text_only(message)
        else texts_in([v for k, v in message.items() if k != "role"])
    )


def message_holding(messages: Sequence[Message], text: str) -> str:
    """The first message that holds a text, as it is told to a person; empty where none does."""
    holds = (i for i, m in enumerate(messages) if any(text in part for part in authored_texts(m)))
    return next((f"message {i + 1}" for i in holds), "")


def check_unicode(messages: Sequence[Message], text: str) -> None:
    """Half a character is none: JSON can hold it, a tokenizer cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        where = message_holding(messages, half) or "the text"
        raise LabelError(f"{where}: its text holds half a character ({half!r}), not Unicode") from error


def trained_messages(messages: Sequence[Message], train_on: str) -> list[int]:
    """The places of the messages to train on; checks roles and texts on the way."""
    assistant = []
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise LabelError(f"message {i + 1}: unknown role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise LabelError(f"message {i + 1}: its content is {type(content).__name__}, not text")
        if role == "assistant":
            assistant.append(i)
        elif message.get("train") or (train_on == "all" and "train" in message):
            raise LabelError(
                f"message {i + 1}: `train` on a {role} message; only an assistant's can be chosen or left out"
            )
    if not assistant:
        raise LabelError("there is no assistant message")
    wanted = assistant[-1:] if train_on == "last_assistant" else assistant
    return [i for i in assistant if messages[i].get("train", i in wanted)]


def check_all_rendered(messages: Sequence[Message], text: str) -> None:
    """No message may be left out by the template; of assistants' the trained ones, which `turn_end` sees to."""
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "assistant" or content in text:
            continue
        # Tool results may be written as JSON; blanks within a text may be tidied.
        quoted = (json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
        if _without_whitespace(content) not in _without_whitespace(text) and not any(
            form in text for form in quoted
        ):
            raise LabelError(
                f"message {i + 1}: the chat template leaves out or changes the {message['role']}'s text"
            )


def turn_start(render: Render, messages: Sequence[Message], i: int, text: str) -> int:
    """The first character of the turn of message `i`: what comes before is what inference would feed."""
    prefix = render(messages[:i], add_generation_prompt=True)
    if not text.startswith(prefix):
        later = i + 1 < len(messages)
        raise (TurnRewrittenLater if later else LabelError)(
            f"message {i + 1}: what inference would feed before this turn is not what stands before it in the whole "
            f"conversation{_LAST_ALONE if later else ''}"
        )
    return len(prefix)


def turn_end(
    render: Render,
    special: Iterable[str],
    endings: Sequence[str],
    messages: Sequence[Message],
    i: int,
    text: str,
    start: int,
) -> int:
    """The character behind the end-of-turn token of message `i`, whose turn starts at character `start`.

    `special` are the tokenizer's special tokens, `endings` those texts that are known to end a turn, longest first.
    """
    message = messages[i]
    if is_text_only(message):
        for written in (message["content"], message["content"].strip()):
            # Mistral's templates write a blank before the text.
            for first in (start, start + 1) if text[start : start + 1] == " " else (start,):
                if text.startswith(written, first):
                    for ending in endings:
                        if text.startswith(ending, first + len(written)):
                            return first + len(written) + len(ending)
    marked, kinds = _marked(message)
    before = render(messages[:i]) if i else ""
    last = render([*messages[:i], marked])
    whole = render([*messages[:i], marked, *messages[i + 1 :]])
    # A template may write a tool's name in the call and again in the answer to it: the marks of the turn are those that
    # are there when nothing follows it.
    there = _MARKS.findall(last)
    found = _MARKS.findall(whole)[: len(there)]
    head, tail = _behind(whole, len(there))
    # Blanks before a mark are not trimmed, so what is compared is all but the blanks. A generation prompt may hold the
    # first word already (`<think>`).
    said = _without_whitespace(text[start : len(text) - len(tail)])
    shown = _without_whitespace(text[len(commonprefix([text, before])) : len(text) - len(tail)])  # noqa: RUF071 - characters
    lacking = [kind for mark, kind in kinds.items() if mark not in found]
    lacking += [kind for kind, part in _assistant_parts(message) if _without_whitespace(part) not in shown]
    if lacking:
        asked_on = any(m["role"] == "user" for m in messages[i + 1 :])
        told = f"message {i + 1}: the chat template leaves out its {lacking[0]}"
        raise TurnRewrittenLater(told + _LAST_ALONE) if asked_on else LabelError(told)
    if found != there or _without_whitespace(head[start:]) != said or not text.endswith(tail):
        raise LabelError(
            f"message {i + 1}: the chat template changes the assistant's text, so its tokens cannot be told"
        )
    # An assistant's message without text is left so: gpt-oss's template takes none beside thinking and a call.
    later = messages[i + 1 :]
    silent = [m["role"] == "assistant" and not m["content"].strip() for m in later]
    fenced = [m if s else m | {"content": _FENCE + m["content"]} for m, s in zip(later, silent, strict=True)]
    if fenced and _FENCE in _behind(render([*messages[:i], marked, *fenced]), len(there))[0]:
        raise LabelError(f"message {i + 1}: the chat template writes a later message inside its turn")
    elsewhere = last
    if i + 1 == len(messages):
        role = "tool" if message.get("tool_calls") else "user"
        with contextlib.suppress(LabelError):
            elsewhere = render([*messages[:i], marked, {"role": role, "content": "Hello there"}])
    # What ends the turn is what follows its text here and elsewhere: as the last one where it is not, and with another
    # message behind it where it is. What a template writes only at the end of a conversation, or before the next
    # message, is none of the turn. A special token may be cut at the edge of what is shared, so whole ones count.
    shared = commonprefix([tail, _behind(elsewhere, len(there))[1]])  # noqa: RUF071 - characters are meant
    places = special_spans(special, tail)
    within = [end for _, end in places if end <= len(shared)]
    if not within and places and places[0][0] <= len(shared):
        # gpt-oss ends the last turn with a token of its own, and the others with the one that ends a user's turn.
        token = tail[slice(*places[0])]
        prompt = text[len(before) : start]
        asked = render([{"role": "user", "content": _FENCE}], add_generation_prompt=True)
        closing = asked.rpartition(_FENCE)[2].removesuffix(prompt)
        if token not in prompt and (i + 1 == len(messages) or token in closing):
            within = [places[0][1]]
    if not within:
        raise LabelError(
            f"message {i + 1}: the template ends the turn with {shared[:40]!r}, in which this tokenizer has no special "
            "token, so the model could not learn to stop"
        )
    return len(text) - len(tail) + within[-1]


def _behind(text: str, marks: int) -> tuple[str, str]:
    """What stands before and behind the last of so many marks, without any mark."""
    ends = [match.end() for match in _MARKS.finditer(text)][:marks]
    cut = ends[-1] if ends else 0
    return _MARKS.sub("", text[:cut]), _MARKS.sub("", text[cut:])


def special_spans(special: Iterable[str], text: str) -> list[tuple[int, int]]:
    """First character and the one behind, of each special token that the text spells out."""
    names = sorted((name for name in special if name in text), key=len, reverse=True)
    return [m.span() for m in re.finditer("|".join(map(re.escape, names)), text)] if names else []


def _assistant_parts(message: Message) -> Iterator[tuple[str, str]]:
    """What each text is that an assistant message says, and the text."""
    yield "text", message["content"]
    yield "thinking", message.get("reasoning_content") or ""
    for call in message.get("tool_calls") or ():
        yield "tool call", str(call.get("function", call).get("name", ""))


def _marked(message: Message) -> tuple[Message, dict[str, str]]:
    """The message with a mark of its own behind each text that it says, and what each mark stands behind.

    What follows the last mark when rendered ends the turn.
    """
    marked = dict(message)
    kinds: dict[str, str] = {}

    def mark(text: str, kind: str) -> str:
        own = _MARK + "".join(chr(97 + int(digit)) for digit in str(len(kinds))) + "z"
        kinds[own] = kind
        return text + own

    def call(function: dict[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        if isinstance(arguments, dict) and any(isinstance(value, str) for value in arguments.values()):
            return function | {
                "arguments": {
                    k: mark(v, "tool call") if isinstance(v, str) else v for k, v in arguments.items()
                }
            }
        return function | {"name": mark(str(function.get("name", "")), "tool call")}

    calls = message.get("tool_calls")
    if message["content"].strip() or not calls:  # a template may treat a text of blanks as none
        marked["content"] = mark(message["content"], "text")
    if message.get("reasoning_content"):
        marked["reasoning_content"] = mark(message["reasoning_content"], "thinking")
    if calls:
        marked["tool_calls"] = [
            each | {"function": call(each["function"])} if "function" in each else call(each)
            for each in calls
        ]
    return marked, kinds


def _without_whitespace(text: str) -> str:
    return "".join(text.split())
