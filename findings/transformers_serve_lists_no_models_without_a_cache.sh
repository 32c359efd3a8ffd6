#!/usr/bin/env bash
# Guess:     GET /v1/models of `transformers serve MODEL` on a machine that has downloaded nothing lists the served model,
#            or nothing: the model comes from a local folder, and it answers.
# Behaviour: the list is an error 500, as scan_cache_dir of huggingface_hub raises CacheNotFound where the Hub's cache
#            does not exist. With an empty folder there it is 200, and the list is empty: the served model is not in it.
#            So clients that ask for the list first, as many chat interfaces do, find no model.
# Versions:  transformers 5.23.0, torch 2.13.0, Python 3.11.
# Output:    no cache: health 200, models 500
#            empty cache: health 200, models 200 with 0 models
set -euo pipefail
folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2> /dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.*" "transformers[serving]==5.23.0" accelerate
cat > "$folder/make.py" <<'PYTHON'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 40)}
backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(
    tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
).save_pretrained(sys.argv[1])
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(sys.argv[1])
PYTHON
"$folder/venv/bin/python" "$folder/make.py" "$folder/model" > /dev/null 2>&1
export HF_HUB_OFFLINE=1
ask() { # PORT: the status of /health and of /v1/models, and the number of models
    python3 - "$1" <<'PYTHON'
import json
import sys
import time
import urllib.error
import urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(path):
    try:
        with opener.open(f"http://127.0.0.1:{sys.argv[1]}{path}", timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


for _ in range(240):
    try:
        health = get("/health")[0]
        break
    except OSError:
        time.sleep(0.5)
status, body = get("/v1/models")
count = f" with {len(json.loads(body)['data'])} models" if status == 200 else ""
print(f"health {health}, models {status}{count}")
PYTHON
}
port=$((20000 + RANDOM % 20000))
for case in "no cache" "empty cache"; do
    port=$((port + 1))
    export HF_HUB_CACHE="$folder/${case// /-}"
    [ "$case" = "no cache" ] || mkdir "$HF_HUB_CACHE"
    "$folder/venv/bin/transformers" serve "$folder/model" --host 127.0.0.1 --port "$port" > "$folder/log" 2>&1 &
    server=$!
    echo "$case: $(ask "$port")" | tee -a "$folder/seen"
    kill "$server"
    wait "$server" || true
    server=
done
diff "$folder/seen" - <<'SEEN'
no cache: health 200, models 500
empty cache: health 200, models 200 with 0 models
SEEN
