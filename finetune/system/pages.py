"""HTML pages and model cards from Jinja templates; untrusted text is shown and never interpreted."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

# Control characters, line separators, marks of writing direction, and characters without a shape. Joiners stay: emoji
# and several scripts need them.
_UNSEEN = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff"
    r"\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with control and invisible characters as Python escapes: `\\x1b`, `\\u202e`."""
    return _UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)


def cell(value: Any) -> str:
    """A text or a number for a table cell."""
    if isinstance(value, str):
        return visible(value)
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def render(template: str, markup: bool = True, **values: Any) -> str:
    """A page from one of our Jinja templates.

    Args:
        template: Its path in this package, such as `cli/report.html.jinja`.
        markup: True for HTML, in which values are escaped; False for Markdown, which has no general escape.
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
    )
    made.filters |= {"cell": cell, "visible": visible}
    return made
