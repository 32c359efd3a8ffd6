"""Tiny seeded models with a tokenizer that is trained on the sample rows, for tests and smoke runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.data.samples import sample_rows
from finetune.data.template import load_template
from finetune.system.terminal import quiet

RANDOM_ARCHITECTURES = ("gemma", "gemma2", "gemma3", "llama")


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
    tokenizer.chat_template = load_template("chatml" if architecture == "llama" else architecture.replace("2", ""))
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
    }
    if architecture in ("gemma2", "gemma3"):
        # Both kinds of attention layers, and a window that is shorter than ordinary rows.
        shape |= {"query_pre_attn_scalar": 16, "sliding_window": 32, "num_hidden_layers": 4}
        shape["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = AutoConfig.for_model("gemma3_text" if architecture == "gemma3" else architecture, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Norms as if trained: a test must notice one that is left out.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, 0.0 if "gemma" in architecture else 1.0, 0.1)
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
