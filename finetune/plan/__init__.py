"""Predicts the memory and time of a recipe on a GPU, and what to change where it does not fit.

>>> plan(load_recipe("recipes/qlora_ultrachat.yaml"), GPUS["4090"])
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.plan.run import plan as plan

__getattr__ = lazy_names(__name__, plan="run")
