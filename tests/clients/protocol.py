"""The part that all probes share: what they ask a program, and the form of the answer.

Probes run in the environments of the programs that they ask: plain Python, and numpy.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = (
    "What is the difference between a lake and a pond?",
    "日本でいちばん高い山は何ですか。",
    "def f(x):\n    return x + 1\n\n\n# end",
    "  two  blanks, 12345 and é ñ 😀",
    "A lake is a body of water that is surrounded by land. " * 8,
)
CONVERSATIONS = (
    [{"role": "user", "content": "What is a lake?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "日本の山は？"},
    ],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a lake?"}],
)
ANSWER = 24
"""The tokens of a greedy answer."""

Parts = dict[str, Callable[..., Any]]
"""The questions that a program can answer about an artefact; one that it has no form of is left out.

`ids`: the token ids of a text. `prompt`: the rendered text of a conversation, with the generation prompt. `logits`: of
token ids, an array (tokens, vocabulary). `greedy`: the `ANSWER` token ids that follow given ones.
"""


def answer(read: Callable[[dict[str, Any]], Parts]) -> None:
    """Asks a program about each artefact of the job file named on the command line, and prints the answers as JSON.

    Each job names its folder or file (`path`), an `adapter` or None, the token ids to predict for (`texts`), those to
    answer (`prompt`), and the file to save logits to (`logits`). An error of one part leaves the others.

    Args:
        read: Opens an artefact.
    """
    jobs, found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), {}
    with contextlib.redirect_stdout(sys.stderr):
        for job in jobs:
            found[job["name"]] = _ask(read, job)
    print(json.dumps(found, ensure_ascii=False))


def _ask(read: Callable[[dict[str, Any]], Parts], job: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {"errors": {}}
    try:
        parts = read(job)
    except Exception as error:
        return {"errors": {"load": _line(error)}}
    questions = {
        "ids": lambda ask: [list(map(int, ask(text))) for text in TEXTS],
        "prompt": lambda ask: [ask(conversation) for conversation in CONVERSATIONS],
        "logits": lambda ask: _save(job["logits"], [ask(ids) for ids in job["texts"]]),
        "greedy": lambda ask: list(map(int, ask(job["prompt"]))),
    }
    for name, question in questions.items():
        if name in parts:
            try:
                said[name] = question(parts[name])
            except Exception as error:
                said["errors"][name] = _line(error)
    return said


def _save(file: str, arrays: list[Any]) -> bool:
    np.savez(file, *[np.asarray(array, dtype=np.float32) for array in arrays])
    return True


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
