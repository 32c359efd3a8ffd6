"""Pushes checkpoints to the Hub during a run, which neither waits for the pushes nor fails with them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune.hub.payload import Payload, linked_copy, make_payload
from finetune.hub.run import send
from finetune.recipe.schema import HubSection
from finetune.system.errors import first_line
from finetune.system.terminal import Say


class CheckpointUploads(TrainerCallback):  # type: ignore[misc]
    """Pushes every `hub.every_n_saves`-th checkpoint in a thread of the first process, one at a time.

    Args:
        output: The run's folder.
        section: The recipe's `hub` section.
        say: Called with a line for each push.
    """

    def __init__(self, output: Path, section: HubSection, say: Say) -> None:
        self.output, self.section, self.say = output, section, say
        self.staging = output / ".pushing"
        self.saves = 0
        self.thread: threading.Thread | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Links the checkpoint's files into a folder of their own, so that rotation may remove it while it is sent."""
        # The finished run is pushed by `train` itself.
        if not state.is_world_process_zero or state.global_step >= state.max_steps:
            return
        self.saves += 1
        if self.saves % (self.section.every_n_saves or 1):
            return
        step = f"step {state.global_step}"
        if self.thread and self.thread.is_alive():
            self.say(f"hub: {step} is not pushed: the last push is still running")
            return
        assert self.section.repo_id
        try:
            # `ask=False`: nothing here may wait for the Hub.
            shutil.rmtree(self.staging, ignore_errors=True)
            folder = self.output / f"checkpoint-{state.global_step}"
            payload = linked_copy(make_payload(folder, self.section.repo_id, ask=False), self.staging)
        except Exception as error:
            self.say(f"hub: {step} is not pushed: {first_line(error)}")
            return
        self.thread = threading.Thread(target=self._send, args=(payload, step), name="finetune-push", daemon=True)
        self.thread.start()

    def _send(self, payload: Payload, step: str) -> None:
        assert self.section.repo_id
        try:
            self.say(f"hub: {step} pushed: {send(payload, self.section.repo_id, self.section.private)}")
        except Exception as error:
            self.say(f"hub: {step} is not pushed: {first_line(error)}")

    def finish(self) -> None:
        """Waits for a running push."""
        if self.thread:
            self.thread.join()
        shutil.rmtree(self.staging, ignore_errors=True)
