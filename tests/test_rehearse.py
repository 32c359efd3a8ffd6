"""The longest batch is tried before the first step, leaves nothing behind, and what does not fit is told."""

import copy
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.cli.commands import main
from finetune.system.errors import RunError
from finetune.train.callbacks import memory_check
from finetune.train.callbacks.memory_check import MemoryCheck, optimizer_bytes, shortfall, smaller_settings

Write = Callable[..., Path]
STATM = Path("/proc/self/statm")
# What a record says of time.
CLOCKS = {"tokens_per_second", "peak_memory_gib", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def assert_same_runs(a: Path, b: Path) -> None:
    name = "adapter_model.safetensors" if (a / "adapter_model.safetensors").exists() else "model.safetensors"
    one, other = load_file(a / name), load_file(b / name)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert records(a) == records(b) != []
    assert (a / "ledger.json").read_text() == (b / "ledger.json").read_text()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a recipe without a memory check."""

    def run(*argv: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(MemoryCheck, "on_train_begin", lambda *args, **kwargs: None)
            return main(list(argv))

    return run


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The inputs of each pass, and the gradients before and after it; the memory check's pass is the first."""
    seen: list[SimpleNamespace] = []
    step = SFTTrainer.training_step

    def gradients(model: Any) -> list[bool | None]:
        """The state of each trained parameter's gradient: none, only zeros, or more."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return [None if p.grad is None else bool(p.grad.any()) for p in trained]

    def training_step(trainer: Any, model: Any, inputs: Any, *args: Any) -> Any:
        taken = SimpleNamespace(trainer=trainer, inputs=dict(inputs), items=args[0], before=gradients(model))
        loss = step(trainer, model, inputs, *args)
        taken.after = gradients(model)
        seen.append(taken)
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    return seen


# ---------------------------------------------------------------------------------------------------------------
# Runs with it and without


@pytest.mark.parametrize(
    ("sections", "overrides"),
    [
        ({}, []),
        pytest.param({}, ["training.packing=true"], marks=pytest.mark.slow),
        # Noise on the embeddings, for there is no adapter to drop out of.
        ({"lora": None}, ["training.neftune_noise_alpha=5"]),
        pytest.param(
            {"quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, [], marks=pytest.mark.slow
        ),
    ],
    ids=["lora", "packed", "full", "4-bit"],
)
@pytest.mark.slow
def test_a_run_with_it_is_the_run_without(
    write_recipe: Write,
    without: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    sections: dict[str, Any],
    overrides: list[str],
) -> None:
    sections = {"lora": {"lora_dropout": 0.1}} | sections
    path = write_recipe(
        model={"name_or_path": "random:gemma2"}, training={"gradient_accumulation_steps": 2}, **sections
    )
    assert without(str(path), *overrides, "training.output_dir=without") == 0
    assert "memory: " not in capsys.readouterr().err
    assert main([str(path), *overrides]) == 0
    [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory: ")]
    assert said.startswith("memory: the longest batch (2 rows, 256 tokens) takes ")
    assert said.endswith(" GiB")
    assert_same_runs(Path("run"), Path("without"))


@pytest.mark.slow
def test_a_resumed_run_with_it_is_the_run_without(write_recipe: Write, without: Callable[..., int]) -> None:
    path = write_recipe(lora={"lora_dropout": 0.1}, training={"save_strategy": "steps", "save_steps": 2})
    assert without(str(path), "training.output_dir=whole") == 0
    Path("run").mkdir()
    for name in ("checkpoint-2", "metrics.jsonl"):
        Path("whole", name).rename(Path("run", name))
    assert main([str(path), "training.resume_from_checkpoint=true"]) == 0
    whole = load_file("whole/adapter_model.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file("run/adapter_model.safetensors").items())


@pytest.mark.slow
def test_a_stream_is_not_read_for_it(
    write_recipe: Write, without: Callable[..., int], steps: list[SimpleNamespace]
) -> None:
    sample = Path(__file__).parents[1] / "data" / "chat_sample.jsonl"
    path = write_recipe(data={"train": [{"path": str(sample), "streaming": True}]})
    assert without(str(path), "training.output_dir=without") == 0
    del steps[:]
    assert main([str(path)]) == 0
    # None of its rows can be longer.
    assert steps[0].inputs["input_ids"].shape == (2, 128)
    assert steps[0].items == 2 * 127
    assert_same_runs(Path("run"), Path("without"))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_it_takes_the_longest_rows_and_gives_gradients_back(
    write_recipe: Write, steps: list[SimpleNamespace], packing: bool, accumulation: int
) -> None:
    path = write_recipe(
        training={
            "packing": packing,
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": 3,
            "max_steps": 1,
            "max_length": 150,
        }
    )
    assert main([str(path), "data.eval_fraction=0.1"]) == 0
    first, *others = steps
    assert len(others) == accumulation
    longest = sorted((row["input_ids"] for row in first.trainer.train_dataset), key=len, reverse=True)[:3]
    ids, mask = first.inputs["input_ids"], first.inputs.get("attention_mask")
    if packing:
        assert mask is None
        assert ids[0].tolist() == [token for row in longest for token in row]
    else:
        assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == longest
        assert ids.numel() > max(step.inputs["input_ids"].numel() for step in others)
    assert first.items == (first.inputs["labels"][:, 1:] != -100).sum()
    # Gradients are there before it where they are in most batches of the run.
    assert set(first.before) == ({None} if accumulation == 1 else {False})
    assert any(first.after)
    assert set(others[0].before) == {None}


def test_nothing_is_left_of_it(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the pass draws, counts and switches, a failed one too."""
    state: list[Any] = []
    begin, backward = MemoryCheck.on_train_begin, Accelerator.backward

    def left(trainer: Any) -> list[Any]:
        return [
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
            torch.get_rng_state().tolist(),
            [module.training for module in trainer.model_wrapped.modules()],
            [parameter.grad for parameter in trainer.model_wrapped.parameters()],
            copy.deepcopy(trainer._metrics),
            trainer._total_train_tokens,
        ]

    def watched(self: MemoryCheck, *args: Any, **kwargs: Any) -> None:
        self.trainer.model.eval()
        self.trainer._metrics["train"]["entropy"] = [1.5]
        self.trainer._total_train_tokens = 7
        state.append(left(self.trainer))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Accelerator, "backward", drawing)
            try:
                begin(self, *args, **kwargs)
            finally:
                state.append(left(self.trainer))

    def drawing(accelerator: Any, loss: Any) -> None:
        random.random(), np.random.rand(), torch.rand(1)
        backward(accelerator, loss)
        state.append("gradients")
        if fails:
            raise RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7340032 bytes.")

    monkeypatch.setattr(MemoryCheck, "on_train_begin", watched)
    fails = False
    assert main([str(write_recipe(training={"max_steps": 1}))]) == 0
    before, gradients, after = state
    assert gradients == "gradients"
    assert before == after
    del state[:]
    fails = True
    assert main([str(write_recipe(training={"output_dir": "other"}))]) == 2
    assert "torch asked for another 7 MiB, which are not available" in capsys.readouterr().err
    before, gradients, after = state
    assert before == after


