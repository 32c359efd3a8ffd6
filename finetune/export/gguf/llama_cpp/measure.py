"""What became of a GGUF file: measured by llama.cpp in a process of its own, as `verify.py` does for folders.

The figures have the names that they have there, so that one table can show both kinds.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from finetune.data.chat import IGNORE
from finetune.data.samples import LabelledRow
from finetune.data.turns import Message
from finetune.evaluate.perplexity import score, score_groups
from finetune.export.gguf.llama_cpp.library import Llama
from finetune.export.gguf.llama_cpp.server import NO_SERVER, Server
from finetune.system import fresh_process
from finetune.system.errors import FinetuneError, LlamaCppError, first_line

# As in `verify.py`: an answer that has not ended by then is taken for one that does not end.
_ANSWER_TOKENS = 64
_PROMPTS = 10
QUESTION = "What is a Large Language Model?"
_QUESTION_TOKENS = 128
# Tokens on which the speed is taken: of a prompt, as llama.cpp's own bench, and of its answer.
_SPEED = (512, 64)
# Differences that the report shows, and token ids of each.
_SHOWN, _AROUND = 5, 8


@dataclass(frozen=True)
class TokenizedText:
    """A text and its ids by the trained tokenizer; what llama.cpp makes of it is compared with them.

    `special` tells whether names of control tokens in it stand for them. `messages` are there where the text is a
    rendered conversation: llama.cpp then renders them itself, by the file's template. One that ends with an answer is
    whole; any other ends where the next answer begins.
    """

    text: str
    ids: list[int]
    special: bool = True
    messages: list[Message] | None = None


@dataclass(frozen=True)
class Measurement:
    """What GGUF files of one model are measured on, and the predictions that they are compared with."""

    rows: list[LabelledRow]
    """Rows that a file predicts; it also answers the prompts of the first ten."""
    groups: dict[str, list[LabelledRow]] = field(default_factory=dict)
    """More rows, by name; the result's `groups` holds the figures of each."""
    texts: list[TokenizedText] = field(default_factory=list)
    """Texts whose token ids are compared."""
    conversations: list[TokenizedText] = field(default_factory=list)
    """Texts whose token ids are returned, for `verify.compare`; those without messages are plain texts."""
    prompts: list[TokenizedText] = field(default_factory=list)
    """Conversations up to an answer; the file's own chat template must write them alike."""
    against: str | None = None
    """The report's name for the model that made `reference`."""
    reference: Path | None = None
    """A file of that model's predictions on the same rows; None where there are none."""
    keep: Path | None = None
    """Where to keep the file's own predictions."""


@dataclass(frozen=True)
class _Task:
    """What the fresh process gets."""

    file: Path
    measurement: Measurement


def measure(file: Path, name: str, measurement: Measurement) -> dict[str, Any]:
    """Runs a GGUF file in llama.cpp, in a fresh process; `error` in the result where it cannot be loaded or run.

    The result has the keys of `verify.measure` and: `largest`, the largest difference of a log-probability from the
    reference's; `same_texts` and `same_prompts` with `count`, `equal` and the first `differences`; `question`;
    `prompt_speed` and `speed` in tokens per second.

    Args:
        file: A GGUF file.
        name: The report's name for it.
        measurement: What it is measured on.
    """
    size = file.stat().st_size if file.is_file() else 0
    found: dict[str, Any] = {"name": name, "against": measurement.against, "dtype": "gguf", "bytes": size}
    # After a failed assertion ggml would start a debugger for a backtrace.
    environment = {"GGML_NO_BACKTRACE": "1"}
    try:
        return found | fresh_process.call(
            _load_and_measure, _Task(file, measurement), environment=environment
        )
    except fresh_process.ProcessFailed as error:
        return found | {"error": _crash_reason(error.code, error.stderr) if error.code else str(error)}
    except LlamaCppError as error:
        reason = str(error)
        if reason.endswith(NO_SERVER) and isinstance(error.__cause__, fresh_process.ProcessFailed):
            reason += f": {_first_logged_error(error.__cause__.stderr)}"
        return found | {"error": reason}
    except (FinetuneError, OSError) as error:
        return found | {"error": f"{type(error).__name__}: {first_line(error)}"}


def _crash_reason(code: int, stderr: str) -> str:
    """One line on why llama.cpp's process ended without a result."""
    if code == -signal.SIGKILL:
        return "llama.cpp's process was killed, most likely because memory ran out"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    why = next((line for line in lines if "GGML_ASSERT" in line), lines[-1] if lines else "it said nothing")
    if code < 0:
        return f"llama.cpp crashed ({signal.Signals(-code).name}): {why}"
    return f"llama.cpp's process ended with code {code}: {why}"


def _first_logged_error(stderr: str) -> str:
    """The first error in the log of llama.cpp's server, without its time."""
    first = next((line for line in stderr.splitlines() if " E " in line), stderr)
    return first.partition(" E ")[2].strip() or "it does not say why"


# ---------------------------------------------------------------------------------------------------------------
# In the fresh process


