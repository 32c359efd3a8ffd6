"""Finds where each assistant turn starts in a rendered conversation, and checks that no message is left out.

A turn starts where the prompt that inference would feed ends. `turn_ends.py` finds where it ends, and `chat.py` proves
the same prefix in tokens. A conversation whose turns cannot be proved raises `LabelError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from finetune.data.tool_answers import check_answer_rendered
from finetune.system.errors import LabelError, TurnRewrittenLater

Message = dict[str, Any]
Tool = dict[str, Any]  # a function that may be called, in OpenAI's form

ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTING = ("system", "developer")  # the roles of texts that instruct the model before its user does
FENCE = "xwqvkjzwx"  # put before the texts of other messages
# A text this long that occurs once in the messages and the template is rendered if it is in the output; else FENCE is
# needed to find out.
_LONG_ENOUGH = 16
LAST_ONLY = "data.train_on: last_assistant trains on the last turn alone"


class Special(NamedTuple):
    """The special tokens of a tokenizer.

    Attributes:
        tokens: All of them.
        outside: BOS and EOS, which begin no turn.
    """

    tokens: frozenset[str]
    outside: frozenset[str]


class Render(Protocol):
    """A chat template with its tools."""

    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the messages as the template writes them."""


def is_text_only(message: Message) -> bool:
    """True for a message that has text, but no reasoning and no tool calls."""
    return message.keys() <= {"role", "content", "train"}


def called_functions(message: Message) -> list[Tool]:
    """The functions that a message calls, each a map with `name` and `arguments`; empty if it calls none."""
    return [call.get("function", call) for call in message.get("tool_calls") or ()]


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


def check_all_rendered(render: Render, messages: Sequence[Message], text: str, template: str) -> None:
    """Checks that a rendered conversation holds the text of each message but the assistant's, which `turn_end` checks.

    A text whose words stand in another message or in the template as well may have been left out all the same. Then the
    conversation is rendered once more, with a fence before each text.

    Args:
        render: The chat template.
        messages: The conversation.
        text: The rendered conversation.
        template: The source of the chat template.

    Raises:
        LabelError: The template leaves out or changes a message's text.
    """
    texts = [message["content"] if isinstance(message["content"], str) else "" for message in messages]
    contents = [content.strip() for content in texts]
    for i, message in enumerate(messages):
        if not isinstance(message["content"], str):
            check_answer_rendered(message["content"], text, i)
    others = [i for i, message in enumerate(messages) if message["role"] != "assistant" and contents[i]]
    everything = "\0".join([template, *(part for message in messages for part in authored_texts(message))])
    unsure = False
    for i in others:
        if not _holds(text, contents[i]):
            raise _left_out(messages, i)
        # A short text may stand in the name of a role or in another part that only a rendered template shows.
        unsure = unsure or len(contents[i]) < _LONG_ENOUGH or everything.count(contents[i]) > 1
    if not unsure:
        return
    fences = {i: f"{FENCE}{letters(i)}z" for i in others}
    try:
        fenced = render(
            [m | {"content": fences[i] + contents[i]} if i in fences else m for i, m in enumerate(messages)]
        )
    except LabelError:
        return  # a template that reads its texts, such as JSON, reads none with a fence
    for i, fence in fences.items():
        if not _holds(fenced, fence + contents[i]):
            raise _left_out(messages, i)


def _left_out(messages: Sequence[Message], i: int) -> LabelError:
    reason = f"the chat template leaves out or changes the {messages[i]['role']}'s text"
    return LabelError(reason, message=i)


