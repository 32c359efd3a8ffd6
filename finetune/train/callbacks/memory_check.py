"""Tries the longest batch of a run before the first step, so that a lack of memory shows at once."""

from __future__ import annotations

import copy
import gc
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import datasets
import numpy as np
import peft
import torch
from transformers import TrainerCallback

from finetune.system.devices import machine_memory, process_peak_memory
from finetune.system.errors import RunError
from finetune.system.numbers import GIB, memory
from finetune.system.terminal import Say
from finetune.train.row_order import row_lengths
from finetune.train.trainer import RunTrainer

_TEXT = "One two three four five six seven eight nine ten eleven twelve"
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}


class MemoryCheck(TrainerCallback):  # type: ignore[misc]
    """Runs a forward and a backward pass on the longest batch before the first step, and restores all state."""

    def __init__(self, trainer: RunTrainer, say: Say) -> None:
        self.trainer, self.say = trainer, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports how much memory the longest batch needs.

        Raises:
            RunError: The batch does not fit; the message says by how much, and which settings help.
        """
        trainer, cuda = self.trainer, args.device.type == "cuda"
        # These optimizers change weights in the backward pass, which cannot be undone; XLA compiles for each length.
        changes_weights = trainer.is_deepspeed_enabled or "lomo" in args.optim or "layerwise" in args.optim
        if changes_weights or args.device.type == "xla":
            return
        rows = self._longest_rows()
        if not rows:
            return
        need = available = 0
        lack = ""
        with restored_state(trainer):
            try:
                _, need = self._measure(rows, accumulates=args.gradient_accumulation_steps > 1)
            except (RuntimeError, MemoryError) as error:
                # Upstream's search for a batch size needs the error itself.
                if args.auto_find_batch_size or not _is_out_of_memory(error):
                    raise
                lack = shortfall(str(error), torch.cuda.mem_get_info(args.device)[0] if cuda else None)
            # The memory of a failed pass is free only here.
            if not lack:
                need, available = self._worst_rank(need + self._optimizer_bytes())
            elif cuda and trainer.accelerator.num_processes == 1:  # several would wait for this one
                need, available = self._extrapolated(rows), _available_bytes(args.device)
        if cuda and need > available and not args.auto_find_batch_size:
            excess = memory(need - available)
            lack = f"it needs about {memory(need)}, {memory(available)} are available: {excess} too much"
        count, tokens = len(rows), self._collate(rows)["input_ids"].numel()
        batch = f"the longest batch ({count} row{'s' * (count > 1)}, {tokens:,} tokens)"
        if lack:
            one, two, three = smaller_settings(args, trainer.model, len(rows[0]["input_ids"]))
            raise RunError(f"{batch} does not fit into memory: {lack}. Write {one}, {two}, or {three}")
        if state.is_world_process_zero:
            self.say(f"memory: {batch} takes {need / GIB:.1f} of {available / GIB:.1f} GiB")

    def _longest_rows(self) -> list[dict[str, Any]]:
        """As many rows as a batch has, the longest of the run, longest first: no padded batch is larger."""
        dataset, count = self.trainer.train_dataset, self.trainer._train_batch_size
        if isinstance(dataset, datasets.IterableDataset):
            # Reading a row of a stream counts it, so a row of `max_length` tokens is invented.
            length = self.trainer.args.max_length or 0
            ids = self.trainer.processing_class(_TEXT, add_special_tokens=False)["input_ids"]
            row = (ids * length)[:length]
            return [{"input_ids": row, "labels": row}] * count if row else []
        return [dataset[int(i)] for i in np.argsort(-row_lengths(dataset), kind="stable")[:count]]

    def _collate(self, rows: list[dict[str, Any]]) -> Any:
        return self.trainer._get_collator_with_removed_columns(self.trainer.data_collator)(rows)

    def _measure(self, rows: list[dict[str, Any]], accumulates: bool) -> tuple[int, int]:
        """Runs a forward and a backward pass on a batch; returns the bytes held before, and the peak.

        With `accumulates` gradients exist before it, as in all batches of a step but the first. On a CPU the bytes
        before are 0, and the peak is that of the process since its start.
        """
        trainer, model, device = self.trainer, self.trainer.model_wrapped, self.trainer.args.device
        cuda = device.type == "cuda"
        # During accumulation FSDP 2 holds unsharded gradients, which only a backward pass can create.
        passes = 2 if accumulates and trainer.is_fsdp_enabled else 1
        if accumulates and passes == 1:
            for parameter in _trained_parameters(model):
                parameter.grad = torch.zeros_like(parameter)
        before = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        # The loop sets it at each step; trl reads it for the loss of a router.
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        for last in (False, True)[-passes:]:
            [batch], items = trainer.get_batch_samples(iter([self._collate(rows)]), 1, device)
            with nullcontext() if last else trainer.accelerator.no_sync(model):
                trainer.uncounted_step(model, batch, items)
        if cuda:
            return before, torch.cuda.max_memory_allocated(device)
        return before, process_peak_memory()

    def _extrapolated(self, rows: list[dict[str, Any]]) -> int:
        """An estimate in bytes for a batch that did not fit; 0 if no part of it fits either.

        It is measured on the longest row, or on half of the only row. Memory beyond weights and gradients is taken to
        grow with the number of tokens; eager attention grows faster.
        """
        row, half = rows[0], len(rows[0]["input_ids"]) // 2
        shorter = {name: value[:half] if isinstance(value, list) else value for name, value in row.items()}
        part = rows[:1] if len(rows) > 1 else [shorter]
        _free_memory(self.trainer)
        try:
            before, peak = self._measure(part, accumulates=True)
        except Exception:  # the estimate is only part of a message
            return 0
        times = self._collate(rows)["input_ids"].numel() / self._collate(part)["input_ids"].numel()
        return int(before + (peak - before) * times) + self._optimizer_bytes()

    def _optimizer_bytes(self) -> int:
        """The bytes that the optimizer's first step will add; a resumed run holds them already."""
        trainer = self.trainer
        # The state of a weight in CPU memory (fsdp_offload_params) stays there.
        weights = [w for w in _trained_parameters(trainer.model_wrapped) if w.device.type == trainer.args.device.type]
        return 0 if trainer.optimizer.state else optimizer_bytes(trainer.args.optim, weights)

    def _worst_rank(self, need: int) -> tuple[int, int]:
        """The needed and the available bytes on the rank that has the least left."""
        device = self.trainer.args.device
        pairs = self.trainer.accelerator.gather(torch.tensor([[need, _available_bytes(device)]], device=device))
        worst: list[int] = max(pairs.tolist(), key=lambda pair: pair[0] - pair[1])
        return worst[0], worst[1]


