#!/usr/bin/env bash
# Guess:     a column of quoted texts in a JSON Lines file is a column of texts.
# Behaviour: where every cell of a column looks like an ISO date, load_dataset("json") makes it timestamp[s]: the answer
#            "2024-05-01" comes back as datetime(2024, 5, 1, 0, 0), whose str() is "2024-05-01 00:00:00". One cell that is no
#            date keeps the whole column text. Fields of objects, and of objects in lists (the contents of a conversation's
#            messages), are changed in the same way. Such an answer, turned into text again, is a text that no file holds.
# Versions:  datasets 5.2.0, pyarrow 26.0.1, Python 3.11.
# Output:    dates: timestamp[s] 2024-05-01 00:00:00
#            one other: string 2024-05-01
#            in an object: timestamp[s] 2024-05-01 00:00:00
#            in a list of objects: timestamp[s] 2024-05-01 00:00:00
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


def loaded(name, values):
    path = os.path.join(sys.argv[1], name)
    with open(path, "w") as file:
        file.writelines(json.dumps({"answer": value}) + "\n" for value in values)
    return load_dataset("json", data_files=path, split="train", cache_dir=sys.argv[1])


dates = loaded("dates.jsonl", ["2024-05-01", "2024-05-02"])
other = loaded("other.jsonl", ["2024-05-01", "no date"])
inside = loaded("object.jsonl", [{"content": "2024-05-01"}, {"content": "2024-05-02"}])
listed = loaded("list.jsonl", [[{"content": "2024-05-01"}], [{"content": "2024-05-02"}]])
found = [
    f"dates: {dates.features['answer'].dtype} {dates[0]['answer']}",
    f"one other: {other.features['answer'].dtype} {other[0]['answer']}",
    f"in an object: {inside.features['answer']['content'].dtype} {inside[0]['answer']['content']}",
    f"in a list of objects: {listed.features['answer'].feature['content'].dtype} {listed[0]['answer'][0]['content']}",
]
print("\n".join(found))
assert found == [
    "dates: timestamp[s] 2024-05-01 00:00:00",
    "one other: string 2024-05-01",
    "in an object: timestamp[s] 2024-05-01 00:00:00",
    "in a list of objects: timestamp[s] 2024-05-01 00:00:00",
]
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
