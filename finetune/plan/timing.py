"""Times real steps of a recipe on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise

from finetune.recipe.load import load_recipe
from finetune.system.errors import PlanError
from finetune.system.files import read_records
from finetune.system.terminal import Say
from finetune.train.run import train

_STEPS = 3


def measure(path: str, overrides: Sequence[str], say: Say) -> list[float]:
    """Seconds of three steps of the recipe, after one that is not timed. What the run writes is removed.

    Args:
        path: The recipe's file.
        overrides: Its overrides.
        say: Called with the lines of the run.

    Raises:
        PlanError: There are too few rows for so many steps.
        FinetuneError: The run fails; see `finetune.train.train`.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = [
            f"training.output_dir={folder}/run",
            f"training.max_steps={_STEPS + 1}",
            "training.logging_steps=1",
            "training.logging_strategy=steps",
            "training.save_strategy='no'",
            "training.eval_strategy='no'",
            "training.eval_on_start=false",
            "training.load_best_model_at_end=false",
            "training.resume_from_checkpoint=false",
            "training.report_to=none",
        ]
        run = train(load_recipe(path, [*overrides, *own]), say)
        records = [record for record in read_records(run / "metrics.jsonl") if "loss" in record]
    seconds = [
        (after["num_tokens"] - before["num_tokens"]) / after["tokens_per_second"] for before, after in pairwise(records)
    ]
    if not seconds:
        raise PlanError("--measure: the recipe has too few rows for a step that can be timed; leave it out")
    return seconds
