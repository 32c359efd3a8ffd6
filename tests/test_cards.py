"""FLOPs per token against torch's count of a real step; a GPU's utilisation and energy in the records."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.cli.commands import main
from finetune.model import flops
from finetune.system import devices
from finetune.train.meter import Meter

Write = Callable[..., Path]
SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 6,
    "pad_token_id": 0,
}
MLA = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "kv_lora_rank": 8, "q_lora_rank": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {},
    "qwen3": {},
    "phi3": {},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": MLA | {"first_k_dense_replace": 4, "num_key_value_heads": 4, "head_dim": 8},
}


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZE | KINDS[kind])
    config._attn_implementation = config._experts_implementation = "eager"  # of other ways torch counts little
    return AutoModelForCausalLM.from_config(config)


def counted(model: Any, rows: int, length: int) -> int:
    """torch's count of a forward and a backward pass in which each token scores, and attention's share of it."""
    model.enable_input_require_grads()  # else the first layer leaves out a gradient that only it does
    ids = torch.randint(1, SIZE["vocab_size"], (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("way", ["full", "lora", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_work_is_what_torch_counts(kind: str, way: str) -> None:
    model = tiny(kind)
    if way != "full":
        last = {"modules_to_save": ["lm_head"]} if way == "head" and not model.config.tie_word_embeddings else {}
        model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*self_attn.*(proj|proj_with_mqa)", **last))
    rows, length = 2, 5  # within the window
    work = flops.flops_per_token(model, {length: rows})
    # Eager attention computes the whole square, of which a row needs what lies before each token.
    square = flops._attention(model.config, {length: rows}) * (2 * length / (length + 1) - 1)
    # Its rotations' angles are a product of matrices too, as torch sees it; nobody learns through them.
    expected = (work + square) * rows * length
    assert counted(model, rows, length) == pytest.approx(expected, rel=0.01)


def test_tokens_look_back_as_far_as_their_layer_does() -> None:
    assert [flops._pairs(length, 4) for length in (1, 3, 4, 6)] == [1, 6, 10, 10 + 2 * 4]
    kinds = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model("gemma3_text", **SIZE | {"num_hidden_layers": 2, "layer_types": kinds})
    per_pair = 6 * 4 * 2 * 16  # three times a product with keys and one with values, of four heads of 16
    assert flops._attention(config, {10: 3}) == per_pair * (flops._pairs(10, 6) + flops._pairs(10, 10)) / 10


def test_only_scored_tokens_cost_the_output_layer() -> None:
    model = tiny("llama")
    every, few = (flops.flops_per_token(model, {8: 1}, share) for share in (1.0, 0.25))
    assert every - few == 0.75 * 6 * SIZE["vocab_size"] * SIZE["hidden_size"]


def test_experts_that_cannot_be_told_give_no_figure() -> None:
    model = tiny("mixtral")
    model.config.num_experts_per_tok = 0
    assert flops.flops_per_token(model, {8: 1}) == 0


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A10G", "a10"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-40"),  # as fast
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_a_gpu_is_known_by_the_drivers_name(driver: str, name: str | None) -> None:
    found = devices.known_gpu(driver)
    assert (found and found.name) == name


def test_a_record_has_the_utilisation_of_the_gpu(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU stands in for a known GPU, and a counter for that of its driver."""
    joules = iter(range(0, 10**9, 3_600_000))
    monkeypatch.setattr(
        devices,
        "this_machine",
        lambda free=False: devices.Hardware("this CPU", 2**40, devices.Device(), tflops_32bit=0.001),
    )
    monkeypatch.setattr("finetune.train.meter.energy_millijoules", lambda: next(joules))
    held: list[Meter] = []
    meter_of = Meter.of
    monkeypatch.setattr(Meter, "of", lambda *of: held.append(meter_of(*of)) or held[-1])
    path = write_recipe(training={"max_steps": 2, "logging_steps": 1})
    assert main(["train", str(path)]) == 0
    records = [r for r in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines()) if "loss" in r]
    assert held[0].flops_per_token > 0
    assert held[0].flops_per_second == 1e9
    for record in records:
        share = record["tokens_per_second"] * held[0].flops_per_token / 1e9
        assert record["mfu"] == pytest.approx(share, rel=1e-3)
    assert [r["energy_wh"] for r in records] == [1, 2]
    report = Path("run/README.md").read_text()
    assert "- energy of the GPUs: 2.00 Wh" in report


def test_energy_is_the_drivers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.energy_millijoules() == 0  # no GPU, no figure
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_get_pynvml_handler", lambda: "gpu 0")
    library = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption={"gpu 0": 7}.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert devices.energy_millijoules() == 7
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 1 / 0  # a GPU that counts none
    assert devices.energy_millijoules() == 0
