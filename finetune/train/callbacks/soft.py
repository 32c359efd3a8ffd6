"""Callbacks and reports that may fail without ending the run: the failure is said, and the run goes on.

These are samples, trackers, metrics, progress, uploads, the loss chart and the model card. What protects the result
(memory check, packed rows, signals, a resumed run's counters) is never made soft.

No rank can be left waiting: what is made soft acts on the first process alone and calls no collective. Samples are
answered by the unwrapped model, whose forward pass synchronises nothing under DDP, and are not taken under FSDP, where
each layer is gathered from all ranks. An error that only says that another rank has ended is raised as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from finetune.system import distributed
from finetune.system.errors import first_line
from finetune.system.terminal import Say


@contextmanager
def softly(what: str, say: Say) -> Iterator[None]:
    """Says an error of the block in one line, and goes on after it; KeyboardInterrupt and SystemExit pass.

    Args:
        what: The subject of the line, such as `loss.png`.
        say: Takes the line.
    """
    try:
        yield
    except Exception as error:  # of any type: it is not what the run is for
        if distributed.is_lost_rank(error):
            raise
        with contextlib.suppress(OSError):  # the terminal may be what failed
            say(f"{what} failed: {first_line(error)}; the run goes on")


def soft(callback: TrainerCallback, what: str, say: Say, retried: bool = True) -> TrainerCallback:
    """The callback, whose errors end no run; only the first one is said.

    Args:
        callback: It is changed, and keeps its class, by which trackers are found.
        what: The subject of the line.
        say: Takes the line.
        retried: False leaves the callback out after its first error: a tracker that cannot be reached would make each
            step wait for it.
    """
    failed = False

    def say_once(line: str) -> None:
        nonlocal failed
        if not failed:
            failed = True
            say(line)

    def guarded(event: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if failed and not retried:
                return None
            with softly(what, say_once):
                return event(*args, **kwargs)
            return None

        return call

    for name in [name for name in dir(callback) if name.startswith("on_")]:
        setattr(callback, name, guarded(getattr(callback, name)))
    return callback
