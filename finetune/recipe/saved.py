"""Reads the recipe that a run keeps in its folder."""

from __future__ import annotations

from pathlib import Path

import yaml

from finetune.recipe.yaml_scalars import Loader
from finetune.recipe.yaml_tree import Section
from finetune.system.errors import RunError, reworded


def saved_sections(file: Path | None) -> Section:
    """The sections of a run's `recipe.yaml`; empty where there is no file.

    They are read without a recipe's checks, because what it names may have moved since. `${NAME}` stays as it was
    written; `expanded` replaces it.

    Args:
        file: The file, as `run_file(folder, "recipe.yaml")` finds it.

    Raises:
        RunError: It is damaged.
    """
    if file is None:
        return {}
    with reworded(RunError, f"{file} is damaged", yaml.YAMLError, ValueError, RecursionError):
        sections = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)
    if not isinstance(sections, dict):
        raise RunError(f"{file} is damaged: it is no map of sections")
    return sections
