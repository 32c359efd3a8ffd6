"""A second plan reads what each step costs, and computes it anew when anything that it depends on changes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.plan.configs import base_config
from finetune.plan.predict import Predictor
from finetune.plan.run import plan
from finetune.plan.settings import step_arguments, step_settings
from finetune.plan.step import FakeModel
from finetune.recipe.load import load_recipe
from finetune.system.devices import GPUS

Write = Callable[..., Path]
SMALL: dict[str, Any] = {"model": {"name_or_path": "random:llama"}, "lora": {"target_modules": ["q_proj"]}}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The batches that are run, in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made: list[Any] = []
    step = FakeModel.step

    def counted(self: FakeModel, batch: Any, *rest: Any) -> Any:
        made.append(batch)
        return step(self, batch, *rest)

    monkeypatch.setattr(FakeModel, "step", counted)
    # The table of GPUs, each of which takes seconds, has one.
    monkeypatch.setattr("finetune.plan.run.GPUS", {"h200": GPUS["h200"]})
    return made


@pytest.mark.slow
def test_a_second_plan_runs_nothing(write_recipe: Write, runs: list[Any]) -> None:
    recipe = load_recipe(write_recipe(**SMALL), ["data.train=[{path: owner/rows}]"])
    first = plan(recipe, GPUS["t4"], use_rows=False)
    count = len(runs)
    assert count
    again = plan(recipe, GPUS["t4"], use_rows=False)
    assert len(runs) == count
    assert replace(again, recipe=recipe, settings=first.settings) == first
    # Rows, the run's folder and reports decide nothing.
    other = load_recipe(recipe.path, ["data.train=[{path: other/rows}]", "training.output_dir=elsewhere"])
    assert plan(other, GPUS["t4"], use_rows=False).fit == first.fit
    assert len(runs) == count


@pytest.mark.slow
def test_without_a_cache_a_plan_is_made(write_recipe: Write, runs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(**SMALL), ["data.train=[{path: owner/rows}]"])
    Path("blocked").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("blocked").absolute()))
    monkeypatch.setenv("FINETUNE_STAND_IN_CACHE", "")
    assert plan(recipe, GPUS["t4"], use_rows=False).fits
    assert runs


@pytest.mark.slow
def test_what_a_step_depends_on_is_a_part_of_the_key(
    write_recipe: Write, runs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(**SMALL)

    def peak(*overrides: str, gpu: str = "t4", base: str = "random:llama", **changes: Any) -> tuple[bool, int]:
        """True if something was run, and the peak of a step."""
        recipe = load_recipe(path, [f"model.name_or_path={base}", *overrides])
        arguments, before = step_arguments(recipe), len(runs)
        settings = replace(step_settings(recipe, arguments, None), **changes)
        predictor = Predictor(base_config(recipe.model), GPUS[gpu], arguments)
        cost = predictor.step(settings)
        predictor.stored.save()
        return len(runs) > before, cost.peak

    assert peak()[0]
    assert not peak()[0]
    for overrides in (["lora.r=5"], ["training.adam_beta2=0.9"], ["training.per_device_train_batch_size=3"]):
        assert peak(*overrides)[0], overrides
    assert peak(checkpointing=True)[0]
    assert peak(optim="sgd")[0]
    assert peak(accumulation=2)[0]
    assert peak(base="random:gemma")[0]
    assert peak("model.dtype=bfloat16", gpu="h100")[0]
    assert not peak()[0]
    # A damaged file is computed anew.
    for file in (Path(path).parent / "cache" / "finetune" / "plan").iterdir():
        file.write_text("{")
    assert peak()[0]
    assert not peak()[0]
