"""One weight to bitsandbytes' 4 or 8 bit and back, as a checkpoint stores it and a run computes with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}


def quantise(weight: torch.Tensor, options: dict[str, Any], layer: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a quantised layer, each with the end of its name.

    Args:
        weight: In the type that the rest of the model is stored in.
        options: `transformers.BitsAndBytesConfig`'s.
        layer: "linear", or "conv1d", whose weight is stored turned.

    Source: transformers 5.23 `integrations/bitsandbytes.py`; bitsandbytes 0.50 `nn/modules.py`, `_save_to_state_dict`.
    """
    weight = weight.T if layer == "conv1d" else weight
    if options.get("load_in_8bit"):
        packed, scales = _to_int8(weight)
        yield "weight", packed
        yield "SCB", scales
        yield "weight_format", torch.tensor(0, dtype=torch.uint8)
        return
    packed, state = _to_4bit(weight, options)
    yield "weight", packed
    for name, tensor in state.as_dict(packed=True).items():
        yield f"weight.{name}", tensor


def dequantised(weight: torch.Tensor, options: dict[str, Any], layer: str) -> torch.Tensor:
    """The values that a run on a quantised base computes with: `weight` rounded and brought back, in its own type."""
    import bitsandbytes.functional as bnb

    turned = weight.T if layer == "conv1d" else weight
    if options.get("load_in_8bit"):
        packed, scales = _to_int8(turned)
        values: torch.Tensor = bnb.int8_vectorwise_dequant(packed, scales).to(weight.dtype)
    else:
        packed, state = _to_4bit(turned, options)
        values = bnb.dequantize_4bit(packed, state)
    return (values.T if layer == "conv1d" else values).contiguous()


def _to_4bit(weight: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    import bitsandbytes.functional as bnb

    storage = options.get("bnb_4bit_quant_storage") or torch.uint8
    packed: torch.Tensor
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=64,
        compress_statistics=bool(options.get("bnb_4bit_use_double_quant")),
        quant_type=options.get("bnb_4bit_quant_type", "fp4"),
        quant_storage=getattr(torch, storage) if isinstance(storage, str) else storage,
    )
    return packed, state


def _to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import bitsandbytes.functional as bnb

    packed, scales, _ = bnb.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    return packed, scales
