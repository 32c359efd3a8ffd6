"""What a recipe needs before it is run: memory by part, whether it fits, what to change, time per step.

>>> plan(load_recipe("recipes/qlora_ultrachat.yaml"), GPUS["4090"])
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.plan.run import plan as plan

__getattr__ = lazy_names(__name__, plan="run")
