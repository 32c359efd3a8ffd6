"""What makes a checkpoint whole, which one a run goes on from, and whether a directory is free for a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Written last: a `checkpoint-N` without it was not finished, whatever else lies in it.
MARKER = "complete.json"


# What a finished run holds in its root, moved there last.
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


_DTYPES = ("float32", "bfloat16", "float16")
# What says of a folder that merge or export wrote it, and so may replace it.
RECORDS = ("merge.json", "report.json")


class RunError(ValueError):
    """The output directory is in use, or there is no run to go on with where the recipe says so."""


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


def sync_files(folder: Path) -> None:
    """Waits until all that this process sees in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


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


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all: beside, synced, renamed."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that grows by a JSON line at a time; a last one that was cut off is left out.

    Raises:
        RunError: Another line is damaged.
    """
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    # Other marks of a line's end may stand in a text.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{number} is damaged; remove the line") from error
    return found


def file_of(run: Path, name: str) -> Path | None:
    """A file of a run, for one of its checkpoints too; None where it has none."""
    folders = (run, run.parent) if run.name.startswith("checkpoint-") else (run,)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def environment_of(run: Path) -> dict[str, Any]:
    """The `environment.json` of a run or of one of its checkpoints; empty where there is none.

    Raises:
        RunError: It cannot be read.
    """
    file = file_of(run, "environment.json")
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("dtype", "float32") not in _DTYPES:
        raise RunError(f"{file} is damaged: it names no dtype that a run trains in")
    return found


@contextlib.contextmanager
def whole_folder(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when all is written and on the disk, and is gone if that fails.

    What a killed process left is removed by the next one; two at once are told apart by a lock.

    Raises:
        RunError: `output` exists and may not be replaced, is or holds one of `inputs`, or another process is at it.
    """
    from filelock import FileLock, Timeout

    check_free(output, overwrite)
    check_apart(output, inputs)
    output = Path(os.path.realpath(output))
    made = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (output.with_name(f".{output.name}.{end}") for end in ("partial", "replaced"))
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"--output: {output} is being written by another process") from None
    try:
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not output.exists():
            old.rename(output)  # a process was killed between the two renames below
            check_free(output, overwrite)
        shutil.rmtree(old, ignore_errors=True)
        beside.mkdir()
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                sync(path)
        check_free(output, overwrite)
        if output.exists():
            output.rename(old)
        beside.rename(output)
        sync(output.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        Path(lock.lock_file).unlink(
            missing_ok=True
        )  # before it is released: nobody holds a lock without a name
        lock.release()
        for parent in made:
            with contextlib.suppress(OSError):  # it is not empty, and so not only ours
                parent.rmdir()


def check_apart(output: Path, inputs: Sequence[Path]) -> None:
    """Refuses an output that would replace what it is made from.

    Raises:
        RunError: It is an input, or a folder above one.
    """
    place = Path(os.path.realpath(output))
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(place):
            raise RunError(f"--output: {output} holds {path}, which is read; write another path")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_free(output: Path, overwrite: bool) -> None:
    """Refuses an output that is there already.

    Raises:
        RunError: It exists and may not be replaced, or is no folder.
    """
    if output.exists() and not output.is_dir():
        raise RunError(f"--output: {output} is a file; write the path of a new folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise RunError(f"--output: {output} exists; write another path, or add --overwrite to replace it")
        if not any((output / name).exists() for name in RECORDS):
            raise RunError(
                f"--output: {output} was not written by merge or export, and is not replaced; write another path"
            )


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
