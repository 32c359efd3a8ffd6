"""Renders a chat template for the first time in a process of its own, whose time and memory have limits.

A template is a program of whoever made the model. The sandbox of jinja2 keeps it from files and modules, and limits
`range` to 100,000 numbers; nothing limits nested loops, or the length of a text, which the compiler computes already.
The process imports jinja2 alone. It stands in for transformers' environment: what a template computes is the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from finetune.data.template import SHIPPED_TEMPLATES
from finetune.system import limited
from finetune.system.cache import cache_dir
from finetune.system.errors import TemplateError
from finetune.system.limited import Limits, serve
from finetune.system.numbers import memory

_LIMITS = Limits(seconds=10, memory=1 << 30)
# Changes when `rendered` does, so that earlier results are not used.
_VERSION = 1

_TOOL = {
    "type": "function",
    "function": {"name": "tide", "description": "Tide at a port", "parameters": {"type": "object", "properties": {}}},
}
_TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "And now?"},
]
_CONVERSATIONS = [
    {"messages": messages, "add_generation_prompt": prompt, "tools": tools}
    for messages in (_TALK, [{"role": "system", "content": "Be brief."}, *_TALK])
    for prompt in (False, True)
    for tools in (None, [_TOOL])
]


def try_template(template: Any, name: str) -> None:
    """Checks that a chat template that does not ship with the project ends, and takes no more than so much memory.

    A template that passes is not tried again. One that fails on these conversations passes: rows may be others.

    Args:
        template: A tokenizer's `chat_template`: a text, texts by name, or None.
        name: The model or file that it is from, for the error.

    Raises:
        TemplateError: It reached a limit.
    """
    for text in template.values() if isinstance(template, dict) else [template]:
        if isinstance(text, str) and text not in _shipped():
            _try_once(text, name)


@functools.cache
def _shipped() -> frozenset[str]:
    return frozenset(file.read_text(encoding="utf-8") for file in SHIPPED_TEMPLATES.glob("*.jinja"))


def _try_once(text: str, name: str) -> None:
    key = hashlib.sha256(f"{_VERSION} {_LIMITS} {text}".encode("utf-8", "surrogatepass")).hexdigest()
    passed = cache_dir() / "templates" / key
    if os.path.exists(passed):
        return
    code = limited.run("finetune.data.template_trial", text, _LIMITS)
    if code == limited.OUT_OF_MEMORY:
        reached = f"takes more than {memory(_LIMITS.memory)} of memory"
    elif code < 0:
        reached = f"does not end within {_LIMITS.seconds} s"
    else:
        with contextlib.suppress(OSError):  # without a cache it is tried again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
        return
    raise TemplateError(
        f"chat template of {name}: it {reached} for a conversation of three messages; write another into "
        "model.chat_template"
    )


def rendered(template: str) -> Iterator[str]:
    """Yields the conversations as rendered; one on which the template fails is left out.

    Source: transformers 5.23 `utils/chat_template_utils.py`, `_cached_compile_jinja_template`.

    Raises:
        MemoryError: As the template caused it.
    """
    import datetime

    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag of trl's and transformers' templates around what an assistant says."""

        tags = {"generation"}  # noqa: RUF012 (as upstream)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": datetime.datetime(2024, 1, 1).strftime}
    values: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "documents": None}
    for conversation in _CONVERSATIONS:
        try:
            yield environment.from_string(template).render(**conversation, **values)
        except MemoryError:
            raise
        except Exception:
            continue  # transformers tells it the user, where a row has it


def _render(template: str) -> None:
    deque(rendered(template), maxlen=0)


if __name__ == "__main__":
    sys.exit(serve(_render))
