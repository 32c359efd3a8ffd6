"""Records and shows the progress of a run: `metrics.jsonl`, a progress bar or lines, `loss.png`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Required, TypedDict

from transformers import TrainerCallback

from finetune.system import files
from finetune.system.charts import points, smoothed
from finetune.system.numbers import clock
from finetune.system.pages import one_line
from finetune.system.terminal import Say, interactive_console
from finetune.train.trainer import RunTrainer

# A run of fewer steps logs each of them, if its recipe has no `training.logging_steps`.
_SHORT_RUN = 100


class MetricsRecord(TypedDict, total=False):
    """A line of `metrics.jsonl`: the step and what the trainer logged at it.

    A training record has `loss`, an evaluation `eval_loss`. The last one has `train_loss`, the step at which the run
    would have ended without an early stop, and, where the best weights are saved in place of the last ones, the step
    that they are of. trl adds more numbers, such as
    `entropy` and `mean_token_accuracy`. A value that is not finite is null.
    """

    step: Required[int]
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    num_tokens: float
    trained_tokens: int
    tokens_per_second: float
    mfu: float
    energy_wh: float
    peak_memory_gib: float
    eval_loss: float
    train_loss: float
    max_steps: int
    saved_step: int


class EachStepLogged(TrainerCallback):  # type: ignore[misc]
    """Logs each step of a run of fewer than 100 steps: with trl's ten, a run of nine would log nothing."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.max_steps < _SHORT_RUN:
            state.logging_steps = 1


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Writes each logged record to `metrics.jsonl`; it acts after the callbacks that add to records."""

    def __init__(self, output: Path, start_step: int, trainer: RunTrainer) -> None:
        self.path = output / "metrics.jsonl"
        self.start_step = start_step
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meter.restart(self.trainer._total_train_tokens)
        if state.is_world_process_zero:
            # Steps that a resumed run repeats are recorded once, and so is its end.
            records = files.read_records(self.path) if self.start_step else []
            kept = [r for r in records if r["step"] <= self.start_step and "train_loss" not in r]
            files.write_whole(self.path, "".join(f"{json.dumps(r)}\n" for r in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        record: MetricsRecord = {"step": state.global_step}
        numbers = {k: float(v) if isinstance(v, str) else v for k, v in logs.items()}
        # The gradient norm of a step that float16's scaler skips is not finite, which JSON cannot hold.
        finite: Any = {k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()}
        record |= finite
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meter.restart(self.trainer._total_train_tokens)


class ProgressDisplay(TrainerCallback):  # type: ignore[misc]
    """Shows a progress bar on a terminal, and elsewhere a line for each logged record."""

    def __init__(self, say: Say, silent: bool) -> None:
        self.say, self.silent = say, silent
        self.bar: Any = None
        self.task: Any = None
        self.start_time, self.first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start_time, self.first_step = time.monotonic(), state.global_step
        if self.silent or not state.is_world_process_zero:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if console := interactive_console():
            note = TextColumn("{task.fields[note]}")
            left = (TimeRemainingColumn(), TextColumn("left"))
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), note, *left)
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, note="")
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if self.silent or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._line(
                f"evaluation at step {state.global_step}: loss {float(logs['eval_loss']):.3f}{_rewards(logs, 'eval_')}"
            )
        elif "loss" in logs:
            speed = logs.get("tokens_per_second")
            note = f"loss {float(logs['loss']):.3f}{_rewards(logs)}" + (f", {speed:,.0f} tokens/s" if speed else "")
            if self.bar:
                self.bar.update(self.task, note=note)
            else:
                done = state.global_step - self.first_step
                left = (time.monotonic() - self.start_time) / max(1, done) * (state.max_steps - state.global_step)
                self.say(f"step {state.global_step}/{state.max_steps}: {note}, {clock(left)} left")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stops the bar and restores the terminal; to be called after an error, too."""
        if self.bar:
            self.bar.stop()

    def _line(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(one_line(text), markup=False, highlight=False)
        else:
            self.say(text)


def _rewards(logs: dict[str, Any], prefix: str = "") -> str:
    """How much the chosen answers' reward exceeds that of the rejected ones, where it is logged."""
    margin, accuracy = (logs.get(f"{prefix}rewards/{name}") for name in ("margins", "accuracies"))
    if margin is None:
        return ""
    # Where rewards are 0 up to rounding, as at the first step, which answer is ahead says nothing.
    if accuracy is None or abs(float(margin)) < 1e-6:
        return f", reward margin {float(margin):.3f}"
    return f", reward margin {float(margin):.3f}, the chosen answer ahead in {float(accuracy):.0%}"


def draw_losses(metrics: Path, into: Path) -> None:
    """Draws the training and evaluation losses by step as a PNG.

    Raises:
        RunError: A line of `metrics.jsonl` is damaged.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = files.read_records(metrics)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if logged := points(records, "loss"):
        steps, losses = zip(*logged, strict=True)
        axes.plot(steps, losses, color="#0b63c5", alpha=0.3, linewidth=1, label="training, as logged")
        axes.plot(steps, smoothed(losses), color="#0b63c5", linewidth=2, label="training, smoothed")
    if evaluated := points(records, "eval_loss"):
        axes.plot(*zip(*evaluated, strict=True), "o-", color="#c2500a", markersize=5, label="evaluation")
    axes.set_xlabel("step", fontsize=12)
    preferences = any("rewards/chosen" in record for record in records)
    axes.set_ylabel("loss" if preferences else "loss (nats per trained token)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if logged or evaluated:
        axes.legend(fontsize=11, frameon=False)
    with files.whole_file(into) as part:
        figure.savefig(part, format="png")
