"""Failures next to the result: each is said once, and the weights are those of a run in which nothing failed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import TensorBoardCallback
from trl import SFTTrainer

import finetune.train.run
from finetune.cli.commands import main
from finetune.system.errors import ModelError
from finetune.train.callbacks import memory_check, metrics, trackers

Write = Callable[..., Path]
ROWS = Path(__file__).parents[1] / "data" / "chat_sample.jsonl"

PARTS: dict[str, tuple[Any, str, str]] = {
    "samples at the start": (trackers.Samples, "on_train_begin", "samples"),
    "samples": (trackers.Samples, "on_evaluate", "samples"),
    "documents": (trackers.RunDocuments, "on_train_begin", "the documents for trackers"),
    "metrics": (metrics.MetricsLog, "on_log", "metrics.jsonl"),
    "progress": (metrics.ProgressDisplay, "on_log", "the progress display"),
    "a tracker": (TensorBoardCallback, "on_train_begin", "tensorboard"),
    "a tracker's log": (TensorBoardCallback, "on_log", "tensorboard"),
    "the end of trackers": (trackers, "close_trackers", "the end of the trackers' runs"),
    "the chart": (finetune.train.run, "draw_losses", "loss.png"),
    "the card": (finetune.train.run, "model_card", "README.md"),
}


@pytest.fixture
def recipe(write_recipe: Write) -> Path:
    data = {"train": [{"path": str(ROWS)}], "eval_fraction": 0.1}
    training = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "report_to": ["tensorboard"]}
    return write_recipe(data=data, training=training)


def fails(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("it broke\nin two lines")


@pytest.mark.parametrize(
    "each", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["all at once", "one after the other"]
)
@pytest.mark.slow
def test_each_of_them_fails_without_ending_the_run(
    each: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "training.output_dir=whole"]) == 0
    whole = Path("whole/adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    for i, parts in enumerate([[part] for part in PARTS.values()] if each else [list(PARTS.values())]):
        with monkeypatch.context() as patch:
            for owner, name, _ in parts:
                patch.setattr(owner, name, fails)
            assert main(["train", str(recipe), f"training.output_dir=run{i}"]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "it broke" in line]
        assert sorted(lines) == sorted({f"{what} failed: it broke; the run goes on" for _, _, what in parts})
        assert Path(f"run{i}/adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_an_evaluation_after_the_last_step_fails_and_the_run_is_saved(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SFTTrainer, "evaluate", fails)
    assert main(["train", str(recipe), "training.eval_strategy=no", "training.save_strategy=no"]) == 0
    assert "the last evaluation failed: it broke; the run goes on" in capsys.readouterr().err
    assert main(["generate", "run", "--prompt", "Hi", "--max-new-tokens", "1"]) == 0


def test_what_protects_the_result_ends_the_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*args: Any, **kwargs: Any) -> None:
        raise ModelError("it does not fit")

    monkeypatch.setattr(memory_check.MemoryCheck, "on_train_begin", refuses)
    assert main(["train", str(recipe)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: it does not fit"


def test_a_second_signal_during_samples_stops_at_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trackers.Samples, "on_evaluate", interrupted)
    assert main(["train", str(recipe)]) == 130
    assert not Path("run/adapter_model.safetensors").exists()
