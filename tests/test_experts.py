"""Models with experts: their router's loss is trained, and its logits are asked for nowhere else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.cli.commands import main
from finetune.model.load_generator import load_generator
from finetune.model.locate import locate

Write = Callable[..., Path]
ROWS = Path(__file__).parents[1] / "data" / "chat_sample.jsonl"
SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., str]:
    def make(kind: str, **values: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(locate("random:llama"))
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        torch.manual_seed(0)
        shape = SHAPE | KINDS[kind] | {"vocab_size": len(tokenizer)} | ids | values
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
        for folder in (model, tokenizer):
            folder.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_model_with_experts_is_sampled_saved_and_answers(
    kind: str, lora: bool, base: Callable[..., str], write_recipe: Write
) -> None:
    path = write_recipe(
        model={"name_or_path": base(kind)},
        lora={} if lora else None,
        data={"train": [{"path": str(ROWS)}], "eval_fraction": 0.1},
        training={"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "save_strategy": "steps", "save_steps": 1},
        evaluate={"max_new_tokens": 4},
    )
    assert main(["train", str(path)]) == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [record["aux_loss"] > 0 for record in records if "loss" in record] == [True]  # it is trained
    assert len(Path("run/samples.jsonl").read_text().splitlines()) == 4
    if not lora:
        for folder in ("run", "run/checkpoint-1"):
            saved = json.loads(Path(folder, "config.json").read_text())
            original = json.loads(Path(kind, "config.json").read_text())
            names = ("output_router_logits", "router_aux_loss_coef")
            assert [saved[name] for name in names] == [original[name] for name in names]
    prompts = [[5, 6, 7], [8]]
    assert [len(answer) > 0 for answer in load_generator("run").answers(prompts, 2)] == [True, True]
    if kind == "mixtral":
        assert main(["evaluate", "run", "--limit", "2"]) == 0


def test_a_config_that_asks_for_its_router_answers_too(base: Callable[..., str]) -> None:
    generator = load_generator(base("mixtral", output_router_logits=True))
    assert len(generator.answers([[5, 6, 7], [8]], 2)) == 2
    assert generator.model.config.output_router_logits is True
