#!/usr/bin/env bash
# Guess:     mlx-lm computes Gemma 2 as transformers does: every second layer sees only the last `sliding_window` tokens.
# Behaviour: its Gemma 2 has full attention in all layers. Within the window both agree; behind it they do not, and nothing
#            is said. A real Gemma 2 has a window of 4,096 tokens, so only longer texts show it.
# Versions:  mlx-lm 0.32.2, mlx[cpu] 0.32.4, transformers 5.23.0, torch 2.13.0, Python 3.11, Linux.
# Output:    tokens within the window: same: True
#            tokens behind the window: same: False
#            transformers with a window longer than the text: same: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "mlx[cpu]==0.32.4" "mlx-lm==0.32.2"
cat > "$folder/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import Gemma2Config, Gemma2ForCausalLM

WINDOW = 8
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "query_pre_attn_scalar": 16}
torch.manual_seed(0)
model = Gemma2ForCausalLM(Gemma2Config(sliding_window=WINDOW, attn_implementation="eager", **sizes)).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.3)
wide = Gemma2ForCausalLM(Gemma2Config(sliding_window=64, attn_implementation="eager", **sizes)).eval()
wide.load_state_dict(model.state_dict())
folder = Path(sys.argv[1]) / "model"
model.save_pretrained(folder)
# The keys of earlier releases, which mlx-lm reads.
config = json.loads((folder / "config.json").read_text())
config |= {"rope_theta": 10000.0, "head_dim": 16}
(folder / "config.json").write_text(json.dumps(config))
ids = np.random.default_rng(0).integers(3, 64, (1, 32))
loaded, _ = load_model(folder)
theirs = np.array(loaded(mx.array(ids)).astype(mx.float32))[0]
with torch.no_grad():
    ours, unlimited = (one(torch.tensor(ids)).logits[0].numpy() for one in (model, wide))
apart = np.abs(theirs - ours).max(axis=1)
seen = [
    f"tokens within the window: same: {bool(apart[:WINDOW].max() < 1e-2)}",
    f"tokens behind the window: same: {bool(apart[WINDOW:].max() < 1e-2)}",
    f"transformers with a window longer than the text: same: {bool(np.abs(theirs - unlimited).max() < 1e-2)}",
]
print("\n".join(seen))
assert [line.rsplit(" ", 1)[1] for line in seen] == ["True", "False", "True"]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
