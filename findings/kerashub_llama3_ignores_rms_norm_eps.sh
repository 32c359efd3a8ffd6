#!/usr/bin/env bash
# Guess:     KerasHub's Llama3Backbone.from_preset, which reads a folder of transformers, computes what transformers does.
# Behaviour: its converter of Llama 3 reads neither `rms_norm_eps` (1e-6 stays; Llama 3, 3.1, 3.2 have 1e-5) nor the scaling
#            of rotary positions where a config holds it as transformers 5 saves it, in `rope_parameters` alone: a model
#            of Llama 3.1 loses its llama3 scaling. Neither is said. With `rope_scaling` beside it, the scaling is read,
#            and the remaining difference is that of the epsilon: a folder whose epsilon is 1e-6 gives transformers' logits.
# Versions:  keras-hub 0.32.0, jax 0.10.2, transformers 5.23.0, Python 3.11.
# Output:    as transformers 5 saves it:      factor None, epsilon 1e-06, largest difference of a logit 18
#            with rope_scaling beside it:     factor 8.0, epsilon 1e-06, largest difference of a logit 0.051
#            with an epsilon of 1e-6, too:    factor 8.0, epsilon 1e-06, largest difference of a logit 0.00011
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0"
"$folder/venv/bin/pip" install --quiet "transformers==5.23.0" "keras-hub==0.32.0" "jax==0.10.2" "safetensors==0.8.0"
cat > "$folder/look.py" <<'PYTHON'
import json
import os
import sys

os.environ["KERAS_BACKEND"], os.environ["HF_HUB_OFFLINE"] = "jax", "1"
import keras_hub
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder = os.path.join(sys.argv[1], "model")
llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
row = np.arange(1, 121)[None]


def look(name, epsilon, beside):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=epsilon, rope_theta=500000.0,
                         rope_scaling=llama3, tie_word_embeddings=False, max_position_embeddings=512)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        wanted = model(torch.from_numpy(row)).logits[0].numpy()
    model.save_pretrained(folder)
    path = os.path.join(folder, "config.json")
    saved = json.load(open(path))
    assert "rope_scaling" not in saved and saved["rope_parameters"]["factor"] == 8.0
    if beside:
        json.dump(saved | {"rope_scaling": llama3}, open(path, "w"))
    backbone = keras_hub.models.Llama3Backbone.from_preset(folder, dtype="float32")
    hidden = backbone({"token_ids": row, "padding_mask": np.ones_like(row, bool)})
    got = np.array(backbone.token_embedding(hidden, reverse=True))[0]
    settings = backbone.get_config()
    factor, used = settings["rope_frequency_adjustment_factor"], settings["layer_norm_epsilon"]
    difference = np.abs(got - wanted).max()
    print(f"{name:32} factor {factor}, epsilon {used}, largest difference of a logit {difference:.2g}")
    return factor, used, difference


factor, used, difference = look("as transformers 5 saves it:", 1e-5, False)
assert factor is None and used == 1e-6 and difference > 1
factor, used, difference = look("with rope_scaling beside it:", 1e-5, True)
assert factor == 8.0 and used == 1e-6 and 0.01 < difference < 0.5
factor, used, difference = look("with an epsilon of 1e-6, too:", 1e-6, True)
assert factor == 8.0 and used == 1e-6 and difference < 0.002
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
