"""What became of a GGUF file: measured by llama.cpp in a process of its own, as `verify.py` does for folders.

The figures have the names that they have there, so that one table can show both kinds.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from finetune.system.errors import LlamaCppError
from finetune.system.fresh_process import child_environment

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
class Text:
    """A text and its ids by the trained tokenizer; what llama.cpp makes of it is compared with them.

    `special` tells whether names of control tokens in it stand for them. `messages` are there where the text is a
    rendered conversation: llama.cpp then renders them itself, by the file's template. One that ends with an answer is
    whole; any other ends where the next answer begins.
    """

    text: str
    ids: list[int]
    special: bool = True
    messages: list[Message] | None = None


def measure(
    file: Path,
    name: str,
    rows: Sequence[LabelledRow],
    work: Path,
    texts: Sequence[Text] = (),
    conversations: Sequence[Text] = (),
    prompts: Sequence[Text] = (),
    against: str | None = None,
    reference: Path | None = None,
    keep: Path | None = None,
    groups: Mapping[str, Sequence[LabelledRow]] | None = None,
) -> dict[str, Any]:
    """What llama.cpp makes of a file, in a fresh process; `error` where it cannot be loaded or run.

    Beside what `verify.measure` gives: `largest`, the largest difference of a log-probability from the reference's;
    `same_texts` and `same_prompts` with `count`, `equal` and the first `differences`; `question`; `prompt_speed` and
    `speed` in tokens per second.

    Args:
        file: A GGUF file.
        name: What it is called in the report.
        rows: What it predicts; the beginnings of the first ten are answered.
        work: A folder for what passes between the processes.
        texts: Whose token ids are compared.
        conversations: Whose ids are given back, for `verify.compare`; those without messages are plain texts.
        prompts: Conversations up to an answer; compared is how the file's template writes them.
        against: The name of the model whose predictions are the reference.
        reference: Predictions that a model kept before, on the same rows.
        keep: Where to keep this file's predictions.
        groups: More rows, by a name; `groups` tells what is found on each.
    """
    # No suffix: the name may hold dots, as `gemma-2b.Q4_K_M` does.
    ask, answer = work / f"{name}.gguf.ask.json", work / f"{name}.gguf.answer.json"
    answer.unlink(missing_ok=True)
    content: dict[str, Any] = {
        "file": str(file),
        "reference": str(reference) if reference else None,
        "keep": str(keep) if keep else None,
    }
    lists: dict[str, Sequence[Any]] = {
        "rows": rows,
        "texts": texts,
        "conversations": conversations,
        "prompts": prompts,
    }
    content |= {key: [asdict(item) for item in items] for key, items in lists.items()}
    content["groups"] = {name: [asdict(row) for row in part] for name, part in (groups or {}).items()}
    ask.write_text(json.dumps(content), encoding="utf-8")
    environment = child_environment()
    environment["GGML_NO_BACKTRACE"] = "1"  # of an assertion; it would start a debugger
    code = f"from finetune.export.gguf.llama_cpp.measure import _measure; _measure({str(ask)!r}, {str(answer)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace"
    )
    found: dict[str, Any] = {"name": name, "against": against, "dtype": "gguf", "bytes": 0}
    if file.is_file():
        found["bytes"] = file.stat().st_size
    if not answer.exists():
        return found | {"error": _crash(done.returncode, done.stderr)}
    found.update(json.loads(answer.read_text(encoding="utf-8")))
    if str(found.get("error", "")).endswith(NO_SERVER):
        found["error"] += f": {_complaint(done.stderr)}"
    return found


def _crash(code: int, said: str) -> str:
    """Why there is no answer, in a line."""
    if code == -signal.SIGKILL:
        return "llama.cpp's process was killed, most likely for want of memory"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    why = next((line for line in lines if "GGML_ASSERT" in line), lines[-1] if lines else "it said nothing")
    if code < 0:
        return f"llama.cpp crashed ({signal.Signals(-code).name}): {why}"
    return f"llama.cpp's process ended with code {code}: {why}"


def _complaint(said: str) -> str:
    """The first error in the log of llama.cpp's server, without its time."""
    first = next((line for line in said.splitlines() if " E " in line), said)
    return first.partition(" E ")[2].strip() or "it does not say why"


