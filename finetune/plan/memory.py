"""Counts the bytes of tensors that are alive while a model is run under torch's FakeTensorMode, where none has any."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# The part that leaves a card which is full, and so counts in no total.
PAGED = "paged"

_aten = torch.ops.aten
# Attention of a CPU, whose shapes are those of a card's: torch 2.13 counts the work of cards' kernels alone.
_forward_work: Any = sdpa_flop_count
_backward_work: Any = sdpa_backward_flop_count
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes alive by part, now and when they were most; and the arithmetic that was done.

    A storage counts once, from the operator that made it to its end, which a weak reference tells. It belongs to the
    part that was at work when it was made. To be entered within a FakeTensorMode.
    """

    def __init__(self, card: bool, trained: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.card = card
        self.trained = trained  # tokens of a batch that are trained on; None: all
        self.part = "weights"
        # Of weights that are used twice: their two gradients are added in place.
        self.tied: set[torch.Size] = set()
        self.now: Counter[str] = Counter()
        self.total = self.most = 0
        self.at_most: dict[str, int] = {}
        self.phase = ""
        self.phases: dict[str, dict[str, int]] = {}
        self.flops = 0
        self.operators = 0  # those that make a tensor; a view is none
        self.times = 1  # how often the work at hand is done
        self._live: dict[int, list[Any]] = {}

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What is made in it belongs to this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def begin(self, phase: str) -> None:
        """From now on another maximum, that of this phase; the work is counted from the first on."""
        if not self.phase:
            self.flops = self.operators = 0
        self.end()
        self.phase = phase

    def end(self) -> None:
        """Keeps the maximum of the phase at hand."""
        if self.phase:
            self.phases[self.phase] = {k: v for k, v in self.at_most.items() if v and k != PAGED}
        self.most, self.at_most = self.total, dict(self.now)

    def add(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Counts a tensor's storage, or moves it to another part."""
        storage = tensor.untyped_storage()
        key, part = storage._cdata, part or self.part
        if key in self._live:
            return
        entry: list[Any] = [part, storage.nbytes(), None]
        entry[2] = weakref.ref(storage, lambda _: self._gone(key, entry))
        self._live[key] = entry
        self._count(part, entry[1])

    def move(self, tensor: torch.Tensor, part: str) -> None:
        """Moves a tensor's storage to another part."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry[0] != part:
            self.now[entry[0]] -= entry[1]
            self.now[part] += entry[1]
            entry[0] = part

    def spike(self, count: int) -> None:
        """Bytes that an operator needs while it runs and that no tensor shows."""
        if self.total + count > self.most:
            self.most = self.total + count
            self.at_most = dict(self.now)
            self.at_most[self.part] = self.at_most.get(self.part, 0) + count

    def _in_place(self, args: tuple[Any, ...]) -> bool:
        """Whether autograd would add these in place, which it does not with tensors of a subclass, as fake ones are.

        Source: torch 2.13 `csrc/autograd/input_buffer.cpp`, `can_accumulate_inplace`.
        """
        if torch.is_grad_enabled() or not all(isinstance(a, torch.Tensor) for a in args):
            return False
        return args[0].shape == args[1].shape and args[0].shape in self.tied

    def multiplied(self, results: int, inner: int) -> None:
        """Counts the work of a matrix product."""
        self._work(2 * results * inner)

    def _work(self, flops: int) -> None:
        self.flops += flops * self.times

    def _count(self, part: str, size: int) -> None:
        self.now[part] += size
        self.total += size if part != PAGED else 0
        if self.total > self.most:
            self.most, self.at_most = self.total, dict(self.now)

    def _chosen(self, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The rows that a mask chooses, which only labels have here; how many, a fake tensor cannot tell."""
        count = mask.numel() if self.trained is None else self.trained
        self.spike(count * mask.dim() * 8)  # their places, as int64
        return tensor.new_empty((count, *tensor.shape[mask.dim() :]))

    def _gone(self, key: int, entry: list[Any]) -> None:
        if self._live.get(key) is entry:
            del self._live[key]
        self.now[entry[0]] -= entry[1]
        self.total -= entry[1] if entry[0] != PAGED else 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operator."""
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if stand_in := _STAND_INS.get(packet.__name__ if func.namespace == "bitsandbytes" else ""):
            with self:
                out = stand_in(*args, **kwargs)
            if packet.__name__ == "int8_scaled_mm":
                self.multiplied(out.numel(), args[0].shape[-1])
            return out
        if packet in _INDEXED and (mask := _mask(args[1])) is not None:
            out = self._chosen(args[0], mask) if packet is _aten.index else args[0]
        elif packet is _aten.add and self._in_place(args):
            return args[0]
        elif packet is _aten._grouped_mm and args[0].dtype != torch.bfloat16:
            # A CPU's kernel takes nothing else. These copies, which a card needs not, do not count.
            out = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
        else:
            out = func(*args, **kwargs)
        if packet in flop_registry:
            self._work(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet is _aten._grouped_mm:  # experts; which tokens go to which makes no difference
            self.multiplied(args[0].shape[-2] * args[0].shape[-1], args[1].shape[-1])
        elif packet is _aten.linear:
            self.multiplied(out.numel(), args[0].shape[-1])
        elif packet is _ATTENTION:
            self._work(_forward_work(*(tensor.shape for tensor in args[:3])))
        elif packet is _ATTENTION_BACKWARD:
            self._work(_backward_work(*(tensor.shape for tensor in args[:4])))
            if self.card:
                # Cards' kernels sum the gradient of the queries in float32.
                # Source: torch 2.13 `flash_attn/flash_api.cpp`, `mha_bwd` (dq_accum).
                self.spike(args[1].numel() * 4)
        self.operators += self.times * (not func.is_view)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


# ---------------------------------------------------------------------------------------------------------------
# Operators that a fake run cannot follow, or whose fake form hides what they take

_INDEXED = (_aten.index, _aten.index_put_, _aten._index_put_impl_)


def _mask(indices: Any) -> torch.Tensor | None:
    found = [index for index in indices if index is not None]
    return found[0] if len(found) == 1 and found[0].dtype == torch.bool else None


def _gemm_4bit(*args: Any, **kwargs: Any) -> Any:
    """As many rows as training has are multiplied with the whole weight, unpacked.

    Source: bitsandbytes 0.50 `backends/default/ops.py`, `_gemm_4bit_default_impl`; CUDA's does the same but for few
    rows or small weights.
    """
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    return _gemm_4bit_default_impl(*args, **kwargs)


def _int8_quant(tensor: torch.Tensor, threshold: float = 0.0) -> Any:
    """Without outliers: how many there are, weights and rows decide."""
    rows = tensor.numel() // tensor.shape[-1]
    outliers = tensor.new_empty(0, dtype=torch.int64) if threshold else None
    packed = torch.empty_like(tensor, dtype=torch.int8)
    return packed, tensor.new_empty(rows, dtype=torch.float32), outliers


def _int8_mixed(
    a: torch.Tensor, ca: Any, cb: Any, sca: Any, scb: Any, outliers: Any = None, bias: Any = None
) -> Any:
    """The same."""
    product = torch.ops.bitsandbytes.int8_scaled_mm.default(ca, cb, sca, scb, bias=bias, dtype=a.dtype)
    return product, a.new_empty(0)


def _int8_mm(a: Any, b: Any, rows: Any, columns: Any, bias: Any = None, dtype: Any = None) -> Any:
    """The product is summed in int32 first.

    Source: bitsandbytes 0.50 `backends/default/ops.py`, `int8_scaled_mm`.
    """
    sums = torch.empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32)
    return torch.empty_like(sums, dtype=dtype or torch.float16)


_STAND_INS: dict[str, Any] = {
    "gemm_4bit": _gemm_4bit,
    "int8_vectorwise_quant": _int8_quant,
    "int8_mixed_scaled_mm": _int8_mixed,
    "int8_scaled_mm": _int8_mm,
}
