"""Predicts the memory and FLOPs of a training step, on given hardware, from steps on fake tensors (plan/step.py)."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from finetune.plan.layers import layer_kinds, with_layers
from finetune.plan.settings import StepSettings
from finetune.plan.step import Batch, FakeModel, StepCost
from finetune.plan.stored import StoredCosts
from finetune.recipe.load import Recipe
from finetune.system.devices import Hardware
from finetune.system.errors import FinetuneError, PlanError, first_line
from finetune.system.numbers import GIB
from finetune.system.terminal import quiet

# torch logs a stack trace if a fake operator fails; here it is reported in one line.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
# Memory of a CUDA context with the libraries that a run loads, which torch does not count. An assumption: published
# figures are 0.3 GiB (T4) to 0.6 GiB (H100).
_CONTEXT = GIB // 2
# Memory that torch's allocator holds beyond live tensors, as a share of the tensors that a step makes and frees. An
# assumption.
_FRAGMENTATION = 0.05
# Memory of Python with torch, transformers and trl. An assumption.
_PROCESS = int(0.7 * GIB)


@dataclass(frozen=True)
class RequiredMemory:
    """Bytes that each GPU (or the CPU) needs, by part.

    Attributes:
        parts: Bytes by part.
        paged: Bytes of optimizer state that a paged optimizer can move to the CPU's memory; not among `parts`.
    """

    parts: dict[str, int]
    paged: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Sample:
    """Layers by number: `few` to run, and in `further` one more of each kind with the number of layers it stands for.

    With `few=(0, 1, 5)` and `further=[(2, 24)]` layers 0, 1, 5 are run, then 2 beside them, whose cost counts 24 times.
    """

    few: tuple[int, ...]
    further: list[tuple[int, int]]


class Predictor:
    """Predicts steps of one base on one hardware; builds each model once, and runs each step once.

    Many decoder layers are alike, so the model is run with a few of them (one of each kind, and one more) and again
    with one more layer of each kind; the difference counts for each further layer of that kind. Kinds of one size count
    as one. The tests hold this against the whole model to the byte. A model whose config does not say how its layers
    differ, or with too many kinds, is run whole.

    Batches that differ only in their number of rows are run twice; the costs of all others follow (`StepCost.at`).
    """

    def __init__(self, config: Any, hardware: Hardware, arguments: SFTConfig) -> None:
        """Builds nothing yet.

        Args:
            config: The base's transformers config.
            hardware: A GPU or a CPU.
            arguments: The recipe's `training` section as an `SFTConfig`.
        """
        self.config, self.hardware, self.arguments = config, hardware, arguments
        self.stored = StoredCosts(config, hardware, arguments)
        self._models: dict[tuple[str, tuple[int, ...]], FakeModel] = {}
        # By all but the number of rows, then by batch.
        self._costs: dict[Any, dict[Batch, StepCost]] = {}

    def step(self, settings: StepSettings) -> StepCost:
        """The cost of a step on one GPU, without what several GPUs add."""
        if (cost := self.stored.get(settings)) is None:
            cost = self._computed(settings)
            self.stored.add(settings, cost)
        return cost

    def _computed(self, settings: StepSettings) -> StepCost:
        one, more = self._run(settings, self._sample.few), []
        for layer, count in self._sample.further:
            more.append((self._run(settings, _plus(self._sample.few, layer)), count))
        return replace(_extrapolate(one, more), timeline=None)

    def required_memory(self, settings: StepSettings) -> RequiredMemory:
        """The memory that each GPU needs."""
        cost = self.step(settings)
        if settings.fsdp:
            return self._fsdp(settings, cost)
        parts = dict(cost.parts)
        if settings.gpus > 1:
            parts["copies"] = cost.gradients  # DDP's buckets hold a copy of each gradient
        return self._with_overhead(parts, cost.paged)

    def _fsdp(self, settings: StepSettings, cost: StepCost) -> RequiredMemory:
        """The memory under FSDP 2, by a formula on top of the cost on one GPU.

        Each decoder layer is a unit, and the rest of the model is one. Weights, their gradients and the optimizer's
        state are divided by the number of GPUs. Gathered, in the dtype of computation, are the rest of the model
        (embeddings), two layers, one of them prefetched, and the gradients of one layer. 4-bit weights are sharded only
        if they are stored as floats.
        """
        count, quantized = settings.gpus, settings.recipe.quantization or {}
        replicated = bool(quantized) and not quantized.get("bnb_4bit_quant_storage")
        model = self._model(settings.recipe, self._sample.few)
        computed = 2 if model.mixed_precision != "no" else 4
        parts = dict(cost.parts)
        if model.mixed_precision == "bf16" and settings.recipe.lora is None and not replicated:
            # FSDP gathers float32 weights in bfloat16, and makes no bfloat16 copies of them as autocast does on one
            # GPU. So these parts are those of a bfloat16 model. With fp16 the copies are counted, which is too much.
            in_bf16 = replace(settings.recipe, model=settings.recipe.model.model_copy(update={"dtype": "bfloat16"}))
            parts |= {
                name: size
                for name, size in self.step(replace(settings, recipe=in_bf16)).parts.items()
                if name in ("attention", "activations", "head")
            }
        trained = cost.gradients
        parts |= cost.kept
        accumulates = settings.accumulation > 1
        parts["gradients"] = trained if accumulates else trained // count
        for name in ("adapter", "optimizer", *(() if replicated else ("weights",))):
            parts[name] = parts.get(name, 0) // count
        layer, rest = model.unit_sizes(computed)
        for further, number in self._sample.further:  # embeddings per layer are outside the layers
            _, more = self._model(settings.recipe, _plus(self._sample.few, further)).unit_sizes(computed)
            rest += (more - rest) * number
        parts["gathered"] = 0 if replicated else 2 * layer + rest
        if settings.recipe.lora is None and not accumulates:
            parts["gathered"] += layer * 4 // computed  # gradients are reduced in float32
        return self._with_overhead(parts, 0)

    def _with_overhead(self, parts: dict[str, int], paged: int) -> RequiredMemory:
        static = ("weights", "adapter", "optimizer")
        transient = sum(size for name, size in parts.items() if name not in static)
        if self.hardware.is_gpu:
            parts |= {"context": _CONTEXT, "fragments": int(transient * _FRAGMENTATION)}
        else:
            parts["process"] = _PROCESS
        return RequiredMemory({name: size for name, size in parts.items() if size > 0}, paged)

    @functools.cached_property
    def _sample(self) -> _Sample:
        """The layers to run in place of all; all of them where fewer do not add up to the whole model's size."""
        depth = int(_text(self.config).num_hidden_layers)
        whole = _Sample(tuple(range(depth)), [])
        try:
            kinds = layer_kinds(self.config)
            numbers = {kind: [i for i, each in enumerate(kinds) if each == kind] for kind in kinds}
            few = tuple(sorted(each for kind, found in numbers.items() for each in found[: 1 + (kind == kinds[0])]))
            further = [
                (left[0], len(left)) for found in numbers.values() if (left := [i for i in found if i not in few])
            ]
            if depth <= len(few) + 1:
                return whole
            size = _parameters(with_layers(self.config, few))
            sizes = [_parameters(with_layers(self.config, _plus(few, layer))) - size for layer, _ in further]
            if len(set(sizes)) == 1:
                further = [(further[0][0], depth - len(few))]
            added = sum(each * count for each, (_, count) in zip(sizes, further, strict=False))
            is_less = len(few) + (len(few) + 1) * len(further) < depth or len(further) == 1
            return _Sample(few, further) if is_less and size + added == _parameters(self.config) else whole
        except Exception:  # the model's code needs something of its layers that the config's lists do not say
            return whole

    def _model(self, recipe: Recipe, kept: tuple[int, ...]) -> FakeModel:
        key = (json.dumps(recipe.sections()), kept)
        if key not in self._models:
            self._models[key] = FakeModel(recipe, with_layers(self.config, kept), self.hardware, self.arguments)
        return self._models[key]

    def _run(self, settings: StepSettings, kept: tuple[int, ...]) -> StepCost:
        try:
            model = self._model(settings.recipe, kept)
            shape, batch = (settings.optim, settings.checkpointing, settings.accumulation > 1), settings.batch
            alike = replace(batch, rows=0, trained=None if batch.trained is None else 0)
            known = self._costs.setdefault((id(model), *shape, alike), {})
            if batch not in known:
                known[batch] = _between(known, batch) or model.step(batch, *shape)
            return known[batch]
        except FinetuneError:
            raise
        except Exception as error:  # code of the model or of a library
            raise self._failed(settings.batch, error) from error

    def _failed(self, batch: Batch, error: Exception) -> PlanError:
        """The error to raise where code of the model or of a library fails on fake tensors."""
        text = _text(self.config)
        known = getattr(text, "max_position_embeddings", None) or batch.length
        if batch.length > known:
            return PlanError(
                f"training.max_length: rows have {batch.length:,} tokens, more than the base's {known:,}; write {known}"
            )
        return PlanError(
            f"model.name_or_path: the memory of this {text.model_type} with this recipe cannot be computed "
            f"({type(error).__name__}: {first_line(error)[:200]})"
        )