# ---------------------------------------------------------------------------------------------------------------
# In the fresh process


def _measure(ask: str, answer: str) -> None:
    job = json.loads(Path(ask).read_text(encoding="utf-8"))
    found: dict[str, Any]
    try:
        found = _look(job)
    except LlamaCppError as error:
        found = {"error": str(error)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"}
    Path(answer).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def _look(job: dict[str, Any]) -> dict[str, Any]:
    file = Path(job["file"])
    rows = [LabelledRow(**row) for row in job["rows"]]
    texts, conversations, prompts = (
        [Text(**item) for item in job[key]] for key in ("texts", "conversations", "prompts")
    )
    reference, keep = (Path(job[key]) if job[key] else None for key in ("reference", "keep"))

    began = time.monotonic()
    every = [*rows, *(LabelledRow(**row) for group in job["groups"].values() for row in group)]
    with Llama(file, max((len(row.input_ids) for row in every), default=1)) as llama:
        seconds = time.monotonic() - began
        ids = [llama.tokenise(item.text, item.special) for item in texts]
        model = _Model(llama, reference)
        result = score(model, list(_parts(rows, llama.step)), reference, keep)
        others = {
            name: [asdict(part) for part in _parts([LabelledRow(**row) for row in group], llama.step)]
            for name, group in job["groups"].items()
        }
        llama.forget()
        by_group = score_groups(_Model(llama, None), others, reference, keep)
        trained = llama.trained_context
    found: dict[str, Any] = {"load_seconds": round(seconds, 2), "perplexity": result.perplexity}
    found |= asdict(result)
    found["largest"] = model.largest
    found["groups"] = by_group
    found["same_texts"] = _same(texts, ids, [item.text for item in texts])

    begun = [row.prompt for row in rows[:_PROMPTS]]
    long = _long(rows, trained)
    # Another template than the trained one may write more.
    room = 2 * max(len(ids) for ids in [*begun, *(item.ids for item in prompts), long]) + 512
    with Server(file, room) as server:
        found["conversations"] = [server.tokenise(_rendered(server, item)) for item in conversations]
        if prompts:
            shown = [_rendered(server, item) for item in prompts]
            found["same_prompts"] = _same(prompts, [server.tokenise(text) for text in shown], shown)
        answers = [server.answer(prompt, _ANSWER_TOKENS) for prompt in begun]
        found["answers"] = [answer["ids"] for answer in answers]
        found["stopped"] = sum(answer["ended"] for answer in answers)
        plain = not any(item.messages for item in [*conversations, *prompts])
        asked = QUESTION if plain else server.render([{"role": "user", "content": QUESTION}])
        answer = server.answer(asked, _QUESTION_TOKENS)
        found["question"] = {
            "prompt": asked,
            "ids": answer["ids"],
            "answer": answer["text"],
            "ended": answer["ended"],
        }
        timed = server.answer(long, _SPEED[1], on=True)
        found |= {key: round(timed[key], 2) for key in ("prompt_speed", "speed")}
    return found


def _rendered(server: Server, item: Text) -> str:
    return server.render(item.messages) if item.messages else item.text


def _same(texts: Sequence[Text], ids: Sequence[list[int]], shown: Sequence[str]) -> dict[str, Any]:
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


def _long(rows: Sequence[LabelledRow], most: int) -> list[int]:
    """A prompt to take the speed on: the rows' tokens one behind the other, no more than the model was made for."""
    ids = [token for row in rows for token in row.input_ids]
    wanted = max(1, min(_SPEED[0], most - _SPEED[1]))
    return (ids * math.ceil(wanted / max(1, len(ids))))[:wanted]


def _parts(rows: Sequence[LabelledRow], most: int) -> Iterator[LabelledRow]:
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


class _Model:
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
            self._llama.forget()
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
