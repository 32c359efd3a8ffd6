#!/usr/bin/env bash
# Guess:     a checkpoint in the format of compressed-tensors whose `ignore` names the experts has them in 16 bit, and
#            from_pretrained reads them as they are, as it reads every other layer that `ignore` names.
# Behaviour: with the preset FP8_DYNAMIC it does. With W4A16, which packs weights, loading raises: the converter that
#            stacks the experts asks for packed weights of the first config group and never looks at `ignore`
#            (integrations/compressed_tensors.py, get_experts_scheme). Without experts the same two files are read.
# Versions:  transformers 5.23.0, compressed-tensors 0.20.1, torch 2.13.0, Python 3.11.
# Output:    mixtral FP8_DYNAMIC: loads
#            mixtral W4A16: RuntimeError: We encountered some issues during automatic conversion of the weights.
#            mistral FP8_DYNAMIC: loads
#            mistral W4A16: loads
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "compressed-tensors==0.20.1" "accelerate>=1.12"
cat > "$folder/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

FORMATS = {"FP8_DYNAMIC": "float-quantized", "W4A16": "pack-quantized"}


def checkpoint(family: str, preset: str) -> Path:
    """A random model whose attention is quantised; every other linear layer is named in `ignore`."""
    folder = Path(sys.argv[1]) / f"{family}-{preset}"
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    options = {"num_local_experts": 2} if family == "mixtral" else {}
    config = AutoConfig.for_model(family, vocab_size=64, num_key_value_heads=4, **sizes, **options)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(FORMATS[preset])
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "self_attn" not in name:
            stored[name] = tensor
            continue
        groups = tensor.reshape(len(tensor), -1, 128)
        scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
        for part, value in compressor.compress({"weight": tensor, "weight_scale": scale}, scheme).items():
            stored[f"{name.removesuffix('weight')}{part}"] = value
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head", "re:.*mlp.*", "re:.*experts.*", "re:.*gate$"],
        format=FORMATS[preset],
        quantization_status="compressed",
    )
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"quantization_config": quantization.to_dict()}))
    return folder


seen = []
for family in ("mixtral", "mistral"):
    for preset in FORMATS:
        try:
            AutoModelForCausalLM.from_pretrained(checkpoint(family, preset))(torch.tensor([[1, 2, 3]]))
            seen.append(f"{family} {preset}: loads")
        except RuntimeError as error:
            seen.append(f"{family} {preset}: {type(error).__name__}: {str(error).partition(' For')[0]}")
print("\n".join(seen))
assert seen == [
    "mixtral FP8_DYNAMIC: loads",
    "mixtral W4A16: RuntimeError: We encountered some issues during automatic conversion of the weights.",
    "mistral FP8_DYNAMIC: loads",
    "mistral W4A16: loads",
]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
