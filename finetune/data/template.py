"""Chat templates: loads those that ship with the project or a file, and applies `model.system_role` to them."""

from __future__ import annotations

import json
import re
from os.path import commonprefix
from pathlib import Path
from typing import Any

from finetune.system.errors import TemplateError, reworded

SHIPPED_TEMPLATES = Path(__file__).parent / "chat_templates"


def shipped_templates() -> str:
    """The names of the shipped templates, as an error lists them."""
    return ", ".join(sorted(file.stem for file in SHIPPED_TEMPLATES.glob("*.jinja")))


# Tokens by which a tokenizer's family is known, and the shipped template of the family; the first that fits.
_FAMILIES = {
    "<|turn>": "gemma4",
    "<start_function_call>": "functiongemma",
    "<start_of_image>": "gemma3",
    "<start_of_turn>": "gemma",
    "<|start_header_id|>": "llama3",
    "<|im_start|>": "chatml",
}


def family_template(tokenizer: Any) -> str | None:
    """The name of the shipped template whose turn tokens a tokenizer has; None if it has those of none."""
    vocabulary = tokenizer.get_vocab()
    return next((template for token, template in _FAMILIES.items() if token in vocabulary), None)


def load_template(name_or_path: str) -> str:
    """The text of a shipped template (such as `gemma3`) or of a `.jinja` file.

    Raises:
        TemplateError: There is no such template, or it is not UTF-8 text.
    """
    is_path = name_or_path.endswith(".jinja")
    path = Path(name_or_path).expanduser() if is_path else SHIPPED_TEMPLATES / f"{name_or_path}.jinja"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise TemplateError(
            f"chat template {name_or_path}: {reason}; write a .jinja file or one of {shipped_templates()}"
        ) from error


# Each is put before the model's own template, which then gets the messages as the recipe wants them. So the choice is
# saved with the template, and any user of the model renders as in training. A caller may pass a text as a list of
# parts. The empty expression at the end keeps a line break with which the model's own template begins.
_TEXT = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set system = system if system is string else system | map(attribute='text') | join -%}
"""
_FOLD = (
    _TEXT
    + """\
    {%- if messages | length == 1 or messages[1]['role'] != 'user' -%}
        {{- raise_exception('a system message can be folded only into a user message that follows it') -}}
    {%- endif -%}
    {%- set system = system | trim ~ '\\n\\n' -%}
    {%- set said = messages[1]['content'] -%}
    {%- set said = system ~ said if said is string else [{'type': 'text', 'text': system}] + said -%}
    {%- set messages = [{'role': 'user', 'content': said}] + messages[2:] -%}
{%- endif -%}{{ '' }}"""
)
_TURN = (
    _TEXT
    + """\
    {{- BOS ~ BEFORE ~ systemTRIM ~ AFTER -}}
    {%- set bos_token = '' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}{{ '' }}"""
)
_ERROR = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {{- raise_exception('there is a system message, and model.system_role is error') -}}
{%- endif -%}{{ '' }}"""


def set_system_role(tokenizer: Any, system_role: str) -> None:
    """Changes the tokenizer's chat template so that it treats a system message as `model.system_role` says.

    Args:
        tokenizer: The tokenizer; it is saved with the changed template.
        system_role: `template` changes nothing; `fold` writes the system text at the start of the first user turn;
            `turn` gives it a turn like a user's with `system` in place of `user`; `error` refuses it.

    Raises:
        TemplateError: There is no template, or no system turn can be made from how it writes a user turn.
    """
    if system_role == "template":
        return
    if tokenizer.chat_template is None:
        raise TemplateError(f"model.system_role: {system_role} needs a chat template; name one in model.chat_template")
    several = isinstance(tokenizer.chat_template, dict)
    templates = tokenizer.chat_template if several else {"": tokenizer.chat_template}
    given = {name: _prelude(tokenizer, text, system_role) + text for name, text in templates.items()}
    tokenizer.chat_template = given if several else given[""]


def _prelude(tokenizer: Any, template: str, system_role: str) -> str:
    return {"fold": _FOLD, "error": _ERROR}.get(system_role) or _turn(tokenizer, template)


def _turn(tokenizer: Any, template: str) -> str:
    """The Jinja text that writes a system turn, made from how this template writes a user turn."""
    mark = "qjxvzw"

    def render(*texts: str, first: str = "user", template: str = template) -> str:
        roles = ("system", "user", "assistant", "user")[first == "user" :]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template))

    with reworded(TemplateError, "model.system_role: turn cannot be given to this chat template", Exception):
        before, alone = render(mark).split(mark)
        _, followed = render(mark, "Yes").split(mark)
        spaced = render(f" {mark} ")
        bos = tokenizer.bos_token if before.startswith(tokenizer.bos_token or "\0") else ""
        header = before.removeprefix(bos)
        # The text behind a user's, up to its last special token and the white space after that.
        shared = commonprefix([alone, followed])  # noqa: RUF071 - characters are meant
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        end = max((shared.rfind(name) + len(name) for name in special if name in shared), default=0)
        after = shared[:end] + re.match(r"\s*", shared[end:])[0]  # type: ignore[index]
        # A later user turn begins like the first, or there is more before the first than its own header.
        again = render("Hi", "Yes", mark, first="user").partition(mark)[0]
        if header.count("user") == 1 and again.endswith(header):
            header = header.replace("user", "system")
            prelude = _TURN.replace("BOS", "bos_token" if bos else "''").replace("BEFORE", json.dumps(header))
            prelude = prelude.replace("AFTER", json.dumps(after))
            prelude = prelude.replace("TRIM", "" if f" {mark} " in spaced else " | trim")
            wanted = f"{bos}{header}Be brief{after}{render('Hi', 'Yes').removeprefix(bos)}"
            if render("Be brief", "Hi", "Yes", first="system", template=prelude + template) == wanted:
                return prelude
    raise TemplateError(
        "model.system_role: turn cannot be given to this chat template, whose user turn does not name its role; "
        "write fold, or a template of your own (model.chat_template)"
    )
