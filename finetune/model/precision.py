"""Decides the dtypes of a run: that of its weights, and that of its computation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from finetune.recipe.load import Recipe
from finetune.recipe.schema import ModelSection
from finetune.system import devices
from finetune.system.devices import Device
from finetune.system.errors import ModelError


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        asked: `model.dtype`, or for `auto` what this device computes in.
        loaded: The weights; float32 for full fine-tuning in float16, as the gradient scaler needs float32 weights.
        computes: Autocast, accelerate's `mixed_precision`; `no` computes in the dtype of the weights.
    """

    asked: torch.dtype
    loaded: torch.dtype
    computes: Literal["no", "fp16", "bf16"]

    @property
    def in_float32(self) -> bool:
        """True if attention gets float32 inputs."""
        return self.asked == torch.float32 and self.computes == "no"


def decide_precision(recipe: Recipe, device: Device | None = None) -> Precision:
    """The dtypes that a recipe is trained in.

    Args:
        recipe: The recipe.
        device: The device to train on; by default this machine's.

    Raises:
        ModelError: The device does not compute in a dtype that the recipe asks for; the message names the key.
    """
    device = device or devices.device_of()
    asked = choose_dtype(recipe.model.dtype, device)
    check_precision(recipe.training, recipe.quantization or {}, asked, device)
    loaded = torch.float32 if recipe.lora is None and asked == torch.float16 else asked
    computes: Literal["no", "fp16", "bf16"] = "no"
    if recipe.training.get("bf16", asked == torch.bfloat16 and not recipe.training.get("fp16")):
        computes = "bf16"
    elif recipe.training.get("fp16", asked == torch.float16):
        computes = "fp16"
    return Precision(asked, loaded, computes)


def resolve_dtype(section: ModelSection) -> torch.dtype:
    """`model.dtype` on this machine; `auto`: bfloat16 on a GPU that computes in it, float16 on another, else float32.

    Raises:
        ModelError: It is bfloat16, and the GPU does not compute in it.
    """
    return choose_dtype(section.dtype, devices.device_of())


# The model types whose residual stream exceeds float16's 65,504. Gemma 3 270M on ordinary conversations: 104,086 in the
# stream and 66,127 before the last norm, but at most 589 in inputs and outputs of matrix products.
EXCEEDS_FLOAT16 = {"gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text"}
# Layers of Gemma 3n and 4 that multiply the residual stream itself, or what is made from it without a norm.
_READ_THE_STREAM = re.compile(
    r"(.*\.)?(per_layer_input_gate|per_layer_projection|per_layer_model_projection|router\.proj|altup"
    r"|altup_projections\.\d+|altup_unembed_projections\.\d+)"
)


def choose_dtype(wanted: str, device: Device, key: str = "model.dtype") -> torch.dtype:
    """The dtype to load weights in.

    Args:
        wanted: A dtype's name, or `auto`: bfloat16 on a GPU that computes in it, float16 on another, else float32.
        device: The device that the model runs on.
        key: The option that `wanted` is the value of, for the message.

    Raises:
        ModelError: The device does not compute in it.
    """
    if wanted == "auto":
        if device.capability is None:
            return torch.float32
        return torch.bfloat16 if device.bf16 else torch.float16
    if wanted == "bfloat16":
        _refuse_bf16(key, wanted, device, "float16 or float32")
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def check_precision(training: dict[str, Any], quantization: dict[str, Any], dtype: torch.dtype, device: Device) -> None:
    """Checks that a device, with weights of a dtype, can compute in the dtypes that a recipe names.

    Args:
        training: The recipe's `training` section.
        quantization: The recipe's `quantization` section.
        dtype: The dtype that the weights are loaded in.
        device: The device that the run computes on.

    Raises:
        ModelError: The device or the weights cannot; the message names the key to change.
    """
    if training.get("bf16"):
        _refuse_bf16("training.bf16", "true", device, "fp16: true")
    if "bfloat16" in str(quantization.get("bnb_4bit_compute_dtype")):
        _refuse_bf16("quantization.bnb_4bit_compute_dtype", "bfloat16", device, "float16")
    if training.get("fp16") and dtype == torch.bfloat16:
        raise ModelError(
            f"training.fp16: is true, but model.dtype auto is bfloat16 on {device.name}; write model.dtype: float16, "
            "or remove fp16"
        )


