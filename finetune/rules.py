"""Which dtype, attention and adapter targets are lawful for a model on a device; what is chosen where none is given.

| facts | `model.dtype` auto | refused |
|---|---|---|
| no CUDA card | float32 | |
| a card that computes in bfloat16 | bfloat16 | float16 autocast over bfloat16 weights |
| a card that does not (T4, V100) | float16 | bfloat16, as weights, in autocast or between 4-bit layers |

| facts | `model.attn_implementation` absent | refused |
|---|---|---|
| soft-capped attention scores (Gemma 2) | eager | sdpa |
| any other model | upstream's choice, sdpa where it can | |
| below compute capability 8.0, or computing in float32 | | flash_attention_* |
| training on a CPU | | flex_attention |

A Gemma in float16 keeps its residual stream in float32 (`widen`). What a model has beside its text (`beside_text`) is
neither trained nor adapted: rows are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.base import ModelError

if TYPE_CHECKING:
    import torch

# Whose residual stream grows beyond float16's 65,504. Measured of Gemma 3 270M on ordinary conversations: 104,086 in it
# and 66,127 before the last norm, but at most 589 in what goes into a matrix product or comes out of one.
_WIDE = {"gemma", "gemma2", "gemma3_text"}


@dataclass(frozen=True)
class Device:
    """What the rules ask of a device; `capability` is CUDA's, None where there is no such card."""

    name: str = "this CPU"
    bf16: bool = True
    capability: tuple[int, int] | None = None


def device_of(place: str | None = None) -> Device:
    """The facts of a place such as `cpu` or `cuda:1`; absent, or auto: of the current card, or of the CPU."""
    import torch

    place = "cuda" if place in (None, "auto") else place
    if not torch.cuda.is_available() or not place.startswith("cuda"):
        return Device()
    with torch.cuda.device(torch.device(place)):
        # By default torch counts a card that only emulates it.
        own = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(torch.cuda.get_device_name(), own, torch.cuda.get_device_capability())


