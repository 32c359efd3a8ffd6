#!/usr/bin/env bash
# Guess:     Dataset.map(num_proc=2) leaves the environment of the process that calls it as it is.
# Behaviour: it copies `os.environ` (copy.deepcopy), sets two variables in the first, starts the pool and puts the copy in
#            its place: `os.environ` is then another object, and not only its contents are restored. What had bound the
#            first one when it was imported (`from os import environ`, a class attribute, a default argument) never sees
#            a variable that is set from then on, and still holds TOKENIZERS_PARALLELISM=false; the processes that are
#            started later see the new ones. rich's Console is such a reader: NO_COLOR, TERM, COLUMNS and TTY_COMPATIBLE
#            set after the `map` have no effect on it.
# Versions:  datasets 5.2.0, rich 15.0.0, Python 3.11.
# Output:    the same object: False
#            set later: os.environ '1', bound before None, child '1'
#            TOKENIZERS_PARALLELISM: os.environ None, bound before 'false'
#            rich with TERM=dumb, which was set later: dumb terminal False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "datasets==5.2.0" "rich==15.0.0"
cat > "$folder/look.py" <<'PYTHON'
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.pop("TOKENIZERS_PARALLELISM", None)
os.environ["TERM"] = "xterm-256color"
from os import environ as bound_before

import datasets
import rich.console


def same(row):
    return row


if __name__ == "__main__":
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"a": [1, 2, 3, 4]}).map(same, num_proc=2)
    print("the same object:", os.environ is bound_before)
    os.environ["SET_LATER"] = "1"
    child = subprocess.check_output([sys.executable, "-c", "import os; print(os.environ.get('SET_LATER'))"], text=True)
    print(f"set later: os.environ {os.environ.get('SET_LATER')!r}, bound before {bound_before.get('SET_LATER')!r}, "
          f"child {child.strip()!r}")
    name = "TOKENIZERS_PARALLELISM"
    print(f"{name}: os.environ {os.environ.get(name)!r}, bound before {bound_before.get(name)!r}")
    os.environ["TERM"] = "dumb"
    dumb = rich.console.Console(force_terminal=True).is_dumb_terminal
    print("rich with TERM=dumb, which was set later: dumb terminal", dumb)
    assert os.environ is not bound_before
    assert (os.environ["SET_LATER"], bound_before.get("SET_LATER"), child.strip()) == ("1", None, "1")
    assert (os.environ.get(name), bound_before.get(name)) == (None, "false")
    assert dumb is False
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
