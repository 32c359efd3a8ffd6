"""Variables of chat templates (`chat_template_kwargs`): which a template reads, and their values as saved defaults.

What a run is trained with must be what everybody renders who is told nothing. So `model.chat_template_kwargs` becomes
the beginning of the chat template, which is saved with the model and copied into every export.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from finetune.data.turns import Message
from finetune.system.errors import TemplateError

KEY = "model.chat_template_kwargs"
# A variable that is given goes before its default. The empty expression keeps a line break with which the model's own
# template begins.
_DEFAULT = "{{%- if {0} is not defined -%}}{{%- set {0} = {1} -%}}{{%- endif -%}}"
_FORCED = "{{%- set {0} = {1} -%}}"
_END = "{{ '' }}"
_ONE = r"\{%- if (?P<name>\w+) is not defined -%\}\{%- set (?P=name) = (.*?) -%\}\{%- endif -%\}"
_DEFAULTS = re.compile(rf"(?P<all>(?:{_ONE})+)\{{\{{ '' \}}\}}")

_ASKED: Message = {"role": "user", "content": "Hello there"}
_ANSWERED: Message = {"role": "assistant", "content": "Good day"}
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_THOUGHT = _ANSWERED | {"reasoning_content": "A greeting."}
_CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
_CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: Message = {"role": "tool", "content": "Four metres", "name": "tide", "tool_call_id": "a1b2c3d4e"}
_FUNCTION = {"name": "tide", "description": "Tide at a port", "parameters": {"type": "object", "properties": {}}}
_TOOLS = [{"type": "function", "function": _FUNCTION}]
# Conversations on which a template with defaults is compared with the template that is told the values.
_CONVERSATIONS = (
    [_ASKED],
    [_ASKED, _ANSWERED],
    [_ASKED, _THOUGHT],
    [_SYSTEM, _ASKED, _ANSWERED, _ASKED],
    [_SYSTEM, _ASKED, _THOUGHT, _ASKED, _THOUGHT],
    [_ASKED, _CALLING, _RESULT],
    [_SYSTEM, _ASKED, _CALLING | {"reasoning_content": "A tide."}, _RESULT, _THOUGHT],
)


def _templates(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's chat templates by name; the name of a single one is empty."""
    own = tokenizer.chat_template
    return own if isinstance(own, dict) else {"": own}


def set_by_transformers(tokenizer: Any) -> set[str]:
    """The names of variables whose values are transformers' own: messages, tools, special tokens, and its arguments."""
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"self", "kwargs"}
    return arguments | {"messages", *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES, *tokenizer.special_tokens_map}


def variables_read(tokenizer: Any) -> list[str]:
    """The names of the variables that a tokenizer's chat templates read, without those that transformers sets."""
    read: set[str] = set()
    for template in _templates(tokenizer).values():
        read |= chat_template_utils._get_template_variables(template)
    return sorted(read - set_by_transformers(tokenizer))


def variable_fault(tokenizer: Any, names: Iterable[str]) -> str:
    """The fault of the first variable that cannot be given to a tokenizer's chat template; empty if there is none.

    Args:
        tokenizer: The tokenizer, which has a chat template.
        names: The names of the variables.
    """
    reserved, read = set_by_transformers(tokenizer), variables_read(tokenizer)
    for name in names:
        if name in reserved:
            return f"{name} is set by transformers itself; remove it"
        if name not in read:
            cure = f"write {', '.join(read)}" if read else "it has none, remove it"
            return f"the chat template reads no variable {name}; {cure}"
    return ""


def set_default_variables(tokenizer: Any, values: Mapping[str, Any]) -> None:
    """Gives variables of a tokenizer's chat template default values, which are saved with it.

    Defaults that the template was given before are replaced, so the template of a run can be given them again.

    Args:
        tokenizer: The tokenizer; its template is changed.
        values: Values by name, as JSON has them; null leaves a variable as it is.

    Raises:
        TemplateError: There is no template, it does not read a variable, or it renders otherwise with a default than
            with the value given.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return
    if tokenizer.chat_template is None:
        raise TemplateError(f"{KEY}: the model has no chat template; name one in model.chat_template")
    if fault := variable_fault(tokenizer, given):
        raise TemplateError(f"{KEY}: {fault}")
    changed = {}
    for name, template in _templates(tokenizer).items():
        defaults, own = split_defaults(template)
        defaults |= {variable: _literal(value, variable) for variable, value in given.items()}
        changed[name] = "".join(_DEFAULT.format(*default) for default in defaults.items()) + _END + own
        for messages in _CONVERSATIONS:
            for tools in (None, _TOOLS):
                for ask in (False, True):
                    wanted = _rendered(tokenizer, template, messages, tools, ask, given)
                    if _rendered(tokenizer, changed[name], messages, tools, ask, {}) != wanted:
                        raise TemplateError(
                            f"{KEY}: the chat template renders otherwise with {', '.join(given)} as its default than "
                            "as an argument; write the value into a template of your own (model.chat_template)"
                        )
    tokenizer.chat_template = changed if isinstance(tokenizer.chat_template, dict) else changed[""]


def split_defaults(template: str) -> tuple[dict[str, str], str]:
    """The defaults that `set_default_variables` has put before a template, as Jinja literals, and the template."""
    found = _DEFAULTS.match(template)
    if not found:
        return {}, template
    return dict(re.findall(_ONE, found["all"])), template[found.end() :]


def with_values_forced(template: str, names: Iterable[str]) -> str:
    """The template with the defaults of some variables in place of whatever it is given."""
    defaults, _ = split_defaults(template)
    forced = "".join(_FORCED.format(name, defaults[name]) for name in names if name in defaults)
    return forced + _END + template if forced else template


def _rendered(tokenizer: Any, template: str, messages: Any, tools: Any, ask: bool, values: Mapping[str, Any]) -> str:
    """The conversation as a template writes it, or in its place the error."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=ask, **values
            )
        )
    except Exception as error:  # a template is anybody's program
        return f"{type(error).__name__}: {error}"


def _literal(value: object, name: str) -> str:
    """A value of JSON as a literal of Jinja, on one line."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key, name)}: {_literal(part, name)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(_literal(part, name) for part in value)}]"
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TemplateError(f"{KEY}: {name} is {value!r}; write a text, a finite number, true or false") from error
