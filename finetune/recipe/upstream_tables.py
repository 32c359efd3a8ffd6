"""The options of trl, transformers and peft, kept in the cache so that a check of a recipe need not import them.

Two things are kept for the releases that are installed: the names and types of upstream's options, and the sets of
values that upstream has taken without a complaint. A release that is installed or removed, or a change in this package,
makes both anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import typing
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypedDict, Union

from finetune.recipe.schema import CONFIGS
from finetune.recipe.yaml_tree import RecipeTree, Section
from finetune.system import files
from finetune.system.cache import cache_dir, made_once, remove_unused
from finetune.system.installed import installed_digest

_PLAIN: dict[str, Any] = {kind.__name__: kind for kind in (str, int, float, bool, dict, list, type(None))}
_GENERIC: dict[str, Any] = {kind.__name__: kind for kind in (list, dict, tuple)}
_NOT_GIVEN: Any = object()
# Values that upstream takes as they are, whatever the others.
_FREE = {"output_dir", "run_name", "seed", "data_seed"}


class Tables(TypedDict):
    """The options of the installed releases, as JSON.

    Attributes:
        training: The type of each parameter of the configuration of each method that there is, by name.
        lora: The types of `LoraConfig`'s parameters.
        trackers: The names that `report_to` takes.
        backends: The backends of `torch.compile`.
    """

    training: dict[str, dict[str, Any]]
    lora: dict[str, Any]
    trackers: list[str]
    backends: list[str]


def config_class(method: str) -> Any:
    """The class whose parameters are the keys of `training`: `trl.DPOConfig` for `dpo`.

    Raises:
        ImportError: The installed trl has no such class.
    """
    module, _, name = CONFIGS[method].rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl 1.16 warns that trl.experimental may change
        try:
            return getattr(importlib.import_module(module), name)
        except AttributeError as error:
            raise ImportError(str(error)) from error


@functools.cache
def tables() -> Tables:
    """The tables of the installed releases; computed, with upstream's imports, where the cache does not have them."""

    def write(folder: Path) -> None:
        files.write_whole(folder / "tables.json", json.dumps(_computed()))
        remove_unused(folder.parents[1])  # `made_once` fills a folder in a folder

    folder = made_once(_folder(), write)
    found: Tables = json.loads((folder / "tables.json").read_text(encoding="utf-8"))
    return found


def types_of(table: dict[str, Any]) -> Section:
    """The Python types of a table's parameters, which pydantic validates as it does upstream's own hints."""
    return {name: _decoded(kind) for name, kind in table.items()}


def unless_known_good(tree: RecipeTree, name: str, values: Section, check: Callable[[], None]) -> None:
    """Calls `check`, which may add faults to the tree, unless it found none in the same values before.

    Args:
        tree: The recipe.
        name: The name of the check.
        values: All values that it reads, as plain data.
        check: The check; it must depend on nothing else.
    """
    read = {key: value for key, value in values.items() if key not in _FREE}
    key = hashlib.sha256(json.dumps([name, tree.method, read]).encode()).hexdigest()[:32]
    mark = cache_dir() / _folder() / key
    if os.path.exists(mark):
        return
    faults = len(tree.faults)
    check()
    if len(tree.faults) == faults:
        tables()  # makes the folder
        with contextlib.suppress(OSError):  # the cache was removed since
            mark.touch()


# ---------------------------------------------------------------------------------------------------------------


def _folder() -> str:
    """A name in the cache for the installed packages and this package's code."""
    return f"upstream/{installed_digest(Path(__file__).parent)}"


def _computed() -> Tables:
    from accelerate.utils import DynamoBackend
    from peft import LoraConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    configs = {}
    for method in CONFIGS:
        try:
            configs[method] = _fields(config_class(method))
        except ImportError:
            continue
    return {
        "training": configs,
        "lora": _fields(LoraConfig),
        "trackers": list(INTEGRATION_TO_CALLBACK),
        "backends": [backend.value.lower() for backend in DynamoBackend],
    }


def _fields(config: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    parameters = [field for field in dataclasses.fields(config) if field.init]
    return {field.name: _encoded(_narrowed(hints[field.name], field.metadata.get("choices"))) for field in parameters}


def _narrowed(hint: Any, choices: Any) -> Any:
    """An upstream type without members that accept anything: `str` beside an enum or a map, `dict` beside a class."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)
    if choices:
        return Union[(Literal[tuple(choices)], *(m for m in members if m is type(None)))]
    enum = any(isinstance(m, type) and issubclass(m, Enum) for m in members)
    is_map = any(m is dict or typing.get_origin(m) is dict for m in members)
    loose = (str,) if enum or is_map else (dict,) if any(map(dataclasses.is_dataclass, members)) else ()
    return Union[tuple(m for m in members if m not in loose)]  # noqa: UP007 (not a fixed list)


def _encoded(hint: Any) -> Any:
    """A type as JSON; "Any", of whose values upstream alone decides, for one that this cannot write."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"Literal": list(arguments)}
    if origin in (Union, UnionType):
        return {"Union": [_encoded(argument) for argument in arguments]}
    if origin in _GENERIC.values():
        return {origin.__name__: [_encoded(argument) for argument in arguments]}
    if isinstance(hint, type) and hint.__name__ in _PLAIN:
        return hint.__name__
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"Literal": [member.value for member in hint]}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        types = typing.get_type_hints(hint)
        fields = [[f.name, _encoded(types[f.name]), _is_required(f)] for f in dataclasses.fields(hint) if f.init]
        return {"class": [hint.__module__, hint.__qualname__, fields]}
    return "Any"


def _is_required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _decoded(kind: Any) -> Any:
    if isinstance(kind, str):
        return _PLAIN.get(kind, Any)
    [(name, arguments)] = kind.items()
    if name == "Literal":
        return Literal[tuple(arguments)]
    if name == "class":
        return _stand_in(*arguments)
    parts = tuple(map(_decoded, arguments))
    return Union[parts] if name == "Union" else _GENERIC[name][parts]  # noqa: UP007 (not a fixed list)


def _stand_in(module: str, name: str, fields: list[Any]) -> Any:
    """A dataclass with an upstream class's parameters, which imports and makes that class once it has values."""

    def check(self: Any) -> None:
        given = {key: value for key, value in vars(self).items() if value is not _NOT_GIVEN}
        getattr(importlib.import_module(module), name)(**given)

    parameters: list[Any] = [
        (field, _decoded(kind), dataclasses.field() if required else dataclasses.field(default=_NOT_GIVEN))
        for field, kind, required in fields
    ]
    return dataclasses.make_dataclass(name, parameters, namespace={"__post_init__": check}, kw_only=True)
