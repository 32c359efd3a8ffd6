"""A whole model written as bf16, fp16, int8 or nf4, each a folder that `from_pretrained` reads as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.merge.plan import MergeRequest, plan_in_fresh_process
from finetune.merge.write import write_weights
from finetune.model.quantization import INT8, NF4

FORMATS = ("bf16", "fp16", "int8", "nf4")
_SHARD = 5_000_000_000


def saved_dtype(model: Path) -> str:
    """The type that config.json gives a model's weights, such as bfloat16; float32 where it says nothing."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def write_format(model: Path, output: Path, kind: str, progress: bool = False) -> None:
    """The model in `model` as one of `FORMATS`, in the empty folder `output`; one tensor is in memory at a time.

    What int8 and nf4 leave as it is (embeddings, norms, the output layer) stays in 16 bit, as bitsandbytes computes.

    Raises:
        MergeError: A weight does not fit float16.
    """
    half = saved_dtype(model)
    half = half if half in ("float16", "bfloat16") else "bfloat16"
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(kind, half)
    kinds: dict[str, dict[str, Any]] = {"int8": INT8, "nf4": NF4 | {"bnb_4bit_compute_dtype": dtype}}
    quantization = kinds.get(kind)
    plan = plan_in_fresh_process(MergeRequest(str(model), (), str(output), dtype, quantization))
    write_weights(plan, output, _SHARD, quantised=quantization is not None, progress=progress)
