"""Records when tensors are made and freed, and FLOPs, while a model runs under torch's FakeTensorMode."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# The part for state of a paged optimizer. It can leave the GPU, so it does not count in the total.
PAGED = "paged"
# Kinds of a timeline's events.
_PHASE, _LIVE, _SPIKE, _TILES = "phase", "live", "spike", "tiles"

_aten = torch.ops.aten
# torch 2.13 counts FLOPs of attention only for GPU kernels; the CPU's take arguments of the same shapes.
_attention_flops: Any = sdpa_flop_count
_attention_backward_flops: Any = sdpa_backward_flop_count
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Timeline:
    """The changes of memory while a step runs.

    Attributes:
        kept: Bytes by part before the first change.
        events: What each change is: `_PHASE` and the name of the phase that begins, `_LIVE` and the part whose bytes
            change, `_SPIKE` and the part for which an operator needs bytes while it runs, or `_TILES` and the number of
            tiles of a loop, at most three.
        sizes: The bytes of each event.
    """

    kept: dict[str, int]
    events: list[tuple[str, str]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, kind: str, name: str, size: int = 0) -> None:
        """Adds an event."""
        self.events.append((kind, name))
        self.sizes.append(size)

    def peaks(self) -> dict[str, dict[str, int]]:
        """Bytes by part at the peak of each phase."""
        now, phases = Counter(self.kept), dict[str, dict[str, int]]()
        total = peak = sum(size for part, size in now.items() if part != PAGED)
        phase = ""
        for (kind, name), size in zip(self.events, self.sizes, strict=True):
            if kind == _PHASE:
                phase, peak, phases[name] = name, total, dict(now)
                continue
            if kind == _LIVE:
                now[name] += size
                total += size if name != PAGED else 0
            spike = size if kind == _SPIKE else 0
            if phase and total + spike > peak:
                peak = total + spike
                phases[phase] = {**now, name: now[name] + spike}
        return {phase: {k: v for k, v in parts.items() if v and k != PAGED} for phase, parts in phases.items()}

    def at(self, share: float, other: Timeline) -> Timeline | None:
        """The timeline of a batch whose number of rows lies at a share of the way from this one's to another's.

        Sizes are lines in the number of rows, so it is exact, beyond the two as well as between them.

        Returns:
            None if the two do not have the same events.
        """
        if self.events != other.events:
            return None
        sizes = [round(a + (b - a) * share) for a, b in zip(self.sizes, other.sizes, strict=True)]
        return Timeline(self.kept, self.events, sizes)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of live tensors by part, now and from the beginning of a timeline on; FLOPs and operators.

    A storage counts once, from the operator that made it until it is freed, which a weak reference reports. It belongs
    to the part that was current (`part`) when it was made. To be entered inside a FakeTensorMode.
    """

    def __init__(self, on_gpu: bool, trained: int | None = None) -> None:
        """Starts with no tensors.

        Args:
            on_gpu: True counts what a GPU's kernels allocate, False what the CPU's do.
            trained: The number of trained tokens in a batch; None: all.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_gpu = on_gpu
        self.trained = trained
        self.part = "weights"
        # Shapes of weights that are used twice, whose two gradients autograd adds in place.
        self.tied: set[torch.Size] = set()
        self.now: Counter[str] = Counter()
        self.timeline = Timeline({})
        self.phase = ""
        self.flops = 0.0
        self.operators = 0.0  # without views, which make no tensor
        self.times = 1.0  # the factor of each operator's FLOPs; see `fake_device.emulate_device`
        self._live: dict[int, list[Any]] = {}

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Tensors that are made inside belong to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def start(self) -> None:
        """Starts a timeline, and counts FLOPs and operators from here."""
        self.timeline, self.phase = Timeline(dict(self.now)), ""
        self.flops = self.operators = 0.0

    def begin(self, phase: str) -> None:
        """Starts a phase, which has a peak of its own."""
        self.phase = phase
        self.timeline.add(_PHASE, phase)

    def note_tiles(self, count: int) -> None:
        """Notes that a loop over tiles begins. Loops over three or more are alike; see `fake_device.emulate_device`."""
        self.timeline.add(_TILES, str(min(count, 3)))

    @contextmanager
    def repeated(self, times: float) -> Iterator[None]:
        """FLOPs and operators inside count so many times."""
        self.times *= times
        yield
        self.times /= times

    def add(self, tensor: torch.Tensor, part: str | None = None) -> None:
        """Counts a tensor's storage from now on, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, part = storage._cdata, part or self.part
        if key in self._live:
            return
        entry: list[Any] = [part, storage.nbytes(), None]
        entry[2] = weakref.ref(storage, lambda _: self._gone(key, entry))
        self._live[key] = entry
        self._count(part, entry[1])

    def add_bytes(self, sizes: dict[str, int]) -> None:
        """Counts bytes by part that stay to the end."""
        for part, size in sizes.items():
            self._count(part, size)

    def move(self, tensor: torch.Tensor, part: str) -> None:
        """Moves a tensor's storage to another part."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry[0] != part:
            self._count(entry[0], -entry[1])
            self._count(part, entry[1])
            entry[0] = part

    def spike(self, count: int) -> None:
        """Counts `count` bytes that an operator needs only while it runs."""
        self.timeline.add(_SPIKE, self.part, count)

    def _adds_in_place(self, args: tuple[Any, ...]) -> bool:
        """True if autograd would add these two gradients in place, which it does with real tensors, not with fake ones.

        Source: torch 2.13 `csrc/autograd/input_buffer.cpp`, `can_accumulate_inplace`.
        """
        if torch.is_grad_enabled() or not all(isinstance(a, torch.Tensor) for a in args):
            return False
        return args[0].shape == args[1].shape and args[0].shape in self.tied

    def count_product(self, results: int, inner: int) -> None:
        """Counts a matrix product with `results` elements, each a sum over `inner` products."""
        self._count_flops(2 * results * inner)

    def _count_flops(self, flops: int) -> None:
        self.flops += flops * self.times

    def _count(self, part: str, size: int) -> None:
        self.now[part] += size
        self.timeline.add(_LIVE, part, size)

    def _masked(self, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The rows that a boolean mask selects: as many as trained tokens, since a fake mask has no values."""
        count = mask.numel() if self.trained is None else self.trained
        self.spike(count * mask.dim() * 8)  # their indices, in int64
        return tensor.new_empty((count, *tensor.shape[mask.dim() :]))

    def _gone(self, key: int, entry: list[Any]) -> None:
        if self._live.get(key) is entry:
            del self._live[key]
        self._count(entry[0], -entry[1])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operator on fake tensors and counts what it makes and computes."""
        if func is torch.ops.prim.device.default:  # asked three times as often as all operators together are run
            return args[0].fake_device
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if stand_in := _STAND_INS.get(packet.__name__ if func.namespace == "bitsandbytes" else ""):
            with self:
                out = stand_in(*args, **kwargs)
            if packet.__name__ == "int8_scaled_mm":
                self.count_product(out.numel(), args[0].shape[-1])
            return out
        if packet in _INDEXED and (mask := _mask(args[1])) is not None:
            out = self._masked(args[0], mask) if packet is _aten.index else args[0]
        elif packet is _aten.add and self._adds_in_place(args):
            return args[0]
        elif packet is _aten._grouped_mm and args[0].dtype != torch.bfloat16:
            # The CPU's kernel takes bfloat16 only. These copies, which a GPU does not need, are not counted.
            out = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
        else:
            out = func(*args, **kwargs)
        if packet in flop_registry:
            self._count_flops(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet is _aten._grouped_mm:  # experts; how tokens are distributed over them makes no difference
            self.count_product(args[0].shape[-2] * args[0].shape[-1], args[1].shape[-1])
        elif packet is _aten.linear:
            self.count_product(out.numel(), args[0].shape[-1])
        elif packet is _ATTENTION:
            self._count_flops(_attention_flops(*(tensor.shape for tensor in args[:3])))
        elif packet is _ATTENTION_BACKWARD:
            self._count_flops(_attention_backward_flops(*(tensor.shape for tensor in args[:4])))
            if self.on_gpu:
                # GPU kernels accumulate the gradient of the queries in float32.
                # Source: torch 2.13 `flash_attn/flash_api.cpp`, `mha_bwd` (dq_accum).
                self.spike(args[1].numel() * 4)
        self.operators += self.times * (not func.is_view)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


# ---------------------------------------------------------------------------------------------------------------
# Operators that fake tensors cannot run, or whose fake kernels hide memory

_INDEXED = (_aten.index, _aten.index_put_, _aten._index_put_impl_)


def _mask(indices: Any) -> torch.Tensor | None:
    given = [index for index in indices if index is not None]
    return given[0] if len(given) == 1 and given[0].dtype == torch.bool else None


def _gemm_4bit(*args: Any, **kwargs: Any) -> Any:
    """For batches of a training step's size the whole weight is dequantised first.

    Source: bitsandbytes 0.50 `backends/default/ops.py`, `_gemm_4bit_default_impl`; CUDA's does the same except for few
    rows or small weights.
    """
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    return _gemm_4bit_default_impl(*args, **kwargs)


def _int8_quant(tensor: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantises without outliers, whose number depends on values."""
    rows = tensor.numel() // tensor.shape[-1]
    outliers = tensor.new_empty(0, dtype=torch.int64) if threshold else None
    packed = torch.empty_like(tensor, dtype=torch.int8)
    return packed, tensor.new_empty(rows, dtype=torch.float32), outliers


def _int8_mixed(a: torch.Tensor, ca: Any, cb: Any, sca: Any, scb: Any, outliers: Any = None, bias: Any = None) -> Any:
    """Multiplies without outliers, as `_int8_quant`."""
    product = torch.ops.bitsandbytes.int8_scaled_mm.default(ca, cb, sca, scb, bias=bias, dtype=a.dtype)
    return product, a.new_empty(0)


def _int8_mm(a: Any, b: Any, rows: Any, columns: Any, bias: Any = None, dtype: Any = None) -> Any:
    """The product is accumulated in int32 first.

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
