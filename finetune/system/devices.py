"""Cards by their memory and speed; what of its speed a model takes, and what energy."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What the rules ask of a device; `capability` is CUDA's, None where there is no such card."""

    name: str = "this CPU"
    bf16: bool = True
    capability: tuple[int, int] | None = None


def device_of(place: str | None = None) -> Device:
    """The facts of a place such as `cpu` or `cuda:1`; absent, or auto: of the current card, or of the CPU."""
    import torch

    place = "cuda" if place in (None, "auto") else place
    if not torch.cuda.is_available() or not place.startswith("cuda"):
        return Device()
    with torch.cuda.device(torch.device(place)):
        # By default torch counts a card that only emulates it.
        own = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(torch.cuda.get_device_name(), own, torch.cuda.get_device_capability())


@dataclass(frozen=True)
class Hardware:
    """A GPU, or the CPU of this machine, to train on.

    Attributes:
        name: Its name in `GPUS`, or the driver's name.
        memory: In bytes, as torch counts it, without the driver's share.
        device: What it computes in.
        tflops_16bit: TFLOP/s of dense matrix products of 16-bit numbers; 0 where it is not known.
        tflops_32bit: The same of 32-bit numbers.
    """

    name: str
    memory: float
    device: Device
    tflops_16bit: float = 0.0
    tflops_32bit: float = 0.0

    @property
    def is_gpu(self) -> bool:
        """True for a CUDA GPU, False for a CPU."""
        return self.device.capability is not None

    def tflops(self, mixed_precision: str) -> float:
        """TFLOP/s under accelerate's `mixed_precision` ("no", "fp16" or "bf16"); 0 where it is not known."""
        return self.tflops_32bit if mixed_precision == "no" else self.tflops_16bit


def gpu_of_size(name: str, gib: float, capability: tuple[int, int] = (8, 0), *tflops: float) -> Hardware:
    """A CUDA GPU with `gib` GiB of memory; `tflops` of 16-bit and of 32-bit numbers."""
    return Hardware(name, gib * GIB, Device(name, capability >= (8, 0), capability), *tflops)


# Memory: torch's "total capacity". Speeds: NVIDIA's data sheets, without sparsity.
GPUS = {
    gpu.name: gpu
    for gpu in (
        gpu_of_size("t4", 14.56, (7, 5), 65, 8.1),
        gpu_of_size("l4", 22.03, (8, 9), 121, 30.3),
        gpu_of_size("a10", 21.98, (8, 6), 125, 31.2),
        gpu_of_size("4090", 23.64, (8, 9), 165, 82.6),
        gpu_of_size("a100-40", 39.38, (8, 0), 312, 19.5),
        gpu_of_size("a100-80", 79.14, (8, 0), 312, 19.5),
        gpu_of_size("h100", 79.10, (9, 0), 989, 66.9),
        gpu_of_size("h200", 139.72, (9, 0), 989, 66.9),
    )
}


def known_gpu(name: str) -> Hardware | None:
    """The entry of `GPUS` for a driver's name such as `NVIDIA A100-SXM4-40GB`; None where there is none."""
    # An L40S is not an L4, nor an A100 an A10. An A10G counts as an A10. GPUs in laptops and on PCIe are slower.
    if re.search(r"laptop|pcie", name, re.IGNORECASE) and not re.search(r"\ba100\b", name, re.IGNORECASE):
        return None
    words = set(re.findall(r"\w+", name.lower().replace("a10g", "a10")))
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words), None)


def this_machine(free: bool = False) -> Hardware:
    """The first GPU of this machine, or its CPU; with `free`, `memory` is what is free now."""
    import torch

    if not torch.cuda.is_available():
        return Hardware("this CPU", machine_memory()[1 if free else 0], Device())
    left, whole = torch.cuda.mem_get_info()
    device = device_of()
    gpu = known_gpu(device.name)
    speeds = (gpu.tflops_16bit, gpu.tflops_32bit) if gpu else ()
    return Hardware(device.name, left if free else whole, device, *speeds)


def machine_memory() -> tuple[int, int]:
    """Bytes of memory that this process may have, and those that are left of them; a container's limit counts.

    What is left is what the kernel can give without swapping. Other systems than Linux do not say it, and all of theirs
    is taken to be left.
    """
    import psutil

    told = psutil.virtual_memory()
    whole, left = told.total, told.available if sys.platform == "linux" else told.total
    for limit, used in _cgroup_limits():
        whole, left = min(whole, limit), min(left, max(0, limit - used))
    return whole, left


def _cgroup_limits(
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


def process_peak_memory() -> int:
    """The most bytes of memory that this process has had since it began."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def energy_millijoules() -> int:
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
