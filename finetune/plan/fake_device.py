"""Makes libraries behave on fake CPU tensors as they do on a GPU, or with real values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from finetune.plan.memory import MemoryTracker
from finetune.train import loss

# Objects, usually modules, each with values for some of its attributes.
Patches = list[tuple[object, dict[str, object]]]


@contextmanager
def emulate_device(on_gpu: bool, tracker: MemoryTracker) -> Iterator[None]:
    """Replaces library functions that branch on the device, so that they run as on a GPU, until the context ends.

    Fake tensors are on the CPU because torch 2.13 without CUDA crashes when it takes gradients of fake CUDA tensors.

    | where | on a GPU |
    |---|---|
    | trl 1.16 `kernels/chunked_logprob.py` | only trained tokens are scored, in tiles that Triton kernels reduce |
    | torch 2.13 `native/Dropout.cpp` | the mask is kept as one byte per element |
    | torch 2.13 `native/SoftMax.cpp` | reads 16-bit and writes float32 without a copy between |
    | bitsandbytes 0.50 `autograd/_functions.py`, `matmul` | 8-bit activations are multiplied with 8-bit weights |

    Args:
        on_gpu: False only shortens the loops over tiles of our own loss.
        tracker: The tracker to which the memory that shortened loops and replaced kernels leave out is added.
    """

    def few_tiles(*bounds: int) -> Iterator[int]:
        """Iterates over the first two of many tiles; the second counts for those left out, the last of them smaller."""
        tiles = range(*bounds)
        tracker.note_tiles(len(tiles))
        yield from tiles[:1] if len(tiles) > 2 else tiles
        if len(tiles) > 2:
            with tracker.repeated((tiles.stop - tiles[1]) / tiles.step):
                yield tiles[1]

    # Our own loss works in tiles of tokens, and its loop over columns of the vocabulary becomes a single pass.
    # Its buffers, which a run keeps from step to step, are made anew in each, so that all steps are alike.
    buffers: list[torch.Tensor] = []
    make = loss._two_buffers
    own = {"_COLUMNS": 2**31, "range": few_tiles, "_two_buffers": lambda _, *shape: make(buffers, *shape)}
    tiles: Patches = [(loss, own)]
    with patched_attributes([*tiles, *(_gpu_patches(tracker, few_tiles) if on_gpu else [])]):
        yield


def _gpu_patches(tracker: MemoryTracker, few_tiles: Callable[..., Iterator[int]]) -> Patches:
    """The functions that run as on a GPU; see `emulate_device`, which has the arguments."""
    import bitsandbytes
    import bitsandbytes.autograd._functions as bnb
    from torch.nn import functional
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    cpu_dropout, cpu_softmax = functional.dropout, functional.softmax

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or p <= 0 or inplace:
            return cpu_dropout(x, p, training, inplace)
        return torch.native_dropout(x, p, True)[0]

    def softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        if dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16) and dim is not None:
            return torch._softmax(x, dim, True)
        return cpu_softmax(x, dim, _stacklevel, dtype)

    def matmul(a: Any, b: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None) -> Any:
        if threshold > 0:
            state.threshold = threshold
        return bnb.MatMul8bitLt.apply(a, b, out, bias, state)

    class NoKernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    return [
        (functional, {"dropout": dropout, "softmax": softmax}),
        (bitsandbytes, {"matmul": matmul}),
        (utils, {"_use_triton": lambda device: True}),
        (
            chunked_logprob,
            {
                "range": few_tiles,
                "_use_triton": lambda device: True,
                "_forward_kernel": NoKernel(),
                "_backward_kernel": NoKernel(),
                "triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
                "_addmm_fp32": lambda sums, a, b: tracker.count_product(sums.numel(), a.shape[1]),
            },
        ),
    ]


@contextmanager
def patched_attributes(patches: Patches) -> Iterator[None]:
    """Sets attributes of objects (usually modules) until the context ends, then restores them."""
    missing = object()
    before = [(owner, name, getattr(owner, name, missing)) for owner, names in patches for name in names]
    try:
        for owner, names in patches:
            for name, value in names.items():
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
