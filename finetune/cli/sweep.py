"""`finetune sweep`: trains a recipe with each combination of some values, one run after another; resumable."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from finetune.cli import report
from finetune.cli.sweep_report import FINISHED, RunRow, as_html, as_json, best_of, differ_in_held_out_rows, read_sweep
from finetune.data.readers import fingerprint, is_file
from finetune.recipe.diff import recipe_changes
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.yaml_tree import COMMAND_LINE, list_items, quoted
from finetune.system import fresh_process
from finetune.system.errors import FinetuneError, RecipeError, RunError, Stopped, first_line
from finetune.system.files import LOCK, locked_folder, write_whole
from finetune.system.terminal import Say
from finetune.train import checkpoint

# Values that the sweep itself gives each run.
_OWN_KEYS = ("extends", "training.output_dir", "training.resume_from_checkpoint", "training.run_name", "hub")
# The longest name of a run's folder, and of one value in it.
_LONGEST_NAME, _LONGEST_VALUE = 80, 24


@dataclass(frozen=True)
class SweepRun:
    """One combination of values.

    Attributes:
        name: The name of its folder in that of the sweep.
        values: The values that differ between runs as they were written, by key.
        overrides: The words of the command line with this combination.
        recipe: The recipe with them; `training.output_dir` is still that of all runs.
    """

    name: str
    values: dict[str, str]
    overrides: list[str]
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.recipe.training["output_dir"], self.name)

    def own_overrides(self) -> list[str]:
        """The values that the sweep gives the run: its folder, and a name of its own where the recipe has one."""
        own = [f"training.output_dir={_text(str(self.folder))}"]
        if run_name := self.recipe.training.get("run_name"):
            own.append(f"training.run_name={_text(f'{run_name}-{self.name}')}")  # trackers take one name for one run
        if self.recipe.hub.repo_id:
            own.append("hub=null")  # each run would replace the one before
        if self.folder.is_dir() and any(path.name != LOCK for path in self.folder.iterdir()):
            own.append("training.resume_from_checkpoint=true")
        return own


def _text(value: str) -> str:
    return quoted(value.replace("${", "$${"))


@dataclass
class Sweep:
    """The runs of one command, and what is known of earlier ones.

    Attributes:
        path: The recipe's file.
        output: The recipe's own `training.output_dir`, which holds the folders of the runs.
        runs: All combinations, in the order of the command line.
        group: The name under which wandb shows the runs together.
        sources: The fingerprint of each file of rows, by its path.
        errors: Why a run failed the last time, by its name.
        notes: Lines about the comparison, for the terminal and the page.
    """

    path: Path
    output: Path
    runs: list[SweepRun]
    group: str
    sources: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @functools.cached_property
    def keys(self) -> list[str]:
        """The keys that differ between runs."""
        return list(self.runs[0].values)

    def rows(self) -> list[RunRow]:
        """The state and the figures of each run, read from its folder."""
        return [RunRow.of(run.name, run.values, run.folder, self.errors.get(run.name)) for run in self.runs]

    def write(self) -> None:
        """Writes `sweep.json` and `sweep.html`."""
        rows = self.rows()
        saved = {"recipe": str(self.path), "group": self.group, "sources": self.sources, "notes": self.all_notes(rows)}
        write_whole(self.output / "sweep.json", json.dumps(as_json(rows, saved), ensure_ascii=False, indent=1) + "\n")
        write_whole(self.output / "sweep.html", as_html(self.output, rows, self.all_notes(rows)))

    def all_notes(self, rows: Sequence[RunRow]) -> list[str]:
        """The notes, and one that only finished runs can give."""
        differ = ["the held-out rows or their tokens differ between runs, so that their losses cannot be compared"]
        return [*self.notes, *(differ if differ_in_held_out_rows(rows) else [])]


# ---------------------------------------------------------------------------------------------------------------
# Which runs


def plan_sweep(path: Path, words: Sequence[str], most: int) -> Sweep:
    """The runs that a command line asks for, each checked as by `finetune check`.

    Args:
        path: The recipe.
        words: `section.key=value`. The items of a list are values to try, any other value is that of all runs.
        most: The most runs.

    Raises:
        RecipeError: A value is refused, there is nothing to try, or there are too many combinations.
    """
    keys = [word.partition("=")[0] for word in words]
    choices = [_choices(word) for word in words]
    swept = {key: items for key, items in zip(keys, choices, strict=True) if len(items) > 1}
    _check_words(words, keys, swept)
    count = math.prod(map(len, swept.values()))
    if count > most:
        raise _refused(f"{count:,} combinations are more than {most}; write fewer values, or --max-runs {count}")
    combinations = list(itertools.product(*choices))
    values = [{key: text for key, text in zip(keys, chosen, strict=True) if key in swept} for chosen in combinations]
    faults: dict[str, None] = {}
    runs = []
    for name, value, chosen in zip(run_names(values), values, combinations, strict=True):
        # A word without "=" stays as it is, for the message.
        overrides = [
            f"{key}={text}" if "=" in word else word for word, key, text in zip(words, keys, chosen, strict=True)
        ]
        try:
            runs.append(SweepRun(name, value, overrides, load_recipe(path, overrides)))
        except RecipeError as error:
            faults |= dict.fromkeys(error.faults)
    if faults:
        raise RecipeError(list(faults))
    _check_runs(runs)
    output = runs[0].folder.parent
    sweep = Sweep(path, output, runs, f"{output.resolve().name}-{secrets.token_hex(4)}")
    if any(run.recipe.hub.repo_id for run in runs):
        sweep.notes.append(
            "hub.repo_id: the runs of a sweep are not pushed; finetune push RUN --repo-id ... pushes one"
        )
    if not any(run.recipe.data.eval or run.recipe.data.eval_fraction for run in runs):
        sweep.notes.append(
            "no rows are held out, so that the runs are compared by their training loss, which says little about new "
            "rows; data.eval_fraction=0.05 holds some out"
        )
    return sweep


def _choices(word: str) -> list[str]:
    """The values that a word of the command line gives its key, as they are written."""
    value = word.partition("=")[2]
    items = list_items(value)
    return [value] if items is None else items


def _refused(line: str) -> RecipeError:
    return RecipeError([f"{COMMAND_LINE}: {line}"])


def _check_words(words: Sequence[str], keys: Sequence[str], swept: Mapping[str, list[str]]) -> None:
    """Refuses keys that the sweep sets itself, keys without a value or given twice, and a sweep over nothing."""
    for key, times in Counter(keys).items():
        if times > 1:
            raise _refused(f"{key}: is given {times} times; write it once, with a list of its values")
        if key in swept and (key in _OWN_KEYS or key.startswith("hub.")):
            raise _refused(f"{key}: is the sweep's own for each run; write one value, or leave it out")
    for word, key in zip(words, keys, strict=True):
        if list_items(word.partition("=")[2]) == []:
            raise _refused(f"{key}: is an empty list; write the values to try, such as {key}=[1, 2]")
    if not swept:
        raise _refused("no key has several values to try; write them as a list: training.learning_rate=[1e-4,2e-4]")


def run_names(values: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for each run's folder, from the values that differ: `learning_rate-1e-4_r-8`.

    It has letters, digits and `._+-` alone. A value that has other characters, or is long, adds a hash.

    Args:
        values: The values of each run as they are written, by key.
    """
    lasts = Counter(key.rpartition(".")[2] for key in values[0])
    names = []
    for one in values:
        parts, lossy = [], False
        for key, text in one.items():
            last = key.rpartition(".")[2]
            plain = re.sub(r",\s*", "-", re.sub(r"[\[\]'\"]", "", text))
            kept = re.sub(r"[^A-Za-z0-9._+-]+", "-", plain)[:_LONGEST_VALUE]
            lossy = lossy or kept != plain
            parts.append(f"{re.sub('[^A-Za-z0-9_]+', '-', last if lasts[last] == 1 else key)}-{kept}")
        name = "_".join(parts).rstrip(".")
        names.append(_hashed(name, one) if lossy or len(name) > _LONGEST_NAME else name)
    same = Counter(name.casefold() for name in names)
    return [_hashed(n, one) if same[n.casefold()] > 1 else n for n, one in zip(names, values, strict=True)]


