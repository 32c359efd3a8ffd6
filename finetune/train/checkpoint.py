"""What makes a checkpoint whole, which one a run goes on from, and whether a directory is free for a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.system.errors import RunError
from finetune.system.files import ADAPTER_WEIGHTS, MODEL_WEIGHTS, WEIGHTS_INDEX, write_whole

# Written last: a `checkpoint-N` without it was not finished, whatever else lies in it.
MARKER = "complete.json"


# What a finished run holds in its root, moved there last.
WEIGHTS = (ADAPTER_WEIGHTS, MODEL_WEIGHTS, WEIGHTS_INDEX)


def check_output(output: Path, resume: str | bool) -> None:
    """Refuses an output directory that holds a run, unless it is to go on.

    Raises:
        RunError: It is not empty.
    """
    if output.is_dir() and any(output.iterdir()):
        if is_finished(output) and resume is True:
            raise RunError(
                f"training.output_dir: {output} holds a finished run; choose another directory, or delete it"
            )
        if not resume:
            raise RunError(
                f"training.output_dir: {output} is not empty; choose another directory, delete it, or go on with its "
                "run: training.resume_from_checkpoint=true"
            )
    elif output.exists() and not output.is_dir():
        raise RunError(f"training.output_dir: {output} is a file")


def is_finished(output: Path) -> bool:
    """Whether a run directory holds the weights of a run that came to its end."""
    return any((output / name).exists() for name in WEIGHTS)


def complete(folder: Path, step: int, marks: dict[str, Any]) -> None:
    """Marks a checkpoint as whole, after all that it holds is on the disk; `marks` say what it belongs to."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_whole(folder / MARKER, json.dumps({"step": step, **marks, "files": files}) + "\n")


def rotate(run: Path, limit: int | None, best: Path | None) -> None:
    """Removes the oldest whole checkpoints over `limit`, the best one and the newest excepted, and unfinished ones."""
    every = checkpoints(run)
    kept = [folder for folder in every if is_whole(folder)]
    over = len(kept) - max(1, limit) if limit else 0
    old = [folder for folder in kept[:-1] if best is None or folder.name != best.name][: max(0, over)]
    for folder in [*old, *(folder for folder in every if folder not in kept)]:
        (folder / MARKER).unlink(missing_ok=True)  # what is half removed is not whole
        shutil.rmtree(folder, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, whole or not, by N."""
    found = [
        p for p in run.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def marks(folder: Path) -> dict[str, Any]:
    """What the marker of a whole checkpoint says: its step, and what it belongs to."""
    found: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return found


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint was finished, and is as it was then."""
    return not _missing(folder)


def _missing(folder: Path) -> str:
    """Why a checkpoint is not whole; empty if it is."""
    if not (folder / MARKER).is_file():
        return f"it was not finished ({MARKER} is missing)"
    try:
        files = marks(folder)["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MARKER} is damaged"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and not {size:,}"
    return ""


def to_resume(run: Path, wanted: str | bool, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `training.resume_from_checkpoint` means; None where a run starts at step 0.

    Raises:
        RunError: `wanted` names a folder that is no whole checkpoint.
    """
    if wanted is True:
        for folder in reversed(checkpoints(run)):
            if not (why := _missing(folder) or _stateless(folder)):
                return folder
            say(f"{folder} passed over: {why}")
        say(f"{run} has no whole checkpoint: starting at step 0")
        return None
    if not wanted:
        return None
    folder = Path(wanted)
    if why := (_missing(folder) or _stateless(folder)) if folder.is_dir() else "there is no such folder":
        whole = [str(p) for p in checkpoints(run) if is_whole(p)]
        there = f"whole ones are {', '.join(whole)}" if whole else f"there is none in {run}"
        raise RunError(f"training.resume_from_checkpoint: {wanted}: {why}; {there}")
    return folder


def _stateless(folder: Path) -> str:
    there = any(folder.glob("state-*.safetensors"))
    return "" if there else "it holds weights alone (training.save_only_model)"
