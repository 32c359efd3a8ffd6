"""Settings that count only before torch and the libraries on it are imported."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# The device files of NVIDIA's and AMD's GPUs and of TPUs.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def prepare_imports() -> None:
    """Makes upstream's imports quicker, and on a CPU lets idle threads sleep.

    transformers, PEFT and trl import bitsandbytes wherever it is installed, and its `torch.compile` decorators load
    torch's compiler: a fifth of the time of all imports of a training run. Here its functions are compiled when they
    are called.

    OpenMP's threads wait for one another by spinning. Beside other busy processes they take the processor from those
    that they wait for (docs/benchmarks.md). A variable that the user has set is kept.

    Source: bitsandbytes 0.50 `backends/default/ops.py`, `_try_torch_compile`; GCC's libgomp, `OMP_WAIT_POLICY`.
    """
    if _Deferred not in sys.meta_path:
        sys.meta_path.insert(0, _Deferred)
    if not any(map(os.path.exists, _ACCELERATORS)):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class _Deferred:
    """Finds the backends of bitsandbytes."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("bitsandbytes.backends."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader.exec_module = _compiling_later(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec


def _compiling_later(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """`exec_module` with a `torch.compile` whose functions compile themselves when they are called."""

    def execute_module(module: ModuleType) -> None:
        import torch

        compile_now = torch.compile
        torch.compile = functools.partial(_compile_later, compile_now)
        try:
            execute(module)
        finally:
            torch.compile = compile_now

    return execute_module


def _compile_later(compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any) -> Any:
    if function is None:
        return functools.partial(_compile_later, compile_now, **options)
    compiled = functools.cache(lambda: compile_now(function, **options))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
