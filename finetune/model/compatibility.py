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

A Gemma in float16 keeps its residual stream in float32 (`keep_residual_in_float32`). Modules that text does not
pass through (`non_text_modules`) are neither trained nor adapted, because all rows are text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from finetune.model.precision import _WIDE
from finetune.system.devices import Device
from finetune.system.errors import ModelError

if TYPE_CHECKING:
    import torch


def check_device(place: str) -> None:
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


# ---------------------------------------------------------------------------------------------------------------
# Attention


def choose_attention(wanted: str | None, config: Any, key: str = "model.attn_implementation") -> str | None:
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
    choose_attention(wanted, config, key)
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


def non_text_modules(model: Any) -> list[str]:
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


def describe_choices(
    wanted: tuple[str, str | None], dtype: torch.dtype, model: Any, device: Device
) -> str | None:
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
        capped = attention == "eager" and choose_attention(None, model.config) == "eager"
        parts.append(f"{attention} attention" + (", as sdpa leaves out its soft-capping" if capped else ""))
    return f"chosen: {'; '.join(parts)}" if parts else None
