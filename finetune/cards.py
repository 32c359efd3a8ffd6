"""Cards by their memory and speed; what of its speed a model takes, and what energy."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.rules import Device, beside_text, device_of

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A place to train on.

    `memory` is in bytes, as torch counts it, the driver's share taken off. Speeds are dense matrix products in TFLOP
    per second, of 16-bit and of 32-bit numbers; 0 where they are not known.
    """

    name: str
    memory: float
    device: Device
    fast: float = 0.0
    slow: float = 0.0

    @property
    def cuda(self) -> bool:
        """Whether it is a CUDA card, and not a CPU."""
        return self.device.capability is not None

    def speed(self, computes: str) -> float:
        """TFLOP per second of products in accelerate's word for a type: no, fp16, bf16; 0 where it is not known."""
        return self.slow if computes == "no" else self.fast


def of_size(name: str, gib: float, capability: tuple[int, int] = (8, 0), *speeds: float) -> Card:
    """A CUDA card of so much memory."""
    return Card(name, gib * GIB, Device(name, capability >= (8, 0), capability), *speeds)


# Memory: what torch says is there ("total capacity"). Speeds: NVIDIA's data sheets, without sparsity.
CARDS = {
    card.name: card
    for card in (
        of_size("t4", 14.56, (7, 5), 65, 8.1),
        of_size("l4", 22.03, (8, 9), 121, 30.3),
        of_size("a10", 21.98, (8, 6), 125, 31.2),
        of_size("4090", 23.64, (8, 9), 165, 82.6),
        of_size("a100-40", 39.38, (8, 0), 312, 19.5),
        of_size("a100-80", 79.14, (8, 0), 312, 19.5),
        of_size("h100", 79.10, (9, 0), 989, 66.9),
        of_size("h200", 139.72, (9, 0), 989, 66.9),
    )
}


def known(name: str) -> Card | None:
    """The card of that name, which is the driver's: `NVIDIA A100-SXM4-40GB`; None where it is another one."""
    # An L40S is no L4, an A100 no A10; an A10G is as good as an A10, and cards in laptops and on PCIe are slower.
    if re.search(r"laptop|pcie", name, re.IGNORECASE) and not re.search(r"\ba100\b", name, re.IGNORECASE):
        return None
    words = set(re.findall(r"\w+", name.lower().replace("a10g", "a10")))
    return next((card for card in CARDS.values() if card.name.split("-")[0] in words), None)


def here(free: bool = False) -> Card:
    """This machine: its first card, or its CPU with the machine's memory; `free`: what of it is left."""
    import torch

    if not torch.cuda.is_available():
        return Card("this CPU", machine()[1 if free else 0], Device())
    left, whole = torch.cuda.mem_get_info()
    device = device_of()
    card = known(device.name)
    return Card(device.name, left if free else whole, device, *((card.fast, card.slow) if card else ()))


def machine() -> tuple[int, int]:
    """Bytes of memory that this process may have, and those that are left of them; a container's limit counts.

    What is left is what the kernel can give without swapping. Other systems than Linux do not say it, and all of theirs
    is taken to be left.
    """
    import psutil

    told = psutil.virtual_memory()
    whole, left = told.total, told.available if sys.platform == "linux" else told.total
    for limit, used in _limits():
        whole, left = min(whole, limit), min(left, max(0, limit - used))
    return whole, left


