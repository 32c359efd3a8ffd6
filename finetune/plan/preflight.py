"""Checks at the start of a run whether it fits the free memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl import SFTConfig

from finetune.model.flops import EXPERT_COUNTS, first_number
from finetune.model.locate import Base
from finetune.plan.advice import changes_that_fit
from finetune.plan.configs import base_config
from finetune.plan.lengths import RowLengths
from finetune.plan.predict import Predictor
from finetune.plan.settings import StepSettings, step_settings
from finetune.recipe.load import Recipe
from finetune.system import distributed
from finetune.system.devices import Hardware, this_machine
from finetune.system.errors import PlanError, first_line
from finetune.system.numbers import GIB, memory
from finetune.system.terminal import Say

# A run is refused only if this share of its predicted memory is not free. Closer cases are left to the memory check
# with the longest batch, which measures.
_CERTAIN = 0.9


def check_memory(
    recipe: Recipe, arguments: SFTConfig, dataset: Any, base: Base | None = None, say: Say = lambda line: None
) -> None:
    """Refuses a run that cannot fit into the free memory.

    A run that is small compared with the free memory passes without a prediction. One for which the prediction fails
    passes with a line that says so; the memory check with the longest batch measures it.

    Args:
        recipe: The recipe.
        arguments: Its `training` section as an `SFTConfig`.
        dataset: The prepared rows; None for a stream.
        base: The recipe's base, if it was located already.
        say: Told why nothing was predicted.

    Raises:
        PlanError: The run does not fit; the message says what to change.
    """
    hardware = this_machine(free=True)
    processes = distributed.world_size()
    if not hardware.is_gpu:  # the processes on one machine share its memory
        hardware = replace(hardware, memory=hardware.memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        shortage = _shortage(recipe, arguments, dataset, hardware, base)
    except Exception as error:  # a failed prediction is no reason to refuse the run
        say(f"memory: not predicted, the longest batch will tell ({type(error).__name__}: {first_line(error)[:200]})")
        return
    if shortage is None:
        return
    required, changes = shortage
    raise PlanError(
        f"{'each process of this run' if processes > 1 else 'this run'} needs about {memory(required)}, and "
        f"{hardware.name} has {memory(hardware.memory)} free{'' if hardware.is_gpu or processes == 1 else ' for it'}. "
        f"Write {' or '.join(changes) or 'a smaller model.name_or_path'}; finetune plan {Path(recipe.path)} shows the "
        "memory by part, --force trains nevertheless"
    )


def _shortage(
    recipe: Recipe, arguments: SFTConfig, dataset: Any, hardware: Hardware, base: Base | None
) -> tuple[float, list[str]] | None:
    """The bytes that a run needs, and changes with which it fits; None if it fits or may fit."""
    config = base_config(recipe.model, base)
    rows = RowLengths.of(dataset) if dataset is not None and hasattr(dataset, "__len__") else None
    settings = step_settings(recipe, arguments, rows)
    if _is_small(config, settings, hardware):
        return None
    predictor = Predictor(config, hardware, arguments)
    settings = replace(settings, gpus=distributed.world_size(), fsdp=distributed.uses_fsdp())
    required = predictor.required_memory(settings)
    # This process has the CUDA context, or Python and its libraries, in memory already.
    total = required.total - required.parts.get("context", 0) - required.parts.get("process", 0)
    if total * _CERTAIN <= hardware.memory:
        return None
    return total, [overrides for overrides, _ in changes_that_fit(predictor, settings, hardware)]


def _is_small(config: Any, settings: StepSettings, hardware: Hardware) -> bool:
    """True if a generous estimate fits: 16 bytes per weight, and activations by the sizes in the config."""
    text = config.get_text_config()
    width, depth = text.hidden_size, text.num_hidden_layers
    heads = max(getattr(layer, "num_attention_heads", 0) or 1 for layer in text.per_layer_config)
    head_width = max(getattr(layer, "head_dim", None) or width // heads for layer in text.per_layer_config)
    inner = max(_largest(getattr(layer, "intermediate_size", None)) or 4 * width for layer in text.per_layer_config)
    per_layer = getattr(text, "vocab_size_per_layer_input", 0) * getattr(text, "hidden_size_per_layer_input", 0)
    experts = first_number(text, *EXPERT_COUNTS)
    feed_forward = inner + experts * (_largest(getattr(text, "moe_intermediate_size", None)) or inner)
    layer = width * (4 * max(width, heads * head_width) + 3 * feed_forward) + per_layer
    weights = 2 * text.vocab_size * width + depth * layer
    length = max(settings.batch.length, settings.batch.joined)
    per_token = depth * 40 * (width + inner) + 8 * length * depth * heads
    activations = settings.batch.rows * length * per_token
    return bool(16 * weights + activations + 2 * GIB <= hardware.memory)


def _largest(sizes: int | list[int] | None) -> int:
    """The largest size of a config's value, which is one number or one for each layer; 0 if there is none."""
    return max(sizes) if isinstance(sizes, list) else sizes or 0