def optimizer_bytes(optim: str, weights: Iterable[Any]) -> int:
    """An estimate of the optimizer's state in bytes.

    Adam keeps two values per weight, of the weight's type or of the bits in the optimizer's name. Other optimizers,
    which keep less, count as 0, and so do paged ones, which can leave the GPU.

    Args:
        optim: `training.optim`.
        weights: The trained parameters.
    """
    if "adam" not in optim or any(word in optim for word in ("paged", "galore", "apollo")):
        return 0
    bits = re.search(r"(\d)bit", optim)
    # This rank's shard of each weight.
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    return int(sum(2 * w.numel() * (int(bits[1]) / 8 if bits else w.element_size()) for w in local))


def shortfall(error: str, free: int | None) -> str:
    """Describes a failed allocation: how much was asked for, and how much was free where that is known.

    Args:
        error: The error's text.
        free: The bytes that were free on the GPU; None on a CPU.
    """
    match = re.search(r"ried to allocate ([\d.]+) (bytes|[KMG]iB)", error)
    if not match:
        return f"torch says {next(iter(error.splitlines()), 'no more')}"
    asked = float(match[1]) * _UNITS[match[2]]
    if free is None or free >= asked:
        return f"torch asked for another {memory(asked)}, which are not available"
    return f"torch asked for {memory(asked)} where {memory(free)} were free: at least {memory(asked - free)} too much"


def smaller_settings(args: Any, model: Any, longest: int) -> list[str]:
    """Three settings that each lower the memory of a batch, first those that change the result least.

    Args:
        args: The trainer's arguments.
        model: The model to train.
        longest: Tokens of the longest row.
    """
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    part = next((n for n in range(2, size + 1) if size % n == 0), 1)
    lora = isinstance(model, peft.PeftModel)
    helps = {
        f"training.per_device_train_batch_size: {size // part} with training.gradient_accumulation_steps: "
        f"{steps * part} (the same result)": size > 1,
        f"training.max_length: {longest // 2}": True,
        "training.gradient_checkpointing: true": not args.gradient_checkpointing,
        "training.packing: false": getattr(args, "packing", False),  # SFTConfig alone has it
        "a lora section (r: 16)": not lora,
        "a quantization section (load_in_4bit: true)": lora and not getattr(model, "is_quantized", False),
        "a smaller model.name_or_path": True,
        "fewer lora.target_modules": lora,
    }
    return [setting for setting, is_open in helps.items() if is_open][:3]


def _is_out_of_memory(error: Exception) -> bool:
    texts = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def _trained_parameters(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _available_bytes(device: Any) -> int:
    """The bytes that this process holds or could get; on a CPU, all of the machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return machine_memory()[0]


def _free_memory(trainer: RunTrainer) -> None:
    trainer.model_wrapped.zero_grad(set_to_none=True)
    gc.collect()
    if trainer.args.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def restored_state(trainer: RunTrainer) -> Iterator[None]:
    """Restores gradients, random states, trl's counters and each module's mode on leaving."""
    modes = [(module, module.training) for module in trainer.model_wrapped.modules()]
    metrics, tokens = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    python, numpy = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator()
    kind, devices = accelerator.type if accelerator else "cuda", range(torch.accelerator.device_count())
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        trainer._metrics, trainer._total_train_tokens = metrics, tokens
        for module, training in modes:
            module.training = training
        _free_memory(trainer)
