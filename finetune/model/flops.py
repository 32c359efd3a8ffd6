"""The floating point operations of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.model.attach import base_of
from finetune.model.compatibility import non_text_modules

# The names that configs have for the number of a model's experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def flops_per_token(model: Any, lengths: Mapping[int, int], scored: float = 1.0) -> float:
    """The floating point operations of a training step per token: forward and backward, without recomputation.

    Each weight that multiplies the token counts 2, the gradient of its input 2, and the gradient of the weight itself 2
    if it is trained; attention counts the same for each token that is attended to. This is the numerator of model FLOPs
    utilisation (MFU), except that frozen weights count only what they cost and that attention is causal. Only matrix
    products are counted: no scans of state space models, unpacking of 4-bit weights, token rows or norms.

    Args:
        model: The model with its adapter, in one process with unsharded weights.
        lengths: The number of rows of each length in tokens.
        scored: The share of the tokens whose logits are computed.

    Returns:
        The number; 0 if the number of a model's experts is unknown.

    Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    import torch

    base = base_of(model)
    skipped = tuple(f".{name}." for name in non_text_modules(base))
    head = {id(p) for p in base.get_output_embeddings().parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    config = base.config.get_text_config()
    active = _active_share(config)
    flops = 0.0
    for name, parameter in model.named_parameters():
        unused = "original_module." in name or "lora_embedding_A" in name or "trainable_tokens" in name
        if parameter.ndim < 2 or unused or any(part in f".{name}" for part in skipped):
            continue
        # A 4-bit weight is stored as one flat tensor.
        state = getattr(parameter, "quant_state", None)
        count = float(state.shape.numel() if state is not None else parameter.numel())
        if id(parameter) in head:
            count *= scored
        elif id(parameter) in tables:
            continue
        elif ".experts." in name:
            if not active:
                return 0.0
            count *= active
        flops += count * (6 if parameter.requires_grad else 4)
    return flops + _attention(config, lengths)


def first_number(config: Any, *names: str) -> int:
    """The first of a config's values that is neither missing nor 0; 0 if there is none."""
    return next((value for name in names if (value := getattr(config, name, None))), 0)


def _active_share(config: Any) -> float:
    """The share of a model's experts that each token is routed to; 0 if it is unknown."""
    experts = first_number(config, *EXPERT_COUNTS)
    active = first_number(config, "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")
    return active / experts if experts else 0.0


def _attention(config: Any, lengths: Mapping[int, int]) -> float:
    """The operations per token of attention in all layers: queries times keys, and attention weights times values."""
    tokens = sum(length * rows for length, rows in lengths.items())
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    longest, window = max(lengths, default=0), getattr(config, "sliding_window", None)
    flops = 0.0
    for kind, layer in zip(kinds, config.per_layer_config, strict=True):
        if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
            continue
        reach = (window if kind == "sliding_attention" else None) or longest
        pairs = sum(rows * _pairs(length, reach) for length, rows in lengths.items())
        flops += 6 * _attention_width(layer) * pairs / max(1, tokens)
    return flops


def _attention_width(layer: Any) -> int:
    """The width of all heads' keys and values together; `layer` is the config of one layer."""
    heads = getattr(layer, "num_attention_heads", 0)
    if getattr(layer, "v_head_dim", None) and getattr(layer, "qk_nope_head_dim", None):
        return int(heads * (layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim))
    return int(2 * heads * (getattr(layer, "head_dim", None) or layer.hidden_size // max(1, heads)))


def _pairs(length: int, window: int) -> int:
    """The number of pairs of tokens in a row of which the later attends to the earlier or to itself."""
    short = min(length, window)
    return short * (short + 1) // 2 + (length - short) * window
