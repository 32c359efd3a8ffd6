"""One training step of the recipe's real model on tensors without memory: what it would take, part by part."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, Trainer, masking_utils
from transformers.quantizers import AutoHfQuantizer

from finetune.model import compatibility
from finetune.model.load import quantization_config
from finetune.model.precision import Precision, decide_precision, keep_residual_in_float32
from finetune.model.trainable import trainable_model
from finetune.plan.fake_device import emulate_device, patched_attributes
from finetune.plan.memory import PAGED, MemoryTracker
from finetune.recipe.load import Recipe
from finetune.system import devices
from finetune.system.errors import PlanError
from finetune.system.terminal import quiet
from finetune.train.loss import use_token_head


@dataclass(frozen=True)
class Batch:
    """The rows of a batch as memory sees them."""

    rows: int
    length: int
    padded: bool = True  # some are shorter than the longest
    packed: bool = False  # several in one, told apart by their positions
    trained: int | None = None  # tokens that are trained on; None: all


@dataclass
class StepCost:
    """Bytes of a step, and its work."""

    # Of each phase of a step its maximum, part by part: which phase takes most, changes with the number of layers.
    phases: dict[str, dict[str, int]]
    kept: dict[str, int]  # between two steps
    paged: int = 0  # the optimizer's, which leave a card that is full
    flops: float = 0.0  # of one batch, forward and backward
    trained: int = 0  # parameters
    gradients: int = 0  # bytes of all of them
    operators: int = 0  # of one batch, each of which takes a card a moment however little it does

    @property
    def parts(self) -> dict[str, int]:
        """At the peak; their sum is the peak."""
        return max(self.phases.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """The most."""
        return sum(self.parts.values())


def build(recipe: Recipe, config: Any, precision: Precision, mode: FakeTensorMode) -> Any:
    """The model that `finetune train` would train, its tensors fake.

    Args:
        recipe: What is trained.
        config: The base's; it is changed.
        precision: The recipe's types.
        mode: What makes the tensors fake.

    Raises:
        ModelError: `lora` does not fit the base.
    """
    attention = recipe.model.attn_implementation
    compatibility.check_attention_name(attention, config)
    if attention is not None and attention not in ("eager", "sdpa"):
        attention = "sdpa"  # flash and flex attention take about as much memory
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=precision.loaded,
            attn_implementation=attention,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    if recipe.quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization_config(recipe.quantization, precision.loaded))
        quantizer.preprocess_model(model=model, dtype=precision.loaded, device_map=None)
        quantizer.postprocess_model(model)
    if precision.loaded == torch.float16:
        keep_residual_in_float32(model)  # as `load_base`
    with torch.device("meta"):
        # Only weights show which tokens the base never learned; two of them take next to nothing.
        model = trainable_model(recipe, model, precision, unlearned=[0, 1])
    _make_fake(model, mode, precision.loaded)
    return model


def _make_fake(model: Any, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Replaces tensors on `meta` by fake ones; quantised weights as bitsandbytes' fake kernels give them."""
    made: dict[int, Any] = {}
    if getattr(model, "is_quantized", False):
        _bitsandbytes_maps()
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = _fake_parameter(module, parameter, dtype), parameter
                module._parameters[name] = made[id(parameter)][0]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _bitsandbytes_maps() -> None:
    """The table of bitsandbytes' 8-bit type, made while tensors still have values; it keeps it for good."""
    from bitsandbytes import functional

    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()


def _fake_parameter(module: Any, parameter: Any, dtype: torch.dtype) -> Any:
    kind = type(parameter).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import quantize_4bit

        weight = torch.empty(module.out_features, module.in_features, dtype=dtype)
        packed, state = quantize_4bit(
            weight,
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
        )
        fake: Any = torch.nn.Parameter(packed, requires_grad=False)
        fake.quant_state, fake.bnb_quantized = state, True
        return fake
    if kind == "Int8Params" and not parameter.has_fp16_weights:
        packed = torch.empty(parameter.shape, dtype=torch.int8)
        fake = torch.nn.Parameter(packed, requires_grad=False)
        fake.CB, fake.has_fp16_weights = packed, False
        fake.SCB = torch.empty(parameter.shape[0], dtype=torch.float32)
        return fake
    return torch.nn.Parameter(
        torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
    )


