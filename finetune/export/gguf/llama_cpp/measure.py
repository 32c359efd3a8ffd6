"""Measures a GGUF file in llama.cpp, in a fresh process, with the figures that `verify.py` takes of folders."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from finetune.data.encoded import IGNORE
from finetune.data.samples import LabelledRow
from finetune.data.turns import Message
from finetune.evaluate.perplexity import score, score_groups
from finetune.export.gguf.llama_cpp.library import Llama
from finetune.export.gguf.llama_cpp.server import NO_SERVER, Server
from finetune.export.report import Agreement, ModelFigures, Question, ScoreFigures, TokenDifference
from finetune.export.verify import ANSWER_TOKENS, ANSWERS
from finetune.system import fresh_process
from finetune.system.errors import FinetuneError, LlamaCppError, first_line

QUESTION = "What is a Large Language Model?"
_QUESTION_TOKENS = 128
# Tokens of the prompt, as in llama.cpp's own bench, and of the answer that the speed is measured on.
_SPEED_PROMPT, _SPEED_ANSWER = 512, 64
# Differences that the report shows, and token ids of each.
_SHOWN_DIFFERENCES, _SHOWN_IDS = 5, 8


@dataclass(frozen=True)
class TokenizedText:
    """A text and its token ids by the trained tokenizer, which llama.cpp's ids are compared with."""

    text: str
    ids: list[int]
    special: bool = True
    """The names of control tokens in the text stand for these tokens."""
    messages: list[Message] | None = None
    """The conversation that the text was rendered from, which llama.cpp then renders by the file's template. One that
    ends with an answer is whole; any other ends where the next answer begins."""


@dataclass(frozen=True)
class Measurement:
    """The rows and texts that a model's GGUF files are measured on, and the predictions that they are compared with."""

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
    """A file of that model's predictions on the same rows; None if there are none."""
    keep: Path | None = None
    """Where to keep the file's own predictions."""


@dataclass(frozen=True)
class _Task:
    """The argument of the fresh process."""

    file: Path
    measurement: Measurement
    adapter: Path | None = None


def measure(file: Path, name: str, measurement: Measurement, adapter: Path | None = None) -> ModelFigures:
    """Runs a GGUF file in llama.cpp, in a fresh process; the result has `error` if it cannot be loaded or run.

    The result has the keys of `verify.measure` and: `largest`, the largest difference of a log-probability from the
    reference's; `same_texts` and `same_prompts` with `count`, `equal` and the first `differences`; `question`;
    `prompt_speed` and `speed` in tokens per second.

    Args:
        file: A GGUF file.
        name: The file's name in the report.
        measurement: The rows and texts that it is measured on.
        adapter: A GGUF file of LoRA to add to it.
    """
    size = file.stat().st_size if file.is_file() else 0
    figures: ModelFigures = {"name": name, "against": measurement.against, "dtype": "gguf", "bytes": size}
    # After a failed assertion ggml would start a debugger for a backtrace.
    environment = {"GGML_NO_BACKTRACE": "1"}
    try:
        figures |= fresh_process.call(_load_and_measure, _Task(file, measurement, adapter), environment=environment)
    except fresh_process.ProcessFailed as error:
        figures["error"] = _crash_reason(error.code, error.stderr) if error.code else str(error)
    except LlamaCppError as error:
        figures["error"] = str(error)
        if str(error).endswith(NO_SERVER) and isinstance(error.__cause__, fresh_process.ProcessFailed):
            figures["error"] += f": {_first_logged_error(error.__cause__.stderr)}"
    except (FinetuneError, OSError) as error:
        figures["error"] = f"{type(error).__name__}: {first_line(error)}"
    return figures


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


def _load_and_measure(task: _Task) -> ModelFigures:
    file, on = task.file, task.measurement
    scores, trained_context = _scores(file, on, task.adapter)
    row_prompts = [row.prompt for row in on.rows[:ANSWERS]]
    long_prompt = _long_prompt(on.rows, trained_context)
    # A file's template may write more than the trained one.
    longest = max(len(ids) for ids in [*row_prompts, *(item.ids for item in on.prompts), long_prompt])
    with Server(file, 2 * longest + 512, task.adapter) as server:
        answers = [server.answer(prompt, ANSWER_TOKENS) for prompt in row_prompts]
        plain = not any(item.messages for item in [*on.conversations, *on.prompts])
        question = QUESTION if plain else server.render([{"role": "user", "content": QUESTION}])
        answer = server.answer(question, _QUESTION_TOKENS)
        timed = server.answer(long_prompt, _SPEED_ANSWER, ignore_end=True)
        file_figures = ModelFigures(
            conversations=[server.tokenize(_rendered(server, item)) for item in on.conversations],
            answers=[answer["ids"] for answer in answers],
            stopped=sum(answer["ended"] for answer in answers),
            question=Question(prompt=question, ids=answer["ids"], answer=answer["text"], ended=answer["ended"]),
            prompt_speed=round(timed["prompt_speed"], 2),
            speed=round(timed["speed"], 2),
        )
        if on.prompts:
            rendered = [_rendered(server, item) for item in on.prompts]
            ids = [server.tokenize(text) for text in rendered]
            file_figures["same_prompts"] = _agreement(on.prompts, ids, rendered)
    scores |= file_figures
    return scores


