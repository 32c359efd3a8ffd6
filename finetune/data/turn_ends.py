"""Finds the end of an assistant turn in a rendered conversation: the character after its end-of-turn token.

Where the turn is the message's text and a known ending, its end is read from the text. Otherwise the conversation is
rendered once more with a marker after each text of the message. A turn whose end cannot be proved raises `LabelError`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from finetune.data.tool_calls import with_arguments
from finetune.data.turns import (
    FENCE,
    LAST_ONLY,
    Message,
    Render,
    Special,
    Tool,
    called_functions,
    is_text_only,
    letters,
    special_spans,
    without_whitespace,
)
from finetune.system.errors import LabelError, TurnRewrittenLater

# Put after each text of an assistant message. It has only letters, so that no template's filter escapes it.
_MARK = "qjxvzwkqy"
_MARKS = re.compile(f"{_MARK}[a-j]+z")


def turn_end(
    render: Render, special: Special, endings: Sequence[str], messages: Sequence[Message], i: int, text: str, start: int
) -> int:
    """The index of the character after the end-of-turn token of turn `i`.

    Args:
        render: The chat template.
        special: The tokenizer's special tokens.
        endings: The texts that are known to end a turn, longest first.
        messages: The conversation.
        i: The index of an assistant message.
        text: The rendered conversation.
        start: The index of the turn's first character, from `turn_start`.

    Raises:
        TurnRewrittenLater: The template leaves out a part of the message because a user speaks after it.
        LabelError: The template leaves out or changes a part of the message, writes another message inside the turn, or
            ends it with no special token of its own.
    """
    message, later = messages[i], messages[i + 1 :]
    if is_text_only(message) and (end := _known_end(message["content"], endings, text, start)):
        return end
    before = render(messages[:i]) if i else ""
    marked, as_last, tail = _checked_tail(render, messages, i, text, start, before)
    count = len(_MARKS.findall(as_last))
    after = _split_after_marks(as_last, count)[1]
    elsewhere = after
    if not later:
        role = "tool" if message.get("tool_calls") else "user"
        with contextlib.suppress(LabelError):
            followed = render([*messages[:i], marked, {"role": role, "content": "Hello there"}])
            elsewhere = _split_after_marks(followed, count)[1]
    # The turn is rendered as the last message and before another message. What follows its text in both belongs to the
    # turn. What a template writes only at the end of a conversation, or only before the next message, does not. A
    # special token may be cut at the end of what is shared: whole ones count.
    shared = commonprefix([tail, elsewhere])  # noqa: RUF071 - characters are meant
    headers = _headers(render, special, messages[:i])
    spans = special_spans(special.tokens, tail)
    own = _before_the_next_header(
        [(tail[first:end], end) for first, end in spans if end <= len(shared)],
        headers,
        # Between `before` and the turn stands the header that `add_generation_prompt` adds.
        unasked=not text[len(before) : start].strip() or len(special_spans(special.tokens, after)) > 1,
    )
    if not own and spans and spans[0][0] <= len(shared) < spans[0][1]:
        first, end = spans[0]
        closes = _closes_turn(render, tail[first:end], text[len(before) : start], headers, not later)
        own = [end] if closes else []
    if not own and spans and spans[0][1] <= len(shared):
        reason = "the chat template ends the turn with the header of the next one, which ends no turn"
        raise LabelError(reason, message=i)
    if not own:
        raise LabelError(
            f"the template ends the turn with {shared[:40]!r}, in which this tokenizer has no special token, so the "
            "model could not learn to stop",
            message=i,
        )
    return len(text) - len(tail) + own[-1]


def _checked_tail(
    render: Render, messages: Sequence[Message], i: int, text: str, start: int, before: str
) -> tuple[Message, str, str]:
    """Checks that turn `i` is rendered whole and by itself; the arguments are those of `turn_end`.

    Returns:
        The message with marks, the conversation rendered up to it, and the part of `text` after the turn's texts.

    Raises:
        TurnRewrittenLater, LabelError: As for `turn_end`.
    """
    message, later = messages[i], messages[i + 1 :]
    marked, part_of_mark = _marked(message)
    try:
        as_last = render([*messages[:i], marked])
    except LabelError:
        if not message.get("tool_calls"):
            raise
        # A template may look a function up by its name.
        marked, part_of_mark = _marked(message, names=False)
        as_last = render([*messages[:i], marked])
    whole = render([*messages[:i], marked, *later])
    # A template may write a tool's name in the call and again in the result: the marks of the turn are those that it
    # has as the last one.
    marks = _MARKS.findall(as_last)
    head, tail = _split_after_marks(whole, len(marks))
    rendered_marks = _MARKS.findall(whole)[: len(marks)]
    # White space before a mark is not trimmed, so texts are compared without it. A generation prompt may hold the first
    # word already (`<think>`).
    turn = without_whitespace(text[start : len(text) - len(tail)])
    shown = without_whitespace(text[len(commonprefix([text, before])) : len(text) - len(tail)])  # noqa: RUF071 - characters
    lacking = [part for mark, part in part_of_mark.items() if mark not in rendered_marks]
    lacking += [part for part, said in _assistant_parts(message) if without_whitespace(said) not in shown]
    if not lacking and _leaves_out_arguments(render, messages[:i], message):
        lacking = ["tool call"]
    if lacking:
        reason = f"the chat template leaves out its {lacking[0]}"
        if any(m["role"] == "user" for m in later):
            raise TurnRewrittenLater(reason, LAST_ONLY, i)
        raise LabelError(reason, message=i)
    if rendered_marks != marks or without_whitespace(head[start:]) != turn or not text.endswith(tail):
        reason = "the chat template changes the assistant's text, so its tokens cannot be found"
        raise LabelError(reason, message=i)
    # An empty assistant message gets no fence: gpt-oss's template refuses text beside reasoning and a call.
    empty = [
        not isinstance(m["content"], str) or (m["role"] == "assistant" and not m["content"].strip()) for m in later
    ]
    fenced = [m if e else m | {"content": FENCE + m["content"]} for m, e in zip(later, empty, strict=True)]
    if fenced and FENCE in _split_after_marks(render([*messages[:i], marked, *fenced]), len(marks))[0]:
        raise LabelError("the chat template writes a later message inside its turn", message=i)
    return marked, as_last, tail


class _Headers(NamedTuple):
    """The special tokens that a template writes in front of a message.

    Attributes:
        opening: Those that begin a conversation, and so a turn.
        last: The one before the first message's text; empty if there is none.
        after_last: Those after the text of the last message without `add_generation_prompt`, in their order.
    """

    opening: frozenset[str]
    last: str
    after_last: tuple[str, ...]


def _headers(render: Render, special: Special, messages: Sequence[Message]) -> _Headers:
    """The special tokens of headers, as the messages before a turn show them."""
    if not messages:
        return _Headers(frozenset(), "", ())
    first, *between = messages
    fenced = [first, *between]
    if isinstance(first["content"], str):  # a tool's answer may be a map
        fenced[0] = first | {"content": FENCE + first["content"]}
    if isinstance(fenced[-1]["content"], str):
        fenced[-1] = fenced[-1] | {"content": fenced[-1]["content"] + _MARK}
    try:
        text = render(fenced)
    except LabelError:
        text = render(messages)
    lead, found, _ = text.partition(FENCE)
    lead = lead if found else ""
    after_last = text.rpartition(_MARK)[2] if _MARK in text else ""
    opening: list[str] = []
    end = None
    for start, stop in special_spans(special.tokens, lead):
        token = lead[start:stop]
        if token in special.outside:
            continue
        if end is not None and lead[end:start].strip():
            break
        opening.append(token)
        end = stop
    before = [lead[start:end] for start, end in special_spans(special.tokens, lead)]
    return _Headers(
        frozenset(opening),
        before[-1] if before and before[-1] not in special.outside else "",
        tuple(after_last[start:end] for start, end in special_spans(special.tokens, after_last)),
    )


def _before_the_next_header(ends: Sequence[tuple[str, int]], headers: _Headers, unasked: bool) -> list[int]:
    """The ends of those special tokens that end a turn: those before the header of the next one.

    Some templates write the next answer's header without `add_generation_prompt`, too.

    Args:
        ends: The special tokens after a turn's text, and where each ends.
        headers: The tokens of headers.
        unasked: True if a header may stand there although `add_generation_prompt` is false.
    """
    own: list[int] = []
    for token, end in ends:
        begins = token in headers.opening or (token == headers.last and headers.after_last[-1:] == (token,))
        # A token that ends each turn may also be what begins the conversation.
        if begins and (own or (unasked and token in headers.opening)):
            break
        own.append(end)
    return own


def _known_end(content: str, endings: Sequence[str], text: str, start: int) -> int:
    """The index after the ending of a turn that is its message's text and a known ending; 0 if it is not that."""
    for written in (content, content.strip()):
        # Mistral's templates write a blank before the text.
        for first in (start, start + 1) if text[start : start + 1] == " " else (start,):
            if text.startswith(written, first):
                for ending in endings:
                    if text.startswith(ending, first + len(written)):
                        return first + len(written) + len(ending)
    return 0


