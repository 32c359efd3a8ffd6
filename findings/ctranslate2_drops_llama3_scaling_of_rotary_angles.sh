#!/usr/bin/env bash
# Guess:     CTranslate2's converter carries over the "llama3" scaling of a Llama 3.1's rotary angles, or refuses it.
# Behaviour: it says nothing and leaves it out: the converted model answers as the same weights without any scaling, to 1e-5,
#            and not as the model, with an old rope_scaling key in config.json beside rope_parameters or without.
# Versions:  ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0, Python 3.11.
# Output:    with rope_scaling False: like the model: False, like the model without scaling: True
#            with rope_scaling True: like the model: False, like the model without scaling: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "ctranslate2==4.8.5" accelerate
cat > "$folder/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import ctranslate2
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
scaling["original_max_position_embeddings"] = 16
words = {f"w{i}": i for i in range(3, 40)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
torch.manual_seed(0)
config = LlamaConfig(vocab_size=40, num_key_value_heads=2, rope_parameters={"rope_theta": 500.0} | scaling, **sizes)
model = LlamaForCausalLM(config).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.4)
plain = LlamaConfig(
    vocab_size=40, num_key_value_heads=2, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}, **sizes
)
without = LlamaForCausalLM(plain).eval()
without.load_state_dict(model.state_dict())
ids = [1, *np.random.default_rng(0).integers(3, 40, 47).tolist()]


def logits(one):
    with torch.no_grad():
        return one(torch.tensor([ids])).logits[0].numpy()


seen = []
for old_key in (False, True):
    folder = Path(sys.argv[1]) / f"model-{old_key}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    if old_key:
        saved |= {"rope_scaling": scaling, "rope_theta": 500.0}
    (folder / "config.json").write_text(json.dumps(saved))
    into = str(folder / "converted")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(into, force=True)
    generator = ctranslate2.Generator(into)
    found = np.array(generator.forward_batch([tokenizer.convert_ids_to_tokens(ids)]))[0]
    like, alike = (float(np.abs(found - logits(one)).max()) < 1e-3 for one in (model, without))
    seen.append(f"with rope_scaling {old_key}: like the model: {like}, like the model without scaling: {alike}")
print("\n".join(seen))
assert [line.split(": ", 1)[1] for line in seen] == ["like the model: False, like the model without scaling: True"] * 2
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
