"""Checks that a device and an attention fit a model; which of its modules an adapter may change.

`model.dtype: auto` (`precision.choose_dtype`):

| device | dtype | refused |
|---|---|---|
| CPU | float32 | |
| GPU with bfloat16 | bfloat16 | float16 autocast over bfloat16 weights |
| GPU without it (T4, V100) | float16 | bfloat16 as weights, in autocast or between 4-bit layers |

`model.attn_implementation`: absent, transformers chooses: eager for Gemma 2, sdpa where a model supports it.

| facts | refused |
|---|---|
| soft-capped attention scores (Gemma 2) | sdpa |
| compute capability below 8.0, computing in float32, or heads above 256 (Gemma 4) | flash_attention_* |
| training on a CPU | flex_attention |

A Gemma in float16 keeps its residual stream in float32 (`precision.keep_residual_in_float32`). Modules that text does
not pass through (`non_text_modules`) are neither trained nor adapted, because all rows are text.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.model.precision import EXCEEDS_FLOAT16
from finetune.system.devices import Device
from finetune.system.errors import ModelError

if TYPE_CHECKING:
    import torch


def check_device(place: str) -> None:
    """Refuses a device that this machine does not have.

    Args:
        place: `cpu`, `auto`, or a device as torch writes it, such as `cuda:1`.

    Raises:
        ModelError: This machine has no such device; the message lists those that it has.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator else "cpu"
    count = torch.accelerator.device_count() if accelerator else 0
    available = ["cpu", *(f"{kind}:{i}" for i in range(count)), "auto"]
    # `cuda` without a number is the current GPU.
    if place not in (*available, kind):
        raise ModelError(f"--device: is {place}, which this machine does not have; write {', '.join(available)}")


# By the type in a config: models that do not write text from left to right, and what trains them.
_OTHER_TRAINERS = {
    "diffusion_gemma": ("a diffusion model", "transformers 5.23 and trl 1.16 have no loss for it"),
    "embedding_gemma2": ("an embedding model", "sentence-transformers' SentenceTransformerTrainer trains it"),
    "embedding_gemma2_text": ("an embedding model", "sentence-transformers' SentenceTransformerTrainer trains it"),
    "gemma4_assistant": ("a draft model for speculative decoding", "train the model that it drafts for"),
    "gemma4_unified_assistant": ("a draft model for speculative decoding", "train the model that it drafts for"),
    "paligemma": ("a model of images with text", "transformers' Trainer trains it on images"),
    "shieldgemma2": ("a classifier of images", "transformers' Trainer trains it on images"),
}


def check_writes_text(config: Any) -> None:
    """Refuses a model that is no causal language model, by name.

    Args:
        config: The model's config.

    Raises:
        ModelError: With what trains such a model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    kind = config.model_type
    what = _OTHER_TRAINERS.get(kind)
    both_ways = getattr(config.get_text_config(decoder=True), "use_bidirectional_attention", None) in (True, "all")
    if what is None and both_ways:
        # EmbeddingGemma is a gemma3_text.
        what = ("an embedding model (use_bidirectional_attention)", _OTHER_TRAINERS["embedding_gemma2"][1])
    if what is None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(config, "auto_map", None):
        encodes = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        what = (
            ("an encoder-decoder model", "transformers' Seq2SeqTrainer trains it")
            if encodes
            else ("not a causal language model", "take one that is")
        )
    if what is not None:
        raise ModelError(f"model.name_or_path: is a {kind}, {what[0]}; {what[1]}")


# The longest heads that FlashAttention 2 and 3 compute.
_FLASH_HEAD_DIM = 256


def check_attention_name(wanted: str | None, config: Any, key: str = "model.attn_implementation") -> None:
    """Refuses an attention that transformers does not have, or that leaves out the model's soft-capping.

    Args:
        wanted: The name; None leaves the choice to transformers.
        config: The model's config.
        key: The key or flag that holds the name, for the message.

    Raises:
        ModelError: The name is unknown, it is sdpa and the model soft-caps its attention scores, or it is a
            FlashAttention and the model has longer heads than that computes.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    # The name of a kernel on the Hub has a slash.
    if wanted is not None and wanted not in known and "/" not in wanted:
        raise ModelError(f"{key}: is {wanted}, which transformers does not have; write one of {', '.join(known)}")
    text = config.get_text_config()
    longest = max(getattr(layer, "head_dim", None) or 0 for layer in text.per_layer_config)
    if wanted is not None and "flash" in wanted and longest > _FLASH_HEAD_DIM:
        raise ModelError(
            f"{key}: is {wanted}, which computes heads of up to {_FLASH_HEAD_DIM}, and some of this {text.model_type} "
            f"have {longest}; write sdpa or remove it"
        )
    if wanted == "sdpa" and _soft_capped(config):
        model_type = config.get_text_config().model_type
        family = {"gemma2": "Gemma 2"}.get(model_type, model_type)
        raise ModelError(f"{key}: is sdpa, which leaves out {family}'s soft-capping; write eager or flex_attention")


