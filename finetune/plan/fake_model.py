"""Builds the model of a recipe with fake tensors, which have shapes and dtypes and no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from finetune.model import compatibility
from finetune.model.load import quantization_config
from finetune.model.precision import Precision, keep_residual_in_float32
from finetune.model.trainable import trainable_model
from finetune.recipe.load import Recipe
from finetune.system.terminal import quiet


def build_fake(recipe: Recipe, config: Any, precision: Precision, mode: FakeTensorMode) -> Any:
    """The model that `finetune train` would train, with fake tensors.

    Args:
        recipe: The recipe.
        config: The base's config, which is changed.
        precision: The recipe's dtypes.
        mode: The mode in which the tensors are made.

    Raises:
        ModelError: `lora` does not fit the base.
    """
    attention = recipe.model.attn_implementation
    compatibility.check_attention_name(attention, config)
    if attention is not None and attention not in ("eager", "sdpa"):
        attention = "sdpa"  # flash and flex attention take about as much memory
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=precision.loaded,
            attn_implementation=attention,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    if recipe.quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization_config(recipe.quantization, precision.loaded))
        quantizer.preprocess_model(model=model, dtype=precision.loaded, device_map=None)
        quantizer.postprocess_model(model)
    if precision.loaded == torch.float16:
        keep_residual_in_float32(model)  # as `load_base`
    with torch.device("meta"):
        # Only weights show which tokens the base never learned; two of them take next to nothing.
        model = trainable_model(recipe, model, precision, unlearned=[0, 1])
    _make_fake(model, mode, precision.loaded)
    return model


def _make_fake(model: Any, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Replaces tensors on `meta` by fake CPU tensors, and quantises weights as bitsandbytes does on fake tensors."""
    made: dict[int, Any] = {}
    if getattr(model, "is_quantized", False):
        _make_8bit_table()
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = _fake_parameter(module, parameter, dtype), parameter
                module._parameters[name] = made[id(parameter)][0]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _make_8bit_table() -> None:
    """Makes bitsandbytes' table of 8-bit values, which it caches, before tensors are fake."""
    from bitsandbytes import functional

    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()


def _fake_parameter(module: Any, parameter: Any, dtype: torch.dtype) -> Any:
    """A fake tensor in place of a parameter of `module`; 4-bit weights are quantised from a weight of `dtype`."""
    kind = type(parameter).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import quantize_4bit

        weight = torch.empty(module.out_features, module.in_features, dtype=dtype)
        packed, state = quantize_4bit(
            weight,
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
        )
        fake: Any = torch.nn.Parameter(packed, requires_grad=False)
        fake.quant_state, fake.bnb_quantized = state, True
        return fake
    if kind == "Int8Params" and not parameter.has_fp16_weights:
        packed = torch.empty(parameter.shape, dtype=torch.int8)
        fake = torch.nn.Parameter(packed, requires_grad=False)
        fake.CB, fake.has_fp16_weights = packed, False
        fake.SCB = torch.empty(parameter.shape[0], dtype=torch.float32)
        return fake
    return torch.nn.Parameter(
        torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
    )
