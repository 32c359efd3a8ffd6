"""The content of `environment.json`: the machine, the packages and the base of a run."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import NotRequired, TypedDict

import torch

from finetune import __version__
from finetune.model.compatibility import stored_quantisation
from finetune.model.locate import Base
from finetune.model.precision import Precision
from finetune.system import distributed


class Environment(TypedDict):
    """`environment.json`: the machine, the packages and the base of a run."""

    device: str
    processes: int
    threads: int
    python: str
    platform: str
    commit: str | None
    base_commit: str | None
    dtype: str
    versions: dict[str, str]
    base_fingerprint: NotRequired[str]
    base_quantization: NotRequired[str]


def environment(precision: Precision, base: Base) -> Environment:
    """The content of `environment.json`: this machine, its packages and the base."""
    clone = Path(__file__).parents[2]
    commit = None
    if (clone / ".git").exists():  # an installed package may lie inside somebody else's repository
        git = ["git", "-C", str(clone), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    identity = base.identity
    found: Environment = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.system(),
        "commit": commit,
        "base_commit": identity.get("base_commit"),
        "dtype": str(precision.loaded).removeprefix("torch."),
        "versions": versions(),
    }
    if "base_fingerprint" in identity:
        found["base_fingerprint"] = identity["base_fingerprint"]
    if method := stored_quantisation(base.config):
        found["base_quantization"] = method
    return found


@functools.cache  # each name takes 8 ms
def versions() -> dict[str, str]:
    """The installed releases of the packages that decide what a run computes."""
    names = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
    return {"finetune": __version__} | {name: importlib.metadata.version(name) for name in names}
