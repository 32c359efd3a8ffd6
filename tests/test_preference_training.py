"""Preference trainers on tiny models: against trl's own trainers, from the reference on, and with shared prompts."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from finetune.data.encoded import IGNORE
from finetune.model.locate import Base
from finetune.model.token_rows import lighten_trainable_tokens
from finetune.recipe.schema import ModelSection
from finetune.recipe.upstream_tables import config_class
from finetune.system.errors import RunError
from finetune.train.callbacks.memory_check import MemoryCheck, smaller_settings
from finetune.train.divergence import AdapterAtStart
from finetune.train.dpo import DpoTrainer, OrpoTrainer
from finetune.train.kto import KtoTrainer
from finetune.train.meter import Meter
from finetune.train.reference import FILE, ReferenceLogProbs, SharedPromptsCheck
from finetune.train.shared_prompts import SharedPrompts

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 1,
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "max_length": None,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
Pair = dict[str, list[int]]


def base_path(name: str) -> str:
    return Base.of(ModelSection(name_or_path=f"random:{name}")).path


def model_of(name: str, lora: dict[str, Any] | None, attention: str = "eager") -> Any:
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_path(name), dtype=torch.float32, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    if lora is None:
        return model
    model = peft.get_peft_model(model, peft.LoraConfig(**lora))
    lighten_trainable_tokens(model)
    return model


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Token ids of prompts, chosen and rejected answers; some prompts are longer than a sliding window of 32."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(20, 200) for _ in range(rng.randint(low, high))]

    return [{"prompt_ids": ids(3, 50), "chosen_ids": ids(2, 9), "rejected_ids": ids(2, 9)} for _ in range(count)]


def prepared(rows: list[Pair]) -> datasets.Dataset:
    def side(row: Pair, name: str) -> tuple[list[int], list[int]]:
        return row["prompt_ids"] + row[name], [IGNORE] * len(row["prompt_ids"]) + row[name]

    table = []
    for i, row in enumerate(rows):
        (ids, labels), (rejected, rejected_labels) = side(row, "chosen_ids"), side(row, "rejected_ids")
        both = {"rejected_input_ids": rejected, "rejected_labels": rejected_labels}
        table.append({"row": f"row {i}", "input_ids": ids, "labels": labels} | both)
    return datasets.Dataset.from_list(table)


def rated(rows: list[Pair]) -> datasets.Dataset:
    table = []
    for row in rows:
        for name, desirable in (("rejected_ids", False), ("chosen_ids", True)):
            labels = [IGNORE] * len(row["prompt_ids"]) + row[name]
            answer = {"input_ids": row["prompt_ids"] + row[name], "labels": labels}
            table.append({"row": "", "desirable": desirable} | answer)
    return datasets.Dataset.from_list(table)


def trained(
    trainer: Any, output: Path, lines: list[str] | None = None, resumed: bool = False
) -> list[dict[str, float]]:
    """The records of a run with one of our trainers."""
    trainer.meter = Meter()
    say = [].append if lines is None else lines.append
    trainer.add_callback(SharedPromptsCheck(trainer, say))
    if trainer.needs_reference:
        trainer.add_callback(ReferenceLogProbs(trainer, output, {"run": str(output)}, resumed, say))
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


class Untouched(DPOTrainer):  # type: ignore[misc]
    """trl's trainer on rows that are tokenised already."""

    def _prepare_dataset(self, dataset: Any, *positional: Any) -> Any:
        return dataset


class UntouchedKto(KTOTrainer):  # type: ignore[misc]
    def _prepare_dataset(self, dataset: Any, *positional: Any) -> Any:
        return dataset


def tokenizer_of(name: str) -> Any:
    return AutoTokenizer.from_pretrained(base_path(name))