def _closes_turn(render: Render, token: str, prompt: str, headers: _Headers, is_last: bool) -> bool:
    """True if a token ends this turn, although not the turns at another place of a conversation.

    gpt-oss ends the last turn with a token of its own, and the others with the one that ends a user's turn.
    """
    if token in prompt or (is_last and not prompt.strip() and token in headers.after_last):
        return False
    closing = ""
    with contextlib.suppress(LabelError):
        asked = render([{"role": "user", "content": FENCE}], add_generation_prompt=True)
        closing = asked.rpartition(FENCE)[2].removesuffix(prompt)
    return is_last or token in closing


def _split_after_marks(text: str, count: int) -> tuple[str, str]:
    """Splits a text after its `count`-th mark; both parts come without any mark."""
    ends = [match.end() for match in _MARKS.finditer(text)][:count]
    cut = ends[-1] if ends else 0
    return _MARKS.sub("", text[:cut]), _MARKS.sub("", text[cut:])


def _texts(value: object) -> Iterator[str]:
    """Yields each text in a value of JSON, but no key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _leaves_out_arguments(render: Render, before: Sequence[Message], message: Message) -> bool:
    """True if a template drops the arguments of calls without a text that could be marked."""
    maps = [function.get("arguments") for function in called_functions(message)]
    if all(not arguments or next(_texts(arguments), None) is not None for arguments in maps):
        return False
    shown = render([*before, with_arguments([message], lambda arguments: {FENCE: FENCE} if arguments else {})[0]])
    return FENCE not in shown


def _assistant_parts(message: Message) -> Iterator[tuple[str, str]]:
    """Yields each part of an assistant message: its name for an error, and its text."""
    yield "text", message["content"]
    yield "thinking", message.get("reasoning_content") or ""
    yield "tool plan", message.get("tool_plan") or ""
    for function in called_functions(message):
        yield "tool call", str(function.get("name", ""))


def _marked(message: Message, names: bool = True) -> tuple[Message, dict[str, str]]:
    """The message with a mark after each of its texts, and for each mark the name of that part of the message.

    What follows the last mark in a rendered conversation ends the turn.

    Args:
        message: An assistant's message.
        names: Whether the name of a called function is marked where its arguments hold a text to mark.
    """
    marked = dict(message)
    part_of_mark: dict[str, str] = {}

    def mark(text: str, part: str) -> str:
        name = f"{_MARK}{letters(len(part_of_mark))}z"
        part_of_mark[name] = part
        return text + name

    def mark_all(value: Any) -> Any:
        if isinstance(value, str):
            return mark(value, "tool call")
        if isinstance(value, dict):
            return {key: mark_all(part) for key, part in value.items()}
        return [mark_all(part) for part in value] if isinstance(value, list) else value

    def call(function: Tool) -> Tool:
        arguments = function.get("arguments")
        has_text = isinstance(arguments, str) or next(_texts(arguments), None) is not None
        if names or not has_text:
            # The name may come before its arguments or after them.
            function = function | {"name": mark(str(function.get("name", "")), "tool call")}
        return function | {"arguments": mark_all(arguments)} if has_text else function

    calls = message.get("tool_calls")
    if message["content"].strip() or not calls:  # a template may treat white space as no text
        marked["content"] = mark(message["content"], "text")
    if message.get("reasoning_content"):
        marked["reasoning_content"] = mark(message["reasoning_content"], "thinking")
    if message.get("tool_plan"):
        marked["tool_plan"] = mark(message["tool_plan"], "tool plan")
    if calls:
        marked["tool_calls"] = [
            each | {"function": call(each["function"])} if "function" in each else call(each) for each in calls
        ]
    return marked, part_of_mark
