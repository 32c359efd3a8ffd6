"""Packed rows are trained as the same rows alone: their loss, their gradients, every token of them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import trl.trainer.sft_trainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import finetune.train.run
from finetune.cli.commands import main
from finetune.model.locate import locate
from finetune.recipe.load import load_recipe
from finetune.system.errors import ModelError
from finetune.train.run import train
from finetune.train.sft import SftTrainer

Write = Callable[..., Path]
SAMPLE = Path(__file__).parents[1] / "data" / "chat_sample.jsonl"
# Gemma 2 caps its attention scores, for which sdpa has no place: transformers 5.23 refuses it there.
ATTENTIONS = [
    ("llama", "sdpa"),
    ("gemma3", "sdpa"),
    pytest.param("gemma2", "eager", marks=pytest.mark.slow),
    pytest.param("gemma", "sdpa", marks=pytest.mark.soak),
    *(pytest.param(name, "eager", marks=pytest.mark.soak) for name in ("llama", "gemma", "gemma3")),
]
# One row to a batch: nothing is beside it, neither another row nor padding.
ALONE = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
PACKED = {"packing": True, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
# Float32 sums in another order: 2e-6 was the most seen, of losses near 8 and of gradients beside the largest of their
# parameter. Rows that read one another move losses by 6e-3 or more, and gradients by more than their size.
TOLERANCE = 2e-5


class Step(NamedTuple):
    loss: float
    eval_loss: float
    gradients: dict[str, torch.Tensor]
    trainer: Any


def draw(model: Any) -> Any:
    """Larger weights than at birth: attention that chooses, so that what it must not see would show."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a tiny model with larger weights."""
    folder = tmp_path_factory.mktemp("bases")

    def make(architecture: str) -> str:
        path = folder / architecture
        if not path.exists():
            made = locate(f"random:{architecture}")
            draw(AutoModelForCausalLM.from_pretrained(made)).save_pretrained(path)
            AutoTokenizer.from_pretrained(made).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def done() -> dict[Any, Step]:
    """Steps on rows alone, each taken once."""
    return {}


@pytest.fixture
def one_step(
    write_recipe: Write, base: Callable[[str], str], done: dict[Any, Step], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Step]:
    """Trains one step on ten rows, as a run does: its loss and gradients, and the evaluation before it."""
    seen: list[Any] = []

    class Watched(SftTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            seen.append((found, self))
            return loss

    monkeypatch.setitem(finetune.train.run._TRAINERS, "sft", Watched)
    # Weights, picture and card are made of nothing that is looked at here.
    monkeypatch.setattr(finetune.train.run, "_save_finished_run", lambda *args: None)
    rows = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)

    def step(architecture: str, attention: str, training: dict[str, Any], lora: bool = True) -> Step:
        key = (architecture, attention, lora)
        if training is ALONE and key in done:
            return done[key]
        Path("rows.jsonl").write_text("".join(rows[:10]), encoding="utf-8")
        Path("held.jsonl").write_text("".join(rows[10:16]), encoding="utf-8")
        path = write_recipe(
            model={"name_or_path": base(architecture), "attn_implementation": attention},
            # Both matrices of an adapter random: with one of them zero the other has no gradient.
            lora={"init_lora_weights": False} if lora else None,
            data={"train": [{"path": "rows.jsonl"}], "eval": [{"path": "held.jsonl"}]},
            training={
                "output_dir": f"run{len(seen)}",
                "max_length": 512,
                "max_steps": 1,
                "gradient_accumulation_steps": 99,  # all rows, however many batches they are
                "eval_on_start": True,
            }
            | training,
        )
        run = train(load_recipe(path))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        taken = Step(
            next(r["loss"] for r in records if "loss" in r),
            next(r["eval_loss"] for r in records if "eval_loss" in r),
            *seen[-1],
        )
        if training is ALONE:
            done[key] = taken
        return taken

    return step


