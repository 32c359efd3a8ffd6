"""Gemma 4 and 3n on tiny models, by the command line: each verb from check to export, and a resumed run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli.commands import main

Write = Callable[..., Path]
ROWS = Path(__file__).parents[1] / "data" / "chat_sample.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["gemma4", pytest.param("gemma4_moe", marks=pytest.mark.soak), pytest.param("gemma3n", marks=pytest.mark.soak)],
)
def test_each_verb(kind: str, write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_length": 128}
    recipe = write_recipe(
        model={"name_or_path": f"random:{kind}"},
        lora={"r": 2, "target_modules": "all-linear"},
        data={"train": [{"path": str(ROWS)}], "eval_fraction": 0.02},
        training=training,
        evaluate={"max_new_tokens": 4},
    )
    assert main(["check", str(recipe)]) == 0
    assert main(["train", str(recipe)]) == 0
    weights = Path("run/adapter_model.safetensors").read_bytes()

    # What a run leaves that was killed after its second step.
    Path("again").mkdir()
    shutil.copytree("run/checkpoint-2", "again/checkpoint-2")
    resumed = ["training.output_dir=again", "training.resume_from_checkpoint=true"]
    assert main(["train", str(recipe), *resumed]) == 0
    assert Path("again/adapter_model.safetensors").read_bytes() == weights

    assert main(["generate", "run", "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    assert main(["evaluate", "run"]) == 0
    assert main(["export", "run", "--output", "out", "--format", "bf16"]) == 0
    models = {model["name"]: model for model in json.loads(Path("out/report.json").read_text())["models"]}
    assert models["merged, original base"]["kl"] < 1e-5
    assert models["bf16"]["kl"] < 0.01
    assert "error:" not in capsys.readouterr().err
