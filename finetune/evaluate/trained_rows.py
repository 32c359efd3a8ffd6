"""Finds sources of an evaluation whose rows the evaluated run was trained on."""

from __future__ import annotations

from pathlib import Path

from finetune.model.provenance import source_run
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import DataSection
from finetune.system.errors import RecipeError
from finetune.system.files import read_json, run_file


def trained_sources(model: str, recipe: Recipe) -> list[str]:
    """The sources that a recipe evaluates on, though the run was trained on their rows, as far as its records tell.

    Args:
        model: A run, or what was merged or exported from one; of other models nothing is known.
        recipe: The recipe with the rows to evaluate on.

    Returns:
        The sources' names in the recipe.

    Raises:
        RunError: A record of the run is damaged.
    """
    run = source_run(Path(model)) if Path(model).is_dir() else None
    saved = run and run_file(run, "recipe.yaml")
    if run is None or saved is None or not (recipe.data.eval or recipe.data.eval_fraction):
        return []
    try:
        own = load_recipe(saved).data
    except RecipeError:
        return []
    held_out = read_json(run_file(run, "ledger.json")).get("eval", {}).get("rows", {}).get("kept")
    if not recipe.data.eval and held_out and _split(own) == _split(recipe.data):
        return []
    trained = [source.place for source in own.train]
    return [source.name for source in recipe.data.eval or recipe.data.train if source.place in trained]


def _split(data: DataSection) -> tuple[object, ...]:
    """The values that decide which rows are held out of the training sources."""
    return data.eval_fraction, data.seed, bool(data.eval), [source.place for source in data.train]