def _load_and_measure(task: _Task) -> dict[str, Any]:
    file, on = task.file, task.measurement
    started = time.monotonic()
    every = [*on.rows, *(row for rows in on.groups.values() for row in rows)]
    with Llama(file, max((len(row.input_ids) for row in every), default=1)) as llama:
        seconds = time.monotonic() - started
        ids = [llama.tokenize(item.text, item.special) for item in on.texts]
        model = _LlamaModel(llama, on.reference)
        result = score(model, list(_split_rows(on.rows, llama.step)), on.reference, on.keep)
        groups = {name: list(_split_rows(rows, llama.step)) for name, rows in on.groups.items()}
        llama.reset()
        by_group = score_groups(_LlamaModel(llama, None), groups, on.reference, on.keep)
        trained_context = llama.trained_context
    found: dict[str, Any] = {"load_seconds": round(seconds, 2), "perplexity": result.perplexity}
    found |= asdict(result)
    found["largest"] = model.largest
    found["groups"] = by_group
    found["same_texts"] = _compared(on.texts, ids, [item.text for item in on.texts])

    row_prompts = [row.prompt for row in on.rows[:_PROMPTS]]
    long_prompt = _long_prompt(on.rows, trained_context)
    # A file's template may write more than the trained one.
    longest = max(len(ids) for ids in [*row_prompts, *(item.ids for item in on.prompts), long_prompt])
    with Server(file, 2 * longest + 512) as server:
        found["conversations"] = [server.tokenize(_rendered(server, item)) for item in on.conversations]
        if on.prompts:
            rendered = [_rendered(server, item) for item in on.prompts]
            ids = [server.tokenize(text) for text in rendered]
            found["same_prompts"] = _compared(on.prompts, ids, rendered)
        answers = [server.answer(prompt, _ANSWER_TOKENS) for prompt in row_prompts]
        found["answers"] = [answer["ids"] for answer in answers]
        found["stopped"] = sum(answer["ended"] for answer in answers)
        plain = not any(item.messages for item in [*on.conversations, *on.prompts])
        prompt = QUESTION if plain else server.render([{"role": "user", "content": QUESTION}])
        answer = server.answer(prompt, _QUESTION_TOKENS)
        found["question"] = {
            "prompt": prompt,
            "ids": answer["ids"],
            "answer": answer["text"],
            "ended": answer["ended"],
        }
        timed = server.answer(long_prompt, _SPEED[1], ignore_end=True)
        found |= {key: round(timed[key], 2) for key in ("prompt_speed", "speed")}
    return found


def _rendered(server: Server, item: TokenizedText) -> str:
    return server.render(item.messages) if item.messages else item.text


def _compared(
    texts: Sequence[TokenizedText], ids: Sequence[list[int]], shown: Sequence[str]
) -> dict[str, Any]:
    """How many texts have the trained ids, and the first that have not, from the first other id on."""
    differences = []
    for item, ours, text in zip(texts, ids, shown, strict=True):
        if ours != item.ids:
            short = min(len(ours), len(item.ids))
            at = next((i for i in range(short) if ours[i] != item.ids[i]), short)
            differences.append(
                {
                    "text": text,
                    "at": at,
                    "trained": item.ids[at : at + _AROUND],
                    "llama.cpp": ours[at : at + _AROUND],
                }
            )
    return {"count": len(texts), "equal": len(texts) - len(differences), "differences": differences[:_SHOWN]}


def _long_prompt(rows: Sequence[LabelledRow], most: int) -> list[int]:
    """A prompt to take the speed on: the rows' tokens one behind the other, no more than the model was made for."""
    ids = [token for row in rows for token in row.input_ids]
    wanted = max(1, min(_SPEED[0], most - _SPEED[1]))
    return (ids * math.ceil(wanted / max(1, len(ids))))[:wanted]


def _split_rows(rows: Sequence[LabelledRow], most: int) -> Iterator[LabelledRow]:
    """Rows with the same predicted tokens in the same order, of which none predicts more than `most`.

    So no more logits are held at once, however long a row is:

        input_ids  a b c d e f        a b c d    a b c d e f
        labels     . . c d e f   ->   . . c d    . . . . e f      (most = 2)
    """
    for row in rows:
        places = [i for i, label in enumerate(row.labels) if label != IGNORE and i > 0]
        for start in range(0, len(places), most):
            part = places[start : start + most]
            labels = [label if part[0] <= i else IGNORE for i, label in enumerate(row.labels[: part[-1] + 1])]
            yield LabelledRow(row.input_ids[: part[-1] + 1], labels)


class _LlamaModel:
    """A file in llama.cpp as `score` takes a model: what a row shares with the one before it is not computed anew.

    `largest` is the largest difference of a log-probability from the reference's, so far.
    """

    device = torch.device("cpu")

    def __init__(self, llama: Llama, reference: Path | None) -> None:
        self._llama = llama
        self._fed: list[int] = []
        self._theirs: Any = None
        self._count = 0
        self.largest: float | None = None
        if reference:
            shape = tuple(json.loads(reference.with_suffix(".json").read_text(encoding="utf-8")))
            self._theirs = np.memmap(reference, np.float32, "r", shape=shape)

    def __call__(self, **options: Any) -> Any:
        return self.forward(**options)

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: torch.Tensor) -> Any:
        places = logits_to_keep.tolist()
        ids = input_ids[0, : places[-1] + 1].tolist()
        known = len(self._fed)
        if ids[:known] != self._fed or places[0] < known:
            self._llama.reset()
            known = 0
        kept = set(places)
        wanted = [i in kept for i in range(known, len(ids))]
        logits = np.stack(list(self._llama.feed(ids[known:], wanted)))
        self._fed = ids
        self._compare(torch.from_numpy(logits))
        return SimpleNamespace(logits=torch.from_numpy(logits).unsqueeze(0))

    def _compare(self, logits: torch.Tensor) -> None:
        if self._theirs is None or self._theirs.shape[1] != logits.shape[1]:
            return
        theirs = self._theirs[self._count : self._count + len(logits)]
        self._count += len(theirs)
        if len(theirs):
            ours = logits[: len(theirs)].log_softmax(-1)
            now = float(ours.sub_(torch.from_numpy(theirs.copy())).abs_().max())
            self.largest = max(self.largest or 0.0, now)
