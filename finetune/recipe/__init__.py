"""Loads recipes: one YAML file a run, checked completely before anything is downloaded.

>>> load_recipe("recipes/quickstart.yaml", ["training.max_steps=10"]).training["max_steps"]
10
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.recipe.load import Recipe as Recipe
    from finetune.recipe.load import load_recipe as load_recipe

__getattr__ = lazy_names(__name__, Recipe="load", load_recipe="load")
