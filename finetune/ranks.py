"""Several processes as one run: one of them speaks, none goes another way, and a fault of one ends all.

A rank that waits for the others inside a collective hears nothing, no signal either. So a fault is left in the
launcher's store, where a thread of each rank looks for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

FILE = "the file given to accelerate launch"
_FAULT = "finetune/fault"
# A rank's own words wait so long for the first rank's, which most often are the same.
_PATIENCE = 2.0


class RanksError(ValueError):
    """The processes of a run were started with different things, or in a way that is not known here."""


def check_launcher() -> None:
    """Refuses what no recipe can be trained with; transformers would refuse the recipe for it.

    Raises:
        RanksError: With what to write instead.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise RanksError(f"{FILE}: DeepSpeed is not used here; take accelerate_configs/fsdp.yaml")


def rank() -> int:
    """The place of this process among those of the run."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def sharded() -> bool:
    """Whether each rank is to hold a part of the weights (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def from_first(value: Any) -> Any:
    """What the first rank holds, on every rank; plain data."""
    if count() == 1:
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
    if count() == 1:
        return
    import torch.distributed as dist

    of_all: list[Any] = [None] * count()
    dist.all_gather_object(of_all, (socket.gethostname(), facts))
    host, first = of_all[0]
    for other, (place, found) in enumerate(of_all):
        for name, value in first.items():
            if found[name] != value:
                raise RanksError(
                    f"{name} of rank {other} ({place}) is not that of rank 0 ({host}); start all machines with the "
                    "same recipe, files and packages"
                )


def most(number: int) -> int:
    """The largest of the numbers that the ranks hold; every rank must ask at once."""
    if count() == 1:
        return number
    import torch
    import torch.distributed as dist

    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def leave() -> None:
    """Parts with the other processes, when all are through."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------
# Faults


def watch() -> None:
    """Ends this process soon after another one has left a fault in the store."""
    if count() > 1:
        threading.Thread(target=_watch, name="finetune-ranks", daemon=True).start()


def _watch() -> None:
    with contextlib.suppress(Exception):  # the store is gone with the run
        store = _store()
        while store is not None:
            if store.check([_FAULT]):
                os._exit(json.loads(store.get(_FAULT))["code"])
            time.sleep(0.5)


def end(lines: Sequence[str], code: int) -> None:
    """Says a fault once, whichever ranks have met it, and ends this process; where it is the only one, does nothing."""
    if count() == 1:
        return
    mine = True
    with contextlib.suppress(Exception):  # better said twice than not at all
        if store := _store():
            deadline = time.monotonic() + (_PATIENCE if rank() else 0)
            while time.monotonic() < deadline and not store.check([_FAULT]):
                time.sleep(0.1)
            # Whoever is first is heard: what the others say is the same, or follows from it.
            text = json.dumps({"rank": rank(), "code": code})
            mine = store.compare_set(_FAULT, "", text).decode() == text
    where = f"rank {rank()} ({socket.gethostname()}): " if rank() else ""
    for line in lines if mine else ():
        print(where + line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def is_lost(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has gone."""
    text = str(error)
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket Timeout")
    return count() > 1 and isinstance(error, RuntimeError) and any(word in text for word in lost)


def _store() -> Any:
    """A connection of its own to the launcher's store; None where there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(*where, is_master=False, timeout=timedelta(seconds=10))
