"""`finetune sweep`: trains a recipe with each combination of some values, one run after another; resumable."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from finetune.cli import report
from finetune.cli.sweep_plan import Sweep, SweepRun
from finetune.cli.sweep_report import FINISHED, RunRow, best_of, read_sweep
from finetune.data.readers import fingerprint, is_file
from finetune.recipe.diff import recipe_changes
from finetune.recipe.load import load_recipe
from finetune.system import fresh_process
from finetune.system.errors import FinetuneError, RunError, Stopped, first_line
from finetune.system.files import LOCK, locked_folder, write_whole
from finetune.system.pages import shell_word
from finetune.system.terminal import Say
from finetune.train import checkpoint

# ---------------------------------------------------------------------------------------------------------------
# Earlier runs in the folder


def join_earlier(sweep: Sweep, say: Say) -> None:
    """Takes over what an earlier command has left in the sweep's folder; says which runs are there.

    Raises:
        RunError: The folder holds something else, or runs with other values or other rows, which are never mixed.
    """
    output = sweep.output
    if output.exists() and not output.is_dir():
        raise RunError(f"training.output_dir: {output} is a file")
    earlier = read_sweep(output / "sweep.json")
    others = f"another training.output_dir, or remove {output}"
    if earlier is None:
        if output.is_dir() and any(path.name != LOCK for path in output.iterdir()):
            raise RunError(
                f"training.output_dir: {output} is not empty, and holds no sweep; write another, such as "
                f"training.output_dir={output}-sweep"
            )
        sweep.sources = _fingerprints(sweep)
        return
    if earlier["keys"] != sweep.keys:
        was, now = (", ".join(keys) for keys in (earlier["keys"], sweep.keys))
        raise RunError(
            f"training.output_dir: {output} holds a sweep over {was}, and this one is over {now}; write {others}"
        )
    for run in sweep.runs:
        saved = run.folder / "recipe.yaml"
        if changes := recipe_changes(saved, run.recipe) if saved.is_file() else []:
            raise RunError(
                f"{run.folder} was trained with other values: {'; '.join(changes)}; write the old ones, or {others}"
            )
    sweep.sources = _fingerprints(sweep)
    known = earlier["sources"]
    begun = any((run.folder / "recipe.yaml").is_file() for run in sweep.runs)
    if begun and (changed := [name for name, mark in sweep.sources.items() if known.get(name, mark) != mark]):
        raise RunError(
            f"{changed[0]}: has other rows than the runs in {output} were trained on; restore them, or write {others}"
        )
    sweep.sources = known | sweep.sources
    sweep.group = earlier["group"]
    names = {run.name for run in sweep.runs}
    sweep.errors = {run["name"]: run["error"] for run in earlier["runs"] if run["error"] and run["name"] in names}
    if left := [run["name"] for run in earlier["runs"] if run["name"] not in names]:
        say(f"runs of an earlier command that this one does not make: {', '.join(left)}")


def _fingerprints(sweep: Sweep) -> dict[str, str]:
    """A hash of the rows of each source that is a file, by its path."""
    sources = {source.name: source for run in sweep.runs for source in [*run.recipe.data.train, *run.recipe.data.eval]}
    return {name: fingerprint(source) for name, source in sources.items() if is_file(source.path)}


# ---------------------------------------------------------------------------------------------------------------
# Running


@dataclass(frozen=True)
class TrainJob:
    """The argument of a run's own process."""

    recipe: str
    overrides: list[str]
    force: bool


def train_in_own_process(job: TrainJob) -> str:
    """Trains one run as `finetune train` does; its lines are sent with `report`.

    Returns:
        Empty, or the line of a run that a signal stopped.

    Raises:
        FinetuneError: As `finetune.train.train`.
    """
    os.setpgrp()  # Ctrl-C reaches the sweep alone, which passes it on once
    fresh_process.report(str(os.getpid()))
    try:
        from finetune.plan import preflight
        from finetune.train.run import train

        recipe = load_recipe(job.recipe, job.overrides)
        train(recipe, fresh_process.report, None if job.force else preflight.check_memory)
    except KeyboardInterrupt as stop:
        return str(stop) or "stopped"
    return ""