def _text(config: Any) -> Any:
    return config.get_text_config()


def _plus(layers: tuple[int, ...], layer: int) -> tuple[int, ...]:
    return tuple(sorted((*layers, layer)))


def _parameters(config: Any) -> int:
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _between(known: dict[Batch, StepCost], batch: Batch) -> StepCost | None:
    """The cost of a batch from those of two others, with other numbers of rows; None if it must be run."""
    for (one, low), (other, high) in itertools.combinations(known.items(), 2):
        if one.rows == other.rows:
            continue
        share = (batch.rows - one.rows) / (other.rows - one.rows)
        trained = [each.trained or 0 for each in (one, other, batch)]
        # The number of trained tokens is rounded up.
        is_in_line = abs(trained[0] + (trained[1] - trained[0]) * share - trained[2]) <= 1
        if is_in_line and (cost := low.at(share, high)) is not None:
            return cost
    return None


def _extrapolate(one: StepCost, grown: Sequence[tuple[StepCost, int]]) -> StepCost:
    """The cost with more layers than `one` has.

    Args:
        one: The cost with a few layers.
        grown: For each kind of layers, the cost with one layer more of it, and the number of layers to add.
    """

    def grow(a: float, *more: float) -> int:
        return max(0, round(a + sum((b - a) * count for b, (_, count) in zip(more, grown, strict=True))))

    def parts(a: dict[str, int], *more: dict[str, int]) -> dict[str, int]:
        names = dict.fromkeys(name for each in (a, *more) for name in each)
        return {name: grow(a.get(name, 0), *(b.get(name, 0) for b in more)) for name in names}

    costs = [cost for cost, _ in grown]
    return StepCost(
        {phase: parts(one.phases[phase], *(cost.phases[phase] for cost in costs)) for phase in one.phases},
        parts(one.kept, *(cost.kept for cost in costs)),
        grow(one.paged, *(cost.paged for cost in costs)),
        grow(one.flops, *(cost.flops for cost in costs)),
        grow(one.gradients, *(cost.gradients for cost in costs)),
        grow(one.operators, *(cost.operators for cost in costs)),
    )
