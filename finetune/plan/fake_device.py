"""What upstream does on a card, or with real values, where it is shown fake tensors on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from finetune.plan.memory import MemoryTracker
from finetune.train import loss


@contextmanager
def emulate_device(card: bool, tracker: MemoryTracker) -> Iterator[None]:
    """What upstream does on a card where it asks for the device.

    Fake tensors are on the CPU: torch 2.13 without CUDA ends the process when it takes gradients of fake CUDA tensors.

    | where | on a card |
    |---|---|
    | trl 1.16 `kernels/chunked_logprob.py` | trained tokens alone are scored, in tiles that Triton kernels fold |
    | torch 2.13 `native/Dropout.cpp` | the mask is kept as one byte |
    | torch 2.13 `native/SoftMax.cpp` | reads 16 bit and writes float32, with no copy between |
    | bitsandbytes 0.50 `autograd/_functions.py`, `matmul` | 8-bit rows are multiplied with 8-bit weights |
    """

    def few(*bounds: int) -> Iterator[int]:
        """Of many equal tiles the first two and the last; the second counts for those that are left out."""
        tiles = range(*bounds)
        if len(tiles) <= 3:
            yield from tiles
            return
        yield tiles[0]
        tracker.times = len(tiles) - 2
        yield tiles[1]
        tracker.times = 1
        yield tiles[-1]

    # Our own head's tiles; of its product over the vocabulary the columns are not told apart.
    tiles: list[tuple[Any, dict[str, Any]]] = [(loss, {"_COLUMNS": 2**31, "range": few})]
    if not card:
        with patched_attributes(tiles):
            yield
        return
    import bitsandbytes
    import bitsandbytes.autograd._functions as bnb
    from torch.nn import functional
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    plain_dropout, plain_softmax = functional.dropout, functional.softmax

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or p <= 0 or inplace:
            return plain_dropout(x, p, training, inplace)
        return torch.native_dropout(x, p, True)[0]

    def softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
        if dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16) and dim is not None:
            return torch._softmax(x, dim, True)
        return plain_softmax(x, dim, _stacklevel, dtype)

    def matmul(
        a: Any, b: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None
    ) -> Any:
        if threshold > 0:
            state.threshold = threshold
        return bnb.MatMul8bitLt.apply(a, b, out, bias, state)

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: None

    places = [
        *tiles,
        (functional, {"dropout": dropout, "softmax": softmax}),
        (bitsandbytes, {"matmul": matmul}),
        (utils, {"_use_triton": lambda device: True}),
        (
            chunked_logprob,
            {
                "_use_triton": lambda device: True,
                "_forward_kernel": Kernel(),
                "_backward_kernel": Kernel(),
                "triton": SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
                "_addmm_fp32": lambda sums, a, b: tracker.multiplied(sums.numel(), a.shape[1]),
            },
        ),
    ]
    with patched_attributes(places):
        yield


@contextmanager
def patched_attributes(places: list[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Each place has these names in place of its own meanwhile."""
    missing = object()
    before = [(place, name, getattr(place, name, missing)) for place, names in places for name in names]
    try:
        for place, names in places:
            for name, value in names.items():
                setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            if value is missing:
                delattr(place, name)
            else:
                setattr(place, name, value)