# ---------------------------------------------------------------------------------------------------------------
# What does not fit


@pytest.mark.skipif(not STATM.exists(), reason="how much a process has mapped is read from Linux")
@pytest.mark.parametrize("size", [1, 4])
def test_memory_that_really_runs_out_is_told_with_three_settings(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The process may map 16 MiB more than before; the attention scores of one row in one layer have 64."""
    Path("rows.jsonl").write_text("".join(json.dumps({"text": "one two three " * 700}) + "\n" for _ in range(size)))
    path = write_recipe(
        model={"name_or_path": "random:gemma2"},
        data={"train": [{"path": "rows.jsonl", "format": "text"}], "deduplicate": False},
        training={"max_length": 2048, "per_device_train_batch_size": size},
    )
    measure = MemoryCheck._measure
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def limited(*args: Any, **kwargs: Any) -> Any:
        mapped = int(STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**24, hard))
        try:
            return measure(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    monkeypatch.setattr(MemoryCheck, "_measure", limited)
    assert main([str(path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    head, _, tail = last.partition("torch asked for another ")
    rows = "1 row" if size == 1 else f"{size} rows"
    assert head == f"error: the longest batch ({rows}, {size * 2048:,} tokens) does not fit into memory: "
    figure, _, tail = tail.partition(" MiB, which are not available. Write ")
    assert int(figure) >= 16
    smaller = "training.max_length: 1024, training.gradient_checkpointing: true"
    assert tail == (
        f"{smaller}, or a quantization section (load_in_4bit: true)"
        if size == 1
        else "training.per_device_train_batch_size: 2 with training.gradient_accumulation_steps: 2 (the same result), "
        + smaller.replace(", ", ", or ")
    )
    assert not Path("run/adapter_model.safetensors").exists()


def test_an_error_that_is_not_memory_stays_what_it_is(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(*args: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    with pytest.raises(RuntimeError, match="mat1"):
        main([str(write_recipe()), "--traceback"])


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which"
GIB = 2**30


class Card(SimpleNamespace):
    """A trainer on a card of 8 GiB with 5 free and 2 held, where a batch takes 1 GiB and a MiB for each token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lengths: list[int], size: int, **args: Any) -> None:
        device = SimpleNamespace(type="cuda")
        values = {
            "device": device,
            "optim": "adamw_torch",
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True,
            "packing": False,
            "auto_find_batch_size": False,
        }
        super().__init__(
            args=SimpleNamespace(**values | args),
            is_deepspeed_enabled=False,
            is_fsdp_enabled=False,
            _train_batch_size=size,
            train_dataset=datasets.Dataset.from_dict(
                {"input_ids": [[5] * n for n in lengths], "labels": [[5] * n for n in lengths]}
            ),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
            _get_collator_with_removed_columns=lambda collator: collator,
            accelerator=SimpleNamespace(num_processes=1, gather=lambda tensor: tensor),
            optimizer=SimpleNamespace(state={}),
            model=torch.nn.Linear(2, 2),
            model_wrapped=torch.nn.Linear(2, 2),
            measured=[],
            _metrics={},
            _total_train_tokens=0,
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 8 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(
            MemoryCheck, "_worst_rank", lambda self, need: (need, memory_check._available_bytes(device))
        )
        monkeypatch.setattr(MemoryCheck, "_measure", self.measure)

    def measure(self, rows: list[dict[str, Any]], accumulates: bool) -> tuple[int, int]:
        self.measured.append((len(rows), len(rows[0]["input_ids"]), accumulates))
        peak = GIB + 2**20 * len(rows) * len(rows[0]["input_ids"])
        if peak > 7 * GIB:
            raise torch.OutOfMemoryError(CUDA)
        return GIB, peak

    def told(self) -> str:
        lines: list[str] = []
        state = SimpleNamespace(is_world_process_zero=True)
        try:
            MemoryCheck(self, lines.append).on_train_begin(self.args, state, None)
        except RunError as error:
            return str(error)
        return lines[0]


def test_a_card_that_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, [100, 1024, 200, 900], 2, gradient_accumulation_steps=2)
    assert card.told() == "memory: the longest batch (2 rows, 2,048 tokens) takes 3.0 of 7.0 GiB"
    assert card.measured == [(2, 1024, True)]