def _refuse_bf16(key: str, value: str, device: Device, instead: str) -> None:
    if not device.bf16:
        raise ModelError(
            f"{key}: is {value}, but {device.name} does not compute in bfloat16, only emulates it; write {instead}"
        )


def keep_residual_in_float32(model: Any) -> bool:
    """Keeps the residual stream of a Gemma in float32, for weights or autocast in float16.

    The model computes its norms in float32 already; they only have to take and return it. Matrix products stay in
    float16, for which old GPUs have tensor cores. On Gemma 3 270M losses are within 0.002 of float32's (bfloat16:
    0.008), where float16 alone gives NaN from layer 8 on.

        embed_tokens             float32 out, which starts the stream
        norms that read it       float32 in, the weights' type out     layer(x) = x + post(attention(pre(x)))
        norms that add to it     made float32 before, float32 out
        layers that read it      computed in float32, outside autocast (Gemma 3n's AltUp, Gemma 4's per-layer inputs)

    Returns:
        True if the model is a Gemma.
    """
    if model.config.get_text_config().model_type not in EXCEEDS_FLOAT16:
        return False
    decoder = model.get_decoder()
    dtype = decoder.embed_tokens.weight.dtype

    def to_weight_type(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    def to_float32(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    def input_to_float32(module: Any, inputs: Any) -> Any:
        return (inputs[0].float(), *inputs[1:])

    def input_to_weight_type(module: Any, inputs: Any) -> Any:
        return (inputs[0].to(dtype), *inputs[1:])

    decoder.embed_tokens.register_forward_hook(to_float32)
    decoder.norm.register_forward_hook(to_weight_type)
    decoder.rotary_emb.register_forward_pre_hook(input_to_weight_type)  # its cosines take their type from the stream
    for layer in decoder.layers:
        # Gemma 1 has two norms a layer, which both read the stream; the others also have one after each part.
        has_norms_after = hasattr(layer, "pre_feedforward_layernorm")
        layer.input_layernorm.register_forward_hook(to_weight_type)
        if has_norms_after:
            layer.post_attention_layernorm.register_forward_pre_hook(input_to_float32)
            layer.pre_feedforward_layernorm.register_forward_hook(to_weight_type)
            layer.post_feedforward_layernorm.register_forward_pre_hook(input_to_float32)
        else:
            layer.post_attention_layernorm.register_forward_hook(to_weight_type)
        if hasattr(layer, "router"):  # experts beside the MLP
            layer.pre_feedforward_layernorm_2.register_forward_hook(to_weight_type)
    _keep_readers_in_float32(decoder)
    return True


def _keep_readers_in_float32(decoder: Any) -> None:
    """Makes the layers that multiply the residual stream itself compute in float32."""
    for name, module in decoder.named_modules():
        if not _READ_THE_STREAM.fullmatch(name):
            continue
        for part in module.modules():
            if hasattr(part, "compute_dtype"):  # 4-bit
                part.compute_dtype = torch.float32
            elif any(parameter.dtype == torch.int8 for parameter in part.parameters(recurse=False)):
                raise ModelError(
                    "quantization.load_in_8bit: is true, but layers of this model read its residual stream, which "
                    "float16 does not hold; write load_in_4bit: true, or remove quantization"
                )
            else:
                for parameter in part.parameters(recurse=False):
                    parameter.data = parameter.data.float()
        for method in ("predict", "correct", "forward"):
            if hasattr(module, method):
                _compute_in_float32(module, method)


def _compute_in_float32(module: Any, method: str) -> None:
    """Makes a module's method compute in float32 where autocast would compute its products in float16."""
    original = getattr(module, method)

    def in_float32(*inputs: torch.Tensor) -> Any:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return original(*(each.float() for each in inputs))

    setattr(module, method, in_float32)
