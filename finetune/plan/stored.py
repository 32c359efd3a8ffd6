"""Costs of steps that an earlier plan has computed, in the cache."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from trl import SFTConfig

import finetune
from finetune.plan.settings import StepSettings
from finetune.plan.step import StepCost
from finetune.system import files
from finetune.system.cache import cache_dir, remove_unused
from finetune.system.devices import Hardware
from finetune.system.installed import installed_digest

_COSTS = TypeAdapter(dict[str, StepCost])
# The sections of a recipe that a step does not depend on. Of `training` it depends on what `arguments` holds.
_OTHER = {"data", "training", "export", "evaluate", "hub"}


class StoredCosts:
    """The costs of one base on one hardware; `save` writes those that were added.

    Nothing is stored for a base with Python files of its own, whose code the key does not hold.
    """

    def __init__(self, config: Any, hardware: Hardware, arguments: SFTConfig) -> None:
        """Reads what is stored.

        Args:
            config: The base's transformers config.
            hardware: A GPU or a CPU.
            arguments: The recipe's `training` section as an `SFTConfig`.
        """
        options = {name: value for name, value in arguments.to_dict().items() if not name.endswith("_dir")}
        key = [config.to_json_string(use_diff=False), hardware.is_gpu, repr(hardware.device), repr(options)]
        code = installed_digest(Path(finetune.__file__).parent)
        name = hashlib.sha256("\n".join([code, *map(str, key)]).encode()).hexdigest()[:32]
        self._file = None if hasattr(config, "auto_map") else cache_dir() / "plan" / f"{name}.json"
        self._costs: dict[str, StepCost] = {}
        self._grown = False
        if self._file and os.path.isfile(self._file):
            with suppress(OSError, ValidationError):  # a damaged file is computed anew
                self._costs = _COSTS.validate_json(self._file.read_bytes())

    @staticmethod
    def key(settings: StepSettings) -> str:
        """All of the settings that the cost of a step on one GPU depends on."""
        sections = {name: value for name, value in settings.recipe.sections().items() if name not in _OTHER}
        how = (settings.batch, settings.optim, settings.checkpointing, settings.accumulation > 1)
        return f"{json.dumps(sections)} {how}"

    def get(self, settings: StepSettings) -> StepCost | None:
        """The cost of a step; None if it is not known."""
        return self._costs.get(self.key(settings))

    def add(self, settings: StepSettings, cost: StepCost) -> None:
        """Keeps the cost of a step."""
        self._costs[self.key(settings)] = cost
        self._grown = True

    def save(self) -> None:
        """Writes the costs if there are new ones; removes files that no plan has written for a month."""
        if self._file is None or not self._grown:
            return
        with suppress(OSError):  # without a cache they are computed again
            self._file.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(self._file, _COSTS.dump_json(self._costs).decode())
            remove_unused(self._file.parent)
        self._grown = False
