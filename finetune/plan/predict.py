"""What a recipe takes on a card, and how it changes with the batch, its length and the settings."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from finetune.plan.step import Batch, FakeModel, StepCost
from finetune.recipe.load import Recipe
from finetune.system.devices import Hardware
from finetune.system.errors import PlanError
from finetune.system.numbers import GIB
from finetune.system.terminal import quiet

# It logs the stack of what a fake operator refuses; we say it in a line.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
# A CUDA context with the libraries that a run loads, outside torch's count. Computed from no run of ours: published
# figures are 0.3 GiB (T4) to 0.6 GiB (H100).
_CONTEXT = GIB // 2
# Of what comes and goes in a step, what torch's allocator holds beyond it. An assumption.
_FRAGMENTS = 0.05
# Python with torch, transformers and trl, which is all that a CPU run has beside its tensors.
_PROCESS = int(0.7 * GIB)
# A row is cut to a whole number of these when a shorter length is looked for.
STRIDE = 64


@dataclass(frozen=True)
class StepSettings:
    """What decides how much memory a step takes, beside the model and the card."""

    recipe: Recipe
    batch: Batch
    optim: str
    checkpointing: bool
    accumulation: int
    cards: int = 1
    sharded: bool = False


@dataclass(frozen=True)
class RequiredMemory:
    """Bytes on one card, part by part, in the order in which they are shown."""

    parts: dict[str, int]
    paged: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


class Predictor:
    """Answers what a setting takes; each model is built once.

    Decoder layers are alike, so a model is run with a few of them (one of each kind, and one more), then with one layer
    more, and grows from there with each further layer as it did with that one; to the byte what all layers take, the
    tests hold. A model whose layers differ is run whole.
    """

    def __init__(self, config: Any, card: Hardware, arguments: Any) -> None:
        """For a base's config, a card, and the recipe's `training` as trl takes it.

        Raises:
            PlanError: The base is no causal language model.
        """
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
            raise PlanError(
                f"model.name_or_path: is a {config.model_type}, which is no causal language model"
            )
        self.config, self.card, self.arguments = config, card, arguments
        self._models: dict[tuple[str, int], FakeModel] = {}
        self._taken: dict[Any, StepCost] = {}
        self._same: bool | None = None

    def step(self, setting: StepSettings) -> StepCost:
        """A step on one card."""
        depth, few = int(_text(self.config).num_hidden_layers), len(layer_types(self.config)) + 1
        if depth <= few + 1 or not self._alike(few):
            return self._run(setting, depth)
        return _extrapolate(self._run(setting, few), self._run(setting, few + 1), depth - few)

    def required_memory(self, setting: StepSettings) -> RequiredMemory:
        """What one card must have for it."""
        taken = self.step(setting)
        if setting.sharded:
            return self._sharded(setting, taken)
        parts = dict(taken.parts)
        if setting.cards > 1:
            parts["copies"] = taken.gradients  # DDP's buckets hold each gradient once more
        return self._beside(parts, taken.paged)

    def _sharded(self, setting: StepSettings, taken: StepCost) -> RequiredMemory:
        """A formula on top of what a step of one card takes: FSDP 2 with each decoder layer, and the rest, as a unit.

        Weights, their gradients and what the optimizer keeps are divided by the number of cards. Whole are, in the
        type that is computed in, the rest (embeddings) and two layers, one of them fetched ahead, with the gradients of
        one. Weights in 4 bit are divided if they are stored as floats.
        """
        count, quantized = setting.cards, setting.recipe.quantization or {}
        whole = bool(quantized) and not quantized.get("bnb_4bit_quant_storage")
        model = self._model(setting.recipe, len(layer_types(self.config)) + 1)
        computed = 2 if model.computes != "no" else 4
        parts = dict(taken.parts)
        if model.computes == "bf16" and setting.recipe.lora is None and not whole:
            # Weights in float32 are gathered in 16 bit, where one card makes copies of them. There is no such model in
            # float16 that could be asked, and those copies are counted.
            lean = replace(
                setting.recipe, model=setting.recipe.model.model_copy(update={"dtype": "bfloat16"})
            )
            parts |= {
                name: size
                for name, size in self.step(replace(setting, recipe=lean)).parts.items()
                if name in ("attention", "activations", "head")
            }
        trained = taken.gradients
        parts |= taken.kept
        accumulates = setting.accumulation > 1
        parts["gradients"] = trained if accumulates else trained // count
        for name in ("adapter", "optimizer", *(() if whole else ("weights",))):
            parts[name] = parts.get(name, 0) // count
        layer, beside = model.units(computed)
        parts["gathered"] = 0 if whole else 2 * layer + beside
        if setting.recipe.lora is None and not accumulates:
            parts["gathered"] += layer * 4 // computed  # summed in float32
        return self._beside(parts, 0)

    def _beside(self, parts: dict[str, int], paged: int) -> RequiredMemory:
        steady = ("weights", "adapter", "optimizer")
        moving = sum(size for name, size in parts.items() if name not in steady)
        if self.card.is_gpu:
            parts |= {"context": _CONTEXT, "fragments": int(moving * _FRAGMENTS)}
        else:
            parts["process"] = _PROCESS
        return RequiredMemory({name: size for name, size in parts.items() if size > 0}, paged)

    def _alike(self, few: int) -> bool:
        """Whether each layer has as many parameters as any other, so that a few speak for all."""
        if self._same is None:
            sizes = [_parameters(_with_layers(self.config, depth)) for depth in (few, few + 1)]
            depth = int(_text(self.config).num_hidden_layers)
            grown = sizes[0] + (sizes[1] - sizes[0]) * (depth - few)
            self._same = grown == _parameters(self.config)
        return self._same

    def _model(self, recipe: Recipe, depth: int) -> FakeModel:
        key = (recipe.to_yaml(), depth)
        if key not in self._models:
            self._models[key] = FakeModel(
                recipe, _with_layers(self.config, depth), self.card.device, self.card.is_gpu, self.arguments
            )
        return self._models[key]

    def _run(self, setting: StepSettings, depth: int) -> StepCost:
        model = self._model(setting.recipe, depth)
        key = (id(model), setting.batch, setting.optim, setting.checkpointing, setting.accumulation > 1)
        if key not in self._taken:
            batch = setting.batch
            try:
                self._taken[key] = model.step(
                    batch, setting.optim, setting.checkpointing, setting.accumulation > 1
                )
            except (
                RuntimeError,
                TypeError,
                ValueError,
                IndexError,
                AttributeError,
                NotImplementedError,
            ) as error:
                raise self._lost(batch, error) from error
        return self._taken[key]

    def _lost(self, batch: Batch, error: Exception) -> PlanError:
        """What upstream's code broke with, in a line."""
        text = _text(self.config)
        known, why = getattr(text, "max_position_embeddings", None) or batch.length, str(error).strip()
        if batch.length > known:
            return PlanError(
                f"training.max_length: rows have {batch.length:,} tokens, more than the base's {known:,}; write {known}"
            )
        return PlanError(
            f"model.name_or_path: a step of this {text.model_type} as the recipe has it cannot be followed "
            f"({type(error).__name__}: {next(iter(why.splitlines()), '')[:200]})"
        )


