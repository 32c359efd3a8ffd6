"""Tiny seeded models with a tokenizer that is trained on the sample rows, for tests and smoke runs."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.data.samples import sample_rows
from finetune.data.template import load_template
from finetune.system.terminal import quiet

# Both kinds of attention layers, and a window that is shorter than ordinary rows.
_PATTERN: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 32,
}
# The last two layers reuse the keys and values of the first two, and each layer reads an embedding of its own.
_PER_LAYER = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "final_logit_softcapping": 30.0}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": _PATTERN | {"query_pre_attn_scalar": 16},
    "gemma3": _PATTERN | {"query_pre_attn_scalar": 16},
    "gemma3n": _PATTERN | _PER_LAYER | {"laurel_rank": 8, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gemma4": _PATTERN | _PER_LAYER | {"global_head_dim": 32, "use_double_wide_mlp": True},
    "gemma4_moe": _PATTERN
    | {"hidden_size_per_layer_input": 0, "global_head_dim": 32, "num_global_key_value_heads": 1}
    | {"attention_k_eq_v": True, "final_logit_softcapping": 30.0}
    | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "llama": {},
}
_MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_moe": "gemma4_text",
}
_TEMPLATES = {"llama": "chatml", "gemma": "gemma", "gemma2": "gemma"}


def random_fingerprint(architecture: str) -> str:
    """A hash of what a random model is made from: this file, the sample rows and the chat template.

    A model that another release has cached, with another template, is not used again.

    Args:
        architecture: One of `RANDOM_ARCHITECTURES`.
    """
    parts = Path(__file__).read_bytes(), sample_rows().read_bytes(), _template(architecture).encode()
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _template(architecture: str) -> str:
    return load_template(_TEMPLATES.get(architecture, "gemma3"))


def make_random(architecture: str, into: Path) -> None:
    """Saves a seeded model of two or four layers, and a byte-level BPE tokenizer that is trained on the sample rows.

    Args:
        architecture: One of `RANDOM_ARCHITECTURES`.
        into: The folder to save to.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in sample_rows().read_text(encoding="utf-8").splitlines()]
    backend = _train_tokenizer([m["content"] for row in rows for m in row["messages"]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = _template(architecture)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    } | copy.deepcopy(_ARCHITECTURES[architecture])
    if shape.get("hidden_size_per_layer_input"):
        shape["vocab_size_per_layer_input"] = len(tokenizer)
    config = AutoConfig.for_model(_MODEL_TYPES.get(architecture, architecture), **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Norms and scales as if trained: a test must notice one that is left out.
        from_zero = architecture in ("gemma", "gemma2", "gemma3")  # these add 1 to the weights of their norms
        for name, tensor in model.state_dict().items():
            if "norm" in name or name.endswith(("scale", "layer_scalar")):
                torch.nn.init.normal_(tensor, 0.0 if from_zero else 1.0, 0.1)
    with quiet():
        model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of 1,024 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    turn_tokens = ["<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", *turn_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer
