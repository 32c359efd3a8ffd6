"""Trains the model of a recipe with trl's trainers and writes a run directory.

>>> train(load_recipe("recipes/quickstart.yaml"), say=print)
PosixPath('runs/quickstart')
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.train.run import train as train

__getattr__ = lazy_names(__name__, train="run")
