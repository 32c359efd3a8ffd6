"""The JSON schema of a recipe, for editors, made from the types that `check` reads."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

from finetune.recipe.load import OWN_SECTIONS
from finetune.recipe.schema import CONFIGS
from finetune.recipe.upstream_types import upstream_keys
from finetune.recipe.yaml_tree import Section

# A value that is read from the environment, of any type.
_FROM_ENVIRONMENT = {"type": "string", "pattern": r"\$\{"}


def releases() -> str:
    """The releases whose keys the schema has."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers", "peft"))


def recipe_schema() -> Section:
    """The schema, in which a key that no recipe has is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a default that has no form in JSON is left out
        return _schema()


def _schema() -> Section:
    definitions: Section = {}
    properties: Section = {
        "extends": {"type": "string", "description": "Another recipe, relative to this file, that this one builds on."},
        "method": {"enum": [*CONFIGS], "description": "The method of training; absent: sft."},
    }
    for name, section in OWN_SECTIONS.items():
        schema = section.model_json_schema()
        definitions |= schema.pop("$defs", {})
        schema.pop("required", None)  # a recipe that extends another one need not repeat it
        properties[name] = {"anyOf": [schema, {"type": "null"}]}
    sections: dict[str, dict[str, list[Any]]] = {"training": {}, "lora": {}, "quantization": {}}
    for method in CONFIGS:
        for name, keys in upstream_keys(method).items():
            for key, hint in keys.items():
                kinds = sections[name].setdefault(key, [])
                if (kind := _type_schema(hint, definitions)) not in kinds:
                    kinds.append(kind)
    for name, found in sections.items():
        keys = {key: {"anyOf": [*kinds, _FROM_ENVIRONMENT]} if kinds[0] else {} for key, kinds in found.items()}
        properties[name] = {"type": ["object", "null"], "properties": keys, "additionalProperties": False}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": releases(),
        "title": "A recipe of finetune",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _type_schema(hint: Any, definitions: Section) -> Section:
    """The schema of a key's type; empty, which accepts all, for a type without one."""
    try:
        schema = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticSchemaGenerationError):
        return {}
    definitions |= schema.pop("$defs", {})
    return schema
