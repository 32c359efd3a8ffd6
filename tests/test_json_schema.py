"""The JSON schema of a recipe accepts what `check` accepts, and refuses keys that no recipe has."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from finetune.cli.commands import main

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8"))


def faults(recipe: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [".".join(map(str, error.absolute_path)) for error in validator.iter_errors(recipe)]


def read(path: Path) -> Any:
    """A recipe as a YAML language server reads it, to which 2e-4 is a number."""
    loader = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": yaml.SafeLoader.yaml_implicit_resolvers})
    tree = yaml.load(path.read_text(encoding="utf-8"), loader)
    training = tree.get("training", {})
    return tree | {"training": {key: _number(value) for key, value in training.items()}}


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_accepts_every_shipped_recipe(path: Path) -> None:
    assert faults(read(path)) == []
    assert "# yaml-language-server: $schema=schema.json\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        ({"modle": {}}, ""),
        ({"training": {"learning_rat": 1}}, "training"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate"),
        ({"lora": {"rank": 8}}, "lora"),
        ({"data": {"train": [{"path": "a", "formt": "text"}]}}, "data"),
        ({"method": "grpo"}, "method"),
    ],
)
def test_the_schema_refuses_what_check_refuses(recipe: Any, place: str) -> None:
    assert faults(recipe) == [place]


@pytest.mark.parametrize("recipe", [{"lora": None}, {"training": {"max_steps": "${STEPS}", "beta": 0.1}}])
def test_values_of_every_method_and_of_the_environment(recipe: Any) -> None:
    assert faults(recipe) == []


def test_the_verb_prints_the_stored_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    if printed["$comment"] == SCHEMA["$comment"]:  # of the same releases of trl, transformers and peft
        assert printed == SCHEMA
