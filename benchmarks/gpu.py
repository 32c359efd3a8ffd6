"""All figures of one NVIDIA GPU: speed and memory of ours, of a bare `trl.SFTTrainer` and of `finetune plan`.

    bash benchmarks/gpu.sh [--minutes N] [--output FILE] [--work FOLDER] [--only REGEX] [--dry-run]

Models of real size with random weights, which are written once, to memory where it suffices: nothing is downloaded.
Each row is a training run in a process of its own, from the base's files on, by `finetune.train.run.train` or by trl's
trainer with the same settings, rows and adapter. It is printed and added to FILE as soon as it is known, the most
important ones first. A row that fails, or that finds too little memory, says so; its traceback is in FILE.log. Rows
for which the time does not suffice are named at the end.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.system.devices import machine_memory  # noqa: E402
from finetune.system.numbers import GIB  # noqa: E402

Row = tuple[str, str, str]  # base, method, trainer
MODELS = [("gemma-2b", "LoRA"), *((name, "QLoRA") for name in ("gemma-2b", "gemma-2-9b", "gemma-7b", "gemma-4-E2B"))]
KINDS = [("bare trl", "ours"), ("ours, packed",), ("ours, compiled",)]
ROWS: list[Row] = [(*model, kind) for kinds in KINDS for model in MODELS for kind in kinds]
TRAINING: dict[str, Any] = {
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "gradient_checkpointing": True,
    "max_length": 512,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "train_sampling_strategy": "sequential",
}
HEAD = (
    *("model", "run", "tokens/s", "/ bare trl", "peak, GiB", "/ bare trl", "reserved, GiB", "on the card, GiB"),
    *("plan: peak, GiB", "/ measured", "plan: on the card, GiB", "/ measured", "whole run, s"),
)
# A dry run's settings, and the values of its configs where the real ones have others.
TINY_TRAINING = {"max_steps": 4, "per_device_train_batch_size": 2, "max_length": 64}
TINY: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 8}
TINY |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
TINY |= {"sliding_window": 32, "query_pre_attn_scalar": 16}
AUDIO = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
PIECE = 2**25


# ---------------------------------------------------------------------------------------------------------------
# In the process of a row


def shrunk(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a tiny model's config with the same kinds of layers."""
    small = {name: shrunk(old) if isinstance(old, dict) else TINY.get(name, old) for name, old in options.items()}
    if "audio_config" in small:
        small["audio_config"] |= AUDIO
    return small | ({"vocab_size_per_layer_input": 1024} if "hidden_size_per_layer_input" in small else {})


def make_base(name: str, folder: Path, dry: bool) -> None:
    """Writes a model with the config of `name` and random weights in bfloat16, beside a tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.model.load import load_tokenizer
    from finetune.model.shard_writer import ShardWriter
    from finetune.plan.configs import _shipped_configs
    from finetune.recipe.schema import ModelSection

    options = _shipped_configs()[f"google/{name}"]
    config = AutoConfig.for_model(**shrunk(options) if dry else options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    need = 2 * sum(tensor.numel() for tensor in tensors.values()) + GIB
    part = folder.parent / "part"
    shutil.rmtree(part, ignore_errors=True)  # of a row that was stopped
    if room(folder.parent) < need:
        raise OSError(f"{folder.parent} has no room for {need / GIB:.0f} GiB of weights; write --work FOLDER")
    part.mkdir()
    writer, generator = ShardWriter(part, 4 * GIB, 2**20), torch.Generator().manual_seed(0)
    block = torch.empty(2 * PIECE, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def pieces(tensor: Any) -> Iterator[Any]:
        if tensor.ndim < 2:  # norms and scales, as if trained
            yield torch.ones(tensor.shape, dtype=torch.bfloat16)
            return
        for begin in range(0, tensor.numel(), PIECE):
            offset = int(torch.randint(PIECE, (), generator=generator))
            yield block[offset : offset + min(PIECE, tensor.numel() - begin)]

    for weight, tensor in tensors.items():
        writer.add(weight, torch.bfloat16, tensor.shape, pieces(tensor))
    writer.close()
    config.save_pretrained(part)
    load_tokenizer(ModelSection(name_or_path="random:gemma")).save_pretrained(part)
    part.rename(folder)


def room(folder: Path) -> int:
    """The bytes that files in a folder may take; those in /dev/shm are part of the machine's memory."""
    free = shutil.disk_usage(folder).free
    return min(free, machine_memory()[1]) if folder.is_relative_to("/dev/shm") else free


