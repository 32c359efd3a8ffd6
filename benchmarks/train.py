"""Training speed in one run: bare `trl.SFTTrainer` and `finetune` with the same settings, step by step.

    python benchmarks/train.py [--steps N] [--recipe FILE]

Each step trains the same batch three times: with bare trl, with `finetune` on the same parameters, and with `finetune`
as the quickstart trains (two token rows more, on which bare trl 1.16 fails). The losses of the first two must agree.
Prints medians and the ratio of tokens per second, as a row for docs/benchmarks.md.
"""

import argparse
import datetime
import statistics
import time
import warnings
from typing import Any

import peft
import torch
from trl import SFTTrainer

from finetune.data.chat import Chat
from finetune.data.mixture import build_datasets
from finetune.model.compatibility import exclude_modules, non_text_modules
from finetune.model.load import load_model, load_tokenizer
from finetune.model.locate import Base
from finetune.model.precision import decide_precision
from finetune.model.trainable import load_trainable
from finetune.recipe.load import load_recipe
from finetune.train.arguments import training_arguments
from finetune.train.sft import SftTrainer

RECIPE = "recipes/quickstart.yaml"


def make_trainer(kind: str, path: str) -> Any:
    """A trainer that is ready to step: `bare`, `ours` or `rows`."""
    rows = "auto" if kind == "rows" else "null"
    recipe = load_recipe(path, [f"lora.trainable_token_indices={rows}", f"training.output_dir=runs/bench-{kind}"])
    precision, base = decide_precision(recipe), Base.of(recipe.model)
    chat = Chat(load_tokenizer(recipe.model))
    data, evaluation = build_datasets(recipe.data, chat, recipe.training["max_length"])
    arguments = {
        "args": training_arguments(recipe, precision),
        "train_dataset": data.dataset,
        "eval_dataset": evaluation.dataset,
        "processing_class": chat.tokenizer,
    }
    torch.manual_seed(0)
    if kind == "bare":
        model = load_model(recipe)
        towers = exclude_modules(non_text_modules(model), None)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear", exclude_modules=towers
        )
        trainer = SFTTrainer(model=model, peft_config=config, **arguments)
    else:
        model = load_trainable(recipe, base, precision, chat, lambda line: None)
        trainer = SftTrainer(model=model, **arguments)
    trainer.model.train()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what `train()` sets before its first step
    return trainer


def main(steps: int, path: str = RECIPE) -> None:
    warnings.simplefilter("ignore")
    trainers = {kind: make_trainer(kind, path) for kind in ("bare", "ours", "rows")}
    batches = [batch for batch, _ in zip(trainers["bare"].get_train_dataloader(), range(steps + 1), strict=False)]
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    for number, batch in enumerate(batches):
        losses = {}
        for kind, trainer in trainers.items():
            start = time.perf_counter()
            losses[kind] = trainer.training_step(trainer.model, dict(batch)).item()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            if number:  # the first one warms up
                seconds[kind].append(time.perf_counter() - start)
        assert abs(losses["bare"] - losses["ours"]) < 2e-3 * losses["bare"], losses
        print(number, {kind: f"{found[-1]:.2f} s" for kind, found in seconds.items() if found}, losses, flush=True)
    tokens = [int(batch["attention_mask"].sum()) for batch in batches[1:]]
    rate = {
        kind: statistics.median(t / s for t, s in zip(tokens, found, strict=True)) for kind, found in seconds.items()
    }
    ratio = {
        kind: statistics.median(a / b for a, b in zip(seconds["bare"], seconds[kind], strict=True))
        for kind in ("ours", "rows")
    }
    day = datetime.date.today()
    print(
        f"| {day} | {torch.get_num_threads()} CPU threads | {rate['bare']:.0f} "
        f"| {rate['ours']:.0f} | {ratio['ours']:.2f} | {rate['rows']:.0f} | {ratio['rows']:.2f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Training speed against a bare SFTTrainer.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--recipe", default=RECIPE)
    main(*vars(parser.parse_args()).values())
