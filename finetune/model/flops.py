"""Floating point operations that a training step takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.model.compatibility import non_text_modules


def flops_per_token(model: Any, lengths: Mapping[int, int], scored: float = 1.0) -> float:
    """Floating point operations that a step needs a token: forward and backward, nothing computed a second time.

    Two for each weight that the token is multiplied with, two more for the gradient of what went in, and two for the
    weight's own where it is trained; in attention as many for each token that it looks back at. It is what model FLOPs
    utilisation counts (Chowdhery et al. 2022, PaLM, appendix B), with the weights that stay frozen taken for what they
    cost, and each token looking back only as far as it does. Not counted: what is no product of matrices (scans of
    state space models), the unpacking of 4-bit weights, token rows and norms.

    Args:
        model: As it is trained, on one process: whole weights, its adapter on it.
        lengths: How many rows there are of each length in tokens.
        scored: The share of the tokens whose scores are computed.

    Returns:
        The number; 0 where a model's experts cannot be told.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    beside = tuple(f".{name}." for name in non_text_modules(base))
    head = {id(p) for p in base.get_output_embeddings().parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    config = base.config.get_text_config()
    active = _active(config)
    work = 0.0
    for name, parameter in model.named_parameters():
        unused = "original_module." in name or "lora_embedding_A" in name or "trainable_tokens" in name
        if parameter.ndim < 2 or unused or any(part in f".{name}" for part in beside):
            continue
        state = getattr(parameter, "quant_state", None)  # of a 4-bit weight, which is stored flat
        count = float(state.shape.numel() if state is not None else parameter.numel())
        if id(parameter) in head:
            count *= scored
        elif id(parameter) in tables:
            continue
        elif ".experts." in name:
            if not active:
                return 0.0
            count *= active
        work += count * (6 if parameter.requires_grad else 4)
    return work + _attention(config, lengths)


# How configs call the number of a model's experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def first_number(config: Any, *names: str) -> int:
    """The first of the numbers that a config has, and is not 0; 0 where it has none."""
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def _active(config: Any) -> float:
    """The share of a model's experts that a token meets; 0 where it cannot be told."""
    several = first_number(config, *EXPERT_COUNTS)
    chosen = first_number(config, "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")
    return chosen / several if several else 0.0


def _attention(config: Any, lengths: Mapping[int, int]) -> float:
    """The part of attention's scores and sums, of all its layers."""
    tokens = sum(length * rows for length, rows in lengths.items())
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    if getattr(config, "v_head_dim", None) and getattr(config, "qk_nope_head_dim", None):
        both = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        both = 2 * width
    work = 0.0
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
            continue
        window = (getattr(config, "sliding_window", None) if kind == "sliding_attention" else None) or max(
            lengths, default=0
        )
        pairs = sum(rows * _pairs(length, window) for length, rows in lengths.items())
        work += 6 * heads * both * pairs / max(1, tokens)
    return work


def _pairs(length: int, window: int) -> int:
    """How many tokens those of a row look at, each at itself and back."""
    short = min(length, window)
    return short * (short + 1) // 2 + (length - short) * window