# ---------------------------------------------------------------------------------------------------------------
# Shared prompts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_moe"])
def test_a_shared_prompt_gives_the_hidden_states_of_two_rows(name: str, attention: str) -> None:
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2")
    model = AutoModelForCausalLM.from_pretrained(
        base_path(name), dtype=torch.float32, attn_implementation=attention
    ).eval()
    torch.manual_seed(0)
    lengths = [(50, 7, 9), (60, 3, 20), (10, 1, 5)]  # of the prompt and both answers; the window has 32 tokens
    prompts = [torch.randint(20, 200, (prompt,)) for prompt, _, _ in lengths]
    rows = [
        torch.cat([prompts[i], torch.randint(20, 200, (answers[side],))])
        for side in (0, 1)
        for i, (_, *answers) in enumerate(lengths)
    ]
    ids = torch.zeros(6, max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    assert SharedPrompts.fit(model)
    shared = SharedPrompts(model)
    with torch.no_grad():
        apart = model.base_model(**inputs).last_hidden_state
        with shared.of_pairs():
            together = model.base_model(**inputs).last_hidden_state
    scale = apart.abs().max()
    assert ((together - apart) * mask.unsqueeze(2)).abs().max() < 2e-6 * scale


def test_a_model_that_mixes_tokens_otherwise_shares_no_prompt(tmp_path: Path) -> None:
    model = model_of("llama", LORA)
    trainer = DpoTrainer(model, DPOConfig(str(tmp_path), **SETTINGS), prepared(pairs(4)), None, tokenizer_of("llama"))
    inner = model.get_base_model().base_model.layers[0].forward
    # As a recurrent layer does: each token gets a part of the one before it in the row.
    model.get_base_model().base_model.layers[0].forward = lambda hidden, *args, **kwargs: inner(
        hidden + torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1], *args, **kwargs
    )
    lines: list[str] = []
    trained(trainer, tmp_path, lines)
    assert trainer.shared is None
    assert any("llama cannot run a pair's prompt once (log-probabilities differ" in line for line in lines), lines


# ---------------------------------------------------------------------------------------------------------------
# Against trl


@pytest.mark.parametrize(
    ("name", "lora", "options"),
    [
        ("gemma3", LORA, {}),
        ("llama", None, {"beta": 0.3}),
        ("llama", LORA, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.2], "ld_alpha": 0.5}),
        ("llama", LORA, {"loss_type": "apo_zero", "use_weighting": True}),
    ],
)
@pytest.mark.slow
def test_losses_gradients_and_metrics_are_trls(
    name: str, lora: dict[str, Any] | None, options: dict[str, Any], tmp_path: Path
) -> None:
    rows, tokenizer = pairs(8), tokenizer_of(name)
    args = DPOConfig(str(tmp_path), **SETTINGS | options)
    model = model_of(name, None)
    # A full model's reference is loaded from its path by trl.
    theirs = Untouched(
        model=model_of(name, None),
        ref_model=None if lora else model,
        peft_config=peft.LoraConfig(**lora) if lora else None,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    ours = DpoTrainer(
        model_of(name, lora), DPOConfig(str(tmp_path), **SETTINGS | options), prepared(rows), None, tokenizer
    )
    start = dict(theirs.model.named_parameters())
    for parameter_name, parameter in ours.model.named_parameters():
        parameter.data.copy_(start[parameter_name])
    theirs.train()
    found = trained(ours, tmp_path)
    assert ours.shared is not None
    expected = [record for record in theirs.state.log_history if "loss" in record]
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        for key in set(other) - {"epoch", "step"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=2e-5), key


@pytest.mark.slow
def test_kto_is_trls_where_a_batch_is_the_whole_step(tmp_path: Path) -> None:
    rows, tokenizer = pairs(4), tokenizer_of("llama")
    options = SETTINGS | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3}
    options |= {"learning_rate": 1e-2, "desirable_weight": 4.0}
    data = rated(rows)
    split = [next(i for i, label in enumerate(row["labels"]) if label != IGNORE) for row in data]
    answers = [row["input_ids"][at:] for row, at in zip(data, split, strict=True)]
    # Our rows take the answer of the row before it that has another prompt.
    others = [answers[(i - 1 - i % 2) % 8] for i in range(8)]
    table = [
        {
            "prompt_ids": row["input_ids"][:at],
            "completion_ids": own,
            "KL_completion_ids": other,
            "label": row["desirable"],
        }
        for row, at, own, other in zip(data, split, answers, others, strict=True)
    ]
    theirs = UntouchedKto(
        model=model_of("llama", None),
        peft_config=peft.LoraConfig(**LORA),
        args=KTOConfig(str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_list(table),
        processing_class=tokenizer,
    )
    ours = KtoTrainer(model_of("llama", LORA), KTOConfig(str(tmp_path), **options), data, data, tokenizer)
    start = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        parameter.data.copy_(start[name])
    theirs.train()
    lines: list[str] = []
    found = trained(ours, tmp_path, lines)
    assert lines[-1] == "reference: the run begins at it, with a loss of 1.250000 and rewards of 0"
    assert not any("cannot" in line for line in lines)
    expected = [record for record in theirs.state.log_history if "loss" in record]
    assert expected[2]["kl"] > 0
    for one, other in zip(found, expected, strict=True):
        for key in set(other) - {"epoch", "step", "rewards/margins"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=2e-5), key
    assert ours.evaluate()["eval_kl"] > 0


def test_orpo_is_the_papers_loss(tmp_path: Path) -> None:
    rows = pairs(2)
    args = config_class("orpo")(str(tmp_path), **SETTINGS | {"gradient_accumulation_steps": 1, "beta": 0.25})
    model = model_of("llama", LORA)
    logs = []
    for row in rows:
        for name in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[name]])
            scores = model(ids).logits[0, :-1].log_softmax(1)
            count = len(row[name])
            logs.append(scores.gather(1, ids[0, 1:, None])[-count:].mean())
    log_p = torch.stack(logs).view(2, 2).double()
    log_odds = log_p - torch.log(1 - log_p.exp())
    expected = (-log_p[:, 0] - 0.25 * torch.nn.functional.logsigmoid(log_odds[:, 0] - log_odds[:, 1])).mean()
    lines: list[str] = []
    trainer = OrpoTrainer(model, args, prepared(rows), None, tokenizer_of("llama"))
    [record] = trained(trainer, tmp_path, lines)
    assert trainer.shared is not None
    assert lines == []
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert not (tmp_path / FILE).exists()


