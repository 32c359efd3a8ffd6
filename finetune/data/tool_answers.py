"""Checks that a chat template writes a tool's answer as JSON, if the answer is a map or a list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from finetune.system.errors import LabelError

# The keys of an answer in the form that FunctionGemma's guide shows. Its template writes their values alone.
_NAMED_ANSWER = {"name", "response"}


def check_answer_rendered(answer: Any, text: str, message: int) -> None:
    """Checks that a rendered conversation holds all of a tool's answer, and nothing of it as Python prints it.

    Raises:
        LabelError: The template leaves out a part, or prints a map or list of Python (`{'height': 4}`).
    """
    for part in _parts(answer):
        if isinstance(part, dict | list):
            if repr(part) in text and repr(part) not in _written(part):
                reason = "the chat template prints a map of a tool's answer as Python, not as JSON"
                raise LabelError(reason, "write the content as a text of JSON", message)
        elif not any(form in text for form in _written(part)):
            raise LabelError("the chat template leaves out or changes the tool's answer", message=message)


def _parts(value: Any) -> Iterator[Any]:
    """Yields a value of JSON and all values in it, keys of maps too."""
    yield value
    keys = value if isinstance(value, dict) and value.keys() != _NAMED_ANSWER else ()
    for part in [*keys, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(part)


def _written(value: Any) -> set[str]:
    """The forms in which a template may write a value of JSON."""
    if isinstance(value, str):
        quoted = {json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
        return {value, value.strip(), *quoted}
    if isinstance(value, dict | list):
        return {json.dumps(value, ensure_ascii=ascii_only) for ascii_only in (True, False)}
    return {json.dumps(value), str(value)}
