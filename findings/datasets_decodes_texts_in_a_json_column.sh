#!/usr/bin/env bash
# Guess:     load_dataset("json") gives a text back as the text that the file holds.
# Behaviour: in a column whose cells differ in type (an object in one row, a text in another), datasets makes a `Json`
#            feature, stores each cell as JSON, and decodes texts twice: "42" comes back as the number 42, "null" as None,
#            "[1, 2]" as a list, and "{\"city\": \"Brest\"}" as an object. The column of a tool call's arguments, where one row
#            has an object and the others JSON texts, no longer holds the texts that the file does; nothing is said.
#            Which rows are changed depends on other rows: without the row that holds an object, all stay texts.
# Versions:  datasets 5.2.0, pyarrow 26.0.1, Python 3.11.
# Output:    mixed: [{'x': 1}, 42, [1, 2], None, {'city': 'Brest'}, 'plain']
#            texts: ['42', '[1, 2]', 'null', '{"city": "Brest"}', 'plain']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "datasets==5.2.0" "pyarrow==26.0.1"
cat > "$folder/look.py" <<'PYTHON'
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
from datasets import load_dataset

texts = ["42", "[1, 2]", "null", '{"city": "Brest"}', "plain"]


def loaded(name, values):
    path = os.path.join(sys.argv[1], name)
    with open(path, "w") as file:
        file.writelines(json.dumps({"arguments": value}) + "\n" for value in values)
    rows = load_dataset("json", data_files=path, split="train", cache_dir=sys.argv[1])
    return [row["arguments"] for row in rows]


mixed, alone = loaded("mixed.jsonl", [{"x": 1}, *texts]), loaded("texts.jsonl", texts)
print("mixed:", mixed)
print("texts:", alone)
assert mixed == [{"x": 1}, 42, [1, 2], None, {"city": "Brest"}, "plain"]
assert alone == texts
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