class FakeModel:
    """A model that is run on one batch after another, each time as if it were the first."""

    def __init__(
        self, recipe: Recipe, config: Any, device: devices.Device, card: bool, arguments: Any
    ) -> None:
        """Builds it.

        Args:
            recipe: What is trained.
            config: The base's.
            device: On what.
            card: Whether that is a CUDA card.
            arguments: The recipe's `training` as trl takes it.
        """
        self.recipe, self.card, self.arguments = recipe, card, arguments
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        precision = decide_precision(recipe, device)
        self.computes = precision.computes
        self.model = build(recipe, config, precision, self.mode)
        self.causal = self.model.get_base_model() if recipe.lora is not None else self.model
        self.decoder = self.causal.base_model
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(self.causal, outputs=("log_probs", "entropy", "is_top1"))
        rows = any("trainable_tokens" in name for name, _ in self.model.named_parameters())
        if not card or rows:
            use_token_head(self.causal)
        self.checkpointing: bool | None = None

    def checkpoint(self, on: bool) -> None:
        """Turns gradient checkpointing on or off."""
        if on == self.checkpointing:
            return
        self.checkpointing = on
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # transformers 5.23 has other names, which 5.22 has not
            self.model.gradient_checkpointing_disable()
            if on:
                kwargs = dict(self.arguments.gradient_checkpointing_kwargs or {})
                kwargs.pop("selective", None)
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)
                if self.recipe.lora is not None:
                    self.model.enable_input_require_grads()
        self.model.train()

    def units(self, computed: int) -> tuple[int, int]:
        """Bytes of the largest decoder layer's weights, and of all beside the layers, in a type of so many bytes.

        Quantised weights are packed as they are.
        """

        def size(parameters: Any) -> int:
            seen = {id(p): p for p in parameters}.values()
            floats = (p.numel() * (p.element_size() if hasattr(p, "quant_state") else computed) for p in seen)
            return sum(floats)

        layers = list(self.decoder_layers())
        inside = {id(p) for layer in layers for p in layer.parameters()}
        beside = (p for p in self.model.parameters() if id(p) not in inside)
        return max(size(layer.parameters()) for layer in layers), size(beside)

    def decoder_layers(self) -> Any:
        """Of the part that reads text: the list of as many modules as it has layers, whatever it is called.

        Raises:
            PlanError: It has none.
        """
        decoder, depth = self.causal.get_decoder(), self.causal.config.get_text_config().num_hidden_layers
        for module in (decoder or self.causal).modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
                return module
        raise PlanError(
            f"model.name_or_path: is a {self.causal.config.model_type}, whose layers are not found here"
        )

    def step(self, batch: Batch, optim: str, checkpointing: bool, accumulates: bool) -> StepCost:
        """What a step takes once the optimizer has its state; `accumulates`: with gradients of a batch before."""
        self.checkpoint(checkpointing)
        tracker = MemoryTracker(self.card, batch.trained)
        arguments = copy.copy(self.arguments)
        arguments.optim = optim
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([p for p in self.model.parameters() if p.requires_grad], **options)
        with self.mode, emulate_device(self.card, tracker), tracker:
            trained = self._weights(tracker)
            uses = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
            tracker.tied = {p.shape for p in trained if uses[id(p)] > 1}
            tracker.part = "optimizer"
            self._first_step(optimizer, trained, tracker)
            kept = dict(tracker.now)
            tracker.part = "activations"
            if accumulates:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                    tracker.add(parameter.grad, "gradients")
                    tracker.move(parameter.grad, "gradients")
            tracker.begin("forward")
            self._pass(batch, tracker, trained)
            tracker.begin("optimizer")
            tracker.part = "optimizer"
            if self.arguments.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trained, self.arguments.max_grad_norm)
            optimizer.step()
            tracker.end()
        paged, gradients = kept.pop(PAGED, 0), sum(p.numel() * p.element_size() for p in trained)
        count = sum(p.numel() for p in trained)
        taken = StepCost(tracker.phases, kept, paged, tracker.flops, count, gradients, tracker.operators)
        for parameter in trained:
            parameter.grad = None
        del optimizer
        return taken

    def _weights(self, tracker: MemoryTracker) -> list[torch.nn.Parameter]:
        """Counts all that the model holds; returns what is trained of it."""
        for name, parameter in self.model.named_parameters():
            frozen_or_whole = self.recipe.lora is None or not (parameter.requires_grad or "lora_" in name)
            tracker.add(parameter, "weights" if frozen_or_whole else "adapter")
            if (state := getattr(parameter, "quant_state", None)) is not None:
                nested = state.state2
                constants = [state.absmax, state.code, state.offset]
                constants += [nested.absmax, nested.code] if nested is not None else []
                for tensor in constants:
                    if tensor is not None:
                        tracker.add(tensor, "weights")
            if (scales := getattr(parameter, "SCB", None)) is not None:
                tracker.add(scales, "weights")
        for buffer in self.model.buffers():
            tracker.add(buffer, "weights")
        return [p for p in self.model.parameters() if p.requires_grad]

    def _first_step(self, optimizer: Any, trained: list[Any], tracker: MemoryTracker) -> None:
        """Leaves the optimizer with its state."""
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        plain = getattr(optimizer, "get_state_buffer", None)
        if self.card and getattr(optimizer, "is_paged", False):
            # As bitsandbytes 0.50 does on a card, `optim/optimizer.py`, `get_state_buffer`.
            def paged(p: Any, dtype: torch.dtype = torch.float32) -> Any:
                with tracker.within(PAGED if p.numel() >= 1e5 else "optimizer"):
                    return torch.zeros_like(p, dtype=dtype)

            optimizer.get_state_buffer = paged
        elif plain is not None:
            optimizer.get_state_buffer = lambda p, dtype=torch.float32: torch.zeros_like(p, dtype=dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _pass(self, batch: Batch, tracker: MemoryTracker, trained: list[Any]) -> None:
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: tracker.move(p.grad, "gradients")) for p in trained
        ]
        hooks += _hooks(self.decoder, self.decoder_layers()[0], tracker)
        # A fake tensor cannot tell that each row is one sequence, for which no mask is made.
        alone = [] if batch.packed else [(masking_utils, {"find_packed_sequence_indices": lambda ids: None})]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.computes)
        # On a CPU autocast takes float16 as it takes bfloat16, which has as many bytes.
        autocast = torch.autocast("cpu", dtype=dtype) if dtype else nullcontext()
        shape = (1, batch.rows * batch.length) if batch.packed else (batch.rows, batch.length)
        inputs = {
            "input_ids": torch.empty(shape, dtype=torch.int64),
            "labels": torch.empty(shape, dtype=torch.int64),
        }
        if batch.packed:
            inputs["position_ids"] = torch.empty(shape, dtype=torch.int64)
        elif batch.padded:
            inputs["attention_mask"] = torch.empty(shape, dtype=torch.int64)
        try:
            with autocast, patched_attributes(alone):
                out = self.model(**inputs, fused_lm_head=True, num_items_in_batch=torch.tensor(1))
                with tracker.within("head"):
                    total = -out.log_probs.sum() / 1.0
                    del out
            tracker.part = "head"
            with patched_attributes(alone):  # for layers that are computed again
                total.backward()
        finally:
            for hook in hooks:
                hook.remove()
            tracker.part = "activations"


def _hooks(decoder: Any, first: Any, tracker: MemoryTracker) -> list[Any]:
    """Tell the tracker which part is at work."""
    before: list[str] = []

    def enter(module: Any, inputs: Any) -> None:
        before.append(tracker.part)
        tracker.part = "attention"

    def leave(module: Any, inputs: Any, output: Any) -> None:
        tracker.part = before.pop()

    def begin(module: Any, inputs: Any) -> None:
        tracker.part = "activations"

    def end(module: Any, inputs: Any, output: Any) -> None:
        tracker.part = "head"
        output.last_hidden_state.register_hook(lambda gradient: back())

    def back() -> None:
        tracker.part = "activations"
        tracker.begin("backward")

    def last(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and tracker.phase == "forward":
            hidden.register_hook(lambda gradient: tracker.begin("first layer"))

    hooks = [
        first.register_forward_hook(last),
        decoder.register_forward_pre_hook(begin),
        decoder.register_forward_hook(end),
    ]
    for module in decoder.modules():
        if type(module).__name__.endswith("Attention"):
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks
