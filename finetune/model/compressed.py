"""Weights in fp8 and in 4 bit as compressed-tensors stores them, which vLLM and SGLang read.

Suffixes name the dimensions of a tensor: O output features, I input features, G groups of input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from finetune.model.shards import row_ranges

# Our formats: the preset of compressed-tensors, and its name for the form of the stored tensors.
_PRESETS = {"fp8": ("FP8_DYNAMIC", "float-quantized"), "w4a16": ("W4A16", "pack-quantized")}
# The multiples of the scale that covers a group's largest weight; above 1 for a largest one that is rounded down.
_RATIOS = (1.0, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05)
# The multiples of the input and output features that servers have kernels for. Source: torch 2.13 `_scaled_mm`;
# GPTQ_MARLIN_MIN_THREAD_K and _N of the Marlin kernel in vLLM and SGLang.
_MULTIPLES = {"fp8": (16, 16), "w4a16": (128, 64)}


def quantised_layers(model: nn.Module, kind: str) -> list[str]:
    """The names of the linear layers that a format quantises.

    Those of the text model, but for the output layer and shapes that servers have no kernel for. None of a model with
    experts: transformers 5.23 reads its experts as if they were quantised too.

    Args:
        model: The model, on any device.
        kind: `fp8` or `w4a16`.

    Source: transformers 5.23 `integrations/compressed_tensors.py`, `get_experts_scheme`.
    """
    if any(".experts." in name and weight.ndim == 3 for name, weight in model.named_parameters()):
        return []
    multiple_I, multiple_O = _MULTIPLES[kind]
    inside = {id(module) for module in model.get_decoder().modules()}  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) in inside
        and module.in_features % multiple_I == 0
        and module.out_features % multiple_O == 0
    ]


def config(model: nn.Module, kind: str) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        model: The model, on any device.
        kind: `fp8` or `w4a16`.
    """
    from compressed_tensors.quantization import QuantizationConfig

    quantised = set(quantised_layers(model, kind))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    saved: dict[str, Any] = QuantizationConfig(
        config_groups={"group_0": _scheme(kind)},
        ignore=[name for name in linear if name not in quantised],
        format=_PRESETS[kind][1],
        quantization_status="compressed",
    ).to_dict()
    return saved


def quantise(
    weight_OI: torch.Tensor, kind: str, importance_I: torch.Tensor | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a checkpoint stores for a quantised layer, each with the suffix of its name.

    fp8 has one scale for each output feature, 4 bit one for each output feature and 128 input features. Scales have the
    weight's type, and weights are rounded to the nearest multiple of the scale as it is stored. The scale covers the
    largest weight; with `importance_I` that of 4 bit may clip it, where the layer's output then errs less.

    Args:
        weight_OI: The layer's weight, in the type that the rest of the model is stored in.
        kind: `fp8` or `w4a16`.
        importance_I: For `w4a16`: the mean squared input of each column.

    Source: compressed-tensors 0.20 `compressors/naive_quantized/base.py`, `compressors/pack_quantized/base.py`.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme(kind)
    exact_OI = weight_OI.float()
    groups_OGI = exact_OI.reshape(len(exact_OI), -1, scheme.weights.group_size or exact_OI.shape[1])
    scales_OG, _ = calculate_qparams(groups_OGI.amin(2), groups_OGI.amax(2), scheme.weights)
    scales_OG = scales_OG.to(weight_OI.dtype)
    if importance_I is not None:
        importance_GI = importance_I.reshape(groups_OGI.shape[1:])
        ranges = row_ranges(*exact_OI.shape)
        parts = [_clipped(groups_OGI[start:stop], scales_OG[start:stop], importance_GI) for start, stop in ranges]
        scales_OG = torch.cat(parts)
    compressor = BaseCompressor.get_value_from_registry(_PRESETS[kind][1])
    stored: Mapping[str, torch.Tensor] = compressor.compress(
        {"weight": exact_OI, "weight_scale": scales_OG.float()}, scheme
    )
    for name, tensor in stored.items():
        yield name, scales_OG if name == "weight_scale" else tensor.contiguous()


def _clipped(groups_OGI: torch.Tensor, scales_OG: torch.Tensor, importance_GI: torch.Tensor) -> torch.Tensor:
    """The scale of each group, of some multiples of the given one, with the least weighted error of 4-bit weights.

    The square of a weight's error counts as often as the mean square of its input: the sum is the expected square of
    the output's error, if inputs do not correlate.
    """
    best_OG, least_OG = scales_OG, torch.full(scales_OG.shape, torch.inf)
    for ratio in _RATIOS:
        tried_OG = (scales_OG * ratio).to(scales_OG.dtype)
        step_OGI = tried_OG.float()[..., None]
        error_OGI = (groups_OGI / step_OGI).round().clamp(-8, 7) * step_OGI - groups_OGI
        error_OG = (error_OGI.square() * importance_GI).sum(2)
        best_OG = torch.where(error_OG < least_OG, tried_OG, best_OG)
        least_OG = torch.minimum(error_OG, least_OG)
    return best_OG


def _scheme(kind: str) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(_PRESETS[kind][0], ["Linear"])
