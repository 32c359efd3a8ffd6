"""Real steps of a recipe on this machine, timed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise

from finetune.recipe.load import load_recipe
from finetune.system.errors import PlanError
from finetune.train.run import train

STEPS = 3


def measure(path: str, overrides: Sequence[str], say: Callable[[str], None]) -> list[float]:
    """Seconds of three steps of the run itself, into a folder that is thrown away; the first one warms up.

    Raises:
        PlanError: There were too few rows for so many steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = [
            f"training.output_dir={folder}/run",
            f"training.max_steps={STEPS + 1}",
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
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if "loss" in (record := json.loads(line))]
    found = [
        (after["num_tokens"] - before["num_tokens"]) / after["tokens_per_second"]
        for before, after in pairwise(records)
    ]
    if not found:
        raise PlanError("--measure: the recipe has too few rows for a step that could be timed")
    return found
