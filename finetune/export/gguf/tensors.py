"""Which tensors llama.cpp knows of a model family: their names, and what is done to their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.system.errors import ExportError

# model_type of a config, and the architecture under which llama.cpp computes it.
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Where there are four norms a layer, the second one has another place.
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TEXT = re.compile(r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?(.+)")
_BESIDE = re.compile(
    r"(?:model\.)?(?:vision_tower|multi_modal_projector|vision_model)\.|.*\.rotary_emb\.inv_freq$"
)


def checked_model_type(config: dict[str, Any]) -> str:
    """The model_type of the text model that a config.json describes, one of `ARCHITECTURES`.

    Raises:
        GGUFError: It is another one.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"GGUF: a model of type {kind} is not written; known are {', '.join(sorted(ARCHITECTURES))}"
        )
    return str(kind)


def gguf_names(config: dict[str, Any]) -> Callable[[str], str | None]:
    """What turns the name of a tensor, on disk or in memory, into llama.cpp's; None is no tensor of the text model.

    Raises:
        GGUFError: The family of the config, or, when it is called, the tensor is unknown.
    """
    kind = checked_model_type(config)
    inner = _INNER | (_FOUR_NORMS if kind.startswith(("gemma2", "gemma3")) else {})

    def translate(name: str) -> str | None:
        if _BESIDE.match(name):
            return None
        found = _TEXT.fullmatch(name)
        stem, _, end = (found[1] if found else "").rpartition(".")
        if end in ("weight", "bias"):
            if stem in _OUTER:
                return f"{_OUTER[stem]}.{end}"
            layer = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
            if layer and layer[2] in inner:
                return f"blk.{layer[1]}.{inner[layer[2]]}.{end}"
        raise ExportError(f"GGUF: llama.cpp has no place for {name} in a model of type {kind}")

    return translate


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that llama.cpp wants of a text model, under its names, with the shapes that the config gives them.

    In llama.cpp's own order. `rope_freqs.weight` is not among them: it is in no checkpoint.

    Args:
        config: The text model's, as transformers reads it.
    """
    kind, hidden, inner = config.model_type, config.hidden_size, config.intermediate_size
    size = head_dim(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    linear = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    biased = (
        [name for name in linear if name.startswith("attn")]
        if getattr(config, "attention_bias", False)
        else []
    )
    biased += (
        [name for name in linear if name.startswith("ffn")] if getattr(config, "mlp_bias", False) else []
    )
    biased = ["attn_q", "attn_k", "attn_v"] if kind == "qwen2" else biased
    norms = {"attn_norm": hidden, "ffn_norm": hidden}
    if kind in ("gemma2", "gemma3_text"):
        norms |= {"post_attention_norm": hidden, "post_ffw_norm": hidden}
    if kind in ("gemma3_text", "qwen3"):
        norms |= {"attn_q_norm": size, "attn_k_norm": size}
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    layer |= {f"{name}.bias": linear[name][:1] for name in biased}
    layer |= {f"{name}.weight": (length,) for name, length in norms.items()}
    found: dict[str, tuple[int, ...]] = {
        "output.weight": (config.vocab_size, hidden),
        "output_norm.weight": (hidden,),
        "token_embd.weight": (config.vocab_size, hidden),
    }
    for number in range(config.num_hidden_layers):
        found |= {f"blk.{number}.{name}": shape for name, shape in sorted(layer.items())}
    return found


def head_dim(config: Any) -> int:
    """How many numbers an attention head has."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def converted_values(name: str, rows: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    """Numbers as llama.cpp wants them: Gemma's norms count from 1, and Llama's rotated pairs lie side by side.

    transformers rotates the number i of a head with i + half of the head, llama.cpp's `llama` 2i with 2i + 1.

    Args:
        name: As llama.cpp calls the tensor.
        rows: The tensor or some rows of it, of which attn_q and attn_k come in whole heads.
        config: The text model's.
    """
    kind = config.model_type
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return rows + np.float32(1)
    if ARCHITECTURES[kind] == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
        rest = rows.shape[1:]
        return rows.reshape(-1, 2, head_dim(config) // 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
    return rows
