"""Finds the config of a base without a download where possible, and a GPU by its name."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

from finetune.model.load import load_tokenizer
from finetune.model.locate import Base, read_config
from finetune.model.resize import needed_rows, resized_config
from finetune.plan.lengths import has_tokenizer
from finetune.recipe.schema import ModelSection
from finetune.system.devices import CARDS, GPUS, Hardware, gpu_of_size
from finetune.system.errors import PlanError


def gpu_named(name: str) -> Hardware:
    """The GPU with a name of `GPUS` or `CARDS`, as shops write it, or one of a size in GB such as `24` or `24gb`.

    Raises:
        PlanError: It is neither.
    """
    known = GPUS | CARDS
    short = re.sub(r"nvidia|geforce|quadro|tesla|rtx|gtx|[\s_]+", "", name.lower())
    short = re.sub(r"(?<=\d)-?gb$", "", short) if short.startswith(("a100", "v100")) else short
    short = {"a100": "a100-80", "a10040": "a100-40", "a10080": "a100-80", "v10032": "v100-32"}.get(short, short)
    if short in known:
        return known[short]
    try:
        size = float(name.lower().removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise PlanError(f"--gpu: is {name}; write one of {', '.join(known)}, or a size in GB, such as 24")
    return gpu_of_size(f"{size:g} GB", size)


@functools.cache
def _shipped_configs() -> dict[str, dict[str, Any]]:
    families = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    return {name: family["config"] for family in families for name in family["models"]}


def base_config(section: ModelSection, base: Base | None = None) -> Any:
    """The config of a base: the one that this package ships, or that of its directory or of the Hub.

    Args:
        section: The `model` section of the recipe.
        base: The base, if it was located already.

    Raises:
        ModelError: It has no config that can be loaded.
    """
    if section.resize_embeddings and has_tokenizer(section):
        original = base.original if base else Base.of(section).original
        config = copy.deepcopy(base_config(section.model_copy(update={"resize_embeddings": False}), original))
        return resized_config(config, needed_rows(load_tokenizer(section, original)))
    from transformers import AutoConfig

    name = section.name_or_path
    folder = Path(name).expanduser()
    if name in _shipped_configs() and section.revision is None and not folder.is_dir():
        return AutoConfig.for_model(**_shipped_configs()[name])
    if (folder / "config.json").is_file():  # its weights are not needed
        return read_config(str(folder), trust_remote_code=section.trust_remote_code)
    return (base or Base.of(section)).config
