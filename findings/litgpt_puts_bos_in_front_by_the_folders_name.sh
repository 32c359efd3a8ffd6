#!/usr/bin/env bash
# Guess:     LitGPT's Tokenizer puts BOS in front of a prompt if the tokenizer does so itself (its post-processor), wherever
#            its files lie.
# Behaviour: without add_bos_token in tokenizer_config.json, which transformers 5 no longer writes, it decides by the name of
#            the folder: one that begins with "Llama-3" gets BOS, the same files in a folder of another name get none.
#            tokenizers itself puts BOS in front in both.
# Versions:  litgpt 0.5.13, tokenizers of its own choice, torch 2.13.0, Python 3.11.
# Output:    tokenizers: [1, 3, 4]
#            in Llama-3-tiny: [1, 3, 4]
#            in my-model: [3, 4]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "litgpt==0.5.13"
cat > "$folder/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

backend = Backend(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3, "green": 4}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
seen = [f"tokenizers: {backend.encode('red green').ids}"]
config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
for name in ("Llama-3-tiny", "my-model"):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    seen.append(f"in {name}: {Tokenizer(folder).encode('red green').tolist()}")
print("\n".join(seen))
assert seen == ["tokenizers: [1, 3, 4]", "in Llama-3-tiny: [1, 3, 4]", "in my-model: [3, 4]"]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/look.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
