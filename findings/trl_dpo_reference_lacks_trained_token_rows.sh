#!/usr/bin/env bash
# Guess:     DPOTrainer on an adapter that was trained before takes a frozen copy of it as reference, so the first loss is
#            ln 2 = 0.6931 and all rewards are 0.
# Behaviour: it copies the parameters whose name holds ".default.". PEFT keeps trained rows of an embedding
#            (trainable_token_indices) as trainable_tokens_delta.default, without a dot behind it, and so keeps LoRA on an
#            embedding: the reference has the base's rows there. The first loss is not ln 2, and rewards are not 0. With
#            LoRA on linear layers alone it is.
# Versions:  trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11.
# Output:    LoRA on linear layers: rewards of the first step are 0: True
#            LoRA and trained token rows: rewards of the first step are 0: False
#            LoRA on the embedding too: rewards of the first step are 0: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "trl==1.16.0" "peft==0.21.2" "datasets==5.2.0"
cat > "$folder/look.py" <<'PYTHON'
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {"<unk>": 0, "<pad>": 1, "</s>": 2, "red": 3, "green": 4, "blue": 5, "one": 6, "two": 7}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
rows = Dataset.from_list([{"prompt": "red green ", "chosen": "blue one", "rejected": "two two"}] * 2)
kinds = {
    "LoRA on linear layers": {"target_modules": ["q_proj"]},
    "LoRA and trained token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "LoRA on the embedding too": {"target_modules": ["q_proj", "embed_tokens"]},
}
seen = []
for name, options in kinds.items():
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=8, num_key_value_heads=2, **sizes)),
        LoraConfig(r=4, task_type="CAUSAL_LM", **options),
    )
    for parameter in model.parameters():  # as an adapter that was trained before
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    arguments = DPOConfig(
        sys.argv[1],
        max_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    first = trainer.state.log_history[0]
    zero = max(abs(first["rewards/chosen"]), abs(first["rewards/rejected"])) < 1e-6
    seen.append(f"{name}: rewards of the first step are 0: {zero}")
print("\n".join(seen))
assert [line.endswith("True") for line in seen] == [True, False, False]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder/run" 2> "$folder/log" | grep -v "^{" || { cat "$folder/log"; exit 1; }
