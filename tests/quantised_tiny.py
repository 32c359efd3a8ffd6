"""Tiny models whose weights are stored quantised, in the files that others publish: fp8, MXFP4, compressed-tensors."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.model.locate import locate
from finetune.system.terminal import quiet

# A tensor's name and values before quantisation, and the tensors that are stored, with the values that they stand for.
Stored = Iterator[tuple[str, torch.Tensor]]
Quantiser = Callable[[str, torch.Tensor], tuple[Stored, torch.Tensor]]
SHAPE: dict[str, Any] = {
    **{"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
}
EXPERTS: dict[str, Any] = {
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    "layer_types": ["sliding_attention", "full_attention"],
}
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp8_in_blocks(name: str, weight_OI: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """As DeepSeek and Qwen publish: a scale for each block of 128 by 128, of the rest where less is left."""
    rows, columns = weight_OI.shape
    padded = torch.nn.functional.pad(weight_OI.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / 448
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    stored = (weight_OI.float() / each).to(torch.float8_e4m3fn)
    return iter([(name, stored), (f"{name}_scale_inv", scales)]), stored.float() * each


def w4a16(name: str, weight_OI: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """As compressed-tensors packs."""
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    groups = weight_OI.float().reshape(len(weight_OI), -1, 128)
    scales, _ = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress({"weight": weight_OI.float(), "weight_scale": scales.float()}, scheme)
    values = ((groups / scales[..., None]).round().clamp(-8, 7) * scales[..., None]).reshape(weight_OI.shape)
    return ((name.removesuffix("weight") + part, tensor) for part, tensor in stored.items()), values


def mxfp4(name: str, weight_EIO: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """As GPT-OSS is published: blocks of 32 numbers with 4 bits and one power of two, the low half of a byte first."""
    groups = weight_EIO.float().transpose(1, 2).unflatten(2, (-1, 32))
    powers = groups.abs().amax(3).log2().floor() - 2
    scaled = groups / powers.exp2()[..., None]
    codes = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1)
    values = (_E2M1[codes] * scaled.sign() * powers.exp2()[..., None]).flatten(2).transpose(1, 2)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return iter([(f"{name}_blocks", blocks), (f"{name}_scales", (powers + 127).to(torch.uint8))]), values


_PACKED = QuantizationConfig(
    config_groups={"group_0": preset_name_to_scheme("W4A16", ["Linear"])},
    ignore=["lm_head"],
    format="pack-quantized",
    quantization_status="compressed",
)
# By the name of the form: the kind of the model, the ends of the quantised names, their quantiser, and what config.json
# says.
FORMS: dict[str, tuple[str, tuple[str, ...], Quantiser, dict[str, Any]]] = {
    "fp8": (
        "llama",
        ("_proj.weight",),
        fp8_in_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    "compressed-tensors": ("llama", ("_proj.weight",), w4a16, _PACKED.to_dict()),
    "mxfp4": (
        "gpt_oss",
        ("experts.gate_up_proj", "experts.down_proj"),
        mxfp4,
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    ),
}


def save(form: str, folder: Path, exact: Path) -> None:
    """Writes a model that is stored quantised, the rest in bfloat16, and one in `exact` with its values in float32."""
    kind, ends, quantise, quantization = FORMS[form]
    shape = SHAPE | (EXPERTS if kind == "gpt_oss" else {})
    torch.manual_seed(0)
    with quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).bfloat16().save_pretrained(exact)
        AutoTokenizer.from_pretrained(locate("random:llama")).save_pretrained(exact)
    shutil.copytree(exact, folder)
    tensors: dict[str, torch.Tensor] = {}
    values = load_file(exact / "model.safetensors")
    for name, weight in list(values.items()):
        if name.endswith(ends):
            stored, rounded = quantise(name, weight * 10)
            tensors |= {key: part.contiguous() for key, part in stored}
            values[name] = rounded.contiguous()
        else:
            tensors[name] = weight
            values[name] = weight.float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(values, exact / "model.safetensors", {"format": "pt"})
    for place, more in ((folder, {"quantization_config": quantization}), (exact, {"dtype": "float32"})):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | more, default=str))
