"""The token head against trl's head and against the model's own loss."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune.train import loss
from finetune.train.loss import use_token_head

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": None},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "qwen2": {"tie_word_embeddings": False},
}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 0.0 if "norm" not in name or "gemma" in family else 1.0, 0.3)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(False)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 96, (3, 12), generator=generator)
    labels = ids.clone()
    labels[0, :7] = -100
    labels[1, 3:9] = -100
    labels[2, 2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tile", [96 * 4, 2**25], ids=["tiles of four", "one tile"])
def test_equals_trl_and_the_model_itself(family: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_TILE", tile)
    model, inputs = model_of(family), batch()
    theirs = model(**inputs, fused_lm_head=True)
    (-theirs.log_probs.sum() / 17).backward()
    their_gradients = gradients(model)
    own = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"])

    assert use_token_head(model)
    ours = model(**inputs, fused_lm_head=True)
    (-ours.log_probs.sum() / 17).backward()
    our_gradients = gradients(model)

    # Scores are float32 in both heads whatever the model computes in: 1e-5 is their rounding, ten times over.
    tight = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, **tight)
    torch.testing.assert_close(ours.entropy, theirs.entropy, **tight)
    assert torch.equal(ours.is_top1, theirs.is_top1.bool())
    assert torch.equal(ours.label_mask, theirs.label_mask)
    torch.testing.assert_close(ours.loss.double(), own.loss.double(), **tight)
    assert our_gradients.keys() == their_gradients.keys() != set()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(
            gradient, their_gradients[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_batch_without_labels_is_a_differentiable_zero() -> None:
    model, inputs = model_of("llama"), batch()
    use_token_head(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out = model(**inputs, fused_lm_head=True)
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.13's compiler asks for it
def test_steps_of_a_compiled_model() -> None:
    inputs, found = batch(), []
    for compiled in (False, True):
        model = model_of("gemma2")
        use_token_head(model, compiled=compiled)
        run = torch.compile(model, backend="eager") if compiled else model
        for _ in range(2):
            run(**inputs, fused_lm_head=True).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], rtol=1e-12, atol=1e-12)


def test_plain_forward_and_generate_are_untouched() -> None:
    model, inputs = model_of("gemma2").eval(), batch()
    before = model(input_ids=inputs["input_ids"]).logits
    greedy = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **greedy)
    use_token_head(model)
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, before)
    again = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **greedy)
    assert torch.equal(again, answer)


def test_a_trained_output_layer_is_left_to_trl() -> None:
    model = model_of("llama")
    model.get_output_embeddings().weight.requires_grad_(True)
    forward = model.forward
    assert not use_token_head(model)
    assert model.forward == forward
