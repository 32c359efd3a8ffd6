"""HTML pages and model cards from Jinja templates; untrusted text is shown and never interpreted."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

# Control characters, line separators, marks of writing direction, and characters without a shape. Joiners stay: emoji
# and several scripts need them.
_UNSEEN = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff"
    r"\U000e0000-\U000e007f]"
)
# The characters that are markup in Markdown where they stand: `<` before a tag, `]` before a link's address.
_MARKUP = re.compile(r"[\\`*]|^[#>]|<(?=[A-Za-z/!?])|&(?=[#\w])|\](?=[(\[:])|~(?=~)|(?<!\w)_|_(?!\w)")


def visible(text: str) -> str:
    """The text with control and invisible characters as Python escapes: `\\x1b`, `\\u202e`."""
    return _UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """The text on one line, with line breaks, control and invisible characters as Python escapes."""
    return visible(text).replace("\n", "\\n")


def markdown(text: str) -> str:
    """A name or a sentence for one line of Markdown, which shows it as it is: no tag, link, code or emphasis."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def table_cell(value: object) -> str:
    """A text or a number for a cell of a Markdown table."""
    return markdown(str(value)).replace("|", "\\|")


def code(text: str) -> str:
    """A name as a code span of Markdown."""
    fence, pad = _fence(text, 1), " " * text.startswith("`") or " " * text.endswith("`")
    return f"{fence}{pad}{one_line(text)}{pad}{fence}"


def fenced(text: str, language: str = "") -> str:
    """Lines as a code block of Markdown, which no line of theirs ends."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than stand together anywhere in a text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def shell_word(text: str) -> str:
    """A name as one word of a shell's command line."""
    return shlex.quote(one_line(text))


def python_text(text: str) -> str:
    """A name as a string of Python's source."""
    return json.dumps(one_line(text), ensure_ascii=False)


def cell(value: Any) -> str:
    """A text or a number for a table cell."""
    if isinstance(value, str):
        return visible(value)
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def render(template: str, markup: bool = True, **values: Any) -> str:
    """A page from one of our Jinja templates.

    Args:
        template: Its path in this package, such as `cli/report.html.jinja`.
        markup: True for HTML, in which values are escaped; False for Markdown, which has no general escape: see
            `markdown`, `code`, `fenced`, `shell_word` and `python_text`.
        **values: The template's variables.
    """
    return str(environment(markup).get_template(template).render(values))


@functools.cache
def environment(markup: bool) -> Any:
    """The Jinja environment of our templates, which compiles each of them once; `markup` as for `render`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=markup,
        # No value reaches a page with a control character; a `Markup` is made of values that have been here.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.filters |= {
        filter.__name__: filter for filter in (cell, code, fenced, markdown, python_text, shell_word, table_cell)
    }
    return made
