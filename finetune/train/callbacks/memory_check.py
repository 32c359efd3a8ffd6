"""The longest batch of a run, tried before the first step: if memory runs out it does so now, and not in hour three."""

from __future__ import annotations

import copy
import gc
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import datasets
import numpy as np
import peft
import pyarrow.compute as pc
import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from finetune.system.devices import machine_memory, process_peak_memory
from finetune.system.errors import RunError

_TEXT = "One two three four five six seven eight nine ten eleven twelve"
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Rehearsal(TrainerCallback):  # type: ignore[misc]
    """A forward and a backward pass on the longest batch before the first step; nothing of it stays but a line."""

    def __init__(self, trainer: Any, say: Callable[[str], None]) -> None:
        self.trainer, self.say = trainer, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what the longest batch takes.

        Raises:
            RehearsalError: It does not fit; the message says by how much, and what to write.
        """
        trainer, cuda = self.trainer, args.device.type == "cuda"
        # Their backward pass changes the weights itself, which could not be taken back; XLA compiles for each length.
        steps = trainer.is_deepspeed_enabled or "lomo" in args.optim or "layerwise" in args.optim
        if steps or args.device.type == "xla":
            return
        rows = self._longest_rows()
        if not rows:
            return
        need = there = 0
        lack = ""
        with _untouched(trainer):
            try:
                _, need = self._measure(rows, accumulates=args.gradient_accumulation_steps > 1)
            except (RuntimeError, MemoryError) as error:
                # Upstream's search for a batch size goes by the error itself.
                if args.auto_find_batch_size or not _is_out_of_memory(error):
                    raise
                lack = shortfall(str(error), torch.cuda.mem_get_info(args.device)[0] if cuda else None)
            # Only now is what a failed pass held let go of.
            if not lack:
                need, there = self._worst(need + self._optimizer_bytes())
            elif cuda and trainer.accelerator.num_processes == 1:  # several would wait for this one
                need, there = self._extrapolated(rows), _there(args.device)
        if cuda and need > there and not args.auto_find_batch_size:
            lack = f"it needs about {_size(need)}, {_size(there)} are there: {_size(need - there)} too much"
        count, tokens = len(rows), self._collated(rows)["input_ids"].numel()
        batch = f"the longest batch ({count} row{'s' * (count > 1)}, {tokens:,} tokens)"
        if lack:
            one, two, three = settings(args, trainer.model, len(rows[0]["input_ids"]))
            raise RunError(f"{batch} does not fit into memory: {lack}. Write {one}, {two}, or {three}")
        if state.is_world_process_zero:
            self.say(f"rehearsal: {batch} takes {need / 2**30:.1f} of {there / 2**30:.1f} GiB")

    def _longest_rows(self) -> list[dict[str, Any]]:
        """As many of the longest rows as a batch has, the longest first: padded, no batch of the run is larger."""
        dataset, count = self.trainer.train_dataset, self.trainer._train_batch_size
        if isinstance(dataset, datasets.IterableDataset):
            # Reading a row of a stream counts it, so this one is made up; none is longer than `max_length`.
            length = self.trainer.args.max_length or 0
            ids = self.trainer.processing_class(_TEXT, add_special_tokens=False)["input_ids"]
            row = (ids * length)[:length]
            return [{"input_ids": row, "labels": row}] * count if row else []
        tables = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
        lengths = np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in tables])
        return [dataset[int(i)] for i in np.argsort(-lengths, kind="stable")[:count]]

    def _collated(self, rows: list[dict[str, Any]]) -> Any:
        return self.trainer._get_collator_with_removed_columns(self.trainer.data_collator)(rows)

    def _measure(self, rows: list[dict[str, Any]], accumulates: bool) -> tuple[int, int]:
        """Bytes held before, and at most during, a forward and a backward pass on a batch of these rows.

        With `accumulates` gradients are there before it, as they are in all batches of a step but the first. On a CPU
        there is nothing before, and the peak is that of the process since it began.
        """
        trainer, model, device = self.trainer, self.trainer.model_wrapped, self.trainer.args.device
        cuda = device.type == "cuda"
        # FSDP 2 holds whole gradients while it accumulates, not the rank's share: only a pass makes those.
        passes = 2 if accumulates and trainer.is_fsdp_enabled else 1
        if accumulates and passes == 1:
            for parameter in _trained(model):
                parameter.grad = torch.zeros_like(parameter)
        before = torch.cuda.memory_allocated(device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        # The loop sets it at each step; trl reads it for the loss of a router.
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        for last in (False, True)[-passes:]:
            [batch], items = trainer.get_batch_samples(iter([self._collated(rows)]), 1, device)
            with nullcontext() if last else trainer.accelerator.no_sync(model):
                # trl's step: what ours does beside it is for steps that count.
                SFTTrainer.training_step(trainer, model, batch, items)
        if cuda:
            return before, torch.cuda.max_memory_allocated(device)
        return before, process_peak_memory()

    def _extrapolated(self, rows: list[dict[str, Any]]) -> int:
        """About the bytes that a batch needs which did not fit; 0 where not even a part of it fits.

        The part is its longest row, or half of its only one. What comes on top of weights and gradients is taken to
        grow with the tokens; attention that keeps its scores grows faster.
        """
        row, half = rows[0], len(rows[0]["input_ids"]) // 2
        part = rows[:1] if len(rows) > 1 else [{name: row[name][:half] for name in ("input_ids", "labels")}]
        _clean(self.trainer)
        try:
            before, peak = self._measure(part, accumulates=True)
        except Exception:  # whatever the failed pass left behind: only a figure is lost
            return 0
        times = self._collated(rows)["input_ids"].numel() / self._collated(part)["input_ids"].numel()
        return int(before + (peak - before) * times) + self._optimizer_bytes()

    def _optimizer_bytes(self) -> int:
        """What the optimizer's first step will add; a resumed run holds it already."""
        trainer = self.trainer
        # A weight that waits in the CPU's memory (fsdp_offload_params) is stepped on there.
        weights = [w for w in _trained(trainer.model_wrapped) if w.device.type == trainer.args.device.type]
        return 0 if trainer.optimizer.state else optimizer_bytes(trainer.args.optim, weights)

    def _worst(self, need: int) -> tuple[int, int]:
        """What is needed and what is there, on the rank that has the least left."""
        device = self.trainer.args.device
        pairs = self.trainer.accelerator.gather(torch.tensor([[need, _there(device)]], device=device))
        worst: list[int] = max(pairs.tolist(), key=lambda pair: pair[0] - pair[1])
        return worst[0], worst[1]