def _soft_capped(config: Any) -> bool:
    """True if the model soft-caps its attention scores."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def stored_quantisation(config: Any) -> str:
    """The method in which a model's weights are stored quantised, such as bitsandbytes; empty if they are not."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return ""
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method") or values.get("mode") or "unknown"
    return str(getattr(method, "value", method))


def can_be_dequantised(config: Any) -> bool:
    """True if transformers 5.23 can dequantise the weights of a model that are stored quantised (not GPTQ and AWQ)."""
    return stored_quantisation(config) == "bitsandbytes" or dequantised_when_loaded(config) is not config


def dequantised_when_loaded(config: Any) -> Any:
    """A config with which transformers dequantises weights that are stored quantised, while it loads them.

    Adapters need it: PEFT finds no weight in packed layers of compressed-tensors, and MXFP4 cannot be trained on.

    Args:
        config: The model's config, which is not changed.

    Returns:
        A copy; the config itself for methods that transformers 5.23 cannot dequantise then (bitsandbytes, on whose
        weights adapters are trained; GPTQ, AWQ).

    Raises:
        ModelError: The weights are in several schemes of compressed-tensors, which transformers 5.23 reads by one.
    """
    from transformers.quantizers import AutoQuantizationConfig

    stored = getattr(config, "quantization_config", None)
    if stored is None or not hasattr(AutoQuantizationConfig.from_dict(stored), "dequantize"):
        return config
    if len(stored.get("config_groups") or ()) > 1:
        raise ModelError(
            f"{config.name_or_path}: its weights are stored quantised in several schemes (config_groups), which "
            "transformers would dequantise by one of them; name the model that they were made from"
        )
    config = copy.deepcopy(config)
    config.quantization_config = stored | {"dequantize": True}
    return config


def check_fp8_blocks(model: torch.nn.Module, config: Any) -> None:
    """Refuses a model in fp8 whose last blocks are smaller than the others.

    transformers 5.23 divides such a weight into equal blocks, where it can, and scales rows by a neighbour's scale
    (`integrations/finegrained_fp8.py`, `_dequantize_one`).

    Args:
        model: The dequantised model.
        config: The config of its file.

    Raises:
        ModelError: A side of a weight is longer than a block, and no multiple of it.
    """
    stored = config.quantization_config
    block, kept = stored.get("weight_block_size"), stored.get("modules_to_not_convert") or ()
    for name, weight in model.get_decoder().named_parameters() if block else ():  # type: ignore[operator]
        sizes = zip(weight.shape[-2:], block, strict=False)
        if (
            weight.ndim > 1
            and "embed" not in name
            and not any(re.search(pattern, f"model.{name}") for pattern in kept)
            and any(size > side and size % side for size, side in sizes)
        ):
            raise ModelError(
                f"{config.name_or_path}: {name} is stored in fp8 in blocks of {block[0]} by {block[1]}, which do not "
                f"divide its {weight.shape[-2]:,} rows and {weight.shape[-1]:,} columns, and transformers would scale "
                "some of them wrongly; name the model that it was made from"
            )


def check_attention(
    wanted: str | None,
    config: Any,
    device: Device,
    float32: bool,
    training: bool = True,
    key: str = "model.attn_implementation",
) -> None:
    """Refuses an attention that `check_attention_name` refuses, or that this device cannot run.

    Args:
        wanted: The name; None leaves the choice to transformers.
        config: The model's config.
        device: The device that runs the model.
        float32: True if the inputs of attention are float32, by the weights' dtype and autocast.
        training: True if gradients are computed.
        key: The key or flag that holds the name, for the message.

    Raises:
        ModelError: The attention is refused; the message says what to write instead.
    """
    check_attention_name(wanted, config, key)
    flash = wanted is not None and re.fullmatch(r"flash_attention_\d", wanted)
    if flash and (device.capability is None or device.capability < (8, 0)):
        has = ".".join(map(str, device.capability)) if device.capability else "none"
        raise ModelError(
            f"{key}: is {wanted}, which needs a GPU of compute capability 8.0, and {device.name} has {has}; remove it"
        )
    if flash and float32:
        raise ModelError(
            f"{key}: is {wanted}, which computes only in bfloat16 and float16, not in float32 as this run; remove it"
        )
    if wanted == "flex_attention" and training and device.capability is None:
        raise ModelError(f"{key}: is {wanted}, which has no backward pass on a CPU; remove it")


def non_text_modules(model: Any) -> list[str]:
    """The names of a causal model's modules that text does not pass through: vision towers, projectors.

    Parameters there would never get a gradient, for which DDP would wait.
    """
    if model.config.get_text_config() is model.config:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    path = names[id(model.get_decoder())].split(".")
    found = []
    for depth, on_the_path in enumerate(path):
        parent = ".".join(path[:depth])
        for name, child in model.get_submodule(parent).named_children():
            if name != on_the_path and child is not model.get_output_embeddings():
                found.append(f"{parent}.{name}".lstrip("."))
    return found


