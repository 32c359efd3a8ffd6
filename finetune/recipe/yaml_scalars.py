"""Scalars of YAML 1.2: the types that they get when they are read, and the text with which they are written."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
NUMBER_PATTERN = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
# The patterns of unquoted scalars by type, as in YAML 1.2: `2e-4` is a number, the `no` of `eval_strategy: no` text.
SCALAR_TYPES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: {"true": True, "false": False}[text.lower()]),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        NUMBER_PATTERN + r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    ),
    "merge": (r"<<", str),
    "str": (r"(?s:.*)", str),
}


def type_of(text: str) -> str:
    """The type of an unquoted scalar: the first of `SCALAR_TYPES` whose pattern matches."""
    return next(name for name, (pattern, _) in SCALAR_TYPES.items() if re.fullmatch(pattern, text))


class Loader(yaml.SafeLoader):
    """PyYAML's loader, which gives unquoted scalars the types of `SCALAR_TYPES`."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (as upstream)


for _name, (_pattern, _) in SCALAR_TYPES.items():
    Loader.add_implicit_resolver(TAG + _name, re.compile(rf"(?:{_pattern})\Z"), [None])


def scalar_text(value: Any) -> str:
    """A scalar, or an empty list or map, as YAML of the same type; `${NAME}` in a text stays as it is."""
    if not isinstance(value, str):
        return re.sub(r"Infinity|NaN", lambda word: f".{word[0][:3].lower()}", json.dumps(value))
    if re.fullmatch(r"[A-Za-z_./][\w./@+:-]*", value) and value[-1] != ":" and type_of(value) == "str":
        return value
    return quoted(value)


def quoted(text: str) -> str:
    """A text in double quotes on one line; a `${NAME}` in it is read from the environment again."""
    return yaml.dump(text, default_style='"', allow_unicode=True, width=sys.maxsize).rstrip("\n")


def list_items(text: str) -> list[str] | None:
    """The items of a list in YAML, each as it is written; None for a text that is no list."""
    try:
        node = yaml.compose(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError):
        return None
    if not isinstance(node, yaml.SequenceNode):
        return None
    return [text[item.start_mark.index : item.end_mark.index].strip() for item in node.value]
