"""Quantises weights as bitsandbytes, compressed-tensors or mlx stores them, and dequantises those of a run's base.

Suffixes name the dimensions of a tensor: O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from finetune.model import compressed, mlx

NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8: dict[str, Any] = {"load_in_8bit": True}
# The key of a format of `compressed.py`, in place of bitsandbytes' options.
COMPRESSED = "compressed"
# The key of the bits of a weight in a format of `mlx.py`; 16 are not quantised.
MLX = "mlx"


def quantise(
    weight: torch.Tensor, options: dict[str, Any], layer: str, importance_I: torch.Tensor | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a checkpoint stores for a quantised layer, each with the suffix of its name.

    Args:
        weight: The layer's weight, in the type that the rest of the model is stored in: (O, I), or (I, O) of a conv1d.
        options: The arguments of `transformers.BitsAndBytesConfig`, or a format of `compressed.py` under `COMPRESSED`,
            or bits under `MLX`.
        layer: "linear", or "conv1d", whose weight is stored transposed.
        importance_I: The mean squared input of each column, which only w4a16 takes.

    Source: transformers 5.23 `integrations/bitsandbytes.py`; bitsandbytes 0.50 `nn/modules.py`, `_save_to_state_dict`.
    """
    weight_OI = weight.T if layer == "conv1d" else weight
    if kind := options.get(COMPRESSED):
        yield from compressed.quantise(weight_OI, kind, importance_I)
        return
    if bits := options.get(MLX):
        yield from mlx.quantise(weight_OI, bits)
        return
    if options.get("load_in_8bit"):
        packed_OI, scales_O = _to_int8(weight_OI)
        yield "weight", packed_OI
        yield "SCB", scales_O
        yield "weight_format", torch.tensor(0, dtype=torch.uint8)
        return
    packed, state = _to_4bit(weight_OI, options)
    yield "weight", packed
    for name, tensor in state.as_dict(packed=True).items():
        yield f"weight.{name}", tensor


def dequantised(weight: torch.Tensor, options: dict[str, Any], layer: str) -> torch.Tensor:
    """The values that a run on a quantised base computes with: `weight` quantised and back, in its shape and type.

    Args:
        weight: The layer's weight: (O, I), or (I, O) of a conv1d.
        options: The arguments of `transformers.BitsAndBytesConfig`.
        layer: "linear", or "conv1d", whose weight is stored transposed.
    """
    import bitsandbytes.functional as bnb

    weight_OI = weight.T if layer == "conv1d" else weight
    values_OI: torch.Tensor
    if options.get("load_in_8bit"):
        values_OI = bnb.int8_vectorwise_dequant(*_to_int8(weight_OI)).to(weight.dtype)
    else:
        values_OI = bnb.dequantize_4bit(*_to_4bit(weight_OI, options))
    return (values_OI.T if layer == "conv1d" else values_OI).contiguous()


def _to_4bit(weight_OI: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """A weight in 4 bit, two numbers to a byte, and bitsandbytes' `QuantState` of it."""
    import bitsandbytes.functional as bnb

    storage = options.get("bnb_4bit_quant_storage") or torch.uint8
    packed: torch.Tensor
    packed, state = bnb.quantize_4bit(
        weight_OI.contiguous(),
        blocksize=64,
        compress_statistics=bool(options.get("bnb_4bit_use_double_quant")),
        quant_type=options.get("bnb_4bit_quant_type", "fp4"),
        quant_storage=getattr(torch, storage) if isinstance(storage, str) else storage,
    )
    return packed, state


def _to_int8(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in int8, and the largest absolute value of each of its rows, (O,)."""
    import bitsandbytes.functional as bnb

    packed_OI, scales_O, _ = bnb.int8_vectorwise_quant(weight_OI.contiguous().to(torch.float16))
    return packed_OI, scales_O
