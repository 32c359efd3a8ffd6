"""Marks complete checkpoints, finds the one to resume from, and checks that a directory is free for a run.

The files of a `checkpoint-N` folder:

    adapter_model.safetensors, adapter_config.json   the adapter; in full fine-tuning the model's own files instead
    tokenizer.json, chat_template.jinja, ...         the tokenizer
    state-RANK-of-RANKS.safetensors                  optimizer, counters, and trained weights that no file above holds
    scheduler.pt, scaler.pt                          learning rate scheduler; gradient scaler in fp16
    rng_state.pth, rng_state_RANK.pth                random number generators
    trainer_state.json                               transformers' log and step
    recipe.yaml                                      the recipe of the run
    complete.json                                    the step, and the size of each file; written last
"""

from __future__ import annotations

import itertools
import json
import shutil
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from finetune.system.errors import RunError
from finetune.system.files import ADAPTER_WEIGHTS, LOCK, MODEL_WEIGHTS, WEIGHTS_INDEX, read_json, write_whole
from finetune.system.terminal import Say

if TYPE_CHECKING:
    from finetune.recipe.diff import Digests

# Written last: a `checkpoint-N` folder without it is incomplete.
MARKER = "complete.json"
# The log and the step, which transformers writes.
_TRAINER_STATE = "trainer_state.json"

# The directory of a finished run has one of these files of weights, which is moved there last.
WEIGHTS = (ADAPTER_WEIGHTS, MODEL_WEIGHTS, WEIGHTS_INDEX)


class MarkerFields(TypedDict):
    """The number of processes, digests of the rows and of values from the environment, and the day it began."""

    processes: int
    rows: str | None
    day: NotRequired[str]
    environment: NotRequired[Digests]


class Marker(MarkerFields):
    """`complete.json`: the step, and the size of each file in bytes."""

    step: int
    files: dict[str, int]


def check_output(output: Path, resume: str | bool) -> None:
    """Refuses an output directory that is not empty, unless its run is to be resumed.

    Raises:
        RunError: It holds files of another run, or of this run without `resume`; or it is a file.
    """
    if output.is_dir() and any(path.name != LOCK for path in output.iterdir()):
        if is_finished(output) and resume is True:
            raise RunError(
                f"training.output_dir: {output} holds a finished run; choose another directory, or delete it"
            )
        if not resume:
            free = next(
                name for n in itertools.count(2) if not (name := output.with_name(f"{output.name}-{n}")).exists()
            )
            raise RunError(
                f"training.output_dir: {output} is not empty; write another, such as training.output_dir={free}, or "
                "resume its run with training.resume_from_checkpoint=true"
            )
    elif output.exists() and not output.is_dir():
        raise RunError(f"training.output_dir: {output} is a file")


def is_finished(output: Path) -> bool:
    """True if a run directory holds the weights of a finished run."""
    return any((output / name).exists() for name in WEIGHTS)


def write_marker(folder: Path, step: int, fields: MarkerFields) -> None:
    """Marks a checkpoint as complete; its files must have been written and synced before."""
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    marker: Marker = {"step": step, **fields, "files": sizes}
    write_whole(folder / MARKER, json.dumps(marker) + "\n")


def rotate(run: Path, limit: int | None, best: Path | None) -> None:
    """Removes incomplete checkpoints, and the oldest complete ones over `limit`.

    Args:
        run: The run directory.
        limit: The number of complete checkpoints to keep; None keeps all.
        best: The best checkpoint, which is kept like the newest.
    """
    every = checkpoints(run)
    kept = [folder for folder in every if is_whole(folder)]
    over = len(kept) - max(1, limit) if limit else 0
    old = [folder for folder in kept[:-1] if best is None or folder.name != best.name][: max(0, over)]
    for folder in [*old, *(folder for folder in every if folder not in kept)]:
        (folder / MARKER).unlink(missing_ok=True)  # a half removed one must not count as complete
        shutil.rmtree(folder, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, complete or not, by N."""
    numbers = {p: p.name.removeprefix("checkpoint-") for p in run.glob("checkpoint-*") if p.is_dir()}
    return sorted((p for p in numbers if numbers[p].isdigit()), key=lambda p: int(numbers[p]))


def read_marker(folder: Path) -> Marker:
    """The marker of a complete checkpoint."""
    marker: Marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return marker


def first_day(start: Path | None) -> date:
    """The day on which a checkpoint's run began: chat templates may print today's date. Today without a checkpoint."""
    day = read_marker(start).get("day") if start is not None else None
    return date.fromisoformat(day) if day else date.today()


def is_whole(folder: Path) -> bool:
    """True if the checkpoint is marked as complete, its files have the marker's sizes, and its log is JSON."""
    return not _why_not_whole(folder)


def _why_not_whole(folder: Path) -> str:
    """Why a checkpoint is not complete; empty if it is."""
    if not (folder / MARKER).is_file():
        return f"it is incomplete ({MARKER} is missing)"
    try:
        sizes = read_marker(folder)["files"]
        first_day(folder)
        sound = all(type(number) is int for number in (read_marker(folder)["step"], *sizes.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        return f"{MARKER} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
    try:
        read_json(folder / _TRAINER_STATE)  # transformers 5.23 fails with Python's error
    except RunError:
        return f"{_TRAINER_STATE} is damaged"
    return ""


def checkpoint_to_resume(run: Path, wanted: str | bool, say: Say) -> Path | None:
    """The checkpoint that `training.resume_from_checkpoint` names; None if a run starts at step 0.

    Args:
        run: The run directory.
        wanted: The option's value: a folder, or True for the newest checkpoint that can be resumed from.
        say: Called with a line for each checkpoint that is skipped.

    Raises:
        RunError: `wanted` names a folder that is not a complete checkpoint with a state.
    """
    if wanted is True:
        for folder in reversed(checkpoints(run)):
            if not (why := _why_not_resumable(folder)):
                return folder
            say(f"{folder} skipped: {why}")
        say(f"{run} has no complete checkpoint: starting at step 0")
        return None
    if not wanted:
        return None
    folder = Path(wanted)
    if why := _why_not_resumable(folder) if folder.is_dir() else "there is no such folder":
        complete = ", ".join(str(p) for p in checkpoints(run) if is_whole(p))
        choice = f"complete ones: {complete}" if complete else f"{run} has none"
        raise RunError(f"training.resume_from_checkpoint: {wanted}: {why}; {choice}")
    return folder


def _why_not_resumable(folder: Path) -> str:
    if why := _why_not_whole(folder):
        return why
    if any(folder.glob("state-*.safetensors")):
        return ""
    return "it holds only weights (training.save_only_model)"
