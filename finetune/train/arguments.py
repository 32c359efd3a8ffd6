"""The recipe's training section as upstream takes it, and what it and the launcher's file cannot do together."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.utils import is_torch_xla_available
from trl import SFTConfig

from finetune.model import compatibility
from finetune.model.locate import Base
from finetune.model.precision import Precision
from finetune.recipe.load import Recipe
from finetune.system import devices, distributed
from finetune.system.errors import RunError


def check_launch(recipe: Recipe, precision: Precision) -> None:
    """Refuses what the launcher's file, the recipe and this machine's card cannot do together.

    Raises:
        LaunchError, ModelError: With the key to change, in one of the two.
    """
    file, training, bits = distributed.LAUNCHER_FILE, recipe.training, recipe.quantization or {}
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision.computes):
        raise RunError(f'{file}: mixed_precision is {launched}; write "no", the recipe decides')
    optim = str(training.get("optim", ""))
    if optim.startswith(("galore", "apollo")):
        raise RunError(
            f"training.optim: is {optim}, whose state cannot be saved; write adamw_torch_fused, or adamw_8bit"
        )
    if distributed.world_size() > 1:
        for key, why in _ALONE.items():
            if training.get(key):
                raise RunError(
                    f"training.{key}: is true, but there are {distributed.world_size()} processes, {why}; remove it"
                )
    for size in ("TP", "CP", "SP"):
        if int(os.environ.get(f"PARALLELISM_CONFIG_{size}_SIZE", 1)) > 1:
            raise RunError(
                f"{file}: parallelism_config_{size.lower()}_size is above 1, and nothing is spread that way here; "
                "remove it, and take accelerate_configs/fsdp.yaml"
            )
    if not distributed.uses_fsdp():
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise RunError(f"{file}: fsdp_config.fsdp_version is not 2; write 2")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        raise RunError(
            f"{file}: fsdp_activation_checkpointing is true, which draws another dropout when it computes a layer "
            "again; write false, training.gradient_checkpointing does it"
        )
    if optim.startswith(("adafactor", "lion", "ademamix", "paged")) or "8bit" in optim or "bnb" in optim:
        raise RunError(
            f"training.optim: is {optim}, which cannot step on weights in parts; write adamw_torch_fused"
        )
    if training.get("save_only_model"):
        raise RunError(
            "training.save_only_model: is true, but a run in parts saves all that it needs; remove it"
        )
    if bits.get("load_in_8bit"):
        raise RunError(
            "quantization.load_in_8bit: is true, but such weights cannot be cut into parts; write load_in_4bit: true, "
            "or launch with accelerate_configs/ddp.yaml"
        )
    dtype, storage = str(precision.asked)[6:], bits.get("bnb_4bit_quant_storage") or "uint8"
    if bits and storage != dtype:
        raise RunError(
            f"quantization.bnb_4bit_quant_storage: is {storage}, but to be cut into parts it must be model.dtype; "
            f"write bnb_4bit_quant_storage: {dtype}"
        )


# What only one process can do, and why.
_ALONE = {
    "auto_find_batch_size": "of which each would find its own",
    "save_on_each_node": "of which one writes for all",
}


def check_base(recipe: Recipe, base: Base, precision: Precision) -> None:
    """Refuses, before any row is read, what the base model and this machine's card cannot do together.

    Raises:
        ModelError: With the key to change.
    """
    wanted = recipe.model.attn_implementation
    compatibility.check_attention(wanted, base.config, devices.device_of(), precision.in_float32)


def training_arguments(recipe: Recipe, precision: Precision, streamed: bool) -> SFTConfig:
    """The recipe's `training` for trl; making it joins the processes of the run.

    Raises:
        LaunchError: This machine cannot compute in the recipe's type, or is no TPU.
    """
    values = dict(recipe.training)
    for ours in ("resume_from_checkpoint", "save_total_limit", "disable_tqdm"):
        values.pop(ours, None)
    # SFTConfig sets bf16 unless it is told otherwise.
    values["bf16"], values["fp16"] = (precision.computes == word for word in ("bf16", "fp16"))
    if values.get("fsdp_config"):
        values |= _on_tpu()
    elif not torch.accelerator.is_available():
        if values["fp16"]:
            raise RunError(
                "model.dtype, training.fp16: float16 is trained on a GPU only; on a CPU write float32"
            )
        values = {"dataloader_pin_memory": False, "use_cpu": True} | values
    packs = bool(values.get("packing"))
    if values.get("padding_free") and not packs:
        # Our rows fit already; trl 1.16 refuses a length that it would not hold them to.
        values["max_length"] = None
    if not (packs or values.get("eval_packing") or values.get("shuffle_dataset")):
        # Our rows fit already; trl's preparation would go over each once more.
        values["dataset_kwargs"] = {"skip_prepare_dataset": True}
    if streamed:
        # Each rank reads the stream and takes its share; upstream lets the first read for all, padded to one length.
        values["accelerator_config"] = {"dispatch_batches": False} | (values.get("accelerator_config") or {})
    config = SFTConfig(**values, disable_tqdm=True)
    config._n_gpu = min(
        1, config.n_gpu
    )  # several cards in one process are torch's DataParallel, which nobody wants
    return config


def _on_tpu() -> dict[str, Any]:
    """What torch_xla's sharding over all chips of one process (SPMD) needs."""
    if not is_torch_xla_available():
        raise RunError(
            "training.fsdp_config: xla needs torch_xla, which is not installed; remove it, or run on a TPU"
        )
    import torch_xla.runtime

    torch_xla.runtime.use_spmd()
    # accelerate would have XLA take every float32 for bfloat16.
    return {"fsdp": True, "bf16": False, "gradient_checkpointing": False, "dataloader_drop_last": True}
