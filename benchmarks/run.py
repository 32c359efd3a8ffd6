"""Whole runs of ours against a bare `trl.SFTTrainer` script with the same settings, on one process and on two (FSDP 2).

    python benchmarks/run.py --work DIR [--rounds N] [--processes 1 2]

A random Llama of 25 million parameters with a small vocabulary, so that the output layer, where ours is quicker on a
CPU, hardly counts. Each run is a process of its own through `accelerate launch`; the two kinds take turns. Prints
medians as rows for docs/benchmarks.md: tokens per second (between the records of two steps), seconds from the start of
the command to the end of the first step, and MiB of the adapter and of a checkpoint.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
TRAINING: dict[str, Any] = {
    "max_steps": 12,
    "learning_rate": 2e-4,
    "gradient_checkpointing": False,
    "max_length": 512,
    "logging_steps": 1,
    "save_strategy": "steps",  # with upstream's `save_steps` of 500: one checkpoint, after the last step
    "report_to": "none",
    "train_sampling_strategy": "sequential",
}


def make(work: Path) -> Path:
    """The recipe, beside the model that it trains."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from finetune.model.locate import locate

    tokenizer = AutoTokenizer.from_pretrained(locate("random:llama"))
    config = AutoConfig.for_model(
        "llama",
        **SHAPE,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    recipe = {
        "model": {"name_or_path": str(work / "model")},
        "lora": {"r": 16, "trainable_token_indices": "none"},
        "data": {"train": [{"path": str(ROOT / "data" / "chat_sample.jsonl")}]},
        "training": TRAINING,
    }
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def bare(recipe_path: str, output: str, size: int) -> None:
    """The script that a user of trl writes: the same rows, adapter and settings in trl's trainer."""
    import peft
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetune.data.chat import Chat
    from finetune.data.mixture import build_datasets
    from finetune.model.load import load_tokenizer
    from finetune.recipe.load import load_recipe

    class Metrics(TrainerCallback):
        """The loss and the speed of each step, in the file that `finetune` writes them to."""

        time, tokens = 0.0, 0.0

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if state.is_world_process_zero and "loss" in logs:
                now, tokens = time.monotonic(), float(logs["num_tokens"])
                rate = (tokens - self.tokens) / (now - self.time)
                record = {"step": state.global_step, "loss": float(logs["loss"]), "tokens_per_second": rate}
                with Path(output, "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
                self.time, self.tokens = now, tokens

    recipe = load_recipe(recipe_path)
    tokenizer = load_tokenizer(recipe.model)
    data, _ = build_datasets(recipe.data, Chat(tokenizer), recipe.max_length)
    config = SFTConfig(
        **{name: recipe.training[name] for name in TRAINING},
        output_dir=output,
        per_device_train_batch_size=size,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype="float32"),
        args=config,
        train_dataset=data.dataset,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=8, target_modules="all-linear"),
    )
    Path(output).mkdir(parents=True, exist_ok=True)
    trainer.add_callback(Metrics())
    trainer.train()


def timed(kind: str, recipe: Path, ranks: int, output: Path) -> tuple[float, float, list[float]]:
    """Tokens per second, seconds to the end of the first step, and the losses."""
    shutil.rmtree(output, ignore_errors=True)
    size = 4 // ranks
    if kind == "ours":
        words = ["train", str(recipe), f"training.output_dir={output}", f"training.per_device_train_batch_size={size}"]
    else:
        words = ["--bare", str(recipe), str(output), str(size)]
    script = str(ROOT / "tests" / "on_cpu.py") if kind == "ours" else __file__
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    config = "cpu.yaml" if ranks == 1 else "fsdp.yaml"
    launch += [str(ROOT / "accelerate_configs" / config), "--num_processes", str(ranks)]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": str(2 // ranks)}
    began, metrics, first = time.time(), output / "metrics.jsonl", 0.0
    with subprocess.Popen([*launch, script, *words], env=env, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            if not first and metrics.exists() and metrics.stat().st_size:
                first = time.time() - began
            time.sleep(0.05)
        assert process.returncode == 0, process.stderr.read().decode()
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    # The first steps warm up; the last one saves.
    rate = statistics.median(record["tokens_per_second"] for record in steps[2:-1])
    return rate, first, [record["loss"] for record in steps]


def weight(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    recipe, day = make(args.work), datetime.date.today()
    checkpoint = f"checkpoint-{TRAINING['max_steps']}"
    for ranks in args.processes:
        found: dict[str, list[tuple[float, float, list[float]]]] = {"bare": [], "ours": []}
        for _ in range(args.rounds):
            for kind, runs in found.items():
                runs.append(timed(kind, recipe, ranks, args.work / f"{kind}-{ranks}"))
                print(ranks, kind, runs[-1], flush=True)
        rates = {kind: statistics.median(run[0] for run in runs) for kind, runs in found.items()}
        starts = {kind: statistics.median(run[1] for run in runs) for kind, runs in found.items()}
        ratio = statistics.median(ours[0] / other[0] for ours, other in zip(found["ours"], found["bare"], strict=True))
        weights = {kind: weight(args.work / f"{kind}-{ranks}" / checkpoint) for kind in found}
        adapter = args.work / f"ours-{ranks}" / checkpoint / "adapter_model.safetensors"
        print(
            f"| {day} | {ranks} | {rates['bare']:.0f} | {rates['ours']:.0f} | {ratio:.2f} | {starts['bare']:.1f} "
            f"| {starts['ours']:.1f} | {adapter.stat().st_size / 2**20:.1f} | {weights['ours']:.1f} "
            f"| {weights['bare']:.1f} |"
        )


if __name__ == "__main__":
    if sys.argv[1] == "--bare":
        sys.path.insert(0, str(ROOT / "tests"))
        import on_cpu  # noqa: F401 (two CPU ranks may be FSDP)

        bare(*sys.argv[2:4], int(sys.argv[4]))
    else:
        main()
