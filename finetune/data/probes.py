"""Short conversations that a chat template is asked with before any row is known, and what their answers show.

A template may refuse some of them: it may need tools or thinking, or feed the beginning of the answer. The rows decide.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from finetune.data.turns import FENCE, Message, Tool
from finetune.system.errors import LabelError

QUESTION, ANSWER = "Hello there", "Good day"
PLAIN: tuple[Message, ...] = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER})
_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a word",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
# A token that a template spells at the beginning of a line, or after another token.
_TOKEN = re.compile(r"(?:^|\n|>)[ \t]*(?=(<\|?\w+\|?>))")


class Probe(NamedTuple):
    """A conversation, and the functions that may be called in it."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] | None


def probes(render: Callable[..., str]) -> Iterator[Probe]:
    """Yields conversations of one question and its answer, those that most templates take first.

    Args:
        render: `Chat.render`.
    """
    question, answer = PLAIN
    thinking = (question, answer | {"reasoning_content": "A greeting."})
    for tools in (None, (_TOOL,)):
        yield Probe(PLAIN, tools)
        yield Probe(thinking, tools)
        with contextlib.suppress(LabelError):
            fed = render([question], True, tools)
            header, found, _ = render([question, answer | {"content": FENCE}], False, tools).partition(FENCE)
            if found and fed.startswith(header) and (begun := fed[len(header) :]).strip():
                yield Probe((question, answer | {"content": begun + ANSWER}), tools)


def spelt_tokens(text: str) -> list[str]:
    """The parts of a rendered probe that look like tokens of turns: after its texts, at the edge of a line.

    A pair such as `<result>` and `</result>`, and a tag inside a sentence, is text that the template says to the model.
    """
    _, _, behind = text.partition(QUESTION)
    between, _, after = behind.partition(ANSWER)
    tokens = [match[1] for part in (between, after) for match in _TOKEN.finditer(part)]
    return [token for token in dict.fromkeys(tokens) if f"</{token[1:]}" not in text]
