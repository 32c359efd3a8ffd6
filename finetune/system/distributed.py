"""Coordinates the ranks of a run: values that must agree on all of them, and errors of one rank that end all of them.

A rank that waits in a collective cannot handle a signal. So a rank that fails writes its error to the launcher's store
(`TCPStore`), which a thread of each rank polls. If the store does not answer, the first machine has failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from finetune.system.errors import RunError
from finetune.system.terminal import print_line

LAUNCHER_FILE = "the file given to accelerate launch"
LOST_RANK = (
    "another process of this run has ended (killed, or out of memory?). Its checkpoints are kept; resume with "
    "training.resume_from_checkpoint=true"
)
# The store outlives a restart of the ranks (`--max_restarts`), so the key names the restart.
_FAULT = f"finetune/fault/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
# The seconds that other ranks wait for rank 0 to report, whose error is most often the same.
_WAIT_FOR_RANK_0 = 2.0
# Seconds until the rank that reported ends, and the launcher with it: the others poll twice a second.
_WAIT_FOR_OTHERS = 1.5
# Seconds that the store may not answer, or a file may not be seen on another machine.
_SILENCE = 30.0
_left = threading.Event()


def check_launcher() -> None:
    """Refuses DeepSpeed, before transformers reports it as an error of the recipe.

    Raises:
        RunError: The launcher's file chooses DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise RunError(f"{LAUNCHER_FILE}: DeepSpeed is not used here; use accelerate_configs/fsdp.yaml")


def rank() -> int:
    """The rank of this process; 0 if it is the only one."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def uses_fsdp() -> bool:
    """True if the launcher chose FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def broadcast_from_first(value: Any) -> Any:
    """Rank 0's value, on every rank; it must be picklable. A collective: every rank must call it."""
    if world_size() == 1:
        return value
    from torch.distributed import broadcast_object_list

    box = [value]
    broadcast_object_list(box)
    return box[0]


def check_same(facts: dict[str, Any]) -> None:
    """Refuses a run whose ranks differ in any of `facts`. A collective: every rank must call it.

    Args:
        facts: Picklable values to compare, by the name that the message shows.

    Raises:
        RunError: Two ranks differ. It is raised on every rank and names the first difference.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, (socket.gethostname(), facts))
    first_host, first = gathered[0]
    for other, (host, found) in enumerate(gathered):
        for name, value in first.items():
            if found[name] != value:
                raise RunError(
                    f"{name} of rank {other} ({host}) is not that of rank 0 ({first_host}); start all machines with "
                    "the same recipe, files and packages"
                )


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers. A collective: every rank must call it."""
    if world_size() == 1:
        return number
    import torch
    import torch.distributed as dist

    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def check_shared(path: Path) -> None:
    """Waits until every rank sees a file that rank 0 has written, which takes a while on a network filesystem.

    Raises:
        RunError: A rank does not see it.
    """
    deadline = time.monotonic() + _SILENCE
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    if blind := max_over_ranks(0 if path.exists() else rank()):
        raise RunError(
            f"training.output_dir: rank {blind} does not see {path}, which rank 0 has written; all machines need one "
            "shared filesystem there"
        )


def leave_group() -> None:
    """Leaves the process group once all ranks have finished."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()
        _left.set()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------
# Faults


def watch_other_ranks() -> None:
    """Starts a thread that ends this process when another rank has failed or the launcher's store is gone."""
    if _has_store():
        threading.Thread(target=_watch, name="finetune-ranks", daemon=True).start()


def _watch() -> None:
    store, last_answer = None, time.monotonic()
    while not _left.is_set():
        try:
            store = store or _store()
            if store.check([_FAULT]) and not _left.is_set():
                os._exit(json.loads(store.get(_FAULT))["code"])
            last_answer = time.monotonic()
        except Exception:  # torch raises several types
            store = None
            if time.monotonic() - last_answer > _SILENCE and not _left.is_set():
                _print([f"error: {LOST_RANK} (the launcher of the first machine does not answer)"])
                os._exit(1)
        time.sleep(0.5)


def end_all_ranks(lines: Sequence[str], code: int) -> None:
    """Prints an error once, even if several ranks have it, and ends this process; does nothing in a run of one process.

    Args:
        lines: The error.
        code: The exit code of all ranks.
    """
    if world_size() == 1:
        return
    reporting = True
    with contextlib.suppress(Exception):  # printed twice is better than not at all
        if _has_store():
            store = _store()
            deadline = time.monotonic() + (_WAIT_FOR_RANK_0 if rank() else 0)
            while time.monotonic() < deadline and not store.check([_FAULT]):
                time.sleep(0.1)
            # The first rank reports: the others' errors are the same, or follow from it.
            text = json.dumps({"rank": rank(), "code": code})
            _left.set()
            reporting = store.compare_set(_FAULT, "", text).decode() == text
    if reporting:
        # The launcher sends SIGTERM as soon as another rank has ended.
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _print(lines)
        time.sleep(_WAIT_FOR_OTHERS)
    sys.stdout.flush()
    os._exit(code)


def _print(lines: Sequence[str]) -> None:
    where = f"rank {rank()} ({socket.gethostname()}): " if rank() else ""
    for line in lines:
        print_line(where + line)


def is_lost_rank(error: BaseException) -> bool:
    """True for an error that only says that another rank has ended."""
    text = str(error)
    return world_size() > 1 and isinstance(error, RuntimeError) and any(word in text for word in _LOST_MESSAGES)


# Messages of gloo and NCCL.
_LOST_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "ncclRemoteError",
    "remote process exited",
)


def _has_store() -> bool:
    return world_size() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> Any:
    """A new connection to the launcher's store."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(*where, is_master=False, timeout=timedelta(seconds=10))
