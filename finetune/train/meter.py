"""Measures speed, memory and energy of a run."""

from __future__ import annotations

import time
from typing import Any

import torch

from finetune.data.mixture import Prepared
from finetune.model.flops import flops_per_token
from finetune.model.precision import Precision
from finetune.recipe.load import Recipe
from finetune.recipe.schema import DEFAULT_MAX_LENGTH
from finetune.system import devices, distributed
from finetune.system.devices import energy_millijoules, process_peak_memory
from finetune.system.numbers import GIB


class Meter:
    """Adds speed and memory to each logged record, before trackers get it."""

    def __init__(self, flops_per_token: float = 0.0, flops_per_second: float = 0.0) -> None:
        """Starts to count energy.

        Args:
            flops_per_token: Floating point operations of training per token; 0 if unknown.
            flops_per_second: The peak of all GPUs of the run together; 0 if unknown.
        """
        self.flops_per_token, self.flops_per_second = flops_per_token, flops_per_second
        self.last = (0.0, 0.0)  # time and tokens of the last record
        self.counter = energy_millijoules()

    @classmethod
    def of(cls, recipe: Recipe, precision: Precision, model: Any, data: Prepared) -> Meter:
        """The meter of a run; it gives no MFU on hardware whose speed is not known."""
        speed = devices.this_machine().tflops(precision.computes) * 1e12 * distributed.world_size()
        if not speed:
            return cls()
        ledger = data.ledger
        # A stream has counted nothing yet.
        lengths = ledger.lengths or {recipe.max_length or DEFAULT_MAX_LENGTH: 1}
        trained_share = ledger.trained_tokens / ledger.tokens if ledger.tokens else 1.0
        return cls(flops_per_token(model, lengths, trained_share), speed)

    def restart(self, tokens: float) -> None:
        """Leaves out the time since the last record, which was not training: a start, an evaluation."""
        self.last = (time.monotonic(), tokens)

    def measure(self, logs: dict[str, Any], tokens: float) -> None:
        """Adds tokens per second since the last record, MFU and the peak memory to `logs`."""
        (before, counted), now = self.last, time.monotonic()
        if tokens > counted:
            rate = (tokens - counted) / (now - before)
            logs["tokens_per_second"] = round(rate, 1)
            if self.flops_per_token and self.flops_per_second:
                logs["mfu"] = round(rate * self.flops_per_token / self.flops_per_second, 4)
        self.last = (now, tokens)
        logs["peak_memory_gib"] = round(_peak_memory() / GIB, 3)

    def spent_millijoules(self) -> int:
        """The energy that this process's GPU used since the last call."""
        before, self.counter = self.counter, energy_millijoules()
        return self.counter - before


def _peak_memory() -> float:
    """The peak memory in bytes of the current GPU; without one, of the process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_peak_memory()
