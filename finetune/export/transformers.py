"""Writes the weights of a whole model in another format, in a folder that `from_pretrained` or mlx-lm reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.merge.request import MergeRequest
from finetune.merge.run import plan_in_fresh_process
from finetune.merge.write import write_weights
from finetune.model.quantization import COMPRESSED, INT8, MLX, NF4
from finetune.recipe.export_formats import MLX_BITS

if TYPE_CHECKING:
    from finetune.export.gguf.quantize import ImportanceMatrix

# Bytes; the default of `finetune merge --max-shard-size`.
_SHARD_SIZE = 5_000_000_000


def saved_dtype(model: Path) -> str:
    """The dtype of a model's weights by its config.json, such as `bfloat16`; `float32` if the config has none."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def write_format(
    model: Path,
    output: Path,
    kind: str,
    progress: bool = False,
    trust_remote_code: bool = False,
    matrix: ImportanceMatrix | None = None,
) -> None:
    """Writes a model in one of `WEIGHT_FORMATS`, with one tensor in memory at a time.

    Weights that are not quantised are written in 16 bit: norms, and except for mlx embeddings and the output layer.

    Args:
        model: A folder with a whole model.
        output: An empty folder.
        kind: The format.
        progress: Shows a progress bar on a terminal.
        trust_remote_code: True if the user lets Python files of the model's repository run.
        matrix: The importance matrix that w4a16 is quantised with, by llama.cpp's names; None rounds to nearest.

    Raises:
        MergeError: A weight exceeds the range of float16.
    """
    half = saved_dtype(model)
    half = half if half in ("float16", "bfloat16") else "bfloat16"
    dtype = {"bf16": "bfloat16", "fp16": "float16", "mlx-bf16": "bfloat16"}.get(kind, half)
    kinds: dict[str, dict[str, Any]] = {
        "int8": INT8,
        "nf4": NF4 | {"bnb_4bit_compute_dtype": dtype},
        "fp8": {COMPRESSED: "fp8"},
        "w4a16": {COMPRESSED: "w4a16"},
    } | {name: {MLX: bits} for name, bits in MLX_BITS.items()}
    quantization = kinds.get(kind)
    request = MergeRequest(str(model), (), str(output), dtype, quantization, trust_remote_code=trust_remote_code)
    plan = plan_in_fresh_process(request)
    importance: dict[str, torch.Tensor] = {}
    if matrix is not None:
        from finetune.export.gguf.tensors import gguf_names

        gguf_name = gguf_names(json.loads((model / "config.json").read_text(encoding="utf-8")))
        # GGUF files keep some linear layers unquantised (Gemma 3n's AltUp), and have no importance for them.
        found = {item.name: matrix.get(gguf_name(item.name) or "") for item in plan.tensors if item.quantised}
        importance = {name: torch.from_numpy(means) for name, means in found.items() if means is not None}
    write_weights(
        plan, output, _SHARD_SIZE, quantised=quantization is not None, progress=progress, importance=importance
    )
