"""Early stopping: what it needs, when it ends a run, killed and resumed or not, and which weights it says are saved."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.cli.commands import main
from finetune.cli.report import as_html
from finetune.system.files import read_records
from finetune.train.outcome import Outcome

Write = Callable[..., Path]
ROWS = {"train": [{"path": str(Path(__file__).parents[1] / "data" / "chat_sample.jsonl")}], "eval_fraction": 0.1}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
# No loss falls by so much, so that the first evaluation stays the best one that counts.
STOPS_AT_3 = {"patience": 2, "min_delta": 10.0}
RESUME = "training.resume_from_checkpoint=true"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"train": ROWS["train"]}},
            "early_stopping: is given, with nothing to evaluate on; add data.eval or data.eval_fraction",
        ),
        (
            {"data": ROWS},
            "early_stopping: is given, but nothing is evaluated while training; add training.eval_strategy: epoch, or "
            "steps",
        ),
        (
            {"data": ROWS, "training": EVALUATED, "early_stopping": {"patience": 0, "min_delta": -1}},
            "early_stopping.min_delta: is -1; write a number greater than or equal to 0",
        ),
        (
            {"data": ROWS, "training": EVALUATED | {"early_stopping_patience": 3}},
            "training.early_stopping_patience: is not a recipe's key; write the section early_stopping: "
            "{patience: ...}",
        ),
    ],
)
def test_what_it_needs(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], message: str
) -> None:
    assert main(["check", str(write_recipe(**{"early_stopping": {}} | sections))]) == 2
    assert message in capsys.readouterr().err


def test_check_says_what_will_be_saved(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(data=ROWS, early_stopping={}, training=EVALUATED)
    assert main(["check", str(path)]) == 0
    assert (
        "early stopping: after 3 evaluations without an improvement; the last weights are saved "
        "(load_best_model_at_end: true: the best)" in capsys.readouterr().out
    )
    assert main(["check", str(path), "training.load_best_model_at_end=true"]) == 0
    assert "without an improvement; the best weights are saved" in capsys.readouterr().out
    # The loss decides by which checkpoint is the best.
    assert main(["check", str(path), "training.save_strategy=best"]) == 0
    assert main(["check", str(path), "training.save_strategy=best", "early_stopping=null"]) == 2


@pytest.mark.slow
def test_a_killed_run_stops_where_the_whole_one_did(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed between the two evaluations that count, and after the decision to stop."""
    path = write_recipe(data=ROWS, early_stopping=STOPS_AT_3, training=EVALUATED | {"max_steps": 6})
    assert main([str(path)]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert "stopped early at step 3 of 6, the last weights are saved; talk to it: finetune generate run" in last
    assert "Finished: stopped early at step 3 of 6; the last weights are saved" in as_html(Path("run"))
    assert [r["step"] for r in read_records(Path("run/metrics.jsonl")) if "eval_loss" in r] == [1, 2, 3]
    Path("run").rename("whole")
    for k in (2, 3):
        Path("run").mkdir()
        for name in ("recipe.yaml", "metrics.jsonl"):
            shutil.copy(f"whole/{name}", "run")
        for step in range(1, k + 1):
            shutil.copytree(f"whole/checkpoint-{step}", f"run/checkpoint-{step}")
        assert main([str(path), RESUME]) == 0, capsys.readouterr().err
        one, other = (load_file(Path(run, "adapter_model.safetensors")) for run in ("run", "whole"))
        assert [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])] == []
        curves = [
            [(r["step"], r.get("loss"), r.get("eval_loss")) for r in read_records(Path(run, "metrics.jsonl"))]
            for run in ("run", "whole")
        ]
        assert curves[0] == curves[1]
        shutil.rmtree("run")


@pytest.mark.slow
def test_it_comes_and_goes_with_a_resume(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint without its counter is resumed from; the best weights are those of the lowest loss."""
    path = write_recipe(data=ROWS, training=EVALUATED | {"max_steps": 1})
    assert main([str(path)]) == 0
    Path("run/adapter_model.safetensors").unlink()
    stops = [f"early_stopping={STOPS_AT_3}", "training.max_steps=6", "training.load_best_model_at_end=true"]
    assert main([str(path), RESUME, *stops]) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "early_stopping.patience null -> 2; early_stopping.min_delta null -> 10.0" in said
    records = read_records(Path("run/metrics.jsonl"))
    losses = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    # The first evaluation with early stopping, at step 2, counts as an improvement.
    assert list(losses) == [1, 2, 3, 4]
    best = min((2, 3, 4), key=lambda step: losses[step])
    assert f"stopped early at step 4 of 6, the weights of step {best}, the best, are saved; talk to it" in said
    one, other = (load_file(Path(run, "adapter_model.safetensors")) for run in ("run", f"run/checkpoint-{best}"))
    assert [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])] == []


END = {"step": 4, "train_loss": 2.0}
LOGGED = [
    {"step": 2, "loss": 2.0},
    {"step": 2, "eval_loss": 1.5},
    {"step": 4, "loss": 1.0},
    {"step": 4, "eval_loss": 3},
]


@pytest.mark.parametrize(
    ("records", "held_out", "notes"),
    [
        ([], None, []),
        (LOGGED, 3, []),
        ([*LOGGED, END | {"max_steps": 4}], 3, []),
        ([*LOGGED, END], 3, []),  # of an earlier version
        ([*LOGGED, END | {"max_steps": 4, "saved_step": 2}], 1.5, ["the weights of step 2, the best, are saved"]),
        (
            [*LOGGED, END | {"max_steps": 9}],
            3,
            ["stopped early at step 4 of 9", "the last weights are saved; the lowest evaluation loss was at step 2"],
        ),
    ],
)
def test_the_outcome_of_a_run(records: list[dict[str, Any]], held_out: float | None, notes: list[str]) -> None:
    outcome = Outcome.of(records)
    assert (outcome.held_out, outcome.notes()) == (held_out, notes)