# Linear layers beside attention and MLP: routers, and what Gemma 3n and 4 have around their layers. vLLM and llama.cpp
# do not apply an adapter to all of them.
_BESIDE_PROJECTIONS = re.compile(
    r"(.*\.)?(per_layer_\w+|altup\w*\..+|laurel\..+|router(\..+)?|\w+_router|gate|shared_expert_gate)"
)
# The names of experts' layers in checkpoints, which PEFT's conversion takes for those experts wherever they stand.
_EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class AdapterTargets:
    """The layers that `lora.target_modules: all-linear` adapts.

    Attributes:
        modules: Names of linear layers, or their last parts where these mean no other module.
        experts: Names of parameters with the weights of all experts of a layer, as `peft.LoraConfig.target_parameters`.
        left_out: The last parts of the names of linear layers and experts that it leaves as they are.
    """

    modules: list[str]
    experts: list[str]
    left_out: list[str]

    def describe(self) -> str | None:
        """One line with what is adapted and what is not; None where that is every linear layer."""
        if not self.left_out:
            return None
        names = dict.fromkeys(name.rpartition(".")[2] for name in [*self.modules, *self.experts])
        return (
            f"lora.target_modules: all-linear is {', '.join(names)}; without an adapter: {', '.join(self.left_out)} "
            "(lora.target_modules and, for experts, lora.target_parameters choose otherwise)"
        )


def all_linear_targets(model: Any) -> AdapterTargets:
    """The projections of attention and MLP, and experts where PEFT counts them among the linear layers.

    PEFT's own `all-linear` (0.21) also takes routers and the layers around per-layer embeddings, and doubles the rank
    of experts' fused gate and up projections.

    Args:
        model: The causal model without an adapter.
    """
    import peft
    import torch
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers.pytorch_utils import Conv1D

    probe = peft.LoraConfig(target_modules="all-linear")
    convert_peft_config_for_transformers(probe, model, None)
    experts = sorted(name for name in probe.target_parameters or () if name != "gate.weight")
    frozen = tuple(f"{name}." for name in non_text_modules(model))
    modules = {name: module for name, module in model.named_modules() if not name.startswith(frozen)}
    linear = [
        name
        for name, module in modules.items()
        # gptqmodel's layers of GPTQ and AWQ are of classes of their own, which PEFT's all-linear passes over.
        if (isinstance(module, (torch.nn.Linear, Conv1D)) or hasattr(module, "qweight"))
        and module is not model.get_output_embeddings()
    ]
    chosen = [name for name in linear if not _BESIDE_PROJECTIONS.fullmatch(name)]
    if experts:
        chosen = [name for name in chosen if name.rpartition(".")[2] not in _EXPERT_LAYERS]
    left_out = dict.fromkeys(_name_in_layer(name) for name in linear if name not in chosen)
    if not experts and any(".experts." in name and p.ndim == 3 for name, p in model.named_parameters()):
        left_out["experts"] = None
    ends = {name.rpartition(".")[2] for name in chosen}
    if {name for name in modules if name.rpartition(".")[2] in ends} == set(chosen):
        chosen = list(dict.fromkeys(name.rpartition(".")[2] for name in chosen))
    return AdapterTargets(chosen, experts, list(left_out))


def _name_in_layer(name: str) -> str:
    """A module's name within its layer (`router.proj`); its last part where it is in none."""
    parts = re.split(r"\.\d+\.", re.sub(r"\.\d+$", "", name))
    return parts[-1] if len(parts) > 1 else parts[0].rpartition(".")[2]


def exclude_modules(names: list[str], wanted: str | list[str] | None) -> str | list[str] | None:
    """The value of `peft.LoraConfig.exclude_modules` that excludes all modules below `names`, and those in `wanted`.

    Args:
        names: Full names of modules, as `non_text_modules` returns them.
        wanted: The recipe's `lora.exclude_modules`: a regular expression over full names, or a list of names' ends.
    """
    if not names:
        return wanted
    parts = [rf"({'|'.join(map(re.escape, names))})\..*"]
    if isinstance(wanted, str):
        parts.append(wanted)
    elif wanted:
        parts.append(rf"(.*\.)?({'|'.join(map(re.escape, wanted))})")
    return "|".join(parts)


def describe_choices(wanted: tuple[str, str | None], dtype: torch.dtype, model: Any, device: Device) -> str | None:
    """One line with the dtype and attention that the recipe left open; None if it left neither open.

    Args:
        wanted: The recipe's `model.dtype` and `model.attn_implementation`.
        dtype: The dtype that the run computes in.
        model: The loaded model.
        device: The device that it is on.
    """
    parts = []
    if wanted[0] == "auto":
        choice = f"{str(dtype).removeprefix('torch.')} on {device.name}"
        parts.append(choice if device.bf16 else f"{choice}, which does not compute in bfloat16")
    if str(dtype) == "torch.float16" and model.config.get_text_config().model_type in EXCEEDS_FLOAT16:
        parts.append("float32 in its residual stream, where float16 overflows")
    if wanted[1] is None:
        attention = model.config._attn_implementation
        capped = attention == "eager" and _soft_capped(model.config)
        parts.append(f"{attention} attention" + (", as sdpa leaves out its soft-capping" if capped else ""))
    return f"chosen: {'; '.join(parts)}" if parts else None
