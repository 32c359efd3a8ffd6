"""How a run ended, read from its `metrics.jsonl`: stopped early or not, and which weights are saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.system.charts import points


@dataclass(frozen=True)
class Outcome:
    """How far a run got, and the losses of the weights that it saved.

    Attributes:
        step: The last step.
        max_steps: The step at which it would have ended without an early stop; None for a run that is not finished.
        best_step: The step of the best weights, where they are saved in place of the last ones.
        loss: The last training loss that was logged.
        held_out: The evaluation loss of the saved weights; of a run that is not finished, the last one.
    """

    step: int
    max_steps: int | None
    best_step: int | None
    loss: float | None
    held_out: float | None
    _lowest: int | None

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]]) -> Outcome:
        """The outcome of the run that logged these records."""
        last: dict[str, Any] = next((record for record in reversed(records) if "train_loss" in record), {})
        losses, evaluated = points(records, "loss"), points(records, "eval_loss")
        best = last.get("saved_step")
        saved = [loss for step, loss in evaluated if step == best] or [loss for _, loss in evaluated[-1:]]
        return cls(
            step=records[-1]["step"] if records else 0,
            max_steps=last.get("max_steps"),
            best_step=best,
            loss=losses[-1][1] if losses else None,
            held_out=saved[0] if saved else None,
            _lowest=int(min(evaluated, key=lambda point: point[1])[0]) if evaluated else None,
        )

    @property
    def stopped_early(self) -> bool:
        """True if the evaluations stopped improving, and the run with them, before its last step."""
        return self.max_steps is not None and self.step < self.max_steps

    def notes(self) -> list[str]:
        """An early stop, and which weights are saved if not simply the last ones: clauses of a sentence."""
        notes = [f"stopped early at step {self.step:,} of {self.max_steps:,}"] if self.stopped_early else []
        if self.best_step is not None:
            notes.append(f"the weights of step {self.best_step:,}, the best, are saved")
        elif self.stopped_early:
            notes.append("the last weights are saved")
            if self._lowest not in (None, self.step):
                notes[-1] += f"; the lowest evaluation loss was at step {self._lowest:,}"
        return notes
