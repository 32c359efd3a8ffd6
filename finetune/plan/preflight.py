"""At the start of a run: whether the memory that is really free will do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.model.flops import EXPERT_COUNTS, first_number
from finetune.model.locate import Base
from finetune.plan.advice import advice
from finetune.plan.configs import base_config
from finetune.plan.lengths import RowLengths
from finetune.plan.predict import Predictor, StepSettings
from finetune.plan.run import step_settings
from finetune.recipe.load import Recipe
from finetune.system import distributed
from finetune.system.devices import Hardware, this_machine
from finetune.system.errors import PlanError
from finetune.system.numbers import GIB

# What a check may be wrong by: a run that lacks less is left to MemoryCheck, which measures its longest batch.
_DOUBT = 0.9


def check(recipe: Recipe, arguments: Any, dataset: Any, base: Base | None = None) -> None:
    """Refuses a run for which the memory that is really free cannot suffice.

    Small runs are passed by: nothing is built where sixteen bytes a weight and a generous share a token are there. So
    are those of which nothing can be computed: that is no reason not to try them.

    Args:
        recipe: What is to be run.
        arguments: Its `training`, as trl takes it.
        dataset: The prepared rows; None for a stream.
        base: The recipe's base, where it is located already.

    Raises:
        PlanError: With what to change.
    """
    card = this_machine(free=True)
    if not card.is_gpu:  # processes on one machine share its memory
        card = replace(card, memory=card.memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        lacks = _lacks(recipe, arguments, dataset, card, base)
    except Exception:
        return
    if lacks is None:
        return
    total, found = lacks
    each = "each process of this run" if distributed.world_size() > 1 else "this run"
    write = " or ".join(found) or "a smaller model.name_or_path"
    raise PlanError(
        f"{each} needs about {total / GIB:.1f} GiB, and {card.name} has {card.memory / GIB:.1f} GiB free"
        f"{'' if card.is_gpu or distributed.world_size() == 1 else ' for it'}. "
        f"Write {write}; finetune plan {Path(recipe.path)} shows what takes it, --force goes on"
    )


def _lacks(
    recipe: Recipe, arguments: Any, dataset: Any, card: Hardware, base: Base | None
) -> tuple[float, list[str]] | None:
    """The bytes that are needed where they are not there, and what to change; None where they are."""
    config = base_config(recipe.model, base)
    rows = RowLengths.of(dataset) if dataset is not None and hasattr(dataset, "__len__") else None
    setting = step_settings(recipe, arguments, rows)
    if _small(config, setting, card):
        return None
    own = Predictor(config, card, arguments)
    setting = replace(setting, cards=distributed.world_size(), sharded=distributed.uses_fsdp())
    need = own.required_memory(setting)
    # The context is there already.
    total = need.total - need.parts.get("context", 0) - need.parts.get("process", 0)
    if total * _DOUBT <= card.memory:
        return None
    return total, [text for text, _ in advice(own, setting, card)]


def _small(config: Any, setting: StepSettings, card: Hardware) -> bool:
    text = config.get_text_config()
    width, depth = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * width
    experts = first_number(text, *EXPERT_COUNTS)
    wide = inner + experts * (getattr(text, "moe_intermediate_size", None) or inner)
    weights = 2 * text.vocab_size * width + depth * width * (4 * width + 3 * wide)
    tokens = setting.batch.rows * setting.batch.length
    work = tokens * (
        depth * 40 * (width + inner) + 8 * setting.batch.length * depth * text.num_attention_heads
    )
    return bool(16 * weights + work + 2 * GIB <= card.memory)
