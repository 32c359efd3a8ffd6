"""A recipe and a card to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from trl import SFTConfig

from finetune.model.locate import Base
from finetune.model.precision import decide_precision
from finetune.plan.advice import advice, supported_variant, why_unsupported, with_fsdp
from finetune.plan.configs import base_config
from finetune.plan.lengths import RowLengths, row_lengths
from finetune.plan.predict import (
    STRIDE,
    Predictor,
    RequiredMemory,
    StepSettings,
    layer_types,
    with_length,
    with_rows,
)
from finetune.plan.step import Batch
from finetune.recipe.load import Recipe
from finetune.system.devices import GPUS, Hardware, this_machine
from finetune.system.errors import ModelError, PlanError
from finetune.system.terminal import Say, quiet

# Of a larger batch nobody asks.
MOST_ROWS = 1024
# Of `training`, what decides about memory and steps.
_MEMORY = [
    *(
        "output_dir",
        "optim",
        "optim_args",
        "optim_target_modules",
        "learning_rate",
        "weight_decay",
        "adam_beta1",
    ),
    *(
        "adam_beta2",
        "adam_epsilon",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "max_grad_norm",
    ),
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
        "packing",
    ),
    *("packing_strategy", "padding_free", "pad_to_multiple_of"),
]


@dataclass
class HardwareFit:
    """A card, what it must have, and what it could hold beside."""

    hardware: Hardware
    required: RequiredMemory | None
    refused: str = ""  # why the recipe, as it is written, cannot run on it at all
    instead: list[str] = field(default_factory=list)  # the overrides with which it can, of which `need` is
    rows: int = 0  # the largest batch of the recipe's length
    length: int = 0  # the longest rows of the recipe's batch; only where it was looked for
    how: str = ""  # of several cards: ddp or fsdp

    @property
    def holds(self) -> bool:
        """Whether its memory does; with `instead`, where the recipe is refused."""
        return self.required is not None and self.required.total <= self.hardware.memory

    @property
    def fits(self) -> bool:
        """Whether the recipe as it is written can run on it."""
        return self.holds and not self.refused


@dataclass
class MemoryPlan:
    """What is known of a recipe before it is run."""

    recipe: Recipe
    setting: StepSettings
    rows: RowLengths | None  # None where the rows are not at hand
    fit: HardwareFit  # the card that was asked for
    others: list[HardwareFit]  # each known card
    advice: list[tuple[str, int]] = field(default_factory=list)  # a change, and the bytes with it
    layout: list[HardwareFit] = field(default_factory=list)  # of several cards, each way to use them
    flops: float = 0.0  # of the longest batch
    operators: int = 0  # of any batch
    steps: int | None = None
    computes: str = "no"
    measured: list[float] = field(default_factory=list)  # seconds of real steps
    cards: int = 1

    @property
    def fits(self) -> bool:
        """Whether it fits the card that was asked for; several of them: in one way or the other."""
        return any(fit.fits for fit in self.layout or [self.fit])


def step_arguments(recipe: Recipe) -> SFTConfig:
    """What decides about memory and steps of the recipe's `training`, as trl takes it, without asking for a device."""
    values = {name: recipe.training[name] for name in _MEMORY if name in recipe.training}
    if values.get("padding_free") and not values.get("packing"):
        values["max_length"] = None  # as `training_arguments`
    with quiet():
        return SFTConfig(**values, report_to="none", use_cpu=True, bf16=False)


def step_settings(recipe: Recipe, arguments: Any, rows: RowLengths | None) -> StepSettings:
    """The recipe's own longest batch and settings."""
    count = int(arguments.per_device_train_batch_size)
    packs = bool(arguments.packing)
    flat = bool(arguments.padding_free) or (packs and arguments.packing_strategy in ("bfd", "bfd_split"))
    limit = recipe.max_length
    if rows is not None and not packs:
        limit = rows.longest
        count = min(count, rows.count)
    if limit is None:
        raise PlanError("training.max_length: is null and the rows are not at hand; write a length")
    multiple = arguments.pad_to_multiple_of or 1
    length = math.ceil(limit / multiple) * multiple
    trained = rows.trained(count) if rows is not None and not packs else None
    batch = Batch(count, length, padded=count > 1 and not flat, packed=flat, trained=trained)
    optim = str(getattr(arguments.optim, "value", arguments.optim))
    return StepSettings(
        recipe,
        batch,
        optim,
        bool(arguments.gradient_checkpointing),
        int(arguments.gradient_accumulation_steps),
    )


