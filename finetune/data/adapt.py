"""Adapts a conversation to its chat template: roles that the template lacks, and tokens that a variable writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from finetune.data.rendering import Renderer
from finetune.data.template_variables import variables_read
from finetune.data.turns import INSTRUCTING, Message, Tool, without_whitespace
from finetune.system.errors import LabelError

# Renders the instructing messages of a conversation with variables of the template; see `_shown`.
Probe = Callable[[Sequence[Message], Mapping[str, Any]], "str | None"]
_QUESTION: Message = {"role": "user", "content": "Hello there"}
_NO_ROLE = "qjxvzw"  # letters, which no template's filter escapes

# Changes that the ledger counts as mended.
DEVELOPER_RENAMED = "rows whose developer message became a system message, because the chat template has no such role"
THINKING_SWITCHED_ON = "rows whose system text switched thinking on by its token"


class Adapted(NamedTuple):
    """A conversation as its template takes it.

    Attributes:
        messages: The messages.
        variables: The template's variables.
        changes: What was changed, as the ledger counts it.
    """

    messages: list[Message]
    variables: dict[str, Any]
    changes: list[str]


def adapt(
    render: Renderer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Adapted:
    """The conversation as the chat template takes it.

    A `developer` message becomes a `system` message where the template does not know that role. Where the system text
    begins with a special token that the template writes there itself if a variable is true, as Gemma 4's `<|think|>`,
    the variable takes the token's place.

    Args:
        render: Renders with the chat template.
        messages: The conversation.
        tools: The functions that may be called.
        variables: The row's variables.
    """
    adapted = Adapted(list(messages), dict(variables or {}), [])
    instructing = [message for message in messages if message["role"] in INSTRUCTING]
    if not instructing:
        return adapted
    # These alone are rendered: the rest of the conversation may be one that the template refuses as it is.
    probe = partial(_shown, render, tools=tools)
    developers = any(message["role"] == "developer" for message in instructing)
    if developers and not _knows_developer(probe, instructing, adapted.variables):
        adapted.messages[:] = _with_role(messages, "system")
        adapted.changes.append(DEVELOPER_RENAMED)
    found = _token_as_variable(probe, adapted.messages[0], render, adapted.variables)
    if found:
        adapted.messages[0], name = found
        adapted.variables[name] = True
        adapted.changes.append(THINKING_SWITCHED_ON)
    return adapted


def _shown(
    render: Renderer, instructing: Sequence[Message], variables: Mapping[str, Any], tools: Sequence[Tool] | None
) -> str | None:
    """The instructing messages before a question, without white space; None where the template refuses them."""
    try:
        return without_whitespace(render([*instructing, _QUESTION], tools=tools, variables=variables))
    except LabelError:
        return None


def _with_role(messages: Sequence[Message], role: str) -> list[Message]:
    return [m | {"role": role} if m["role"] == "developer" else m for m in messages]


def _knows_developer(probe: Probe, instructing: Sequence[Message], variables: Mapping[str, Any]) -> bool:
    """True if the template writes a developer's text, and not as that of any role, unless it takes no system text."""
    texts = [without_whitespace(str(message["content"])) for message in instructing if message["role"] == "developer"]

    def shown(role: str) -> str | None:
        text = probe(_with_role(instructing, role), variables)
        return text if text is not None and all(part in text for part in texts) else None

    own, other = shown("developer"), shown(_NO_ROLE)
    known = other is None or other.replace(_NO_ROLE, "developer") != own
    return own is not None and (known or shown("system") is None)


def _token_as_variable(
    probe: Probe, first: Message, render: Renderer, variables: Mapping[str, Any]
) -> tuple[Message, str] | None:
    """The system message without the token that its text begins with, and the variable that has the template write it.

    None where the first message is no such message, or no variable has the template write the same.
    """
    if first["role"] not in INSTRUCTING:
        return None
    text = first["content"].lstrip() if isinstance(first["content"], str) else ""
    token = max((token for token in render.special_texts if text.startswith(token)), key=len, default=None)
    if token is None:
        return None
    rest = first | {"content": text.removeprefix(token).lstrip()}
    wanted = probe([first], variables)
    names = [name for name in variables_read(render.tokenizer) if name not in variables]
    same = (name for name in names if wanted is not None and probe([rest], {**variables, name: True}) == wanted)
    return next(((rest, name) for name in same), None)