def _scores(file: Path, on: Measurement, adapter: Path | None) -> tuple[ModelFigures, int]:
    """Predictions and token ids of a GGUF file, and the context length that it was made for."""
    started = time.monotonic()
    every = [*on.rows, *(row for rows in on.groups.values() for row in rows)]
    with Llama(file, max((len(row.input_ids) for row in every), default=1), adapter) as llama:
        seconds = time.monotonic() - started
        ids = [llama.tokenize(item.text, item.special) for item in on.texts]
        model = _LlamaModel(llama, on.reference)
        result = score(model, list(_split_rows(on.rows, llama.step)), on.reference, on.keep)
        llama.reset()
        parts = {name: list(_split_rows(rows, llama.step)) for name, rows in on.groups.items()}
        groups = score_groups(_LlamaModel(llama, None), parts, on.reference, on.keep)
        trained_context = llama.trained_context
    figures = cast("ModelFigures", asdict(result))
    figures |= ModelFigures(
        load_seconds=round(seconds, 2),
        perplexity=result.perplexity,
        largest=model.largest,
        groups=cast("dict[str, ScoreFigures]", groups),
        same_texts=_agreement(on.texts, ids, [item.text for item in on.texts]),
    )
    return figures, trained_context


def _rendered(server: Server, item: TokenizedText) -> str:
    return server.render(item.messages) if item.messages else item.text


def _agreement(texts: Sequence[TokenizedText], ids: Sequence[list[int]], shown: Sequence[str]) -> Agreement:
    """How many texts have the trained ids; the first ones that do not, each from the first other id on.

    Args:
        texts: Texts with the trained ids.
        ids: llama.cpp's ids of each.
        shown: The text of each that the report shows.
    """
    differences: list[TokenDifference] = []
    for item, tokens, text in zip(texts, ids, shown, strict=True):
        if tokens != item.ids:
            pairs = enumerate(zip(tokens, item.ids, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(item.ids)))
            trained, own = (some[at : at + _SHOWN_IDS] for some in (item.ids, tokens))
            differences.append({"text": text, "at": at, "trained": trained, "llama.cpp": own})
    equal = len(texts) - len(differences)
    return {"count": len(texts), "equal": equal, "differences": differences[:_SHOWN_DIFFERENCES]}


def _long_prompt(rows: Sequence[LabelledRow], trained_context: int) -> list[int]:
    """A prompt to measure the speed on: the rows' tokens, no more than leave room for an answer in the context."""
    ids = [token for row in rows for token in row.input_ids]
    wanted = max(1, min(_SPEED_PROMPT, trained_context - _SPEED_ANSWER))
    return (ids * math.ceil(wanted / max(1, len(ids))))[:wanted]


def _split_rows(rows: Sequence[LabelledRow], most: int) -> Iterator[LabelledRow]:
    """Rows with the same predicted tokens in the same order, none of which predicts more than `most`.

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
    """A file in llama.cpp as `score` takes a model; the tokens that a row shares with the one before are not run again.

    `largest` is the largest difference of a log-probability from the reference's, so far.
    """

    device = torch.device("cpu")

    def __init__(self, llama: Llama, reference: Path | None) -> None:
        self._llama = llama
        self._fed: list[int] = []
        self._reference: Any = None
        self._compared = 0
        self.largest: float | None = None
        if reference:
            shape = tuple(json.loads(reference.with_suffix(".json").read_text(encoding="utf-8")))
            self._reference = np.memmap(reference, np.float32, "r", shape=shape)

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
        logits = torch.from_numpy(np.stack(list(self._llama.feed(ids[known:], wanted))))
        self._fed = ids
        self._compare(logits)
        return SimpleNamespace(logits=logits.unsqueeze(0))

    def _compare(self, logits: torch.Tensor) -> None:
        """Updates `largest` with logits (N, V) of the next N predicted tokens."""
        if self._reference is None or self._reference.shape[1] != logits.shape[1]:
            return
        expected = self._reference[self._compared : self._compared + len(logits)]
        self._compared += len(expected)
        if len(expected):
            log_probs = logits[: len(expected)].log_softmax(-1)
            difference = log_probs.sub_(torch.from_numpy(expected.copy())).abs_().max()
            self.largest = max(self.largest or 0.0, float(difference))