class _Signals:
    """While a run trains, SIGINT and SIGTERM are passed on to its process, which saves a checkpoint and ends."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.pid: int | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Passes the signal on, or stops the sweep at once where no run has begun."""
        self.received.append(number)
        if self.pid is None:
            raise KeyboardInterrupt
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @contextlib.contextmanager
    def passed_on(self) -> Iterator[None]:
        """Takes both signals until its end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self.pid = None
            for number, handler in before.items():
                signal.signal(number, handler)


def run_sweep(sweep: Sweep, force: bool, say: Say) -> None:
    """Trains the runs that are not finished, and writes `sweep.json` and `sweep.html` after each of them.

    A run that fails is noted, and the next one begins.

    Args:
        sweep: The sweep.
        force: Trains even where the memory check says that a run does not fit.
        say: Takes a line for each stage of each run.

    Raises:
        RunError: The folder holds something else, or another process trains into it.
        KeyboardInterrupt: A signal came; the run that was going on has saved a checkpoint.
    """
    with locked_folder(sweep.output, "training.output_dir"):
        join_earlier(sweep, say)
        sweep.write()
        for number, run in enumerate(sweep.runs, 1):
            head = f"[{number}/{len(sweep.runs)}]"
            if checkpoint.is_finished(run.folder):
                say(f"{head} {run.name} is finished already")
                continue
            try:
                error = _train(sweep, run, force, lambda line, head=head: say(f"{head} {line}"))  # type: ignore[misc]
                sweep.errors.pop(run.name, None)
                if error:
                    sweep.errors[run.name] = error
                    say(f"{head} failed: {error}")
                else:
                    write_whole(run.folder / "report.html", report.as_html(run.folder))
            finally:
                sweep.write()


def _train(sweep: Sweep, run: SweepRun, force: bool, say: Say) -> str:
    """Trains one run in a process of its own; returns why it failed, or an empty text."""
    signals = _Signals()

    def on_line(line: str) -> None:
        if signals.pid is None:
            signals.pid = int(line)
        else:
            say(line)

    environment = {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or sweep.group}
    if "WANDB_RUN_ID" in os.environ:
        environment["WANDB_RUN_ID"] = ""  # all runs would be one
    say(" ".join(f"{key}={value}" for key, value in run.values.items()))
    error, stopped = "", ""
    with signals.passed_on():
        try:
            job = TrainJob(str(sweep.path), [*run.overrides, *run.own_overrides()], force)
            stopped = fresh_process.call(train_in_own_process, job, on_line, environment)
        except (FinetuneError, OSError, fresh_process.ProcessFailed) as failure:
            error = first_line(failure)
    if signals.received:
        line = stopped.partition(". Go on")[0] or error or f"{run.name}: stopped"
        raise Stopped(signals.received[0], line)
    return error or stopped


def last_line(sweep: Sweep, rows: Sequence[RunRow]) -> str:
    """The best run and the next commands; empty if no run is finished."""
    best = best_of(rows)
    if best is None:
        return ""
    folder, loss = shell_word(str(best.folder)), best.held_out if best.held_out is not None else best.loss
    measured = "" if loss is None else f" ({'held out' if best.held_out is not None else 'loss'} {loss:.3g})"
    finished = sum(row.state == FINISHED for row in rows)
    among = "" if finished == len(rows) else f", of the {finished} finished of {len(rows)}"
    recipe = next(run.recipe for run in sweep.runs if run.name == best.name)
    merge = f"; finetune merge {folder} --output DIR" if recipe.lora is not None else ""
    return f"best{among}: {best.name}{measured}; talk to it: finetune generate {folder}{merge}"
