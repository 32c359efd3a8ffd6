"""Speed, memory and energy of a run."""

from __future__ import annotations

import time
from typing import Any

import torch

from finetune.system.devices import energy_millijoules, process_peak_memory


class Meter:
    """Speed and memory, put into each record before any tracker sees it.

    `work` is in floating point operations a token, `speed` of all cards together in as many a second; 0: not known.
    """

    def __init__(self, work: float = 0.0, speed: float = 0.0) -> None:
        self.work, self.speed = work, speed
        self.mark = (0.0, 0.0)
        self.counter = energy_millijoules()

    def rest(self, tokens: float) -> None:
        """What came before is not training time: a start, an evaluation."""
        self.mark = (time.monotonic(), tokens)

    def measure(self, logs: dict[str, Any], tokens: float) -> None:
        """Adds tokens per second since the last record, what share of the cards' speed that is, and the most memory."""
        (before, counted), now = self.mark, time.monotonic()
        if tokens > counted:
            rate = (tokens - counted) / (now - before)
            logs["tokens_per_second"] = round(rate, 1)
            if self.work and self.speed:
                logs["mfu"] = round(rate * self.work / self.speed, 4)
        self.mark = (now, tokens)
        logs["peak_memory_gib"] = round(_peak() / 2**30, 3)

    def spent(self) -> int:
        """Millijoules that this process's card took since the last time."""
        before, self.counter = self.counter, energy_millijoules()
        return self.counter - before


def _peak() -> float:
    """Bytes: of the current card, of the process where there is none."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_peak_memory()
