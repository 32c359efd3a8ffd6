"""On SIGINT and SIGTERM the current step is finished, a checkpoint is saved and the run stops."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from finetune.system import distributed
from finetune.train.trainer import RunTrainer


@contextmanager
def stop_on_signals(trainer: RunTrainer) -> Iterator[list[int]]:
    """Makes SIGINT and SIGTERM finish the current step, save a checkpoint and stop; a second SIGINT stops at once.

    All ranks stop at the same step, even if only one got the signal. Yields a list, empty until a signal comes, then
    with its number.
    """
    stopped: list[int] = []
    first_signal_at = 0.0

    def on_signal(signum: int, frame: Any) -> None:
        nonlocal first_signal_at
        # A launcher passes its signal on, and more than once.
        stops_at_once = signum == signal.SIGINT and (
            distributed.world_size() == 1 or time.monotonic() - first_signal_at > 3
        )
        if stopped and stops_at_once:
            raise KeyboardInterrupt
        first_signal_at = first_signal_at or time.monotonic()
        stopped[:] = [signum]

    class Stop(TrainerCallback):  # type: ignore[misc]
        save_after_epoch = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            signum = distributed.max_over_ranks(stopped[0] if stopped else 0)
            stopped[:] = [signum] if signum else []
            # The last step ends the run anyway.
            if stopped and state.global_step < state.max_steps:
                trainer.stopping = control.should_save = control.should_training_stop = True
            # A checkpoint at the end of an epoch is saved after what is evaluated and logged there.
            self.save_after_epoch = control.should_save and state.epoch == int(state.epoch)
            control.should_save = control.should_save and not self.save_after_epoch
            return control

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_save = control.should_save or self.save_after_epoch
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
