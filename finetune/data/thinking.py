"""Finds an assistant's thinking in a rendered conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from finetune.data.turns import FENCE, Message, Render, has_thinking, letters
from finetune.system.errors import LabelError

_FENCES = re.compile(f"{FENCE}([a-j]+)z")
# The end of a thought that is written as a part of the answer's text.
_CLOSED_IN_TEXT = re.compile(r"</\w*(?:think|thought|reason)\w*>|\[/think\]|<channel\|>", re.IGNORECASE)


def check_thinking_apart(messages: Sequence[Message], indices: Iterable[int]) -> None:
    """Checks that no thinking stands in the text of some messages, where it cannot be told from the answer.

    Raises:
        LabelError: It does.
    """
    for i in indices:
        if _CLOSED_IN_TEXT.search(messages[i]["content"]):
            detail = "data.train_on_thinking: false needs it as reasoning_content"
            raise LabelError("its thinking is a part of its text", detail, i)


def thinking_spans(
    render: Render, messages: Sequence[Message], indices: Iterable[int], text: str
) -> list[tuple[int, int]]:
    """The (start, end) in characters of the thinking of some messages, without white space around it.

    Args:
        render: The chat template.
        messages: The conversation.
        indices: The messages; thinking of theirs that the template leaves out has no span.
        text: The rendered conversation.

    Raises:
        LabelError: The template changes the thinking, so that it cannot be found.
    """
    fenced = list(messages)
    for i in indices:
        if has_thinking(messages[i]):
            thinking = messages[i]["reasoning_content"]
            core, fence = thinking.strip(), f"{FENCE}{letters(i)}z"
            lead, _, trail = thinking.partition(core)
            fenced[i] = messages[i] | {"reasoning_content": f"{lead}{fence}{core}{fence}{trail}"}
    if all(new is old for new, old in zip(fenced, messages, strict=True)):
        return []
    whole = render(fenced)
    places: dict[str, list[int]] = {}
    removed = 0
    for match in _FENCES.finditer(whole):
        places.setdefault(match[1], []).append(match.start() - removed)
        removed += len(match[0])
    if _FENCES.sub("", whole) != text or any(len(ends) != 2 for ends in places.values()):
        raise LabelError("the chat template changes its thinking, so its tokens cannot be found", message=max(indices))
    return [(start, end) for start, end in places.values()]