def test_a_card_that_is_too_small_tells_by_how_much_from_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, [2048, 100, 2048, 100, 2048, 100, 2048], 4, gradient_accumulation_steps=3)
    assert card.told() == (
        "the longest batch (4 rows, 8,192 tokens) does not fit into memory: it needs about 9.0 GiB, 7.0 GiB are "
        "available: 2.0 GiB too much. Write training.per_device_train_batch_size: 2 with "
        "training.gradient_accumulation_steps: 6 (the same result), training.max_length: 1024, or a lora "
        "section (r: 16)"
    )
    assert card.measured == [(4, 2048, True), (1, 2048, True)]


def test_one_row_that_is_too_long_tells_it_from_its_half(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, [100, 7168], 1)
    assert "(1 row, 7,168 tokens) does not fit into memory: it needs about 8.0 GiB" in card.told()
    assert card.measured == [(1, 7168, False), (1, 3584, True)]


@pytest.mark.parametrize("why", ["not even half of it fits", "other ranks would wait"])
def test_where_nothing_more_can_be_measured_it_tells_what_torch_asked_for(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    card = Card(monkeypatch, [16384] if why.startswith("not") else [7168], 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1.2 * GIB, 8 * GIB))
    if why.startswith("other"):
        card.accelerator.num_processes = 2
    expected = "torch asked for 2.5 GiB where 1.2 GiB were free: at least 1.3 GiB too much. Write "
    assert expected in card.told()
    assert len(card.measured) == (2 if why.startswith("not") else 1)


def test_what_the_optimizer_will_add_counts_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "optimizer_bytes", lambda optim, weights: 5 * GIB)
    card = Card(monkeypatch, [2048], 1)
    assert "it needs about 8.0 GiB, 7.0 GiB are available: 1.0 GiB too much" in card.told()
    card.optimizer.state = {"a parameter": {"exp_avg": 0}}
    assert card.told() == "memory: the longest batch (1 row, 2,048 tokens) takes 3.0 of 7.0 GiB"


