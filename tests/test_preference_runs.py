"""Runs of dpo, kto and orpo through the command line: one result on any number of ranks, and resumed to the bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from safetensors.torch import load_file

from finetune.cli.commands import main
from finetune.train.reference import FILE, ReferenceLogProbs
from finetune.train.trainer import RunTrainer

Write = Callable[..., Path]
DATA = {"train": [{"path": "pairs.jsonl"}], "eval": [{"path": "held_out.jsonl"}]}
METRICS = {"dpo": "rewards/margins", "kto": "kl", "orpo": "nll_loss"}


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes()


@pytest.fixture
def pairs(tmp_path: Path) -> None:
    """Pairs with answers of 1 to 20 words; 11 do not fill three steps of four."""
    rng = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

    def text(most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))

    for name, count in (("pairs.jsonl", 11), ("held_out.jsonl", 3)):
        rows = [{"prompt": text(20), "chosen": f"Yes {text(8)}", "rejected": f"No {text(20)}"} for _ in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def records(run: str, key: str) -> list[float]:
    lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


def recipe(write: Write, method: str, **training: Any) -> Path:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 4}
    return write(method=method, data=DATA, training=settings | training, model={"name_or_path": "random:gemma3"})


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("dpo", marks=pytest.mark.slow),
        pytest.param("kto", marks=pytest.mark.soak),
        pytest.param("orpo", marks=pytest.mark.soak),
    ],
)
def test_one_result_however_the_pairs_are_spread(
    method: str, write_recipe: Write, pairs: None, processes: Processes
) -> None:
    path = str(recipe(write_recipe, method))
    assert main([path, "training.output_dir=one"]) == 0
    smaller = "training.per_device_train_batch_size=2"
    assert main([path, "training.output_dir=accumulated", smaller, "training.gradient_accumulation_steps=2"]) == 0
    processes.run("train", path, "training.output_dir=fsdp", smaller, ranks=2)
    processes.run("train", path, "training.output_dir=ddp", smaller, ranks=2, config="ddp.yaml")
    weights = load_file("one/adapter_model.safetensors")
    for other in ("accumulated", "fsdp", "ddp"):
        for key in ("loss", "grad_norm", "eval_loss", METRICS[method], f"eval_{METRICS[method]}", "num_tokens"):
            assert records(other, key) == pytest.approx(records("one", key), rel=5e-5, abs=5e-6), (other, key)
        for name, tensor in load_file(f"{other}/adapter_model.safetensors").items():
            assert torch.allclose(tensor, weights[name], rtol=0, atol=1e-4), (other, name)


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        ("dpo", 1),
        pytest.param("kto", 1, marks=pytest.mark.slow),
        *(pytest.param(method, 2, marks=pytest.mark.soak) for method in ("dpo", "kto")),
        pytest.param("orpo", 1, marks=pytest.mark.soak),
    ],
)
@pytest.mark.slow
def test_a_resumed_run_ends_at_the_same_bits(
    method: str, ranks: int, write_recipe: Write, pairs: None, processes: Processes
) -> None:
    path = str(recipe(write_recipe, method, save_strategy="steps", save_steps=1, per_device_train_batch_size=2))

    def train(*overrides: str) -> None:
        if ranks == 1:
            assert main([path, *overrides]) == 0
        else:
            processes.run("train", path, *overrides, ranks=ranks)

    train("training.output_dir=whole")
    Path("run").mkdir()
    shutil.copytree("whole/checkpoint-2", "run/checkpoint-2")
    for name in (FILE, "metrics.jsonl", "recipe.yaml"):
        if Path("whole", name).exists():
            shutil.copy(Path("whole", name), Path("run", name))
    train("training.output_dir=run", "training.resume_from_checkpoint=true")
    name = "adapter_model.safetensors"
    assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    for key in ("loss", "grad_norm", "eval_loss", METRICS[method]):
        assert records("run", key) == records("whole", key), key
    if ranks == 1:
        assert divergences("run")[-1:] == divergences("whole")[-1:]


def divergences(run: str) -> list[float]:
    lines = Path(run, "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [sample["kl"] for sample in map(json.loads, lines) if "kl" in sample]


@pytest.mark.slow
def test_a_run_killed_while_its_reference_is_computed_ends_at_the_same_bits(
    write_recipe: Write, pairs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(recipe(write_recipe, "dpo", seed=3))
    real, calls = ReferenceLogProbs._computed, []

    def killed(self: ReferenceLogProbs) -> torch.Tensor:
        calls.append(1)
        table = real(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return table

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceLogProbs, "_computed", killed)
        assert main([path]) == 130
        assert not Path("run", FILE).exists()
        assert main([path, "training.resume_from_checkpoint=true"]) == 0
    assert len(calls) == 2
    assert main([path, "training.output_dir=whole"]) == 0
    name = "adapter_model.safetensors"
    assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_pairs(
    write_recipe: Write, pairs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = RunTrainer.uncounted_step
    monkeypatch.setattr(RunTrainer, "uncounted_step", lambda *args, **kwargs: step(*args, **kwargs) * float("nan"))
    path = recipe(write_recipe, "dpo", train_sampling_strategy="sequential")
    assert main([str(path), "--force"]) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step 1, on the rows pairs.jsonl:1, pairs.jsonl:2, pairs.jsonl:3, pairs.jsonl:4" in error


@pytest.mark.slow
def test_evaluation_counts_the_pairs_whose_chosen_answer_is_preferred(write_recipe: Write, pairs: None) -> None:
    path = recipe(write_recipe, "dpo", max_steps=12, learning_rate=1e-2)
    evaluate = {"evaluate.prompts": "p.jsonl", "evaluate.max_new_tokens": "2"}
    Path("p.jsonl").write_text('{"prompt": "One?"}\n', encoding="utf-8")
    assert main([str(path), *(f"{key}={value}" for key, value in evaluate.items())]) == 0
    assert main(["evaluate", "run", "--compare", "base", "--output", "out"]) == 0
    before, after = json.loads(Path("out/report.json").read_text(encoding="utf-8"))["models"]
    assert before["pairs"]["gained"] == {}
    assert after["pairs"]["gained"]["all"] == {
        "right": 3,
        "judged": 3,
        "low": pytest.approx(0.4385, abs=1e-4),
        "high": 1,
    }
    # Of both models the whole answers, by the log-probabilities that the run has logged.
    assert {"all", "en"} & after["pairs"]["whole"].keys()
    text = Path("out/report.md").read_text(encoding="utf-8")
    assert "it gained more than the rejected one since base of run" in text
    assert "100.0% (3 of 3; 95%: 43.8% to 100.0%)" in text


@pytest.mark.slow
def test_the_page_and_the_card_of_a_run_show_its_rewards(
    write_recipe: Write, pairs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe(write_recipe, "dpo", eval_steps=2, eval_on_start=True)), "lora.lora_dropout=0.1"]) == 0
    # At the start all rewards are 0 up to rounding.
    assert (len(records("run", "eval_loss")), len(records("run", "eval_rewards/accuracies"))) == (3, 2)
    said = capsys.readouterr().err
    assert "lora.lora_dropout has no effect: training.disable_dropout, true by default with this method, is on" in said
    assert "evaluation at step 4: loss 0." in said
    assert ", the chosen answer ahead in " in said
    assert main(["report", "run"]) == 0
    page = Path("run/report.html").read_text(encoding="utf-8")
    for title in (
        "Reward margin: chosen less rejected",
        "Share of pairs whose chosen answer has the higher reward",
        "Rewards: log-probability gained since the start, times beta",
        "Tokens of the sampled answers (mean)",
        "KL divergence of the sampled answers from the reference (nats per token)",
    ):
        assert title in page
    assert "nats per trained token" not in page
    found = divergences("run")
    assert (len(found), found[:3]) == (9, [0, 0, 0])
    assert min(found[3:]) > 0
    card = Path("run/README.md").read_text(encoding="utf-8")
    assert "`random:gemma3`, trained by DPO with LoRA on pairs.jsonl" in card
    assert "11 pairs of answers to prompts in English: 11.5 tokens chosen and 17.2 rejected on average" in card
    [last] = [line for line in card.splitlines() if line.startswith("| evaluation, step 4 |")]
    margin, accuracy = (records("run", f"eval_rewards/{name}")[-1] for name in ("margins", "accuracies"))
    assert last.endswith(f" | {margin:.4f} | {accuracy:.1%} |")
    assert "loss of DPO" in card
    assert "nats a token" not in card