def _holds(text: str, content: str) -> bool:
    """True if a rendered text holds a message's; it may write it as JSON, and change the white space inside."""
    if content in text or any(
        json.dumps(content, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (True, False)
    ):
        return True
    return without_whitespace(content) in without_whitespace(text)


def turn_start(render: Render, messages: Sequence[Message], i: int, text: str) -> int:
    """The index of the first character of turn `i`, right after the prompt that inference would feed.

    Args:
        render: The chat template.
        messages: The conversation.
        i: The index of an assistant message.
        text: The rendered conversation.

    Raises:
        TurnRewrittenLater: Messages that follow the turn change what comes before it.
        LabelError: That prompt is not a prefix of the text.
    """
    prefix = render(messages[:i], add_generation_prompt=True)
    if text.startswith(prefix):
        return len(prefix)
    reason = (
        "the prompt that inference would feed before this turn (add_generation_prompt=True) is not the beginning of "
        "the rendered conversation"
    )
    if i + 1 < len(messages):
        raise TurnRewrittenLater(reason, LAST_ONLY, i)
    if fault := thought_fault(messages[i], prefix):
        raise LabelError(*fault, i)
    raise LabelError(reason, message=i)


def special_spans(special_tokens: Iterable[str], text: str) -> list[tuple[int, int]]:
    """The (start, end) of each special token that a text spells out, in its order."""
    names = sorted((name for name in special_tokens if name in text), key=len, reverse=True)
    return [m.span() for m in re.finditer("|".join(map(re.escape, names)), text)] if names else []


def letters(number: int) -> str:
    """A number in letters, which no template's filter escapes."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def without_whitespace(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


# An opening tag, a word at most, and the tag that closes it: `<think>\n\n</think>`, `<|channel>thought\n<channel|>`.
_TAG = r"<[^<>\s]+>|\[[^\[\]\s]+\]"
_THOUGHT = rf"\s*({_TAG})\s*\w*\s*({_TAG})\s*"
_CLOSED_THOUGHT, _ENDS_CLOSED = re.compile(_THOUGHT), re.compile(rf"{_THOUGHT}\Z")
# The opening of a thought at the end of a prompt: `<think>\n`, `[THINK]`, `<|channel>thought\n`.
_ENDS_OPEN = re.compile(r"(?:<[^<>/\s]*(?:think|thought|reason)[^<>\s]*>|\[think\]|<\|channel>)\s*\w*\s*\Z", re.I)


def has_thinking(message: Message) -> bool:
    """True if a message has thinking of its own."""
    return bool((message.get("reasoning_content") or "").strip())


def thought_fault(message: Message, prompt: str) -> tuple[str, str] | None:
    """The reason why an answer cannot follow a prompt that opens or closes a thought, and the cure; None where it can.

    Args:
        message: An assistant's message.
        prompt: The rendered prompt that inference would feed before it.
    """
    prompt = prompt[-200:]
    found = _ENDS_CLOSED.search(prompt)
    closed = found is not None and found[2] in _closing_tags(found[1])
    if closed and has_thinking(message):
        cure = "remove its reasoning_content, or switch thinking on by chat_template_kwargs"
        return "inference feeds a closed thought before this turn, which has thinking", cure
    if not closed and not has_thinking(message) and _ENDS_OPEN.search(prompt):
        cure = "add reasoning_content, or switch thinking off by chat_template_kwargs"
        return "inference feeds the beginning of a thought before this turn, which has none", cure
    return None


def after_closed_thought(render: Render, messages: Sequence[Message], i: int, text: str) -> tuple[str, int] | None:
    """The prompt that inference feeds before turn `i`, and where the turn begins in `text`; else None.

    Some templates feed an empty thought that no finished turn has. The answer then follows that thought.

    Args:
        render: The chat template.
        messages: The conversation.
        i: The index of an assistant message.
        text: The rendered conversation.

    Raises:
        LabelError: The template refuses a part of the conversation.
    """
    if messages[i].get("reasoning_content"):
        return None
    fed = render(messages[:i], add_generation_prompt=True)
    fenced = render([*messages[:i], {"role": "assistant", "content": FENCE}])
    header, found, _ = fenced.partition(FENCE)
    if not (found and fed.startswith(header) and text.startswith(header)):
        return None
    thought = _CLOSED_THOUGHT.fullmatch(fed[len(header) :])
    if not thought or thought[2] not in _closing_tags(thought[1]) or thought[1] in messages[i]["content"]:
        return None
    return fed, len(header)


def _closing_tags(tag: str) -> set[str]:
    """The tags that close one: `</think>`, `[/THINK]`, `<channel|>`, `<|END_THINKING|>` and their like."""
    closing = {f"{tag[0]}/{tag[1:]}", f"{tag[:2]}/{tag[2:]}"}
    if tag.startswith("<|") and not tag.endswith("|>"):
        closing.add(f"<{tag[2:-1]}|>")
    words = (("START", "END"), ("start", "end"), ("BEGIN", "END"), ("begin", "end"), ("bo", "eo"), ("BO", "EO"))
    return closing | {tag.replace(first, last, 1) for first, last in words if first in tag}
