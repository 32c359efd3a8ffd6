"""Writes files and folders that exist only when they are complete, reads them, and locates the cache directory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from finetune.system.errors import RunError
from finetune.system.numbers import memory

# The files of a model or an adapter, as transformers and PEFT call them.
MODEL_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# The record of what a merged model was made from.
MERGE_RECORD = "merge.json"
# The file in a folder that the process which trains or evaluates into it has locked.
LOCK = ".lock"
# Each output of merge and of export has one of these; only such a folder may be replaced.
_OUTPUT_RECORDS = (MERGE_RECORD, "report.json")
# The beginning of a pointer of Git LFS, and the size of the largest.
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec", 1024
# The errors of a disk, a quota or a limit of a file's size that is reached.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def full_disk_names(path: Path) -> Iterator[None]:
    """Names the file or folder that is written in an error of a full disk, which names none, or one that is read."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path next to `path` to write to; on leaving the file is synced and renamed to `path`, on an error removed.

    Raises:
        RunError: A folder, a device or a pipe is at `path`.
    """
    check_replaceable(path)
    part = path.with_name(f".{path.name}.part")
    try:
        if part.is_symlink() or not part.is_file():
            part.unlink(missing_ok=True)  # writing would follow a link, and wait at a pipe
        with full_disk_names(path):
            yield part
            sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Refuses the path of a file to write at which there is something else than a file.

    Raises:
        RunError: A folder, a device, a pipe or a socket is there, or a link to one.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device, a pipe or a socket"
        raise RunError(f"{path} is {kind}, and only a file is replaced; write the path of a file")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that `path` is complete or does not exist, even after a power failure."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes a value as JSON, as `write_whole` does."""
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_together(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes text files into a folder as `write_whole` does; where one of them cannot be written, none is replaced.

    Once all are written they get their names in order: where the last one is, all are.
    """
    with full_disk_names(folder), ExitStack() as parts:
        for name, text in reversed(list(texts.items())):
            parts.enter_context(whole_file(folder / name)).write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to fill; on leaving it is synced and renamed to `output`, on an error removed.

    The remains of a killed process are removed by the next one. A lock keeps two processes apart.

    Args:
        output: The folder to make.
        overwrite: True if an earlier output of merge or export may be replaced.
        inputs: The folders that are read, none of which `output` may be or contain.

    Raises:
        RunError: `output` exists and may not be replaced, contains one of `inputs`, or is being written by another
            process.
    """
    check_free(output, overwrite)
    check_apart(output, inputs)
    output = Path(os.path.realpath(output))
    partial, replaced, lock = (output.with_name(f".{output.name}.{end}") for end in ("partial", "replaced", "lock"))
    with _locked(lock, f"--output: {output} is being written by another process"):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not output.exists():
                # A process was killed between the two renames below.
                replaced.rename(output)
                check_free(output, overwrite)
            shutil.rmtree(replaced, ignore_errors=True)
            partial.mkdir()
            with full_disk_names(output):
                yield partial
                sync_files(partial)
            check_free(output, overwrite)
            if output.exists():
                output.rename(replaced)
            partial.rename(output)
            sync(output.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_free(output: Path, overwrite: bool) -> None:
    """Refuses an output folder that exists and may not be replaced.

    Raises:
        RunError: It is a file, is not empty and `overwrite` is false, or neither merge nor export wrote it.
    """
    if output.exists() and not output.is_dir():
        raise RunError(f"--output: {output} is a file; write the path of a new folder")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise RunError(f"--output: {output} exists; write another path, or add --overwrite to replace it")
        if not any((output / name).exists() for name in _OUTPUT_RECORDS):
            raise RunError(
                f"--output: {output} was not written by merge or export, and is not replaced; write another path"
            )


def check_space(folder: Path, needed: int, cure: str = "make room") -> None:
    """Refuses to write `needed` bytes into a folder whose disk lacks the room.

    Raises:
        RunError: The disk has less than that and 1%, which file systems take for themselves.
    """
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        raise RunError(f"{folder} has {memory(free)} free, and {memory(needed)} are needed; {cure}")


def check_apart(output: Path, inputs: Sequence[Path]) -> None:
    """Refuses an output folder that would replace one of its inputs.

    Raises:
        RunError: It is one of `inputs` or a folder above one.
    """
    place = Path(os.path.realpath(output))
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(place):
            raise RunError(f"--output: {output} contains {path}, which is read; write another path")


def sync_files(folder: Path) -> None:
    """Waits until everything in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked_folder(folder: Path, key: str, work: str = "training") -> Iterator[None]:
    """Makes a folder, and keeps other processes that would lock it out until the end; removes it if it stays empty.

    Args:
        folder: The folder.
        key: The key that names it, for the message.
        work: The work of the process that has it, for the message.

    Raises:
        RunError: Another process holds the lock.
    """
    with _locked(
        folder / LOCK, f"{key}: another process is {work} into {folder}; wait for its end, or write another directory"
    ):
        yield


@contextmanager
def _locked(file: Path, taken: str) -> Iterator[None]:
    """Holds a lock, whose file is removed at the end, as are folders that were made for it and are empty then.

    The lock ends with the process, however that ends; its file may stay, and says nothing. A filesystem without locks
    has none.

    Raises:
        RunError: Another process holds the lock; the text is `taken`.
    """
    from filelock import FileLock, Timeout

    new = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(taken) from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            # Before the lock is released: afterwards the file may already be another process's lock.
            file.unlink(missing_ok=True)
            lock.release()
        for folder in new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def is_full(error: BaseException) -> bool:
    """True if an error, or one that it was raised from, says that a disk or a quota is full.

    Libraries pass on the words of the system: safetensors writes `(os error 28)`.
    """
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, OSError) and one.errno in FULL_DISK:
            return True
        if re.search(r"No space left on device|\(os error (28|122)\)|Disk quota exceeded", str(one)):
            return True
        one = one.__cause__
    return False


# ---------------------------------------------------------------------------------------------------------------
# Reading


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file, opened for reading; a device or a pipe is neither waited for nor read.

    Raises:
        OSError: It cannot be opened, or is something else; `strerror` says which.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a device or a pipe, not a file", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: str | Path, most: int) -> str:
    """The text of a regular file, in UTF-8 with or without a byte order mark.

    Args:
        path: The file.
        most: The largest size in bytes.

    Raises:
        OSError: It cannot be read, is a device or a pipe, or is larger; `strerror` says which.
        UnicodeDecodeError: It is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def git_lfs_pointer(folder: Path) -> Path | None:
    """A file of a folder that holds only the name of its content, which Git LFS has not fetched; None if none does."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file() and file.stat().st_size < _POINTER_BYTES:
            with file.open("rb") as content:
                if content.read(len(_POINTER)) == _POINTER:
                    return file
    return None


def read_json(file: Path | None) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file.

    Raises:
        RunError: The file is not JSON, or holds something else than an object.
    """
    if file is None or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is damaged: it holds no JSON object")
    return content


def with_repeated_key(pairs: Sequence[tuple[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """An object of JSON, and the first key that is written in it a second time, which `json` would pass over.

    Args:
        pairs: The keys and values that `json` gives to an `object_pairs_hook`.
    """
    found, seen = dict(pairs), set[str]()
    if len(found) < len(pairs):
        for key, _ in pairs:
            if key in seen:
                return found, key
            seen.add(key)
    return found, None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file that is appended to; none where there is no file.

    A last line without a line break was cut off while it was written, and is left out.

    Raises:
        RunError: Another line is damaged.
    """
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    # Not `splitlines`, which also splits at characters that may stand in a text.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"{path}:{number} is damaged; remove the line") from error
    return records


def run_file(folder: Path, name: str) -> Path | None:
    """A file of a run, also looked for in the parent folder of a checkpoint; None if there is none."""
    folders = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    return next((place / name for place in folders if (place / name).is_file()), None)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