def write_recipe(folder: Path, base: Path, method: str, kind: str, dry: bool) -> Path:
    """A recipe and its rows: conversations, the longest first; the answers are about half of their tokens."""
    import yaml

    from finetune.model.quantization import NF4

    training = TRAINING | (TINY_TRAINING if dry else {}) | {"output_dir": str(folder / "run")}
    training |= {"packing": kind == "ours, packed", "torch_compile": kind == "ours, compiled"}
    if dry and training["torch_compile"]:
        training["torch_compile_backend"] = "eager"
    most = (training["max_length"] - 14) * 10 // 32  # the template takes 14 tokens, and such a word 1.6
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in range(160):
            size = most if row < 8 else 1 + row * 37 % (most - 1)
            ask, answer = (" ".join(words[(i * i + turn) % 10] for i in range(size)) for turn in range(2))
            messages = [{"role": "user", "content": f"{row:03} {ask}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(base)},
        "lora": {"r": 16, "lora_alpha": 16, "trainable_token_indices": "none"},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}]},
        "training": training,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | ({"quantization": NF4} if method == "QLoRA" else {})), encoding="utf-8")
    return path


def rates_of_ours(recipe: Path) -> list[float]:
    """Tokens per second of each step but the first."""
    from finetune.recipe.load import load_recipe
    from finetune.system.files import read_records
    from finetune.train.run import train

    records = read_records(train(load_recipe(recipe), print) / "metrics.jsonl")
    return [record["tokens_per_second"] for record in records if "loss" in record][1:]


def rates_of_bare_trl(recipe: Path) -> list[float]:
    """The same of trl's trainer, with its peak of memory from its first step on, as ours."""
    import torch
    from train import make_trainer
    from transformers import TrainerCallback

    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "loss" in logs:
                ends.append((time.monotonic(), float(logs["num_tokens"])))

    trainer = make_trainer("bare", str(recipe))
    trainer.add_callback(Clock())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(ends)]


def used_memory() -> dict[str, float]:
    """Bytes at most in tensors, in torch's allocator, and of the card with CUDA's context; those of a CPU's process."""
    import torch

    from finetune.system.devices import process_peak_memory

    if not torch.cuda.is_available():
        return dict.fromkeys(("peak", "reserved", "card"), process_peak_memory())
    (free, whole), reserved = torch.cuda.mem_get_info(), torch.cuda.max_memory_reserved()
    card = reserved + whole - free - torch.cuda.memory_reserved()
    return {"peak": torch.cuda.max_memory_allocated(), "reserved": reserved, "card": card}


def planned_memory(path: Path) -> dict[str, float]:
    from finetune.plan.configs import base_config
    from finetune.plan.lengths import row_lengths
    from finetune.plan.predict import Predictor
    from finetune.plan.settings import step_arguments, step_settings
    from finetune.recipe.load import load_recipe
    from finetune.system.devices import this_machine

    recipe = load_recipe(path)
    arguments, config = step_arguments(recipe), base_config(recipe.model)
    settings = step_settings(recipe, arguments, row_lengths(recipe, print, config))
    need = Predictor(config, this_machine(), arguments).required_memory(settings)
    beside = sum(need.parts.get(name, 0) for name in ("context", "fragments"))
    return {"plan_peak": need.total - beside, "plan_card": need.total}


