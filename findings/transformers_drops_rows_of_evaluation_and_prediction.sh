#!/usr/bin/env bash
# Guess:     dataloader_drop_last=True leaves out the last, smaller batch of training rows; evaluate() and predict() take
#            every row that they are given.
# Behaviour: the argument holds for their dataloaders, too. predict() on 12 rows with batches of 8 returns 8 predictions and
#            no word of the other four, so that predictions[i] still belongs to row i but the last rows have none. evaluate()
#            on 4 rows runs no batch, returns no eval_loss and raises nothing: metric_for_best_model then has nothing to read.
# Versions:  transformers 5.23.0, torch 2.13.0, accelerate 1.15.0, Python 3.11.
# Output:    12 rows, drop_last False: 12 predictions, eval_loss True
#            12 rows, drop_last True: 8 predictions, eval_loss True
#            4 rows, drop_last False: 4 predictions, eval_loss True
#            4 rows, drop_last True: no predictions, eval_loss False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers==5.23.0" "accelerate==1.15.0"
cat > "$folder/look.py" <<'PYTHON'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(12)]
seen = []
for count in (12, 4):
    for drop in (False, True):
        arguments = TrainingArguments(
            sys.argv[1],
            per_device_eval_batch_size=8,
            dataloader_drop_last=drop,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, eval_dataset=rows[:count])
        predictions = trainer.predict(rows[:count]).predictions
        predicted = "no" if predictions is None else len(predictions)
        has_loss = "eval_loss" in trainer.evaluate()
        seen.append(f"{count} rows, drop_last {drop}: {predicted} predictions, eval_loss {has_loss}")
print("\n".join(seen))
assert seen == [
    "12 rows, drop_last False: 12 predictions, eval_loss True",
    "12 rows, drop_last True: 8 predictions, eval_loss True",
    "4 rows, drop_last False: 4 predictions, eval_loss True",
    "4 rows, drop_last True: no predictions, eval_loss False",
]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder/out" | grep -v "^{"