def plan(
    recipe: Recipe,
    card: Hardware | None = None,
    cards: int = 1,
    say: Say = lambda line: None,
    use_rows: bool = True,
) -> MemoryPlan:
    """What the recipe needs on a card, and on each known one.

    Args:
        recipe: It is not run, and no weights are read.
        card: Absent: this machine's.
        cards: How many of them.
        say: Told what becomes of the rows, where they are at hand.
        use_rows: Whether they are looked for.

    Raises:
        PlanError, ModelError: The card cannot compute as the recipe says, in no other type either, or the base is not
            known.
    """
    card = card or this_machine()
    base = Base.of(recipe.model, say)
    arguments, config = step_arguments(recipe), base_config(recipe.model, base)
    rows = row_lengths(recipe, say, base) if use_rows else None
    written = step_settings(recipe, arguments, rows)
    predictors: dict[Any, Predictor] = {}

    def on(place: Hardware) -> tuple[Predictor, StepSettings, HardwareFit]:
        """What answers for a card, the recipe in types that it computes in, and a fit to be filled."""
        refused, its, instead = why_unsupported(recipe, config, place.device), recipe, list[str]()
        if refused:
            its, instead = supported_variant(recipe, place.device)
            if why_unsupported(its, config, place.device):
                raise ModelError(refused)
        kind = (place.is_gpu, decide_precision(its, place.device))
        if kind not in predictors:
            predictors[kind] = Predictor(config, place, arguments)
        return predictors[kind], replace(written, recipe=its), HardwareFit(place, None, refused, instead)

    own, setting, fit = on(card)
    fit.required = own.required_memory(setting)
    if cards == 1:
        fit.rows = _largest_batch(own, setting, card, sure=True)
        fit.length = _longest_row(own, setting, card, config)
    step = own.step(setting)
    made = MemoryPlan(
        recipe,
        setting,
        rows,
        fit,
        [],
        flops=step.flops,
        operators=step.operators,
        computes=decide_precision(setting.recipe, card.device).computes,
        cards=cards,
    )
    if cards > 1:
        ddp = replace(setting, cards=cards)
        made.layout.append(replace(fit, required=own.required_memory(ddp), how="ddp"))
        made.layout.append(_in_parts(own, ddp, replace(fit, how="fsdp")))
    if rows is not None:
        made.steps = _steps(arguments, rows, recipe, cards)
    elif arguments.max_steps > 0:
        made.steps = int(arguments.max_steps)
    for other in GPUS.values():
        try:
            its, asked, found = on(other)
            asked = replace(asked, cards=cards)
            if cards > 1 and (parts := with_fsdp(asked, other)):
                asked, more = parts
                found.instead = found.instead + more
            found.required, found.rows = its.required_memory(asked), _largest_batch(its, asked, other)
        except (ModelError, PlanError) as error:
            found = HardwareFit(other, None, str(error))
        made.others.append(found)
    if not any(each.holds for each in made.layout or [fit]):
        asked, more = replace(setting, cards=cards), list[str]()
        if cards > 1 and (parts := with_fsdp(asked, card)):
            asked, more = parts
        start = [*fit.instead, *more]
        made.advice = [(" ".join([*start, text]), need) for text, need in advice(own, asked, card)]
    return made


def _in_parts(own: Predictor, setting: StepSettings, fit: HardwareFit) -> HardwareFit:
    if (parts := with_fsdp(setting, fit.hardware)) is None:
        return replace(fit, required=None, refused="8-bit weights cannot be cut into parts")
    asked, more = parts
    refused = fit.refused or ("not launched as it is written" if more else "")
    return replace(fit, required=own.required_memory(asked), refused=refused, instead=fit.instead + more)


def _steps(arguments: Any, rows: RowLengths, recipe: Recipe, cards: int) -> int:
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    count = rows.count
    if arguments.packing:
        assert recipe.max_length is not None, "packing without a length is refused with the recipe"
        count = math.ceil(rows.tokens / recipe.max_length)
    batches = math.ceil(count / (arguments.per_device_train_batch_size * cards))
    steps: int = math.ceil(batches / int(arguments.gradient_accumulation_steps))
    epochs: float = arguments.num_train_epochs
    return math.ceil(steps * epochs)


def _largest_batch(own: Predictor, setting: StepSettings, card: Hardware, sure: bool = False) -> int:
    """The largest batch that fits; `MOST_ROWS` stands for any; `sure`: the next one is tried, too."""

    def total(rows: int) -> int:
        return own.required_memory(with_rows(setting, rows)).total

    return _edge(total, card.memory, max(2, setting.batch.rows), MOST_ROWS, tries=3 if sure else 0)


def _longest_row(own: Predictor, setting: StepSettings, card: Hardware, config: Any) -> int:
    """The longest rows of the recipe's batch that fit, in steps of 64 tokens, and that the base knows."""
    text = config.get_text_config()
    if set(layer_types(config)) - {"all", "full_attention", "sliding_attention", "chunked_attention"}:
        return 0  # a state goes from block to block of a row: long ones would be looked at for minutes
    most = int(getattr(text, "max_position_embeddings", 0) or 8192) // STRIDE

    def total(strides: int) -> int:
        return own.required_memory(with_length(setting, strides * STRIDE)).total

    start = min(most, max(1, setting.batch.length // STRIDE))
    return _edge(total, card.memory, start, most, tries=1) * STRIDE


def _edge(total: Callable[[int], int], limit: float, start: int, most: int, tries: int) -> int:
    """About the largest number, at most `most`, for which `total` keeps the limit; 0: none. It does for the answer.

    `total` is the maximum of some lines (of a length, of parabolas), so between two points it is below their chord, and
    where that meets the limit is safe. After each of `tries` the chord is a shorter one.
    """
    low, high = 0, start
    while (fits := total(high) <= limit) and high < most:
        low, high = high, min(most, 4 * high)
    if fits:
        return high
    while low == 0 and high > 1:  # below the start
        if total(half := high // 2) <= limit:
            low = half
        else:
            high = half
    while low:
        share = (limit - total(low)) / (total(high) - total(low))
        guess = low + math.floor(share * (high - low))
        if tries == 0 or high - low == 1:
            return guess
        tries -= 1
        guess = min(high - 1, guess + 1)  # one more than is safe
        if total(guess) <= limit:
            low = guess
        else:
            low, high = max(low, guess - 1), guess
    return 0
