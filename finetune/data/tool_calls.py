"""The form in which a chat template takes the `arguments` of tool calls: a map, or a text of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from finetune.data.turns import Message, Render, called_functions
from finetune.system.errors import LabelError

_KEY, _VALUE = "qjxkeyvzw", "qjxvaluevzw"  # only letters, because template filters may escape other characters


def with_arguments_as_rendered(render: Render, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with the arguments of tool calls in the form that the template takes: maps, or else JSON text.

    Args:
        render: The chat template.
        messages: The conversation, with arguments as maps.

    Raises:
        LabelError: The template prints maps as Python does, and does not take text either.
    """
    calling = [i for i, message in enumerate(messages) if _arguments(message)]
    if not calling:
        return messages
    # A template may leave out a call that a user message follows, so the last call is put at the end.
    last = calling[-1]
    sample, as_map, as_text = messages[: last + 1], {_KEY: _VALUE}, json.dumps({_KEY: _VALUE})
    reason = ""
    try:
        shown = render(with_arguments(sample, lambda _: as_map))
        if str(as_map) in shown:
            reason = "the chat template writes a tool call's arguments as Python, not as JSON"
        elif _VALUE in shown:
            return messages
    except LabelError:
        pass  # rendering the conversation tells why, unless it takes texts
    try:
        takes_text = as_text in render(with_arguments(sample, lambda _: as_text))
    except LabelError:
        takes_text = False
    if takes_text:
        return with_arguments(messages, lambda arguments: json.dumps(arguments, ensure_ascii=False))
    if reason:
        raise LabelError(reason, message=last)
    return messages


def _arguments(message: Message) -> list[dict[str, Any]]:
    """The arguments of a message's calls that are maps."""
    given = (function.get("arguments") for function in called_functions(message))
    return [arguments for arguments in given if isinstance(arguments, dict)]


def with_arguments(messages: Sequence[Message], change: Callable[[dict[str, Any]], object]) -> list[Message]:
    """The messages with the arguments of each call changed where they are a map."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return call | {"function": changed(call["function"])}
        arguments = call.get("arguments")
        return call | {"arguments": change(arguments)} if isinstance(arguments, dict) else call

    return [
        message | {"tool_calls": [changed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
