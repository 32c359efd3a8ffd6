#!/usr/bin/env bash
# Guess:     SFTTrainer leaves the settings of a model's config as they were; a saved model generates as its base does.
# Behaviour: for a mixture of experts trl switches config.output_router_logits on, for the loss that balances the experts,
#            and never off again. The saved config.json has it on, so a model that is loaded from it computes that loss while
#            it generates, too: with a batch of two prompts, one of them padded, generate() raises "The size of tensor a (2)
#            must match the size of tensor b (8)". With output_router_logits set to False the same call works.
# Versions:  trl 1.16.0, transformers 5.23.0, torch 2.13.0, datasets 5.2.0, Python 3.11.
# Output:    base: False, after training: True, saved: True
#            generate as saved: RuntimeError
#            generate with output_router_logits False: (2, 5)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "trl==1.16.0" "datasets==5.2.0"
cat > "$folder/look.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {"<unk>": 0, "<pad>": 1, "</s>": 2, "a": 3, "b": 4}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
    unk_token="<unk>",
    pad_token="<pad>",
    eos_token="</s>",
)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = MixtralForCausalLM(MixtralConfig(vocab_size=8, num_local_experts=2, num_key_value_heads=2, **sizes))
base = model.config.output_router_logits
arguments = SFTConfig(
    sys.argv[1],
    max_steps=1,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
)
rows = Dataset.from_list([{"input_ids": [3, 4, 2]}] * 4)
trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model()
saved = MixtralForCausalLM.from_pretrained(sys.argv[1])
seen = [f"base: {base}, after training: {model.config.output_router_logits}, saved: {saved.config.output_router_logits}"]
prompts = {
    "input_ids": torch.tensor([[1, 3, 4], [3, 4, 3]]),
    "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
}
try:
    saved.generate(**prompts, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    seen.append("generate as saved: works")
except RuntimeError as error:
    seen.append(f"generate as saved: {type(error).__name__}")
saved.config.output_router_logits = False
generated = saved.generate(**prompts, max_new_tokens=2, min_new_tokens=2, do_sample=False)
seen.append(f"generate with output_router_logits False: {tuple(generated.shape)}")
print("\n".join(seen))
assert seen == [
    "base: False, after training: True, saved: True",
    "generate as saved: RuntimeError",
    "generate with output_router_logits False: (2, 5)",
]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder/run" 2> "$folder/log" | grep -v "^{" || { cat "$folder/log"; exit 1; }
