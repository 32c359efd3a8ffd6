"""What is known before anything is downloaded: bases by their configs, cards by their memory and speed."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.base import quiet
from finetune.model import load_config
from finetune.rules import Device
from finetune.sections import ModelSection

GIB = 2**30


class PlanError(ValueError):
    """What is asked cannot be planned, or does not fit."""


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


def _card(name: str, gib: float, capability: tuple[int, int], fast: float, slow: float) -> Card:
    return Card(name, gib * GIB, Device(name, capability >= (8, 0), capability), fast, slow)


# Memory: what torch says is there ("total capacity"). Speeds: NVIDIA's data sheets, without sparsity.
CARDS = {
    card.name: card
    for card in (
        _card("t4", 14.56, (7, 5), 65, 8.1),
        _card("l4", 22.03, (8, 9), 121, 30.3),
        _card("a10", 21.98, (8, 6), 125, 31.2),
        _card("4090", 23.64, (8, 9), 165, 82.6),
        _card("a100-40", 39.38, (8, 0), 312, 19.5),
        _card("a100-80", 79.14, (8, 0), 312, 19.5),
        _card("h100", 79.10, (9, 0), 989, 66.9),
        _card("h200", 139.72, (9, 0), 989, 66.9),
    )
}


def card_of(name: str) -> Card:
    """A card by its name, or one of so many GB.

    Raises:
        PlanError: There is none of that name.
    """
    if name.lower() in CARDS:
        return CARDS[name.lower()]
    try:
        size = float(name.lower().removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise PlanError(f"--gpu: is {name}; write one of {', '.join(CARDS)}, or a size in GB, such as 24")
    return _card(f"{size:g} GB", size, (8, 0), 0, 0)


def here(free: bool = False) -> Card:
    """This machine: its first card, or its CPU with the machine's memory; `free`: what of it is left."""
    import torch

    if torch.cuda.is_available():
        from finetune.rules import device_of

        left, whole = torch.cuda.mem_get_info()
        device = device_of()
        known = next((c for c in CARDS.values() if c.name.split("-")[0] in device.name.lower()), None)
        speeds = (known.fast, known.slow) if known else (0.0, 0.0)
        return Card(device.name, left if free else whole, device, *speeds)
    return Card("this CPU", _machine(free), Device())


def _machine(free: bool) -> int:
    """Bytes of memory of the machine; of those that are left, what the kernel says can be had without swapping."""
    import os

    if free and (known := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":", 1) for line in known.read_text(encoding="ascii").splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    families = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    return {name: family["config"] for family in families for name in family["models"]}


def config_of(section: ModelSection) -> Any:
    """The base's config: shipped numbers of those that are known, else a directory's or the Hub's.

    Raises:
        ModelError: There is none to load.
    """
    from transformers import AutoConfig

    name = section.name_or_path
    folder = Path(name).expanduser()
    if name in _known() and section.revision is None and not folder.is_dir():
        facts = dict(_known()[name])
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    if (folder / "config.json").is_file():  # its weights may come later
        with quiet():
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=section.trust_remote_code)
    return load_config(section)
