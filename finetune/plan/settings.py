"""The settings of a recipe that decide how much memory and time a step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trl import SFTConfig

from finetune.plan.lengths import RowLengths
from finetune.plan.step import Batch
from finetune.recipe.load import Recipe
from finetune.system.errors import PlanError
from finetune.system.terminal import quiet

# The keys of `training` that decide about memory and the number of steps.
# fmt: off
_MEMORY_KEYS = (
    "output_dir", "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "gradient_checkpointing", "gradient_checkpointing_kwargs", "max_grad_norm",
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "packing",
    "packing_strategy", "padding_free", "pad_to_multiple_of",
)
# fmt: on


@dataclass(frozen=True)
class StepSettings:
    """The settings that decide how much memory a step takes, apart from the base and the hardware.

    Attributes:
        recipe: The recipe. Values of its `training` section that another attribute has are read from that attribute.
        batch: The longest batch.
        optim: Name of the optimizer, as in `training.optim`.
        checkpointing: True with gradient checkpointing.
        accumulation: Batches per step.
        gpus: Number of processes, with a GPU each.
        fsdp: True if FSDP 2 shards the weights over the GPUs, False if DDP copies them.
    """

    recipe: Recipe
    batch: Batch
    optim: str
    checkpointing: bool
    accumulation: int
    gpus: int = 1
    fsdp: bool = False


def step_arguments(recipe: Recipe) -> SFTConfig:
    """The recipe's `training` section as an `SFTConfig`, with the keys that decide about memory and steps only.

    It can be made for any GPU, because it leaves out the keys for which trl asks this machine's device.
    """
    values = {name: recipe.training[name] for name in _MEMORY_KEYS if name in recipe.training}
    if values.get("padding_free") and not values.get("packing"):
        values["max_length"] = None  # as `train.arguments.training_arguments`
    with quiet():
        return SFTConfig(**values, report_to="none", use_cpu=True, bf16=False)


def step_settings(recipe: Recipe, arguments: SFTConfig, rows: RowLengths | None) -> StepSettings:
    """The settings of a step on the recipe's longest batch.

    Args:
        recipe: The recipe.
        arguments: Its `training` section as an `SFTConfig`.
        rows: The lengths of its rows; None: each has `training.max_length` tokens, all trained on.

    Raises:
        PlanError: Neither the rows nor a `max_length` are known.
    """
    count = int(arguments.per_device_train_batch_size)
    # Only rows of sft are packed.
    packing, free = (bool(getattr(arguments, name, False)) for name in ("packing", "padding_free"))
    # Several rows in one, without padding.
    flat = free or (packing and arguments.packing_strategy in ("bfd", "bfd_split"))
    longest, trained = recipe.max_length, None
    # For pairs whose prompts are not known: as if both answers had no prompt.
    joined = 2 * (longest or 0) if recipe.method in ("dpo", "orpo") else 0
    if rows is not None and not packing:
        count = min(count, rows.count)
        longest, trained = rows.longest, rows.most_trained(count)
        joined = 0 if rows.joined is None else int(rows.joined.max())
    if longest is None:
        raise PlanError("training.max_length: is null and the rows are not on this machine; write a length")
    multiple = getattr(arguments, "pad_to_multiple_of", None) or 1
    length = math.ceil(longest / multiple) * multiple
    return StepSettings(
        recipe,
        Batch(count, length, bool(joined) or (count > 1 and not flat), flat, trained, joined),
        optim=str(getattr(arguments.optim, "value", arguments.optim)),
        checkpointing=bool(arguments.gradient_checkpointing),
        accumulation=int(arguments.gradient_accumulation_steps),
    )


def with_rows(settings: StepSettings, rows: int) -> StepSettings:
    """The settings with another number of rows in the batch, and as many trained tokens per row."""
    batch = settings.batch
    trained = None if batch.trained is None else math.ceil(batch.trained * rows / batch.rows)
    padded = bool(batch.joined) or (rows > 1 and not batch.packed)
    return replace(settings, batch=replace(batch, rows=rows, padded=padded, trained=trained))


def with_length(settings: StepSettings, length: int) -> StepSettings:
    """The settings with rows of another length in tokens, and the same share of trained tokens."""
    batch = settings.batch
    trained = None if batch.trained is None else math.ceil(batch.trained * length / batch.length)
    joined = math.ceil(batch.joined * length / batch.length)
    return replace(settings, batch=replace(batch, length=length, trained=trained, joined=joined))
