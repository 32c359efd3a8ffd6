"""Converts adapters that were initialised from the base's weights (PiSSA, OLoRA) to plain LoRA on the unchanged base.

PiSSA and OLoRA subtract a product from each weight and train it, so that such an adapter does not work on the base
itself. Together with the first product, the trained one is a plain adapter of twice the rank:
`W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]`.

Source: PiSSA, https://arxiv.org/abs/2404.02948; OLoRA, https://arxiv.org/abs/2406.01775. MiCA
(https://arxiv.org/abs/2604.01694) leaves the base unchanged: only the name of its adapter's type is replaced.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.recipe.upstream import INITS_FROM_BASE
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_whole


def initial_adapter(model: Any) -> dict[str, torch.Tensor] | None:
    """Copies of the adapter's initial values, by the names under which PEFT saves them.

    Call it before the first step. Returns None if the adapter was not initialised from the base's weights.
    """
    init = getattr(model, "peft_config", {}).get("default", None)
    init = getattr(init, "init_lora_weights", True)
    if not isinstance(init, str) or not init.startswith(INITS_FROM_BASE):
        return None
    return {
        name.replace(".default", ""): parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if init != "mica" and (".lora_A." in name or ".lora_B." in name or ".lora_embedding_" in name)
    }


def convert_to_lora(folder: Path, initial: dict[str, torch.Tensor]) -> None:
    """Rewrites the adapter in a folder as plain LoRA: twice the rank, the same scaling, DoRA magnitudes unchanged.

    Args:
        folder: The folder with PEFT's `adapter_model.safetensors` and `adapter_config.json`.
        initial: The result of `initial_adapter`; A is (rank, in), B is (out, rank).
    """
    file = folder / ADAPTER_WEIGHTS
    tensors = load_file(file)
    for name, first in initial.items():
        now, first = tensors[name], first.to(tensors[name].dtype)
        is_a = name.endswith(("lora_A.weight", "lora_embedding_A"))
        tensors[name] = torch.cat([now, first]) if is_a else torch.cat([now, -first], 1)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["init_lora_weights"] = True
    if initial:
        config["r"] *= 2
        config["rank_pattern"] = {name: 2 * rank for name, rank in (config.get("rank_pattern") or {}).items()}
        growth = math.sqrt(2) if config.get("use_rslora") else 2
        config["lora_alpha"] *= growth
        config["alpha_pattern"] = {name: alpha * growth for name, alpha in (config.get("alpha_pattern") or {}).items()}
    write_whole(folder / ADAPTER_CONFIG, json.dumps(config, ensure_ascii=False, indent=2) + "\n")
