"""The cache: a folder of what is made once, such as converted bases, prepared rows and upstream's tables."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from finetune.system.files import FULL_DISK, full_disk_names, sync_files
from finetune.system.terminal import print_line

# The environment variable with the folder that is used in place of a cache that cannot be written.
_STAND_IN = "FINETUNE_STAND_IN_CACHE"


def cache_dir() -> Path:
    """The folder of converted bases and prepared rows: `$XDG_CACHE_HOME/finetune`, by default `~/.cache/finetune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by the first process that needs it, while others wait.

    Args:
        name: Its path in `cache_dir()`; it must change whenever the contents that `make` writes change.
        make: Fills the folder that it is given. Temporary files next to that folder are removed afterwards.
    """
    from filelock import FileLock

    target = cache_dir() / name
    if os.path.isdir(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        target = _stand_in_for_cache(error) / name
        target.parent.mkdir(parents=True, exist_ok=True)
    # The lock ends with the process that holds it, however that ends.
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            work = target.with_name(f".{target.name}.part")
            # A killed process may have left it.
            shutil.rmtree(work, ignore_errors=True)
            folder = work / "folder"
            try:
                with full_disk_names(target):
                    folder.mkdir(parents=True)
                    make(folder)
                    sync_files(folder)
                folder.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def _stand_in_for_cache(error: OSError) -> Path:
    """A temporary folder for this process and those that it starts; says why the first time."""
    folder = os.environ.get(_STAND_IN)
    if not folder:
        folder = os.environ[_STAND_IN] = tempfile.mkdtemp(prefix="finetune-cache-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        print_line(
            f"the cache {cache_dir()} cannot be written ({error.strerror or error}): {folder} is used, and removed at "
            "the end; XDG_CACHE_HOME may name another folder"
        )
    return Path(folder)


def remove_unused(folder: Path) -> None:
    """Removes the files and folders in a folder of the cache that were not changed for a month."""
    for entry in folder.iterdir():
        with suppress(OSError):
            if time.time() - entry.stat().st_mtime > 30 * 24 * 3600:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
