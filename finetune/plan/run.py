"""Plans a run: the memory that it needs by part, the hardware that it fits, and changes that make it fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from trl import SFTConfig

from finetune.model.locate import Base
from finetune.model.precision import decide_precision
from finetune.plan.advice import changes_that_fit, supported_variant, why_unsupported, with_fsdp
from finetune.plan.configs import base_config
from finetune.plan.lengths import RowLengths, row_lengths
from finetune.plan.predict import Predictor, RequiredMemory
from finetune.plan.search import largest_batch, longest_rows
from finetune.plan.settings import StepSettings, step_arguments, step_settings
from finetune.recipe.load import Recipe
from finetune.system.devices import GPUS, Hardware, this_machine
from finetune.system.errors import ModelError, PlanError
from finetune.system.terminal import Say


@dataclass
class HardwareFit:
    """The result for one GPU, for each of several, or for this machine's CPU: does the recipe fit.

    Attributes:
        hardware: The GPU or CPU.
        required: The memory that the recipe needs with `overrides`; None if it cannot run there at all.
        unsupported: The reason, other than memory, for which the recipe as written cannot run there; empty if it can.
        overrides: Changes of the recipe with which it can run there.
        largest_batch: The largest batch that fits, in rows of the recipe's length; 0 if none fits or none was searched.
        longest_rows: The longest rows in tokens that fit with the recipe's batch; 0 if none fit or none were searched.
        strategy: "ddp" or "fsdp" for several GPUs.
    """

    hardware: Hardware
    required: RequiredMemory | None
    unsupported: str = ""
    overrides: list[str] = field(default_factory=list)
    largest_batch: int = 0
    longest_rows: int = 0
    strategy: str = ""

    @property
    def memory_suffices(self) -> bool:
        """True if the recipe, with `overrides`, fits into the memory."""
        return self.required is not None and self.required.total <= self.hardware.memory

    @property
    def fits(self) -> bool:
        """True if the recipe as it is written can run there."""
        return self.memory_suffices and not self.unsupported


@dataclass
class MemoryPlan:
    """The memory and time that a recipe needs.

    Attributes:
        recipe: The recipe.
        settings: The settings of a step on the longest batch, on one GPU.
        rows: The lengths of the rows; None if they are not on this machine.
        fit: The result for one GPU of the chosen kind.
        gpu_count: The number of GPUs.
        strategies: The results for several GPUs, under DDP and FSDP.
        all_gpus: The results for each known GPU; for several, under FSDP.
        advice: Overrides that make the recipe fit, with the bytes that each GPU then needs.
        flops: Floating-point operations of the longest batch.
        operators: Operators of a batch.
        steps: Optimizer steps of the run; None if they are not known.
        mixed_precision: accelerate's name for the dtype of autocast.
        measured: The seconds of steps that were timed.
    """

    recipe: Recipe
    settings: StepSettings
    rows: RowLengths | None
    fit: HardwareFit
    gpu_count: int = 1
    strategies: list[HardwareFit] = field(default_factory=list)
    all_gpus: list[HardwareFit] = field(default_factory=list)
    advice: list[tuple[str, int]] = field(default_factory=list)
    flops: float = 0.0
    operators: int = 0
    steps: int | None = None
    mixed_precision: str = "no"
    measured: list[float] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """True if the recipe fits the chosen GPU, or several of them under DDP or FSDP."""
        return any(fit.fits for fit in self.strategies or [self.fit])


def plan(
    recipe: Recipe,
    hardware: Hardware | None = None,
    gpu_count: int = 1,
    say: Say = lambda line: None,
    use_rows: bool = True,
) -> MemoryPlan:
    """Computes the memory and time that a recipe needs, without reading weights.

    Args:
        recipe: The recipe.
        hardware: The GPU to plan for; by default this machine's GPU or CPU.
        gpu_count: The number of such GPUs.
        say: Called with lines about the preparation of the rows, if they are on this machine.
        use_rows: False plans for rows of `training.max_length` tokens, without reading the real rows.

    Raises:
        ModelError: The base does not exist, or the hardware cannot compute as the recipe says in any dtype.
        PlanError: The memory of this architecture cannot be computed, or the length of the rows is not known.
        DataError, TemplateError: The rows cannot be read or rendered.
    """
    hardware = hardware or this_machine()
    base = Base.of(recipe.model, say)
    arguments, config = step_arguments(recipe), base_config(recipe.model, base)
    rows = row_lengths(recipe, say, config, base) if use_rows else None
    candidates = _Candidates(recipe, config, arguments, step_settings(recipe, arguments, rows), gpu_count)

    predictor, settings, fit = candidates.on(hardware)
    fit.required = predictor.required_memory(settings)
    cost = predictor.step(settings)
    made = MemoryPlan(recipe, settings, rows, fit, gpu_count, flops=cost.flops, operators=round(cost.operators))
    made.mixed_precision = decide_precision(settings.recipe, hardware.device).computes
    made.steps = _steps(arguments, rows, recipe, gpu_count)
    if gpu_count == 1:
        fit.largest_batch = largest_batch(predictor, settings, hardware.memory, exact=True)
        fit.longest_rows = longest_rows(predictor, settings, hardware.memory)
    else:
        made.strategies = candidates.strategies(hardware)
    made.all_gpus = [candidates.fit(gpu) for gpu in GPUS.values()]
    if not any(each.memory_suffices for each in made.strategies or [fit]):
        predictor, settings, sharded = candidates.sharded(hardware)
        changes = changes_that_fit(predictor, settings, hardware)
        made.advice = [(" ".join([*sharded.overrides, text]), size) for text, size in changes]
    candidates.save()
    return made


def fits(recipe: Recipe, hardware: Hardware) -> bool:
    """True if rows of `training.max_length` tokens fit one GPU or CPU, in the types that it supports.

    Raises:
        ModelError, PlanError: As for `plan`.
    """
    base = Base.of(recipe.model)
    arguments, config = step_arguments(recipe), base_config(recipe.model, base)
    candidates = _Candidates(recipe, config, arguments, step_settings(recipe, arguments, None), 1)
    predictor, settings, fit = candidates.on(hardware)
    fit.required = predictor.required_memory(settings)
    candidates.save()
    return fit.memory_suffices


@dataclass
class _Candidates:
    """One recipe on different hardware; hardware of the same precision shares a predictor."""

    recipe: Recipe
    config: Any
    arguments: SFTConfig
    settings: StepSettings
    gpu_count: int
    predictors: dict[Any, Predictor] = field(default_factory=dict)

    def save(self) -> None:
        """Keeps the costs of all steps for the next plan."""
        for predictor in self.predictors.values():
            predictor.stored.save()

    def on(self, hardware: Hardware) -> tuple[Predictor, StepSettings, HardwareFit]:
        """A predictor, the settings in types that the hardware supports, and a fit to fill in, all for one GPU.

        Raises:
            ModelError: The hardware cannot compute as the recipe says, nor in another dtype.
        """
        recipe, overrides = self.recipe, list[str]()
        if unsupported := why_unsupported(recipe, self.config, hardware.device):
            recipe, overrides = supported_variant(recipe, hardware.device)
            if why_unsupported(recipe, self.config, hardware.device):
                raise ModelError(unsupported)
        key = (hardware.is_gpu, decide_precision(recipe, hardware.device))
        if key not in self.predictors:
            self.predictors[key] = Predictor(self.config, hardware, self.arguments)
        fit = HardwareFit(hardware, None, unsupported, overrides)
        return self.predictors[key], replace(self.settings, recipe=recipe), fit

    def sharded(self, hardware: Hardware) -> tuple[Predictor, StepSettings, HardwareFit]:
        """The result of `on` for all GPUs, under FSDP if there are several and FSDP can shard the weights."""
        predictor, settings, fit = self.on(hardware)
        settings = replace(settings, gpus=self.gpu_count)
        if self.gpu_count > 1 and (variant := with_fsdp(settings, hardware)):
            settings, overrides = variant
            fit.overrides = fit.overrides + overrides
        return predictor, settings, fit

    def fit(self, hardware: Hardware) -> HardwareFit:
        """Returns if and how the recipe fits; under FSDP on several GPUs."""
        try:
            predictor, settings, fit = self.sharded(hardware)
            fit.required = predictor.required_memory(settings)
            fit.largest_batch = largest_batch(predictor, settings, hardware.memory)
        except (ModelError, PlanError) as error:
            fit = HardwareFit(hardware, None, str(error))
        return fit

    def strategies(self, hardware: Hardware) -> list[HardwareFit]:
        """DDP and FSDP on several GPUs."""
        predictor, settings, fit = self.on(hardware)
        settings = replace(settings, gpus=self.gpu_count)
        ddp = replace(fit, required=predictor.required_memory(settings), strategy="ddp")
        variant = with_fsdp(settings, hardware)
        if variant is None:
            return [ddp, replace(fit, unsupported="8-bit weights cannot be sharded", strategy="fsdp")]
        settings, overrides = variant
        fsdp = replace(fit, required=predictor.required_memory(settings), strategy="fsdp")
        if overrides:
            fsdp.unsupported = fit.unsupported or f"FSDP needs {' '.join(overrides)}"
            fsdp.overrides = fit.overrides + overrides
        return [ddp, fsdp]


def _steps(arguments: SFTConfig, rows: RowLengths | None, recipe: Recipe, gpu_count: int) -> int | None:
    """The number of optimizer steps of a run; None if it depends on rows that are not known."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    if rows is None:
        return None
    count = rows.count
    if arguments.packing:
        count = math.ceil(rows.tokens / (recipe.max_length or rows.longest))
    batches = math.ceil(count / (arguments.per_device_train_batch_size * gpu_count))
    steps: int = math.ceil(batches / int(arguments.gradient_accumulation_steps))
    epochs: float = arguments.num_train_epochs
    return math.ceil(steps * epochs)
