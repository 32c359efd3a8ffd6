"""Writes an adapter as plain LoRA: matrices alone, one rank and no scaling of its own, which any program reads rightly.

Programs that serve adapters differ in what they make of rsLoRA, rank and alpha patterns, and of trained tensors beside
the matrices (`model/adapter_readers.py`). Here each layer's scaling is multiplied into its B, and smaller ranks are
filled up with zeros.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune.merge.adapter import Adapter
from finetune.merge.changes import Change
from finetune.merge.plan import MergePlan
from finetune.merge.request import CONVERTED, MergeRequest
from finetune.merge.run import plan_in_fresh_process
from finetune.recipe.export_formats import ADAPTER, GGUF_ADAPTER
from finetune.system.errors import ExportError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json


@dataclass(frozen=True)
class PlainLora:
    """A folder with plain LoRA, and the folder of its base."""

    folder: Path
    base: Path


_KINDS = {"rows": "token rows", "value": "a tensor trained whole", "base": "a saved embedding", "bias": "a bias"}
# Files of a whole model, which the planning of a merge writes.
_OF_A_MODEL = ("config.json", "generation_config.json")


def write_adapter(
    run: Path, output: Path, base: str | None = None, kind: str = ADAPTER, trust_remote_code: bool = False
) -> PlainLora:
    """Writes a run's adapter as plain LoRA of one rank, with `lora_alpha` equal to it.

    Args:
        run: A run, or a folder with a PEFT adapter.
        output: An empty folder.
        base: The path or id of the base, in place of the one that the run's files name.
        kind: The format that it is written for, `adapter` or `gguf:adapter`.
        trust_remote_code: True if the user lets Python files of the model's repository run.

    Raises:
        ExportError: The adapter holds something else than LoRA matrices of linear layers.
        MergeError, ModelError, RunError: See `plan_in_fresh_process`.
    """
    adapters = ((str(run), 1.0),)
    request = MergeRequest(str(run), adapters, str(output), base=base, trust_remote_code=trust_remote_code)
    plan = plan_in_fresh_process(request)
    changes = _lora_changes(run, plan, kind)
    [(folder, weight)] = plan.adapters
    with Adapter(Path(folder), weight) as adapter:
        rank = max(adapter.header[change.keys["A"]].shape[0] for change in changes)
        tensors = {}
        for change in changes:
            a_RI, b_OR = (adapter.read(change.keys[role]) for role in ("A", "B"))
            missing = rank - a_RI.shape[0]
            tensors[change.keys["A"]] = torch.nn.functional.pad(a_RI, (0, 0, 0, missing))
            tensors[change.keys["B"]] = torch.nn.functional.pad(b_OR * change.scaling, (0, missing))
    for name in _OF_A_MODEL:
        (output / name).unlink()
    shutil.rmtree(output / CONVERTED, ignore_errors=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, output / ADAPTER_WEIGHTS, {"format": "pt"})
    config = read_json(run / ADAPTER_CONFIG) | {
        **{"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}},
        **{"base_model_name_or_path": plan.path, "revision": plan.revision, "inference_mode": True},
        # By their whole names: a pattern, or the names of some layers only, are not read by all.
        **{"target_modules": sorted(_module(change) for change in changes), "exclude_modules": None},
        **{"layers_to_transform": None, "layers_pattern": None},
    }
    (output / ADAPTER_CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return PlainLora(output, Path(plan.folder or plan.path))


def _lora_changes(run: Path, plan: MergePlan, kind: str) -> list[Change]:
    """The changes of a plan; refuses those that are no LoRA of a linear layer, by name."""
    named = [(item.name, change) for item in plan.tensors for change in item.changes]
    named += [(name, change) for group in plan.fused for name, changes in group.changes.items() for change in changes]
    for name, change in named:
        other = _KINDS.get(change.kind) or (f"LoRA of {change.kind}" if change.kind != "lora" else "")
        other = "DoRA" if "magnitude" in change.keys else other
        if other:
            readers, instead = ("llama.cpp does", "gguf:Q8_0") if kind == GGUF_ADAPTER else ("servers do", "bf16")
            raise ExportError(
                f"--format {kind}: {run} holds {other} ({name}), which {readers} not take beside LoRA matrices; "
                f"write --format {instead}, or train without it"
            )
    return [change for _, change in named]


def _module(change: Change) -> str:
    """The name of the module that a change is of, in the base."""
    return change.keys["A"].removeprefix("base_model.model.").removesuffix(".lora_A.weight")