def _hashed(name: str, values: Mapping[str, str]) -> str:
    return f"{name[:_LONGEST_NAME]}-{hashlib.blake2b(json.dumps(values).encode(), digest_size=4).hexdigest()}"


def _check_runs(runs: Sequence[SweepRun]) -> None:
    """Refuses two combinations that are one recipe, such as learning rates 1e-4 and 0.0001, and a given checkpoint."""
    if any(run.recipe.training.get("resume_from_checkpoint") for run in runs):
        raise _refused("training.resume_from_checkpoint: a sweep resumes its runs by itself; leave it out")
    seen: dict[str, SweepRun] = {}
    for run in runs:
        if run.folder.parent != runs[0].folder.parent:
            raise _refused("training.output_dir: differs between runs; write one folder, which will hold them all")
        text = json.dumps(run.recipe.sections(), sort_keys=True, default=str)
        if (first := seen.setdefault(text, run)) is not run:
            pairs = (", ".join(f"{key}={value}" for key, value in one.values.items()) for one in (first, run))
            raise _refused(f"{' and '.join(pairs)} are one and the same run; leave one of them out")


# ---------------------------------------------------------------------------------------------------------------
# What is there already


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
        say(f"of an earlier command, and not of this one: {', '.join(left)}")


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
    from finetune.system.pages import shell_word

    folder, loss = shell_word(str(best.folder)), best.held_out if best.held_out is not None else best.loss
    measured = "" if loss is None else f" ({'held out' if best.held_out is not None else 'loss'} {loss:.3g})"
    finished = sum(row.state == FINISHED for row in rows)
    among = "" if finished == len(rows) else f", of the {finished} finished of {len(rows)}"
    recipe = next(run.recipe for run in sweep.runs if run.name == best.name)
    merge = f"; finetune merge {folder} --output DIR" if recipe.lora is not None else ""
    return f"best{among}: {best.name}{measured}; talk to it: finetune generate {folder}{merge}"
