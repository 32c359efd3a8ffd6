"""Runs one training step of a recipe's model on fake tensors, and counts its memory by part and its FLOPs."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, masking_utils
from trl import SFTConfig

from finetune.model.precision import decide_precision
from finetune.plan.fake_device import Patches, emulate_device, patched_attributes
from finetune.plan.fake_model import build_fake
from finetune.plan.memory import PAGED, MemoryTracker, Timeline
from finetune.recipe.load import Recipe
from finetune.system.devices import Hardware
from finetune.system.errors import PlanError
from finetune.train.loss import use_token_head
from finetune.train.shared_prompts import SharedPrompts


@dataclass(frozen=True)
class Batch:
    """The shape of a batch.

    Attributes:
        rows: Number of rows.
        length: Tokens of each.
        padded: True if some rows are shorter than the longest, so that there is an attention mask.
        packed: True if all rows are concatenated into one, and `position_ids` tell where each begins.
        trained: Tokens of the batch that are trained on; None: all.
        joined: For pairs, the tokens of the longest prompt with both answers, which are run as one row; `rows` is then
            the number of pairs, and `length` the tokens of the longer side. 0 for other rows.
    """

    rows: int
    length: int
    padded: bool = True
    packed: bool = False
    trained: int | None = None
    joined: int = 0


@dataclass
class StepCost:
    """The memory of a step in bytes, by part, and its work.

    Attributes:
        phases: The memory at the peak of each phase of the step. Which phase has the highest peak depends on the number
            of layers.
        kept: The memory between two steps.
        paged: Optimizer state that a paged optimizer can move to the CPU's memory; in no other figure.
        flops: Floating-point operations of the forward and backward pass of one batch.
        gradients: Memory of all gradients.
        operators: Operators of a step with one batch, each of which takes time to launch.
        timeline: The changes of memory from which `phases` follow, without the optimizer's; None for the cost of more
            layers than were run.
    """

    phases: dict[str, dict[str, int]]
    kept: dict[str, int]
    paged: int
    flops: float
    gradients: int
    operators: float
    timeline: Timeline | None = None

    def at(self, share: float, other: StepCost) -> StepCost | None:
        """The cost between two that differ in their number of rows alone.

        Args:
            share: From 0 at this cost's rows to 1 at those of the other; also below or above.
            other: The cost of the same model and settings with another number of rows.

        Returns:
            None if the model ran differently in the two: in one tile of the output layer in place of two, for example.
        """
        assert self.timeline is not None
        assert other.timeline is not None
        if (timeline := self.timeline.at(share, other.timeline)) is None:
            return None
        return replace(
            self,
            phases=self.phases | timeline.peaks(),
            flops=self.flops + (other.flops - self.flops) * share,
            operators=self.operators + (other.operators - self.operators) * share,
            timeline=timeline,
        )

    @property
    def parts(self) -> dict[str, int]:
        """The memory at the peak of the step."""
        return max(self.phases.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """The sum of `parts`."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _OptimizerCost:
    """The memory of an optimizer in bytes, by part, and its work.

    Attributes:
        state: The memory of its state.
        peak: The memory at the peak of its step.
        flops: Floating-point operations of its step.
        operators: Operators of its step.
    """

    state: dict[str, int]
    peak: dict[str, int]
    flops: float
    operators: float