def run_row(name: str, method: str, kind: str, work: Path, dry: bool) -> None:
    """Trains, then plans; writes what is known so far to `result.json`."""
    from finetune.system.errors import first_line
    from finetune.system.files import write_json
    from finetune.train.callbacks.memory_check import _is_out_of_memory

    found: dict[str, Any] = {}

    @contextlib.contextmanager
    def recorded(what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lacks = _is_out_of_memory(error) or "does not fit into memory" in str(error)
            why = "out of memory" if lacks else f"failed: {type(error).__name__}: {first_line(error)[:120]}"
            found.setdefault("outcome", what + why)
        write_json(work / "row" / "result.json", found)

    base = work / f"base-{name}"
    with recorded(""):
        if not base.is_dir():
            make_base(name, base, dry)
        recipe = write_recipe(work / "row", base, method, kind, dry)
        rates = rates_of_bare_trl(recipe) if kind == "bare trl" else rates_of_ours(recipe)
        found |= {"rate": statistics.median(rates[1:])} | used_memory()  # the first two steps warm up
    if kind in ("ours", "ours, packed") and base.is_dir():
        with recorded("plan "):
            found |= planned_memory(recipe)


# ---------------------------------------------------------------------------------------------------------------
# In the process that makes the table


def command(row: Row, work: Path, dry: bool) -> list[str]:
    return [sys.executable, "-W", "ignore", __file__, "--row", json.dumps([*row, str(work), dry])]


def measured(row: Row, work: Path, seconds: float, log: Any, dry: bool) -> dict[str, Any]:
    """Runs a row's process for so many seconds at most; what it found, or why it found nothing."""
    shutil.rmtree(work / "row", ignore_errors=True)
    (work / "row").mkdir()
    print(f"\n== {', '.join(row)}", file=log, flush=True)
    began, late = time.monotonic(), False
    process = subprocess.Popen(command(row, work, dry), stdout=log, stderr=log, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # torch.compile's workers, too
        process.kill()
        process.wait()
    found: dict[str, Any] = {"seconds": time.monotonic() - began}
    with contextlib.suppress(OSError):
        found |= json.loads((work / "row" / "result.json").read_text(encoding="utf-8"))
    if len(found) == 1:
        killed = "out of the machine's memory?" if process.returncode == -signal.SIGKILL else "see the log"
        found["outcome"] = "stopped: the time is up" if late else f"ended by {process.returncode}: {killed}"
    return found


def cells(row: Row, found: dict[str, Any], bare: dict[str, Any]) -> list[str]:
    """The cells of `HEAD`."""

    def gib(name: str) -> str:
        return f"{found[name] / GIB:.2f}" if name in found else ""

    def ratio(name: str, held_against: dict[str, Any], other: str) -> str:
        return f"{found[name] / held_against[other]:.2f}" if name in found and other in held_against else ""

    rate = f"{found['rate']:.0f}" if "rate" in found else ""
    outcome = " ".join(filter(None, (rate, found.get("outcome", "").replace("|", "/"))))
    return [
        *(f"{row[0]} {row[1]}", row[2], outcome, ratio("rate", bare, "rate"), gib("peak"), ratio("peak", bare, "peak")),
        *(gib("reserved"), gib("card"), gib("plan_peak"), ratio("plan_peak", found, "peak")),
        *(gib("plan_card"), ratio("plan_card", found, "card"), f"{found['seconds']:.0f}"),
    ]


def machine(dry: bool) -> str:
    """The date, the card and its driver, the packages and the commit."""

    def said(*words: str) -> str:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        return ""

    gpu = said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").partition("\n")[0]
    if not (gpu or dry):
        sys.exit("error: nvidia-smi finds no GPU; --dry-run makes the table with tiny models on a CPU")
    card = "tiny models on a CPU: figures of a dry run mean nothing" if dry else f"{gpu} (driver)"
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    commit = said("git", "rev-parse", "--short", "HEAD") or "unknown"
    return f"{datetime.date.today()}; {card}; {versions}; commit {commit}"


def main(settings: argparse.Namespace) -> None:
    ends, dry = time.monotonic() + 60 * settings.minutes, settings.dry_run
    rows = [row for row in ROWS if re.search(settings.only, ", ".join(row))]
    head, memory, bare = machine(dry), Path("/dev/shm"), dict[tuple[str, str], dict[str, Any]]()
    in_memory = not dry and memory.is_dir() and room(memory) > 64 * GIB
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="gpu-", dir=settings.work or (memory if in_memory else None)) as work,
        settings.output.open("w", encoding="utf-8") as file,
        Path(f"{settings.output}.log").open("w", encoding="utf-8") as log,
    ):

        def say(line: str) -> None:
            for stream in (file, sys.stdout):
                print(line, file=stream, flush=True)

        say(f"{head}\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
        try:
            while rows and (left := ends - time.monotonic()) > 0:
                found = measured(rows[0], Path(work), left, log, dry)
                row = rows.pop(0)  # an interruption from here on does not name it as not run
                say(f"| {' | '.join(cells(row, found, bare.get(row[:2], {})))} |")
                if row[2] == "bare trl":
                    bare[row[:2]] = found
        finally:
            if rows:
                say(f"\nNot run: {'; '.join(', '.join(row) for row in rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="All figures of one NVIDIA GPU for docs/benchmarks.md.")
    parser.add_argument("--minutes", type=float, default=12, help="the time for all rows (default: 12)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.md"))
    parser.add_argument("--work", type=Path, help="a folder for weights (default: /dev/shm, where 64 GiB are free)")
    parser.add_argument("--only", default="", help="runs only rows that match: 'gemma-2b, LoRA', 'ours$'")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if settings.row:
        from finetune.system.before_torch import prepare_imports

        prepare_imports()
        *row, work, dry = json.loads(settings.row)
        run_row(*row, Path(work), dry)
    else:
        if settings.dry_run:  # without CUDA the processes may be forks of one that has imported all
            sys.path.insert(0, str(ROOT / "tests"))
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes half a minute a row; 0 compiles
            import forks

            if forks.NAME not in os.environ:  # pytest's
                forks.start_server()
            subprocess.Popen = forks.Popen
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        main(settings)
