"""Several processes as one run: one of them speaks, none goes another way, and a fault of one ends all.

A rank that waits for the others inside a collective hears nothing, no signal either. So a fault is left in the
launcher's store, where a thread of each rank looks for it. Where the store has gone, so has the first machine.
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

LAUNCHER_FILE = "the file given to accelerate launch"
LOST_RANK = (
    "another process of this run has ended (killed, or out of memory?). Whole checkpoints are kept; go on with "
    "training.resume_from_checkpoint=true"
)
# A launcher that may start its processes again keeps its store.
_FAULT = f"finetune/fault/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
# A rank's own words wait so long for the first rank's, which most often are the same.
_PATIENCE = 2.0
# And it stays until the others, which look twice a second, have seen the fault: the launcher goes with it.
_FAREWELL = 1.5
# A network may be gone, and a file on another machine unseen, for so long.
_SILENCE = 30.0
_left = threading.Event()


def check_launcher() -> None:
    """Refuses what no recipe can be trained with; transformers would refuse the recipe for it.

    Raises:
        RanksError: With what to write instead.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise RunError(f"{LAUNCHER_FILE}: DeepSpeed is not used here; take accelerate_configs/fsdp.yaml")


def rank() -> int:
    """The place of this process among those of the run."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def uses_fsdp() -> bool:
    """Whether each rank is to hold a part of the weights (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def broadcast_from_first(value: Any) -> Any:
    """What the first rank holds, on every rank; plain data."""
    if world_size() == 1:
        return value
    from torch.distributed import broadcast_object_list

    box = [value]
    broadcast_object_list(box)
    return box[0]


def check_same(facts: dict[str, Any]) -> None:
    """Refuses a run whose ranks differ in any of `facts` (what it is called to what it is).

    Raises:
        RanksError: On every rank, with the first difference.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    of_all: list[Any] = [None] * world_size()
    dist.all_gather_object(of_all, (socket.gethostname(), facts))
    host, first = of_all[0]
    for other, (place, found) in enumerate(of_all):
        for name, value in first.items():
            if found[name] != value:
                raise RunError(
                    f"{name} of rank {other} ({place}) is not that of rank 0 ({host}); start all machines with the "
                    "same recipe, files and packages"
                )


def max_over_ranks(number: int) -> int:
    """The largest of the numbers that the ranks hold; every rank must ask at once."""
    if world_size() == 1:
        return number
    import torch
    import torch.distributed as dist

    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def check_shared(path: Path) -> None:
    """Waits until every rank sees a file that the first has written, as long as a network filesystem may take.

    Raises:
        RanksError: One does not.
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
    """Parts with the other processes, when all are through."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()
        _left.set()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------
# Faults


def watch_other_ranks() -> None:
    """Ends this process soon after another one has left a fault in the store, or when the store has gone."""
    if _has_store():
        threading.Thread(target=_watch, name="finetune-ranks", daemon=True).start()


def _watch() -> None:
    store, heard = None, time.monotonic()
    while not _left.is_set():
        try:
            store = store or _store()
            if store.check([_FAULT]) and not _left.is_set():
                os._exit(json.loads(store.get(_FAULT))["code"])
            heard = time.monotonic()
        except Exception:  # torch has several for it
            store = None
            if time.monotonic() - heard > _SILENCE and not _left.is_set():
                _say([f"error: {LOST_RANK} (the launcher of the first machine does not answer)"])
                os._exit(1)
        time.sleep(0.5)


def end_all_ranks(lines: Sequence[str], code: int) -> None:
    """Says a fault once, whichever ranks have met it, and ends this process; where it is the only one, does nothing."""
    if world_size() == 1:
        return
    mine = True
    with contextlib.suppress(Exception):  # better said twice than not at all
        if _has_store():
            store = _store()
            deadline = time.monotonic() + (_PATIENCE if rank() else 0)
            while time.monotonic() < deadline and not store.check([_FAULT]):
                time.sleep(0.1)
            # Whoever is first is heard: what the others say is the same, or follows from it.
            text = json.dumps({"rank": rank(), "code": code})
            _left.set()
            mine = store.compare_set(_FAULT, "", text).decode() == text
    if mine:
        # The launcher ends this process as soon as another one has gone, which is no news.
        with contextlib.suppress(ValueError):  # another thread than the main one
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _say(lines)
        time.sleep(_FAREWELL)
    sys.stdout.flush()
    os._exit(code)


def _say(lines: Sequence[str]) -> None:
    where = f"rank {rank()} ({socket.gethostname()}): " if rank() else ""
    for line in lines:
        print(where + line, file=sys.stderr, flush=True)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has gone."""
    text = str(error)
    return world_size() > 1 and isinstance(error, RuntimeError) and any(word in text for word in _GONE)


# What gloo and NCCL say of it.
_GONE = (
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
    """A connection of its own to the launcher's store."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(*where, is_master=False, timeout=timedelta(seconds=10))