def _limits(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """Of each control group with a limit that this process is in: the limit, and what is used beside cached files."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system
        return
    for line in lines:
        _, kind, path = line.split(":", 2)
        if kind == "":  # version 2
            top, limit, used = groups, "memory.max", "memory.current"
        elif "memory" in kind.split(","):
            top, limit, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        place = top / path.strip("/")
        # A container may see its own group as the top, and not by the name that it has outside.
        for folder in (place, *place.parents[: len(place.parts) - len(top.parts)]):
            with contextlib.suppress(OSError, ValueError):
                most = int((folder / limit).read_text())  # "max" is none
                words = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                stat = {name: int(value) for name, value in words}
                cached = [stat.get(f"total_{name}", stat.get(name, 0)) for name in _CACHED]
                yield most, int((folder / used).read_text()) - sum(cached)


# Of `memory.stat`, what the kernel takes back first.
_CACHED = ("active_file", "inactive_file", "slab_reclaimable")


def process_peak() -> int:
    """The most bytes of memory that this process has had since it began."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def millijoules() -> int:
    """What this process's card has taken since its driver was loaded; 0 where nobody counts it."""
    import torch

    if not torch.cuda.is_available():
        return 0
    try:
        import pynvml

        # The driver counts cards in another way than CUDA, whose count an environment variable may change.
        handle = torch.cuda._get_pynvml_handler()
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except Exception:  # no such library, or an old card: only a figure is lost
        return 0


# ---------------------------------------------------------------------------------------------------------------
# What a step computes


def work_per_token(model: Any, lengths: Mapping[int, int], scored: float = 1.0) -> float:
    """Floating point operations that a step needs a token: forward and backward, nothing computed a second time.

    Two for each weight that the token is multiplied with, two more for the gradient of what went in, and two for the
    weight's own where it is trained; in attention as many for each token that it looks back at. It is what model FLOPs
    utilisation counts (Chowdhery et al. 2022, PaLM, appendix B), with the weights that stay frozen taken for what they
    cost, and each token looking back only as far as it does. Not counted: what is no product of matrices (scans of
    state space models), the unpacking of 4-bit weights, token rows and norms.

    Args:
        model: As it is trained, on one process: whole weights, its adapter on it.
        lengths: How many rows there are of each length in tokens.
        scored: The share of the tokens whose scores are computed.

    Returns:
        The number; 0 where a model's experts cannot be told.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    beside = tuple(f".{name}." for name in beside_text(base))
    head = {id(p) for p in base.get_output_embeddings().parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    config = base.config.get_text_config()
    active = _active(config)
    work = 0.0
    for name, parameter in model.named_parameters():
        unused = "original_module." in name or "lora_embedding_A" in name or "trainable_tokens" in name
        if parameter.ndim < 2 or unused or any(part in f".{name}" for part in beside):
            continue
        state = getattr(parameter, "quant_state", None)  # of a 4-bit weight, which is stored flat
        count = float(state.shape.numel() if state is not None else parameter.numel())
        if id(parameter) in head:
            count *= scored
        elif id(parameter) in tables:
            continue
        elif ".experts." in name:
            if not active:
                return 0.0
            count *= active
        work += count * (6 if parameter.requires_grad else 4)
    return work + _attention(config, lengths)


# How configs call the number of a model's experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def first(config: Any, *names: str) -> int:
    """The first of the numbers that a config has, and is not 0; 0 where it has none."""
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def _active(config: Any) -> float:
    """The share of a model's experts that a token meets; 0 where it cannot be told."""
    several = first(config, *EXPERTS)
    chosen = first(config, "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")
    return chosen / several if several else 0.0


def _attention(config: Any, lengths: Mapping[int, int]) -> float:
    """The part of attention's scores and sums, of all its layers."""
    tokens = sum(length * rows for length, rows in lengths.items())
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    if getattr(config, "v_head_dim", None) and getattr(config, "qk_nope_head_dim", None):
        both = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        both = 2 * width
    work = 0.0
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
            continue
        window = (getattr(config, "sliding_window", None) if kind == "sliding_attention" else None) or max(
            lengths, default=0
        )
        pairs = sum(rows * _pairs(length, window) for length, rows in lengths.items())
        work += 6 * heads * both * pairs / max(1, tokens)
    return work


def _pairs(length: int, window: int) -> int:
    """How many tokens those of a row look at, each at itself and back."""
    short = min(length, window)
    return short * (short + 1) // 2 + (length - short) * window
