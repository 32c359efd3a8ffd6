"""GPUs by memory and speed; this machine's device, memory, cores and energy."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.system.numbers import GIB


@dataclass(frozen=True)
class Device:
    """A device's name, whether it computes in bfloat16, and its CUDA capability (None for a CPU)."""

    name: str = "this CPU"
    bf16: bool = True
    capability: tuple[int, int] | None = None


def device_of(place: str | None = None) -> Device:
    """The device named by `cpu`, `cuda:1` and so on; for None and `auto` the current GPU, or else the CPU."""
    import torch

    place = "cuda" if place in (None, "auto") else place
    if not torch.cuda.is_available() or not place.startswith("cuda"):
        return Device()
    with torch.cuda.device(torch.device(place)):
        # By default torch returns True also for a GPU that only emulates bfloat16.
        own = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(torch.cuda.get_device_name(), own, torch.cuda.get_device_capability())


@dataclass(frozen=True)
class Hardware:
    """A GPU, or the CPU of this machine, to train on.

    Attributes:
        name: The name in `GPUS`, or the driver's name.
        memory: Bytes, as torch reports them, without the driver's share.
        device: Its name and capabilities.
        tflops_16bit: TFLOP/s of dense matrix products of 16-bit numbers; 0 if it is not known.
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
        """TFLOP/s under accelerate's `mixed_precision` ("no", "fp16" or "bf16"); 0 if it is not known."""
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
# Further cards, which `plan` knows by name. Memory: torch's total, as users' out-of-memory errors name it (GitHub
# issues: xiaoxiangAQ/GAS-Net 7, Morizeyao/GPT2-Chinese 104, liucongg/ChatGLM-Finetuning 73, stepfun-ai/Step-Video-T2V
# 8, and Victarry/stable-dreambooth 8 for an RTX 8000, which has an A6000's 48 GB). For the 4080, 5090 and B200, where
# none was found: the data sheet's, less the share that torch's total is below it on the like cards above. Speeds: as
# published, without sparsity; not held against the sheets yet.
CARDS = {
    gpu.name: gpu
    for gpu in (
        gpu_of_size("3090", 23.68, (8, 6), 71, 35.6),
        gpu_of_size("4080", 15.7, (8, 9), 97.5, 48.7),
        gpu_of_size("5090", 31.4, (12, 0), 209.5, 104.8),
        gpu_of_size("v100", 15.75, (7, 0), 125, 15.7),
        gpu_of_size("v100-32", 31.74, (7, 0), 125, 15.7),
        gpu_of_size("a6000", 47.4, (8, 6), 154.8, 38.7),
        gpu_of_size("l40s", 44.4, (8, 9), 362, 91.6),
        gpu_of_size("b200", 178.0, (10, 0), 2250, 75),
    )
}


def known_gpu(name: str) -> Hardware | None:
    """The entry of `GPUS` for a driver's name such as `NVIDIA A100-SXM4-40GB`; None if there is none."""
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
    """The memory that this process may use and what is free of it, in bytes; a container's limit counts.

    Free memory is what the kernel can give without swapping; on systems other than Linux, all of the memory.
    """
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available if sys.platform == "linux" else memory.total
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def usable_cores() -> int:
    """The number of cores that this process may use at once; a container's quota of processor time counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, math.ceil(quota)) for quota in _cgroup_quotas())])


def _cgroup_limits(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """Limit and use, without cached files, of each control group with a memory limit that this process is in."""
    for folder, version in _cgroup_folders("memory", groups, own):
        limit, used = _MEMORY_FILES[version]
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text())  # "max" where there is no limit
            words = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            stat = {name: int(value) for name, value in words}
            cached = [stat.get(f"total_{name}", stat.get(name, 0)) for name in _CACHED]
            yield most, int((folder / used).read_text()) - sum(cached)


def _cgroup_quotas(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """The cores' worth of processor time of each control group with a quota that this process is in."""
    for folder, version in _cgroup_folders("cpu", groups, own):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((folder / name).read_text() for name in _QUOTA_FILES[version]).split()
            if int(quota) > 0 and int(period) > 0:  # "max" or -1 where there is none
                yield int(quota) / int(period)


def _cgroup_folders(controller: str, groups: Path, own: Path) -> Iterator[tuple[Path, int]]:
    """The folders of the control groups that this process is in, the innermost first, and their version."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system
        return
    for line in lines:
        _, kind, path = line.split(":", 2)
        if kind == "":
            top, version = groups, 2
        elif controller in kind.split(","):
            top, version = groups / controller, 1
        else:
            continue
        place = top / path.strip("/")
        # Inside a container its own group may be the top, under another name than outside.
        for folder in (place, *place.parents[: len(place.parts) - len(top.parts)]):
            yield folder, version


# The files of a memory limit and of its use, and those of a quota and its period in microseconds, by cgroup version.
_MEMORY_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
_QUOTA_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}
# The parts of `memory.stat` that the kernel takes back first.
_CACHED = ("active_file", "inactive_file", "slab_reclaimable")


def process_peak_memory() -> int:
    """The peak memory of this process since it began, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def energy_millijoules() -> int:
    """The energy that this process's GPU has used since its driver was loaded; 0 if that is not known."""
    import torch

    if not torch.cuda.is_available():
        return 0
    try:
        import pynvml

        # The driver numbers GPUs in another way than CUDA, whose numbers depend on an environment variable.
        handle = torch.cuda._get_pynvml_handler()
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except Exception:  # no such library, or an old GPU: only a figure is lost
        return 0
