"""Turns the recipe's training section into trl's arguments, and checks it against the launcher's file."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.utils import is_torch_xla_available

from finetune.model import compatibility
from finetune.model.compatibility import stored_quantisation
from finetune.model.locate import Base
from finetune.model.precision import Precision
from finetune.recipe.load import Recipe
from finetune.recipe.upstream_tables import config_class
from finetune.system import devices, distributed
from finetune.system.errors import ModelError, RunError, reworded

# Settings that need a single process, with the reason.
_ONE_PROCESS_ONLY = {
    "auto_find_batch_size": "each of which would find its own",
    "save_on_each_node": "only one of which writes files",
}


def check_launch(recipe: Recipe, precision: Precision) -> None:
    """Checks that the launcher's file and the recipe fit together.

    Raises:
        RunError: They contradict each other; the message names the key to change.
    """
    file, training = distributed.LAUNCHER_FILE, recipe.training
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision.computes):
        raise RunError(f'{file}: mixed_precision is {launched}; write "no", the recipe decides')
    if distributed.world_size() > 1:
        for key, why in _ONE_PROCESS_ONLY.items():
            if training.get(key):
                raise RunError(
                    f"training.{key}: is true, but there are {distributed.world_size()} processes, {why}; remove it"
                )
    for size in ("TP", "CP", "SP"):
        if int(os.environ.get(f"PARALLELISM_CONFIG_{size}_SIZE", 1)) > 1:
            raise RunError(
                f"{file}: parallelism_config_{size.lower()}_size is above 1, which is not supported; remove it and use "
                "accelerate_configs/fsdp.yaml"
            )
    if distributed.uses_fsdp():
        _check_fsdp(recipe, precision)


def _check_fsdp(recipe: Recipe, precision: Precision) -> None:
    file, training, bits = distributed.LAUNCHER_FILE, recipe.training, recipe.quantization or {}
    optim = str(training.get("optim", ""))
    if os.environ.get("FSDP_VERSION") != "2":
        raise RunError(f"{file}: fsdp_config.fsdp_version is not 2; write 2")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        raise RunError(
            f"{file}: fsdp_activation_checkpointing is true, which uses another dropout mask when it recomputes a "
            "layer; write false, and training.gradient_checkpointing: true in the recipe"
        )
    if optim.startswith(("adafactor", "lion", "ademamix", "paged")) or "8bit" in optim or "bnb" in optim:
        raise RunError(f"training.optim: is {optim}, which cannot step on sharded weights; write adamw_torch_fused")
    if training.get("save_only_model"):
        raise RunError("training.save_only_model: is true, but a sharded run always saves its full state; remove it")
    if bits.get("load_in_8bit"):
        raise RunError(
            "quantization.load_in_8bit: is true, but such weights cannot be sharded; write load_in_4bit: true, or "
            "launch with accelerate_configs/ddp.yaml"
        )
    dtype, storage = str(precision.asked)[6:], bits.get("bnb_4bit_quant_storage") or "uint8"
    if bits and storage != dtype:
        raise RunError(
            f"quantization.bnb_4bit_quant_storage: is {storage}, but sharded weights are stored in model.dtype; "
            f"write bnb_4bit_quant_storage: {dtype}"
        )


def check_base(recipe: Recipe, base: Base, precision: Precision) -> None:
    """Checks, before any row is read, that the base can be located and its attention runs on this device.

    Raises:
        ModelError: One of them fails; the message names the key to change.
        RunError: `training.router_aux_loss_coef` is given, and the base has no experts.
    """
    coefficient = recipe.training.get("router_aux_loss_coef")
    if coefficient and not hasattr(base.config.get_text_config(), "output_router_logits"):
        raise RunError(
            f"training.router_aux_loss_coef: is {coefficient}, but {base.name} has no experts to balance; remove it"
        )
    _check_stored_quantisation(recipe, base)
    wanted = recipe.model.attn_implementation
    compatibility.check_attention(wanted, base.config, devices.device_of(), precision.in_float32)


def _check_stored_quantisation(recipe: Recipe, base: Base) -> None:
    """Refuses to train weights that are stored quantised, and to quantise them a second time."""
    method = stored_quantisation(base.config)
    if method and recipe.lora is None:
        raise ModelError(
            f"model.name_or_path: the weights of {base.name} are stored quantised ({method}), and only an adapter on "
            "them can be trained; add lora: {r: 16}, or name the model that they were made from"
        )
    if method and recipe.quantization is not None:
        raise ModelError(
            f"quantization: the weights of {base.name} are stored quantised already ({method}); remove quantization, "
            "or name the model that they were made from in model.name_or_path"
        )


def training_arguments(recipe: Recipe, precision: Precision) -> Any:
    """The recipe's `training` section as trl's configuration, which joins the processes of the run when it is made.

    Raises:
        RunError: This machine cannot train in the recipe's dtype, or has no TPU, or trl refuses a value here.
    """
    values = dict(recipe.training)
    for own_key in ("resume_from_checkpoint", "save_total_limit", "disable_tqdm"):
        values.pop(own_key, None)
    if recipe.early_stopping and values.get("metric_for_best_model") is None:
        values["metric_for_best_model"] = "loss"  # transformers 5.23 sets it with load_best_model_at_end alone
    # By default SFTConfig sets bf16.
    values["bf16"], values["fp16"] = (precision.computes == word for word in ("bf16", "fp16"))
    if values.get("fsdp_config"):
        values |= _on_tpu()
    elif not torch.accelerator.is_available():
        if values["fp16"]:
            raise RunError("model.dtype, training.fp16: float16 is trained on a GPU only; on a CPU write float32")
        if values.get("activation_offloading"):
            raise RunError("training.activation_offloading: is true, but no GPU holds activations; remove it")
        values = {"dataloader_pin_memory": False, "use_cpu": True} | values
    if recipe.method != "sft":
        # trl 1.16 takes KTO's rows in their order by default, because it pairs each with a neighbour.
        values = {"train_sampling_strategy": "random"} | values
        return _configuration(recipe.method, values)
    packs = bool(values.get("packing"))
    if values.get("padding_free") and not packs:
        # The prepared rows fit already, and trl 1.16 refuses a max_length that it does not apply.
        values["max_length"] = None
    if not (packs or values.get("eval_packing") or values.get("shuffle_dataset")):
        # The rows are tokenised already; trl would process each of them again.
        values["dataset_kwargs"] = {"skip_prepare_dataset": True}
    if any(source.streaming for source in recipe.data.train):
        # Each rank reads the stream and takes its share. With upstream's default the first rank reads for all, padded.
        values["accelerator_config"] = {"dispatch_batches": False} | (values.get("accelerator_config") or {})
    return _configuration("sft", values)


def _configuration(method: str, values: dict[str, Any]) -> Any:
    with reworded(RunError, "training", ValueError, ImportError):  # what depends on this machine: tf32, bf16
        config = config_class(method)(**values, disable_tqdm=True)
    # Several GPUs in one process would be torch's DataParallel.
    config._n_gpu = min(1, config.n_gpu)
    return config


def _on_tpu() -> dict[str, Any]:
    """The arguments for torch_xla's sharding over all chips of one process (SPMD)."""
    if not is_torch_xla_available():
        raise RunError("training.fsdp_config: xla needs torch_xla, which is not installed; remove it, or run on a TPU")
    import torch_xla.runtime

    torch_xla.runtime.use_spmd()
    # With bf16, accelerate makes XLA compute every float32 in bfloat16.
    return {"fsdp": True, "bf16": False, "gradient_checkpointing": False, "dataloader_drop_last": True}