def check_place(place: str) -> None:
    """Refuses a place for a model that there is none of here.

    Raises:
        ModelError: With those that there are.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator else "cpu"
    cards = torch.accelerator.device_count() if accelerator else 0
    there = ["cpu", *(f"{kind}:{i}" for i in range(cards)), "auto"]
    # Without a number it is the first, or the current one.
    if place not in (*there, kind):
        raise ModelError(f"--device: is {place}, which there is none of here; write {', '.join(there)}")


# ---------------------------------------------------------------------------------------------------------------
# dtype


def dtype_for(wanted: str, device: Device, key: str = "model.dtype") -> torch.dtype:
    """The type to load weights in: the one that is wanted, or for `auto` the one that this device computes in.

    Raises:
        ModelError: The device does not compute in it.
    """
    import torch

    if wanted == "auto":
        if device.capability is None:
            return torch.float32
        return torch.bfloat16 if device.bf16 else torch.float16
    if wanted == "bfloat16":
        _refuse_bf16(key, wanted, device, "float16 or float32")
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def check_precision(
    training: dict[str, Any], bits: dict[str, Any], dtype: torch.dtype, device: Device
) -> None:
    """Refuses to compute in a type that the device or the weights do not take.

    Args:
        training: The recipe's section.
        bits: Its quantization.
        dtype: What the weights are loaded in.
        device: Where.

    Raises:
        ModelError: With the key to change.
    """
    import torch

    for name in ("bf16", "bf16_full_eval"):
        if training.get(name):
            _refuse_bf16(f"training.{name}", "true", device, f"{name.replace('bf', 'fp')}: true")
    if "bfloat16" in str(bits.get("bnb_4bit_compute_dtype")):
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


def widen(model: Any) -> bool:
    """Keeps a Gemma's residual stream in float32 where its weights, or autocast, are float16.

    The norms are computed in float32 by the model itself; they only have to get and give it. What goes into a matrix
    product is float16 as before, where the tensor cores of old cards are. On Gemma 3 270M losses are within 0.002 of
    float32's (bfloat16: 0.008), where float16 alone is NaN from layer 8 on.

        embed_tokens             float32, from here on the stream is
        norms that read it       float32 in, the weights' type out     layer(x) = x + post(attention(pre(x)))
        norms that add to it     made float32 before, float32 out

    Returns:
        Whether the model is one of those.
    """
    if model.config.get_text_config().model_type not in _WIDE:
        return False
    decoder = model.get_decoder()
    dtype = decoder.embed_tokens.weight.dtype

    def narrow(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(dtype)

    def wide(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.float()

    def wide_input(module: Any, inputs: Any) -> Any:
        return (inputs[0].float(), *inputs[1:])

    def narrow_input(module: Any, inputs: Any) -> Any:
        return (inputs[0].to(dtype), *inputs[1:])

    decoder.embed_tokens.register_forward_hook(wide)
    decoder.norm.register_forward_hook(narrow)
    decoder.rotary_emb.register_forward_pre_hook(narrow_input)  # its cosines take their type from the stream
    for layer in decoder.layers:
        # Gemma 1 has two norms a layer, which both read the stream; in the others each part has one after it, too.
        after = hasattr(layer, "pre_feedforward_layernorm")
        layer.input_layernorm.register_forward_hook(narrow)
        if after:
            layer.post_attention_layernorm.register_forward_pre_hook(wide_input)
            layer.pre_feedforward_layernorm.register_forward_hook(narrow)
            layer.post_feedforward_layernorm.register_forward_pre_hook(wide_input)
        else:
            layer.post_attention_layernorm.register_forward_hook(narrow)
    return True


# ---------------------------------------------------------------------------------------------------------------
# Attention


def attention_for(wanted: str | None, config: Any, key: str = "model.attn_implementation") -> str | None:
    """The attention to load a model with: the one that is wanted, or one that computes what the model was trained with.

    None leaves it to upstream, whose choice is right for all other models. transformers 5.17 gives Gemma 2 sdpa, which
    leaves out the soft-capping of its attention scores, and says nothing; 5.23 takes eager by itself.

    Raises:
        ModelError: It leaves out a part of the model, or there is none of that name.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    if wanted is None:
        return "eager" if capped else None
    there = ["eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    if wanted not in there and "/" not in wanted:  # the name of a kernel on the Hub has one
        raise ModelError(f"{key}: is {wanted}, which there is none of; write one of {', '.join(there)}")
    if capped and wanted == "sdpa":
        family = {"gemma2": "Gemma 2"}.get(text.model_type, text.model_type)
        raise ModelError(
            f"{key}: is sdpa, which leaves out {family}'s soft-capping; write eager or flex_attention"
        )
    return wanted


def check_attention(
    wanted: str | None,
    config: Any,
    device: Device,
    float32: bool,
    training: bool = True,
    key: str = "model.attn_implementation",
) -> None:
    """Refuses an attention that computes another model than this one, or that cannot be run here.

    Args:
        wanted: Its name.
        config: The model's.
        device: Where it is to run.
        float32: Whether it is given float32, by weights and autocast.
        training: Whether gradients are taken.
        key: Where the name was written.

    Raises:
        ModelError: With what to write instead.
    """
    attention_for(wanted, config, key)
    flash = wanted is not None and re.fullmatch(r"flash_attention_\d", wanted)
    if flash and (device.capability is None or device.capability < (8, 0)):
        own = f" has {device.capability[0]}.{device.capability[1]}" if device.capability else " is no card"
        raise ModelError(
            f"{key}: is {wanted}, which needs a card of compute capability 8.0, and {device.name}{own}; remove it"
        )
    if flash and float32:
        raise ModelError(
            f"{key}: is {wanted}, which computes in bfloat16 and float16 alone, and here it is float32; remove it"
        )
    if wanted == "flex_attention" and training and device.capability is None:
        raise ModelError(f"{key}: is {wanted}, which has no backward pass on a CPU; remove it")


# ---------------------------------------------------------------------------------------------------------------
# Configs and adapters


def corrections(config: Any) -> dict[str, Any]:
    """What `from_pretrained` must be told so that a model computes what it was trained with.

    Gemma 1's first configs say `hidden_act: gelu` and mean its tanh approximation. transformers 5.23 reads them so;
    5.17 computes the exact one.
    """
    legacy = config.model_type == "gemma" and config.hidden_act == "gelu"
    return {"hidden_act": "gelu_pytorch_tanh"} if legacy else {}


def beside_text(model: Any) -> list[str]:
    """The names of the modules of a causal model that text never passes: vision towers, projectors.

    Rows are text, so an adapter there would never get a gradient, nor would the weights themselves: DDP waits for it.
    """
    if model.config.get_text_config() is model.config:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    path = names[id(model.get_decoder())].split(".")
    found = []
    for depth, own in enumerate(path):
        parent = ".".join(path[:depth])
        for name, child in model.get_submodule(parent).named_children():
            if name != own and child is not model.get_output_embeddings():
                found.append(f"{parent}.{name}".lstrip("."))
    return found


def exclude_modules(names: list[str], wanted: str | list[str] | None) -> str | list[str] | None:
    """`peft.LoraConfig.exclude_modules` that leaves out all beneath `names` beside what is wanted anyway.

    PEFT takes one regular expression over whole names, or a list of names' ends.
    """
    if not names:
        return wanted
    parts = [rf"({'|'.join(map(re.escape, names))})\..*"]
    if isinstance(wanted, str):
        parts.append(wanted)
    elif wanted:
        parts.append(rf"(.*\.)?({'|'.join(map(re.escape, wanted))})")
    return "|".join(parts)


# ---------------------------------------------------------------------------------------------------------------
# What was chosen


def told(wanted: tuple[str, str | None], dtype: torch.dtype, model: Any, device: Device) -> str | None:
    """One line about what the recipe did not say itself; None where it said all.

    Args:
        wanted: `model.dtype` and `model.attn_implementation` as the recipe has them.
        dtype: What is computed in.
        model: As it was loaded.
        device: Where.
    """
    parts = []
    if wanted[0] == "auto":
        said = f"{str(dtype).removeprefix('torch.')} on {device.name}"
        parts.append(said if device.bf16 else f"{said}, which does not compute in bfloat16")
    if str(dtype) == "torch.float16" and model.config.get_text_config().model_type in _WIDE:
        parts.append("float32 in its residual stream, where float16 overflows")
    if wanted[1] is None:
        attention = model.config._attn_implementation
        capped = attention == "eager" and attention_for(None, model.config) == "eager"
        parts.append(f"{attention} attention" + (", as sdpa leaves out its soft-capping" if capped else ""))
    return f"chosen: {'; '.join(parts)}" if parts else None
