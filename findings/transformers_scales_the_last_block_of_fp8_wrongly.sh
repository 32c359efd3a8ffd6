#!/usr/bin/env bash
# Guess:     a weight that is stored in fp8 with a scale for each block of 128 by 128 is dequantised by these blocks; the
#            last ones are smaller where 128 does not divide the weight, as in `FP8Linear`, which keeps it in fp8.
# Behaviour: while a model is dequantised (always on a CPU) the size of a block is computed from the number of scales: 192
#            rows with two scales become two blocks of 96. The rows 96 to 127 are multiplied by their neighbours' scale, and
#            nothing is said. Where the numbers do not divide (576 rows, 5 scales) loading fails.
# Versions:  transformers 5.23.0 (`integrations/finegrained_fp8.py`, `Fp8Dequantize._dequantize_one`), torch 2.13.0,
#            Python 3.11, Linux.
# Output:    128 rows: the stored values: True
#            192 rows: the stored values: False (rows 96 to 127 are wrong: True)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "accelerate==1.15.0"
cat > "$folder/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes))
with torch.no_grad():
    # Weights of different sizes, so that the scales differ.
    model.model.layers[0].mlp.gate_proj.weight[128:] *= 8
folder = Path(sys.argv[1]) / "model"
model.save_pretrained(folder)

stored, values = {}, {}
for name, weight in load_file(folder / "model.safetensors").items():
    if not name.endswith("_proj.weight"):
        stored[name] = weight
        continue
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    scales = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3)) / 448
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    stored[name], stored[f"{name}_scale_inv"] = (weight / each).to(torch.float8_e4m3fn), scales
    values[name] = stored[name].float() * each
save_file(stored, folder / "model.safetensors", {"format": "pt"})
config = json.loads((folder / "config.json").read_text())
blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
(folder / "config.json").write_text(json.dumps(config | {"quantization_config": blocks}))

dequantise = FineGrainedFP8Config(dequantize=True)
loaded = dict(LlamaForCausalLM.from_pretrained(folder, quantization_config=dequantise).named_parameters())
same = {}
for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"):
    same[name] = torch.isclose(loaded[name].float(), values[name], rtol=1e-3).all(1)
even, uneven = same.values()
print(f"128 rows: the stored values: {bool(even.all())}")
wrong = (~uneven).nonzero().flatten().tolist()
print(f"192 rows: the stored values: {not wrong} (rows 96 to 127 are wrong: {wrong == list(range(96, 128))})")
assert even.all()
assert wrong == list(range(96, 128))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
