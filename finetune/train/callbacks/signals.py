"""SIGINT and SIGTERM: the step at hand is finished, a checkpoint is saved, the run stops."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from finetune.system import distributed
from finetune.train.trainer import Trainer


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; everything is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """SIGINT and SIGTERM let the step at hand finish, save, and stop; a second SIGINT stops at once.

    All ranks stop at the same step, whichever of them got the signal.
    """
    stopped: list[int] = []
    at = 0.0

    def on_signal(signum: int, frame: Any) -> None:
        nonlocal at
        # A launcher hands its signal on, and more than once.
        hasty = signum == signal.SIGINT and (distributed.world_size() == 1 or time.monotonic() - at > 3)
        if stopped and hasty:
            raise KeyboardInterrupt
        at = at or time.monotonic()
        stopped[:] = [signum]

    class Stop(TrainerCallback):  # type: ignore[misc]
        due = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            signum = distributed.max_over_ranks(stopped[0] if stopped else 0)
            stopped[:] = [signum] if signum else []
            # The last step ends the run anyway.
            if stopped and state.global_step < state.max_steps:
                trainer.stopping = control.should_save = control.should_training_stop = True
            # A checkpoint at the end of an epoch holds what is evaluated and logged there, too.
            self.due = control.should_save and state.epoch == int(state.epoch)
            control.should_save = control.should_save and not self.due
            return control

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_save = control.should_save or self.due
            if trainer.stopping and state.epoch != int(state.epoch):
                control.should_log = control.should_evaluate = control.should_save = False
            return control

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    trainer.add_callback(Stop())
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