class FakeModel:
    """The model that a recipe trains, with fake tensors. Steps are independent: each leaves the model as it was."""

    def __init__(self, recipe: Recipe, config: Any, hardware: Hardware, arguments: SFTConfig) -> None:
        """Builds the model.

        Args:
            recipe: The recipe.
            config: The base's config, which is changed.
            hardware: The GPU or CPU to run on.
            arguments: The recipe's `training` section as an `SFTConfig`.

        Raises:
            ModelError: The hardware does not compute as the recipe says, or `lora` does not fit the base.
        """
        from trl.trainer.utils import add_fused_lm_head

        self.recipe, self.on_gpu, self.arguments = recipe, hardware.is_gpu, arguments
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        precision = decide_precision(recipe, hardware.device)
        self.mixed_precision = precision.computes
        self.model = build_fake(recipe, config, precision, self.mode)
        self.causal = self.model.get_base_model() if recipe.lora is not None else self.model
        self.decoder = self.causal.base_model
        outputs = ("log_probs", "entropy", "is_top1")
        add_fused_lm_head(self.causal, outputs=outputs if recipe.method == "sft" else (*outputs, "mean_logits"))
        token_rows = any("trainable_tokens" in name for name, _ in self.model.named_parameters())
        if not self.on_gpu or token_rows:
            use_token_head(self.causal, mean_logits=recipe.method != "sft")
        shares = recipe.method in ("dpo", "orpo") and SharedPrompts.fit(self.causal)
        self.shared = SharedPrompts(self.causal) if shares else None
        self.checkpointing: bool | None = None
        # By the optimizer's name, and whether gradients accumulate. No batch changes them.
        self._optimizer_costs: dict[tuple[str, bool], _OptimizerCost] = {}

    def set_checkpointing(self, on: bool) -> None:
        """Turns gradient checkpointing on or off."""
        if on == self.checkpointing:
            return
        self.checkpointing = on
        with warnings.catch_warnings():
            # transformers 5.23 deprecates names of which 5.22 has no others.
            warnings.simplefilter("ignore", FutureWarning)
            self.model.gradient_checkpointing_disable()
            if on:
                kwargs = dict(self.arguments.gradient_checkpointing_kwargs or {})
                kwargs.pop("selective", None)
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)
                if self.recipe.lora is not None:
                    self.model.enable_input_require_grads()
        self.model.train()

    def unit_sizes(self, width: int) -> tuple[int, int]:
        """Bytes of the largest decoder layer's weights, and of all weights outside the layers.

        Args:
            width: Bytes of each weight; quantised weights have their own.

        Raises:
            PlanError: The decoder layers cannot be found.
        """

        def size(parameters: Iterable[torch.nn.Parameter]) -> int:
            unique = {id(p): p for p in parameters}.values()
            return sum(p.numel() * (p.element_size() if hasattr(p, "quant_state") else width) for p in unique)

        layers = list(self.decoder_layers())
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = (p for p in self.model.parameters() if id(p) not in inside)
        return max(size(layer.parameters()) for layer in layers), size(outside)

    def decoder_layers(self) -> torch.nn.ModuleList:
        """The `ModuleList` of the text model's layers, found by its length because its name differs by model.

        Raises:
            PlanError: The model has no such list.
        """
        decoder, depth = self.causal.get_decoder(), self.causal.config.get_text_config().num_hidden_layers
        for module in (decoder or self.causal).modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
                return module
        raise PlanError(
            f"model.name_or_path: is a {self.causal.config.model_type}, whose layers are not found; take another"
        )

    def step(self, batch: Batch, optim: str, checkpointing: bool, accumulates: bool) -> StepCost:
        """The cost of any step after the first, when the optimizer has its state.

        Args:
            batch: The shape of the batch.
            optim: Name of the optimizer.
            checkpointing: True with gradient checkpointing.
            accumulates: True if gradients of an earlier batch are there.
        """
        self.set_checkpointing(checkpointing)
        tracker = MemoryTracker(self.on_gpu, batch.trained)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        known = self._optimizer_costs.get((optim, accumulates))
        optimizer = None if known else self._optimizer(optim, trained)
        with self.mode, emulate_device(self.on_gpu, tracker), tracker:
            self._count_weights(tracker)
            uses = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
            tracker.tied = {p.shape for p in trained if uses[id(p)] > 1}
            if known:
                tracker.add_bytes(known.state)
            else:
                weights = Counter(tracker.now)
                self._first_step(optimizer, trained, tracker)
                state = {part: size - weights[part] for part, size in tracker.now.items() if size != weights[part]}
            tracker.start()
            kept = dict(tracker.now)
            tracker.part = "activations"
            if accumulates:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                    tracker.add(parameter.grad, "gradients")
                    tracker.move(parameter.grad, "gradients")
            tracker.begin("forward")
            self._forward_backward(batch, tracker, trained)
            timeline, flops, operators = tracker.timeline, tracker.flops, tracker.operators
            tracker.start()
            if not known:
                tracker.begin("optimizer")
                self._optimizer_step(optimizer, trained, tracker)
                peak = tracker.timeline.peaks()["optimizer"]
                known = _OptimizerCost(state, peak, tracker.flops, tracker.operators)
                self._optimizer_costs[optim, accumulates] = known
        paged, gradients = kept.pop(PAGED, 0), sum(p.numel() * p.element_size() for p in trained)
        for parameter in trained:
            parameter.grad = None
        phases = timeline.peaks() | {"optimizer": known.peak}
        flops, operators = flops + known.flops, operators + known.operators
        return StepCost(phases, kept, paged, flops, gradients, operators, timeline)

    def _count_weights(self, tracker: MemoryTracker) -> None:
        """Counts the memory of parameters, of the constants of quantised ones, and of buffers."""
        for name, parameter in self.model.named_parameters():
            adapter = self.recipe.lora is not None and (parameter.requires_grad or "lora_" in name)
            tracker.add(parameter, "adapter" if adapter else "weights")
            constants = [getattr(parameter, "SCB", None)]
            if (state := getattr(parameter, "quant_state", None)) is not None:
                constants += [state.absmax, state.code, state.offset]
                constants += [state.state2.absmax, state.state2.code] if state.state2 is not None else []
            for tensor in constants:
                if tensor is not None:
                    tracker.add(tensor, "weights")
        for buffer in self.model.buffers():
            tracker.add(buffer, "weights")

    def _optimizer(self, optim: str, trained: list[torch.nn.Parameter]) -> Any:
        arguments = copy.copy(self.arguments)
        arguments.optim = optim
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return optimizer_class(trained, **options)

    def _first_step(self, optimizer: Any, trained: list[torch.nn.Parameter], tracker: MemoryTracker) -> None:
        """Steps once, so that the optimizer has its state."""
        tracker.part = "optimizer"
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        if self.on_gpu and getattr(optimizer, "is_paged", False):
            # Source: bitsandbytes 0.50 `optim/optimizer.py`, `get_state_buffer`, on a GPU.
            def paged(p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
                with tracker.within(PAGED if p.numel() >= 1e5 else "optimizer"):
                    return torch.zeros_like(p, dtype=dtype)

            optimizer.get_state_buffer = paged
        elif hasattr(optimizer, "get_state_buffer"):
            optimizer.get_state_buffer = lambda p, dtype=torch.float32: torch.zeros_like(p, dtype=dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _optimizer_step(self, optimizer: Any, trained: list[torch.nn.Parameter], tracker: MemoryTracker) -> None:
        """Clips the gradients and steps."""
        tracker.part = "optimizer"
        if self.arguments.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, self.arguments.max_grad_norm)
        optimizer.step()

    def _forward_backward(self, batch: Batch, tracker: MemoryTracker, trained: list[torch.nn.Parameter]) -> None:
        """Runs the forward and backward pass of a batch."""
        # transformers reads the values of position_ids to find packed rows. Fake tensors have no values, so it is told.
        one_sequence: Patches = []
        if not batch.packed:
            one_sequence = [(masking_utils, {"find_packed_sequence_indices": lambda ids: None})]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision)
        autocast = torch.autocast("cpu", dtype=dtype) if dtype else nullcontext()
        rows = 2 * batch.rows if batch.joined else batch.rows
        shape = (1, batch.rows * batch.length) if batch.packed else (rows, batch.length)
        names = ["input_ids", "labels"]
        names += ["position_ids"] if batch.packed else ["attention_mask"] if batch.padded else []
        inputs = {name: torch.empty(shape, dtype=torch.int64) for name in names}
        with _tracked_parts(self.decoder, self.decoder_layers()[0], trained, tracker):
            shares = self.shared.of_pairs(batch.joined) if batch.joined and self.shared else nullcontext()
            with autocast, shares, patched_attributes(one_sequence):
                out = self.model(**inputs, fused_lm_head=True, num_items_in_batch=torch.tensor(1))
                with tracker.within("head"):
                    total = -out.log_probs.sum() / 1.0
                    del out
            tracker.part = "head"
            with patched_attributes(one_sequence):  # checkpointed layers run forward again
                total.backward()


