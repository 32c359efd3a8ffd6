"""Recipes of the methods that train on preferences: their keys, their defaults, and the exact words for wrong values."""

# ruff: noqa: E501 (a fault is one line, and easier to read as one)

import importlib
import re
import typing
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli.commands import main
from finetune.recipe import upstream
from finetune.recipe.diff import check_changes
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import CONFIGS
from finetune.recipe.upstream_tables import config_class, tables
from finetune.recipe.upstream_types import DIVERGENCES, DPO_LOSSES
from finetune.system.errors import RecipeError, RunError

Write = Callable[..., Path]
# Two lines, so that what a test adds begins on line 3.
BASE = "model: {name_or_path: owner/model}\ndata: {train: [{path: owner/rows}]}\n"


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Recipe:
    Path("r.yaml").write_text(BASE + text, encoding="utf-8")
    return load_recipe("r.yaml", overrides)


def report(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return caught.value.faults


@pytest.mark.parametrize("method", CONFIGS)
def test_the_method_is_in_the_resolved_recipe(method: str) -> None:
    recipe = load(f"method: {method}\n")
    assert recipe.method == method
    assert recipe.data.on_overflow == ("truncate_turns" if method == "sft" else "drop")
    assert recipe.to_yaml().splitlines()[0] == f"method: {method}  # r.yaml:3"
    assert recipe.sections()["method"] == method
    assert load("", f"method={method}") == recipe
    Path("saved.yaml").write_text(recipe.to_yaml())
    assert load_recipe("saved.yaml") == load_recipe("r.yaml", [f"method={method}", "training.output_dir=runs/r"])
    Path("next.yaml").write_text("extends: r.yaml\nmethod: dpo\n")
    assert load_recipe("next.yaml").method == "dpo"
    assert load("method: null\n").method == "sft"


FAULTS = {
    "another method": ("method: ppo\n", ['r.yaml:3: method: is "ppo"; write sft, dpo, kto or orpo']),
    "no text": ("method: {a: 1}\n", ['r.yaml:3: method: is {"a": 1}; write sft, dpo, kto or orpo']),
    "a name near": ("methods: dpo\n", ["r.yaml:3: methods: is unknown; perhaps method"]),
    "another trainer's name": ("rl: dpo\n", ["r.yaml:3: rl: is not a recipe's key; write method: dpo, kto or orpo"]),
    "keys of other methods": (
        "training: {beta: 0.1, desirable_weight: 1, ld_alpha: 0.5, max_prompt_length: 512}\n",
        [
            "r.yaml:3: training.beta: is a key of dpo, kto, orpo; method is sft",
            "r.yaml:3: training.desirable_weight: is a key of kto; method is sft",
            "r.yaml:3: training.ld_alpha: is a key of dpo; method is sft",
            "r.yaml:3: training.max_prompt_length: is not a recipe's key; write max_length, the limit of a prompt and its answer",
        ],
    ),
    "keys of sft": (
        "method: dpo\ntraining: {packing: true, betta: 0.1, dataset_num_proc: 2, precompute_ref_log_probs: true, x: 1}\n",
        [
            "r.yaml:4: training.packing: is a key of sft; method is dpo",
            "r.yaml:4: training.betta: is unknown; perhaps beta",
            "r.yaml:4: training.dataset_num_proc: is not a recipe's key; remove it; the data section prepares the rows",
            "r.yaml:4: training.precompute_ref_log_probs: is not a recipe's key; remove it; the reference is computed once, and kept",
            "r.yaml:4: training.x: is unknown; write a parameter of trl.DPOConfig",
        ],
    ),
    "a loss with orpo": (
        "method: orpo\ntraining: {loss_type: sigmoid}\n",
        ["r.yaml:4: training.loss_type: is a key of sft, dpo, kto; method is orpo"],
    ),
    "values of the wrong type": (
        "method: dpo\ntraining: {beta: 0, loss_type: [sigmoids], ld_alpha: 2, label_smoothing: 1, metric_for_best_model: accuracy}\n",
        [
            "r.yaml:4: training.beta: is 0; write a number greater than 0",
            "r.yaml:4: training.loss_type.0: is \"sigmoids\"; write 'sigmoid'",
            "r.yaml:4: training.ld_alpha: is 2; write a number less than or equal to 1",
            "r.yaml:4: training.label_smoothing: is 1; write a number less than 1",
            'r.yaml:4: training.metric_for_best_model: is "accuracy"; write '
            "'loss', 'eval_loss', 'rewards/margins', 'eval_rewards/margins', 'rewards/accuracies' or 'eval_rewards/accuracies'",
        ],
    ),
    "weights of losses": (
        "method: dpo\ntraining: {loss_type: [sigmoid, sft], loss_weights: [1]}\n",
        [
            "r.yaml:4: training.loss_weights: is [1]; DPOConfig says: `loss_weights` must have the same length as `loss_type` when combining multiple losses. Got 1 weights for 2 loss types."
        ],
    ),
    "losses and their options": (
        "method: dpo\ntraining: {loss_type: [robust, aot], f_divergence_type: forward_kl, f_alpha_divergence_coef: 0.3, use_weighting: true, label_smoothing: 0.5, discopop_tau: 0.1}\n",
        [
            "r.yaml:4: training.f_divergence_type: is forward_kl, which loss_type aot does not have; write reverse_kl",
            "r.yaml:4: training.f_alpha_divergence_coef: has no effect without f_divergence_type: alpha_divergence; remove it",
            "r.yaml:4: training.use_weighting: is true, but loss_type aot, robust sorts the rows of a batch; remove it",
            "r.yaml:4: training.label_smoothing: is 0.5, but loss_type robust needs less than 0.5; write 0.1",
            "r.yaml:4: training.discopop_tau: has no effect with loss_type aot, robust; remove it, or write loss_type: discopop",
        ],
    ),
    "exo_pair": (
        "method: dpo\ntraining: {loss_type: exo_pair}\n",
        ["r.yaml:4: training.loss_type: has exo_pair, which needs smoothing; write label_smoothing: 0.001"],
    ),
    "smoothing that no loss reads": (
        "method: dpo\ntraining: {label_smoothing: 0.1}\n",
        [
            "r.yaml:4: training.label_smoothing: has no effect with loss_type sigmoid; remove it, or write loss_type: aot or aot_unpaired or exo_pair or robust"
        ],
    ),
    "rows that would be cut": (
        "method: dpo\n",
        [
            "command line: data.on_overflow: is split, but method is dpo, and both answers of a row stay whole; write drop or error",
            'command line: data.train_on: is "all", but method is dpo, which trains on the answers; remove it',
            "command line: data.train_on_thinking: is false, but method is dpo, and thinking is a part of an answer; remove it",
            "command line: data.train.0.streaming: is true, but method is dpo, and the reference needs all rows before training; remove it",
        ],
        *("data.on_overflow=split", "data.train_on=all", "data.train_on_thinking=false", "training.max_steps=1"),
        "data.train.0.streaming=true",
    ),
    "formats of sft": (
        "method: kto\n",
        [
            "command line: data.train.0.format: is messages, but method kto needs pairs; write preference or rated",
            "command line: data.eval.0.format: is alpaca, but method kto needs pairs; write preference or rated",
        ],
        *("data.train.0.format=messages", "data.eval=[{path: owner/others, format: alpaca}]"),
    ),
    "rated rows for dpo": (
        "method: dpo\n",
        ["command line: data.train.0.format: is rated, but method dpo needs pairs; write preference"],
        "data.train.0.format=rated",
    ),
    "pairs for sft": (
        "",
        ["command line: data.train.0.format: is preference, but method is sft; write method: dpo or orpo or kto"],
        "data.train.0.format=preference",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(name: str) -> None:
    text, faults, *overrides = FAULTS[name]
    assert report(text, *overrides) == faults


def test_the_values_are_those_that_trl_compares_with() -> None:
    fields = config_class("dpo").__dataclass_fields__
    for name, known in (("loss_type", DPO_LOSSES), ("f_divergence_type", DIVERGENCES)):
        listed = fields[name].metadata["help"].split("If multiple")[0].split("Only the loss types")[0]
        assert set(re.findall(r"[`'](\w+)[`']", listed)) - {name} == set(typing.get_args(known))
    for loss in typing.get_args(DPO_LOSSES):
        smooth = {"exo_pair": "training.label_smoothing=0.001"}.get(loss)
        recipe = load("method: dpo\n", f"training.loss_type={loss}", *filter(None, [smooth]))
        assert upstream.checked_config(recipe.training, "dpo").loss_type == [loss]


def test_a_trl_without_orpo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    real = importlib.import_module
    # Another release has other tables.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.cache_clear()
    request.addfinalizer(tables.cache_clear)

    def without(name: str) -> object:
        if name == "trl.experimental.orpo":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.8")
    assert report("method: orpo\n") == [
        "r.yaml:3: method: is orpo, which needs trl.experimental.orpo, and trl 9.8 does not have it; write dpo, or install a release that has it"
    ]
    # The other methods do not need it.
    assert report("training: {beta: 1}\n") == ["r.yaml:3: training.beta: is a key of dpo, kto; method is sft"]


def test_a_resumed_run_keeps_its_method() -> None:
    recipe = load("method: dpo\n")
    saved = Path("saved.yaml")
    said: list[str] = []

    def resume(text: str, recipe: Recipe = recipe) -> None:
        saved.write_text(text)
        check_changes(saved, recipe, said.append, same_rows=True, processes=(1, 1))

    resume(recipe.to_yaml())
    resume(load("method: dpo\ntraining: {loss_type: sigmoid}\n").to_yaml())  # the default
    assert said == []
    resume(load("method: dpo\ntraining: {beta: 0.3, loss_type: ipo}\n").to_yaml())
    assert said == ["resuming with changes: training.loss_type [ipo] -> [sigmoid]; training.beta 0.3 -> 0.1"]
    with pytest.raises(RunError, match=r"^training.resume_from_checkpoint: method was sft and is dpo, with which"):
        resume(load("").to_yaml())
    with pytest.raises(RunError, match=r"saved.yaml is damaged: its method is rlhf; restore"):
        resume(recipe.to_yaml().replace("method: dpo", "method: rlhf"))


def test_check_shows_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    load("method: kto\ntraining: {desirable_weight: 1.5}\n")
    assert main(["check", "r.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("r.yaml: ok\nmethod: kto  # r.yaml:3\n")
    assert "  desirable_weight: 1.5  # r.yaml:4\n" in out