def distances(one: Step, other: Step) -> list[float]:
    """How far two steps are apart: the losses; the gradients, beside the largest of their parameter."""
    assert one.gradients.keys() == other.gradients.keys() != set()
    pairs = [(one.gradients[name], other.gradients[name]) for name in one.gradients]
    return [
        abs(one.loss - other.loss),
        abs(one.eval_loss - other.eval_loss),
        max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
    ]


def read_across(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns the cache on, with which transformers no longer tells packed rows from their positions."""
    name = {"gemma3": "Gemma3Text"}.get(architecture, architecture.capitalize())
    backbone = getattr(transformers, f"{name}Model")
    forward = backbone.forward

    def cached(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs | {"use_cache": True})

    monkeypatch.setattr(backbone, "forward", cached)


@pytest.mark.parametrize(("architecture", "attention"), ATTENTIONS)
@pytest.mark.slow
def test_packed_rows_give_the_loss_and_gradients_of_the_rows_alone(
    architecture: str, attention: str, one_step: Callable[..., Step]
) -> None:
    alone = one_step(architecture, attention, ALONE)
    packed = one_step(architecture, attention, PACKED)
    lengths = packed.trainer.train_dataset["seq_lengths"]
    assert len(alone.trainer.train_dataset) == sum(map(len, lengths)) == 10
    assert sum(len(row) > 1 for row in lengths) > 2  # packs of several rows, in more than one batch
    assert packed.trainer.model.config._attn_implementation == attention
    if architecture in ("gemma2", "gemma3"):
        assert packed.trainer.model.config.sliding_window == 32 < min(min(row) for row in lengths)
    assert max(distances(packed, alone)) < TOLERANCE


@pytest.mark.parametrize(
    ("training", "lora"),
    [
        (PACKED, False),
        (PACKED | {"eval_packing": False, "gradient_checkpointing": True}, True),
        (PACKED | {"packing_strategy": "bfd_split", "pad_to_multiple_of": 64}, True),
        ({"padding_free": True, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 4}, True),
    ],
    ids=["full fine-tuning", "evaluated unpacked, layers recomputed", "bfd_split, padded", "padding-free"],
)
@pytest.mark.slow
def test_so_do_other_ways_to_pack(training: dict[str, Any], lora: bool, one_step: Callable[..., Step]) -> None:
    alone = one_step("gemma3", "sdpa", ALONE, lora)
    packed = one_step("gemma3", "sdpa", training, lora)
    assert max(distances(packed, alone)) < TOLERANCE


@pytest.mark.parametrize(("architecture", "attention"), [("llama", "eager"), ("gemma", "sdpa"), ("gemma3", "sdpa")])
@pytest.mark.slow
def test_rows_that_read_one_another_are_seen_and_refused(
    architecture: str, attention: str, one_step: Callable[..., Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = one_step(architecture, attention, ALONE)
    read_across(architecture, monkeypatch)
    kind = f"{'gemma3_text' if architecture == 'gemma3' else architecture} with {attention} attention"
    with pytest.raises(ModelError) as refused:
        one_step(architecture, attention, PACKED | {"output_dir": "refused"})
    assert str(refused.value) == (
        f"training.packing: {kind} would let packed rows attend to each other; write false, or another "
        "model.attn_implementation"
    )
    monkeypatch.setattr(
        finetune.train.callbacks.packing.PackedRowsCheck, "on_train_begin", lambda *args, **kwargs: None
    )
    packed = one_step(architecture, attention, PACKED)
    assert min(distances(packed, alone)) > 50 * TOLERANCE


def foreign_base(family: str, **shape: Any) -> str:
    """A tiny model of a family that `random:` does not make, with the tokenizer of one that it does."""
    tokenizer = AutoTokenizer.from_pretrained(locate("random:llama"))
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=64, pad_token_id=tokenizer.pad_token_id, **shape
    )
    draw(AutoModelForCausalLM.from_config(config)).save_pretrained(family)
    tokenizer.save_pretrained(family)
    return f"./{family}"


def test_a_model_that_knows_no_positions_is_refused(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(model={"name_or_path": foreign_base("bloom", n_layer=2, n_head=4)}, lora=None)
    assert main([str(path), "training.packing=true"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: training.packing: bloom with eager attention would let packed rows attend to each other; write false, "
        "or another model.attn_implementation"
    )
    assert main([str(path), "training.output_dir=other"]) == 0  # unpacked it is trained


@pytest.mark.skipif(importlib.util.find_spec("causal_conv1d") is not None, reason="here the model can take packed rows")
def test_a_model_that_lacks_a_package_for_packed_rows_says_so(
    write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1]}
    path = write_recipe(model={"name_or_path": foreign_base("lfm2", **shape)}, lora=None)
    assert main([str(path), "training.packing=true"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: training.packing: lfm2 with sdpa attention ")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["training.packing=true", "training.packing_strategy=wrapped"],
            "training.packing_strategy: is wrapped, which cuts rows and lets them attend to one another; write bfd",
        ),
        (
            ["training.eval_packing=true", "data.eval_fraction=0.1"],
            "training.eval_packing: is true without packing, so rows would attend to one another; add packing: true",
        ),
    ],
    ids=["wrapped", "evaluation alone"],
)
def test_packing_that_lets_rows_read_one_another_is_refused(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], overrides: list[str], line: str
) -> None:
    assert main([str(write_recipe()), *overrides]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: command line: {line}"
    assert not Path("run").exists()


@pytest.mark.parametrize("how", ["the command line", "Python"])
@pytest.mark.slow
def test_every_token_is_packed_and_no_kernel_is_asked_for(
    how: str, write_recipe: Write, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As many tokens are seen in an epoch as the ledger counts, and nobody is told to install flash attention."""
    path = write_recipe(training={"packing": True, "num_train_epochs": 1, "max_steps": -1})
    if how == "Python":
        train(load_recipe(path))
    else:
        assert main([str(path)]) == 0
    ledger = json.loads(Path("run/ledger.json").read_text())["train"]
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [r["num_tokens"] for r in records if "loss" in r][-1] == ledger["tokens"]
    # pytest raises on what comes as a Python warning.
    assert "flash" not in (capfd.readouterr().err + caplog.text).lower()


@pytest.mark.parametrize("side", ["train", "eval"])
def test_a_row_lost_in_packing_stops_the_run(
    side: str, write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = trl.trainer.sft_trainer.pack_dataset
    lost: list[dict[str, list[int]]] = []

    def pack_less(dataset: Any, length: int, strategy: str, options: dict[str, Any]) -> Any:
        if side in options["desc"]:
            lost.append(dataset[-1])
            dataset = dataset.select(range(len(dataset) - 1))
        return pack(dataset, length, strategy, options)

    monkeypatch.setattr(trl.trainer.sft_trainer, "pack_dataset", pack_less)
    path = write_recipe(training={"packing": True})
    assert main([str(path), "data.eval_fraction=0.1"]) == 2
    ledger = json.loads(Path("run/ledger.json").read_text())[side]
    kept, tokens, trained = ledger["rows"]["kept"], ledger["tokens"], ledger["trained_tokens"]
    (row,) = lost
    labels = sum(label != -100 for label in row["labels"])
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: trl would {'train' if side == 'train' else 'evaluate'} on {kept - 1} rows with "
        f"{tokens - len(row['input_ids']):,} tokens and {trained - labels:,} labels where the ledger counts {kept} "
        f"rows with {tokens:,} tokens and {trained:,} labels"
    )


def test_a_loss_that_is_not_finite_names_the_packed_rows(
    write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text("".join(SAMPLE.read_text().splitlines(keepends=True)[:3]))
    path = write_recipe(
        data={"train": [{"path": "rows.jsonl"}]},
        training={"packing": True, "max_length": 512, "learning_rate": 1e30, "lr_scheduler_type": "constant"},
    )
    assert main([str(path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the loss is nan at step ")
    assert "on the rows rows.jsonl:1, rows.jsonl:2, rows.jsonl:3. This step was not taken" in last
