"""Pages of one file each, which need nothing else and run nothing of what they show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# What steers a terminal, what breaks lines or turns the direction of writing, and what nobody sees. Joiners stay: emoji
# and several scripts are written with them.
_UNSEEN = re.compile(
    r"[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff"
    r"\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with its control and unseen characters written out, as in Python: `\\x1b`, `\\u202e`."""
    return _UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)


def cell(value: Any) -> str:
    """A text or a number as it stands in a table."""
    if isinstance(value, str):
        return visible(value)
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def render(template: str, markup: bool = True, **values: Any) -> str:
    """A page from a Jinja file of ours; whatever stands in a value is text there, never markup.

    Args:
        template: The file's name.
        markup: Whether it is HTML. In Markdown a value stands as it is, for there is no way to write it as text.
        values: What it shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=markup,
    )
    environment.filters |= {"cell": cell, "visible": visible}
    return environment.get_template(template).render(values)
