"""Runs a module in a process whose time and memory have limits, for what somebody else's file makes us compute.

The process imports only what its module does, so that it starts in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OUT_OF_MEMORY = 3
# A longer wait than any limit of processor time: the process may get less than one core.
_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """The limits of a process.

    Attributes:
        seconds: Its time on a processor.
        memory: Its address space in bytes.
    """

    seconds: int
    memory: int


def run(module: str, job: Any, limits: Limits) -> int:
    """The exit code of `python -m MODULE`: `OUT_OF_MEMORY` or less than 0 if it reached a limit.

    Args:
        module: A module that ends with `sys.exit(serve(FUNCTION))`.
        job: The function's argument, as JSON holds it.
        limits: The limits.
    """
    from finetune.system.fresh_process import child_environment  # the process itself needs no pydantic

    text = json.dumps({"job": job, "seconds": limits.seconds, "memory": limits.memory})
    try:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module],
            input=text.encode(),
            env=child_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
        ).returncode
    except subprocess.TimeoutExpired:
        return -9


def serve(function: Callable[[Any], object]) -> int:
    """In the process: sets the limits, and calls a function with the job; returns the exit code."""
    import resource

    given = json.load(sys.stdin)
    for limit, most in (
        (resource.RLIMIT_CPU, given["seconds"]),
        (resource.RLIMIT_AS, given["memory"]),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # the user's own limit is lower
            resource.setrlimit(limit, (most, most))
    try:
        function(given["job"])
    except MemoryError:
        return OUT_OF_MEMORY
    return 0
