"""Weights in 8 and 4 bit as mlx stores them, which mlx-lm and LM Studio read.

Each group of 64 numbers of a row has a scale and a bias: a number is `scale * q + bias`, with q of 8 or 4 bit.
Suffixes name the dimensions of a tensor: O output features, I input features, G groups of input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from finetune.model.shards import row_ranges

GROUP = 64
# The smallest scale before the group's edge is moved to a multiple of it.
_EPSILON = 1e-7


def quantised_layers(model: nn.Module) -> list[str]:
    """The names of the layers that mlx-lm quantises: linear layers and embeddings of the text model, the last one too.

    Layers whose rows are not whole groups stay as they are, and an output layer that is the embedding.

    Args:
        model: The model, on any device.

    Source: mlx-lm 0.32 `utils.py`, `quantize_model`.
    """
    text, output = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    inside = {id(module) for module in text.modules()}
    if output.weight is not model.get_input_embeddings().weight:  # type: ignore[operator]
        inside.add(id(output))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and id(module) in inside and module.weight.shape[1] % GROUP == 0
    ]


def quantise(weight_OI: torch.Tensor, bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a checkpoint stores for a quantised layer, each with the suffix of its name.

    They equal those of `mx.quantize` to the bit; scales and biases have the weight's type.

    Args:
        weight_OI: The layer's weight, in the type that the rest of the model is stored in.
        bits: 8 or 4.

    Source: mlx 0.32 `mlx/backend/cpu/quantized.cpp`, `quantize`.
    """
    slices = [_quantise_rows(weight_OI[start:stop], bits) for start, stop in row_ranges(*weight_OI.shape)]
    for name, parts in zip(("weight", "scales", "biases"), zip(*slices, strict=True), strict=True):
        yield name, torch.cat(parts)


def _quantise_rows(weight_OI: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The packed numbers, scales and biases of some rows."""
    most = 2**bits - 1
    numbers_OGI = weight_OI.float().reshape(len(weight_OI), -1, GROUP)
    low_OG1, high_OG1 = (edge(numbers_OGI, 2, keepdim=True) for edge in (torch.amin, torch.amax))
    below = low_OG1.abs() > high_OG1.abs()
    scale_OG1 = ((high_OG1 - low_OG1) / most).clamp(min=_EPSILON)
    scale_OG1 = torch.where(below, scale_OG1, -scale_OG1)
    # The larger edge of the group is stored exactly, and zero too.
    edge_OG1 = torch.where(below, low_OG1, high_OG1)
    steps_OG1 = (edge_OG1 / scale_OG1).round()
    moved = steps_OG1 != 0
    scale_OG1 = torch.where(moved, edge_OG1 / steps_OG1, scale_OG1)
    bias_OG1 = torch.where(moved, edge_OG1, 0)
    steps = ((numbers_OGI - bias_OG1) / scale_OG1).round_().clamp_(0, most).to(torch.uint8).flatten(1)
    # The first number is in the lowest bits.
    packed = steps if bits == 8 else steps[:, ::2] | steps[:, 1::2] << 4
    return packed.view(torch.uint32), scale_OG1[..., 0].to(weight_OI.dtype), bias_OG1[..., 0].to(weight_OI.dtype)


def dequantise(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight (O, I) that a quantised layer computes with, in the type of its scales.

    Args:
        stored: The layer's tensors, by the names that `quantise` yields.
    """
    scales_OG1, biases_OG1 = (stored[name].float().unsqueeze(2) for name in ("scales", "biases"))
    packed = stored["weight"].view(torch.uint8)
    if packed.shape[1] < scales_OG1.shape[1] * GROUP:
        packed = torch.stack((packed & 15, packed >> 4), 2).flatten(1)
    numbers_OGI = packed.float().reshape(len(packed), -1, GROUP) * scales_OG1 + biases_OG1
    return numbers_OGI.flatten(1).to(stored["scales"].dtype)
