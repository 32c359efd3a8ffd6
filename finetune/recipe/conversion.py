"""A recipe that is made from another trainer's configuration, and its text with the origin of each value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.recipe.yaml_scalars import quoted, scalar_text
from finetune.recipe.yaml_tree import Section
from finetune.system.pages import one_line

_ORDER = ("method", "model", "quantization", "lora", "data", "training", "early_stopping", "hub")


@dataclass
class Conversion:
    """A recipe made from a peer's configuration.

    Attributes:
        peer: The trainer that the configuration is for.
        given: The configuration.
        path: Its file, beside which files that it names are looked for.
        recipe: The values of the recipe by dotted key; the keys of `data.train` and `data.eval` are lists of sources.
        origins: The peer's key that each value comes from, by dotted key.
        left: Keys without a counterpart, with the reason.
    """

    peer: str
    given: Section
    path: Path
    recipe: Section = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def put(self, target: str, value: Any, key: str) -> None:
        """Writes a value of the recipe that a key of the peer's decides."""
        self.recipe[target] = value
        self.came_from(target, key)

    def came_from(self, target: str, key: str) -> None:
        """Notes that a key of the peer's has a part in a value."""
        origins = self.origins.get(target, "")
        if key not in origins.split(", "):
            self.origins[target] = f"{origins}, {key}" if origins else key

    def leave(self, key: str, reason: str) -> None:
        """Lists a key of the peer's that has no counterpart."""
        self.left[key] = reason

    def source(self, part: str = "data.train") -> Section:
        """The first source of the rows, to which several keys of trl's contribute."""
        sources: list[Section] = self.recipe.setdefault(part, [{}])
        return sources[0]

    @property
    def method(self) -> str:
        """The recipe's method."""
        return str(self.recipe.get("method", "sft"))

    def as_yaml(self) -> str:
        """The recipe as YAML, with the peer's keys as comments, and the keys that are left out at its end."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield f"# Converted from {one_line(self.path.name)}, which is for {self.peer}. Check it: finetune check RECIPE"
        for section in _ORDER:
            values = {key: value for key, value in self.recipe.items() if key.split(".")[0] == section}
            if section in values:
                yield f"{section}: {_flow(values[section])}{self._origin(section)}"
            elif values:
                yield f"{section}:"
                for key, value in values.items():
                    yield from self._value(key, value)
        if self.left:
            yield "\n# Left out:"
        for key, reason in self.left.items():
            if key not in self.given:
                yield f"#   {one_line(key)}  ({one_line(reason)})"
            elif self.given[key] is not None:
                yield f"#   {one_line(key)}: {one_line(_flow(self.given[key]))[:60]}  ({one_line(reason)})"
        if unset := [one_line(key) for key in self.left if self.given.get(key, key) is None]:
            yield f"#   null, the default: {', '.join(unset)}"

    def _value(self, key: str, value: Any) -> Iterator[str]:
        name = key.partition(".")[2]
        if key in ("data.train", "data.eval"):
            yield f"  {name}:{self._origin(key)}"
            for source in value:
                yield f"    - {_flow(source)}"
        else:
            yield f"  {name}: {_flow(value)}{self._origin(key)}"

    def _origin(self, key: str) -> str:
        origin = self.origins.get(key, "")
        return f"  # {one_line(origin)}" if origin and origin != key.rpartition(".")[2] else ""


# Converts one key of a peer's. Its arguments: the conversion so far, the recipe's key, the peer's key and its value.
Converter = Callable[[Conversion, str, str, Any], None]


def _flow(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, dict) and value:
        return f"{{{', '.join(f'{scalar_text(name)}: {_flow(item)}' for name, item in value.items())}}}"
    if isinstance(value, list) and value:
        return f"[{', '.join(map(_flow, value))}]"
    text = scalar_text(value)
    if isinstance(value, str) and set(text) & set(",[]{}") and text[0] != '"':
        return quoted(value)  # in flow style a comma or a bracket would end a text
    return text