# ---------------------------------------------------------------------------------------------------------------
# The reference


def changed_adapter() -> Any:
    """An adapter that was trained before: LoRA, rows of tokens, and LoRA on the embedding."""
    lora = LORA | {"target_modules": ["q_proj", "embed_tokens"], "trainable_token_indices": None}
    model = model_of("llama", lora)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    return model


@pytest.mark.slow
def test_a_run_that_goes_on_from_an_adapter_begins_at_the_log_of_two(tmp_path: Path) -> None:
    rows, tokenizer = pairs(8), tokenizer_of("llama")
    theirs = Untouched(
        model=changed_adapter(),
        args=DPOConfig(str(tmp_path), **SETTINGS),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs.train()
    assert abs(theirs.state.log_history[0]["loss"] - math.log(2)) > 1e-3  # trl 1.16 copies only a part of the adapter
    lines: list[str] = []
    ours = DpoTrainer(changed_adapter(), DPOConfig(str(tmp_path), **SETTINGS), prepared(rows), None, tokenizer)
    found = trained(ours, tmp_path, lines)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0]["rewards/chosen"] == found[0]["rewards/rejected"] == pytest.approx(0, abs=1e-6)
    assert "reference: the run begins at it, with a loss of 0.693147 and rewards of 0" in lines


def test_the_reference_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prepared(pairs(8))
    computed: list[int] = []
    real = ReferenceLogProbs._computed
    monkeypatch.setattr(ReferenceLogProbs, "_computed", lambda self: computed.append(1) or real(self))

    def trainer() -> Any:
        args = DPOConfig(str(tmp_path), **SETTINGS)
        return DpoTrainer(model_of("llama", LORA), args, rows, rows, tokenizer_of("llama"))

    first = trained(trainer(), tmp_path)
    again = trained(trainer(), tmp_path)
    assert len(computed) == 1
    assert [record["loss"] for record in again] == [record["loss"] for record in first]
    (tmp_path / FILE).unlink()
    assert trained(trainer(), tmp_path)[0]["loss"] == first[0]["loss"]  # from the cache
    assert len(computed) == 1


def test_a_resumed_run_without_its_reference_does_not_go_on(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), **SETTINGS)
    trainer = DpoTrainer(model_of("llama", LORA), args, prepared(pairs(4)), None, tokenizer_of("llama"))
    with pytest.raises(RunError, match=f"{FILE}: the reference's log-probabilities of this run are not there"):
        trained(trainer, tmp_path, resumed=True)