def optimizer_bytes(optim: str, weights: Iterable[Any]) -> int:
    """An estimate: Adam keeps two values a weight, of its type or of the bits in its name; the others count as nothing.

    So do those that keep less than two, and paged ones, which leave a card that is full.
    """
    if "adam" not in optim or any(word in optim for word in ("paged", "galore", "apollo")):
        return 0
    bits = re.search(r"(\d)bit", optim)
    # Of a weight that is spread over ranks, this one's part.
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]
    return int(sum(2 * w.numel() * (int(bits[1]) / 8 if bits else w.element_size()) for w in local))


def shortfall(error: str, free: int | None) -> str:
    """What is known of an allocation that failed: torch's figure, and the bytes that were free where it can be told."""
    found = re.search(r"ried to allocate ([\d.]+) (bytes|[KMG]iB)", error)
    if not found:
        return f"torch says {next(iter(error.splitlines()), 'no more')}"
    asked = float(found[1]) * _UNITS[found[2]]
    if free is None or free >= asked:
        return f"torch asked for another {_size(asked)}, which are not there"
    return f"torch asked for {_size(asked)} where {_size(free)} were free: at least {_size(asked - free)} too much"


def settings(args: Any, model: Any, longest: int) -> list[str]:
    """Three settings of which each makes the batch smaller, those first that change the result least."""
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    part = next((n for n in range(2, size + 1) if size % n == 0), 1)
    lora = isinstance(model, peft.PeftModel)
    found = {
        f"training.per_device_train_batch_size: {size // part} with training.gradient_accumulation_steps: "
        f"{steps * part} (the same result)": size > 1,
        f"training.max_length: {longest // 2}": True,
        "training.gradient_checkpointing: true": not args.gradient_checkpointing,
        "training.packing: false": args.packing,
        "a lora section (r: 16)": not lora,
        "a quantization section (load_in_4bit: true)": lora and not getattr(model, "is_quantized", False),
        "a smaller model.name_or_path": True,
        "fewer lora.target_modules": lora,
    }
    return [text for text, helps in found.items() if helps][:3]


def _is_out_of_memory(error: Exception) -> bool:
    said = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in said)


def _trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _there(device: Any) -> int:
    """Bytes that this process has or could have; on a CPU, those of the machine, or of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return machine_memory()[0]


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"


def _clean(trainer: Any) -> None:
    trainer.model_wrapped.zero_grad(set_to_none=True)
    gc.collect()
    if trainer.args.device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """Afterwards gradients, random numbers, trl's counts and each module's mode are what they were."""
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
        _clean(trainer)
