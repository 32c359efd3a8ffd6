#!/usr/bin/env bash
# Guess:     a checkpoint of compressed-tensors with two schemes (4 bit, and 8 bit for down_proj) has the same weights when
#            transformers dequantises it while loading (`CompressedTensorsConfig(dequantize=True)`) as when
#            compressed-tensors decompresses it.
# Behaviour: all dense layers are dequantised by the first scheme: each 8-bit number of down_proj is unpacked as two 4-bit
#            ones, and as many of these are kept as the layer has weights. Names and shapes fit, so nothing is said.
# Versions:  transformers 5.23.0 (`integrations/compressed_tensors.py`, `get_dense_scheme`), compressed-tensors 0.20.1,
#            torch 2.13.0, Python 3.11, Linux.
# Output:    decompressed by compressed-tensors: gate_proj is rounded: True, down_proj is rounded: True
#            dequantised while loaded: gate_proj is rounded: True, down_proj is rounded: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "accelerate==1.15.0" "compressed-tensors==0.20.1"
cat > "$folder/look.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization import apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)).bfloat16()
exact = {name: weight.detach().clone() for name, weight in model.named_parameters()}


def scheme(bits, target):
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    return QuantizationScheme(targets=[target], weights=weights)


groups = {"group_0": scheme(4, "re:.*(q|k|v|o|gate|up)_proj"), "group_1": scheme(8, "re:.*down_proj")}
config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="initialized")
apply_quantization_config(model, config)
for module in model.modules():
    if hasattr(module, "quantization_scheme"):
        low, high = (reduce(module.weight.float(), 1, True) for reduce in (torch.amin, torch.amax))
        scale, _ = calculate_qparams(low, high, module.quantization_scheme.weights)
        module.weight_scale.data.copy_(scale)
        module.quantization_status = QuantizationStatus.FROZEN
folder = Path(sys.argv[1]) / "model"
compressor = ModelCompressor.from_pretrained_model(model)
compressor.compress_model(model)
model.save_pretrained(folder)
compressor.update_config(folder)

seen = []
for title, options in (
    ("decompressed by compressed-tensors", {}),
    ("dequantised while loaded", {"quantization_config": CompressedTensorsConfig(dequantize=True)}),
):
    loaded = LlamaForCausalLM.from_pretrained(folder, **options)
    loaded(torch.arange(3, 20)[None])  # decompresses
    weights = dict(loaded.named_parameters())
    line = []
    for layer in ("gate_proj", "down_proj"):
        name = f"model.layers.0.mlp.{layer}.weight"
        error = (weights[name].float() - exact[name].float()).abs().max() / exact[name].float().abs().max()
        # Half of a 4-bit step, and the rounding of bfloat16.
        line.append(f"{layer} is rounded: {bool(error < 0.08)}")
    seen.append(f"{title}: {', '.join(line)}")
print("\n".join(seen))
assert [text.rsplit(" ", 1)[1] for line in seen for text in line.split(", ")] == ["True", "True", "True", "False"]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
