#!/usr/bin/env bash
# Guess:     LoraConfig(layers_to_transform=[0]) limits LoRA to the first layer, however target_modules names its modules.
# Behaviour: it does for a suffix such as "q_proj". For full names, which other tools write into adapter_config.json, it is
#            passed over without a word: every named layer gets an adapter. Of 4 layers, 4 are adapted in place of 1.
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11.
# Output:    target_modules=['q_proj']: layers [0]
#            target_modules=[full names of q_proj]: layers [0, 1, 2, 3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "peft==0.21.2"
cat > "$folder/look.py" <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}


def adapted_layers(target_modules):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    config = LoraConfig(r=2, target_modules=target_modules, layers_to_transform=[0])
    names = [name for name, _ in get_peft_model(model, config).named_modules() if name.endswith(".lora_A")]
    return sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names})


full_names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)]
seen = [
    f"target_modules=['q_proj']: layers {adapted_layers(['q_proj'])}",
    f"target_modules=[full names of q_proj]: layers {adapted_layers(full_names)}",
]
print("\n".join(seen))
assert seen == [
    "target_modules=['q_proj']: layers [0]",
    "target_modules=[full names of q_proj]: layers [0, 1, 2, 3]",
]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py"