@contextmanager
def _tracked_parts(
    decoder: torch.nn.Module, first_layer: torch.nn.Module, trained: list[torch.nn.Parameter], tracker: MemoryTracker
) -> Iterator[None]:
    """Sets the tracker's part and phase by hooks while the model runs."""
    outer_parts: list[str] = []

    def enter_attention(*_: object) -> None:
        outer_parts.append(tracker.part)
        tracker.part = "attention"

    def leave_attention(*_: object) -> None:
        tracker.part = outer_parts.pop()

    def enter_decoder(*_: object) -> None:
        tracker.part = "activations"

    def leave_decoder(module: object, inputs: object, output: Any) -> None:
        tracker.part = "head"
        output.last_hidden_state.register_hook(lambda gradient: begin_backward())

    def begin_backward() -> None:
        tracker.part = "activations"
        tracker.begin("backward")

    def leave_first_layer(module: object, inputs: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and tracker.phase == "forward":
            hidden.register_hook(lambda gradient: tracker.begin("first layer"))

    def move_gradient(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        tracker.move(parameter.grad, "gradients")

    hooks: list[RemovableHandle] = [
        *(p.register_post_accumulate_grad_hook(move_gradient) for p in trained),  # type: ignore[no-untyped-call]
        first_layer.register_forward_hook(leave_first_layer),
        decoder.register_forward_pre_hook(enter_decoder),
        decoder.register_forward_hook(leave_decoder),
    ]
    for module in decoder.modules():
        if type(module).__name__.endswith("Attention"):
            hooks.append(module.register_forward_pre_hook(enter_attention))
            hooks.append(module.register_forward_hook(leave_attention, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        tracker.part = "activations"