def with_rows(setting: StepSettings, rows: int) -> StepSettings:
    """With a batch of so many rows, trained on as those are."""
    padded = rows > 1 and not setting.batch.packed
    share = setting.batch.trained
    trained = None if share is None else math.ceil(share * rows / setting.batch.rows)
    return replace(setting, batch=replace(setting.batch, rows=rows, padded=padded, trained=trained))


def with_length(setting: StepSettings, length: int) -> StepSettings:
    """With rows of so many tokens."""
    share = setting.batch.trained
    trained = None if share is None else math.ceil(share * length / setting.batch.length)
    return replace(setting, batch=replace(setting.batch, length=length, trained=trained))


def _text(config: Any) -> Any:
    return config.get_text_config()


def layer_types(config: Any) -> list[str]:
    """The kinds of layers that a model has, as its config names them, in the order in which they come."""
    return list(dict.fromkeys(getattr(_text(config), "layer_types", None) or ["all"]))


def _parameters(config: Any) -> int:
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def _with_layers(config: Any, depth: int) -> Any:
    """The config with so many layers, of each kind at least one."""
    config = copy.deepcopy(config)
    text = _text(config)
    layers = text.num_hidden_layers
    if layers == depth:
        return config
    text.num_hidden_layers = depth
    if types := getattr(text, "layer_types", None):
        text.layer_types = (layer_types(config) + [types[0]] * depth)[:depth]
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers and name != "layer_types":
            setattr(text, name, value[:depth])
    return config


def _extrapolate(one: StepCost, two: StepCost, layers: int) -> StepCost:
    """From a step, and one with a layer more, a step with so many layers more than the first."""

    def grow(a: float, b: float) -> int:
        return max(0, round(a + (b - a) * layers))

    def parts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return {name: grow(a.get(name, 0), b.get(name, 0)) for name in {**a, **b}}

    return StepCost(
        {phase: parts(one.phases[phase], two.phases[phase]) for phase in one.phases},
        parts(one.kept, two.kept),
        grow(one.paged, two.paged),
        grow(one.flops, two.flops),
        grow(one.trained, two.trained),
        grow(one.gradients, two.gradients),
        grow(one.operators, two.operators),
    )
