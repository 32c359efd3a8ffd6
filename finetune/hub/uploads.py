"""Checkpoints put on the Hub while a run goes on, which never waits for them and never ends because of them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune.hub.payload import Payload, linked_copy, make_payload
from finetune.hub.run import send
from finetune.recipe.schema import HubSection


class CheckpointUploads(TrainerCallback):  # type: ignore[misc]
    """Pushes every so many checkpoints from the first process, one at a time, beside the training."""

    def __init__(self, output: Path, section: HubSection, say: Callable[[str], None]) -> None:
        self.output, self.section, self.say = output, section, say
        self.staging = output / ".pushing"
        self.saves = 0
        self.thread: threading.Thread | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes what the checkpoint is on the Hub, so that it may be removed while it is sent."""
        # The end of a run is pushed whole.
        if not state.is_world_process_zero or state.global_step >= state.max_steps:
            return
        self.saves += 1
        if self.saves % (self.section.every_n_saves or 1):
            return
        step = f"step {state.global_step}"
        if self.thread and self.thread.is_alive():
            self.say(f"hub: {step} is not pushed, the push before it is still under way")
            return
        assert self.section.repo_id
        try:
            # Nothing here may wait for the Hub.
            shutil.rmtree(self.staging, ignore_errors=True)
            folder = self.output / f"checkpoint-{state.global_step}"
            payload = linked_copy(make_payload(folder, self.section.repo_id, ask=False), self.staging)
        except Exception as error:  # whatever it is, it is no reason to end a run
            self.say(f"hub: {step} is not pushed: {next(iter(str(error).splitlines()), repr(error))}")
            return
        self.thread = threading.Thread(
            target=self._send, args=(payload, step), name="finetune-push", daemon=True
        )
        self.thread.start()

    def _send(self, payload: Payload, step: str) -> None:
        assert self.section.repo_id
        try:
            self.say(f"hub: {step} pushed: {send(payload, self.section.repo_id, self.section.private)}")
        except Exception as error:
            self.say(f"hub: {step} is not pushed: {error}")

    def finish(self) -> None:
        """Waits for a push that is under way."""
        if self.thread:
            self.thread.join()
        shutil.rmtree(self.staging, ignore_errors=True)