def test_a_search_for_the_batch_size_gets_the_error_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: Any, **kwargs: Any) -> None:
        torch.rand(random.randrange(1, 9))
        raise torch.OutOfMemoryError(CUDA)

    card = Card(monkeypatch, [7168], 1, auto_find_batch_size=True)
    monkeypatch.setattr(MemoryCheck, "_measure", measure)
    before = random.getstate(), torch.get_rng_state().tolist()
    with pytest.raises(torch.OutOfMemoryError):
        card.told()
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("where", ["lomo", "adalomo", "galore_adamw_layerwise", "xla", "deepspeed"])
def test_no_memory_check_where_the_backward_pass_could_not_be_taken_back(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    card = Card(monkeypatch, [100], 1)
    if where == "xla":
        card.args.device.type = where
    elif where == "deepspeed":
        card.is_deepspeed_enabled = True
    else:
        card.args.optim = where
    MemoryCheck(card, pytest.fail).on_train_begin(card.args, None, None)
    assert card.measured == []


# ---------------------------------------------------------------------------------------------------------------
# Figures and words


@pytest.mark.parametrize(
    ("error", "free", "told"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)",
            None,
            "torch asked for another 3.0 GiB, which are not available",
        ),
        (CUDA, 2 * GIB, "torch asked for 2.5 GiB where 2.0 GiB were free: at least 512 MiB too much"),
        (CUDA, 3 * GIB, "torch asked for another 2.5 GiB, which are not available"),  # in pieces, or not to be used up
        ("Tried to allocate 20.00 MiB.", 0, "torch asked for 20 MiB where 1 MiB were free: at least 20 MiB too much"),
        ("CUDA error: out of memory\nmore", 1, "torch says CUDA error: out of memory"),
        ("", None, "torch says no more"),
    ],
)
def test_what_is_known_of_an_allocation_that_failed(error: str, free: int | None, told: str) -> None:
    assert shortfall(error, free) == told


@pytest.mark.parametrize(
    ("args", "lora", "quantised", "expected"),
    [
        ((6, 2, False, False), True, False, ["batch: 3 steps: 4", "length", "checkpointing"]),
        ((9, 1, False, False), True, False, ["batch: 3 steps: 3", "length", "checkpointing"]),
        ((2, 1, True, True), True, False, ["batch: 1 steps: 2", "length", "packing"]),
        ((1, 1, False, True), True, False, ["length", "checkpointing", "packing"]),
        ((1, 1, False, False), False, False, ["length", "checkpointing", "a lora section"]),
        ((1, 1, True, False), False, False, ["length", "a lora section", "a smaller model"]),
        ((1, 1, True, False), True, False, ["length", "a quantization section", "a smaller model"]),
        ((1, 1, True, False), True, True, ["length", "a smaller model", "fewer lora.target_modules"]),
    ],
)
def test_there_are_always_three_settings_that_are_not_in_use(
    args: tuple[int, int, bool, bool], lora: bool, quantised: bool, expected: list[str]
) -> None:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "packing")
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    if lora:
        model = peft.PeftModel(model, peft.LoraConfig(target_modules=["0"]))
    model.is_quantized = quantised
    found = smaller_settings(SimpleNamespace(**dict(zip(names, args, strict=True))), model, 301)
    full = {
        "length": "training.max_length: 150",
        "checkpointing": "training.gradient_checkpointing: true",
        "packing": "training.packing: false",
        "a lora section": "a lora section (r: 16)",
        "a quantization section": "a quantization section (load_in_4bit: true)",
        "a smaller model": "a smaller model.name_or_path",
    }
    assert found == [
        full.get(
            text,
            text.replace("batch:", "training.per_device_train_batch_size:").replace(
                " steps:", " with training.gradient_accumulation_steps:"
            )
            + " (the same result)" * text.startswith("batch"),
        )
        for text in expected
    ]


def test_the_estimate_is_what_adam_keeps() -> None:
    weights = [torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    optimizer = torch.optim.AdamW(weights)
    sum(weight.float().sum() for weight in weights).backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert optimizer_bytes("adamw_torch_fused", weights) == sum(tensor.nbytes for tensor in kept) == 32800
    assert optimizer_bytes("adamw_bnb_8bit", weights) == 2 * (4096 + 8)
    assert optimizer_bytes("adamw_torch_4bit", weights) == 4096 + 8
    for nothing in ("sgd", "adafactor", "paged_adamw_8bit", "galore_adamw"):
        assert optimizer_bytes(nothing, weights) == 0
