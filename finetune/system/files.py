"""Files and folders that are complete wherever they exist; the cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.system.errors import RunError

# The files of a model or an adapter, as transformers and PEFT call them.
MODEL_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Raised when what a made directory holds changes, so that an old one is not used again.
CACHE_VERSION = 1


def cache_dir() -> Path:
    """The folder for converted bases: `$XDG_CACHE_HOME/finetune`, by default `~/.cache/finetune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached directory `name`; made beside and renamed, so it is whole wherever it exists; others wait for it."""
    from filelock import FileLock

    target = cache_dir() / f"{name}-v{CACHE_VERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
            try:
                made = beside / "model"
                made.mkdir()
                make(made)
                made.rename(target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return target


# What says of a folder that merge or export wrote it, and so may replace it.
RECORDS = ("merge.json", "report.json")


def sync_files(folder: Path) -> None:
    """Waits until all that this process sees in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


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


def run_file(run: Path, name: str) -> Path | None:
    """A file of a run, for one of its checkpoints too; None where it has none."""
    folders = (run, run.parent) if run.name.startswith("checkpoint-") else (run,)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


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


def sha256(path: Path) -> str:
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


def read_json(file: Path | None) -> dict[str, Any]:
    """A file of JSON; empty where there is none."""
    if file is None or not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    return found