@pytest.mark.slow
def test_another_models_reference_does_not_start(tmp_path: Path) -> None:
    rows, tokenizer = prepared(pairs(4)), tokenizer_of("llama")
    trained(DpoTrainer(model_of("llama", LORA), DPOConfig(str(tmp_path), **SETTINGS), rows, None, tokenizer), tmp_path)
    other = DpoTrainer(changed_adapter(), DPOConfig(str(tmp_path), **SETTINGS), rows, None, tokenizer)
    with pytest.raises(RunError, match="are not those of this model"):
        trained(other, tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# One result


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.slow
def test_a_step_is_the_same_however_it_is_accumulated(size: int, tmp_path: Path) -> None:
    options = SETTINGS | {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    rows = prepared(pairs(6))  # the second step has two pairs

    def losses(options: dict[str, Any]) -> list[dict[str, float]]:
        args = DPOConfig(str(tmp_path), **options)
        return trained(DpoTrainer(model_of("gemma3", LORA), args, rows, None, tokenizer_of("gemma3")), tmp_path)

    for one, other in zip(losses(options), losses(SETTINGS), strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert one[key] == pytest.approx(other[key], rel=2e-5, abs=1e-6), key


@pytest.mark.slow
def test_rows_that_only_fill_a_batch_count_for_nothing(tmp_path: Path) -> None:
    rows = pairs(3)
    filled = prepared([*rows, rows[0]]).to_list()
    filled[3]["labels"] = [IGNORE] * len(filled[3]["labels"])
    filled[3]["rejected_labels"] = [IGNORE] * len(filled[3]["rejected_labels"])
    options = SETTINGS | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}

    def record(data: datasets.Dataset) -> dict[str, float]:
        args = DPOConfig(str(tmp_path), **options)
        trainer = DpoTrainer(model_of("llama", LORA), args, data, data, tokenizer_of("llama"))
        return trained(trainer, tmp_path / str(len(data)), lines)[0] | trainer.evaluate()

    lines: list[str] = []
    one, other = record(datasets.Dataset.from_list(filled)), record(prepared(rows))
    for key in ("loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/accuracies", "eval_logps/chosen"):
        assert one[key] == pytest.approx(other[key], rel=2e-5, abs=1e-6), key
    counted = [line for line in lines if line.endswith("rows are computed")]
    assert counted == ["reference: log-probabilities of 3 rows are computed"] * len(counted) != []


def test_the_longest_batch_is_that_of_both_sides(tmp_path: Path) -> None:
    rows = pairs(6)
    rows[4] = {"prompt_ids": [20, 21], "chosen_ids": [22], "rejected_ids": list(range(20, 180))}
    args = DPOConfig(str(tmp_path), **SETTINGS)
    trainer = DpoTrainer(model_of("llama", LORA), args, prepared(rows), None, tokenizer_of("llama"))
    longest = MemoryCheck(trainer, print)._longest_rows()
    assert longest[0]["row"] == "row 4"
    # What to write where it does not fit.
    settings = smaller_settings(args, trainer.model, len(longest[0]["input_ids"]))
    assert settings[0].startswith("training.per_device_train_batch_size: 1")
    assert not any("packing" in setting for setting in settings)


def test_the_divergence_is_from_the_adapter_at_the_start() -> None:
    """A fresh adapter, whose start is the base; then one that goes on from values of its own."""
    lora = LORA | {"trainable_token_indices": [5, 6]}
    prompt, answer = [4, 5, 6, 7], [9, 5, 1]
    model = model_of("gemma3", lora).eval()
    start = AdapterAtStart.of(model)
    assert start is not None
    assert start.divergence(prompt, answer) == 0
    changed = [p for p in model.parameters() if p.requires_grad]
    for parameter in changed:
        parameter.data.normal_(0, 0.1)
    places = [parameter.data_ptr() for parameter in changed]

    def log_probs() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompt + answer])).logits[0, 3:-1].log_softmax(-1)

    now = log_probs()
    with model.disable_adapter():
        before = log_probs()
    expected = float((now.exp() * (now - before)).sum(-1).mean())
    assert expected > 0.01
    assert start.divergence(prompt, answer) == pytest.approx(expected, rel=1e-4)
    assert [parameter.data_ptr() for parameter in changed] == places
    assert torch.equal(log_probs(), now)
    later = AdapterAtStart.of(model)
    assert later is not None
    assert later.divergence(prompt, answer) == 0


def test_a_model_without_an_adapter_is_compared_with_nothing() -> None:
    assert AdapterAtStart.of(model_of("gemma3", None)) is None
