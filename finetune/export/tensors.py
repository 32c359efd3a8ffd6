"""Which tensors llama.cpp knows of a model family: their names, and what is done to their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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


class GGUFError(ValueError):
    """A model that cannot be written as GGUF, or not as asked."""


def family(config: dict[str, Any]) -> str:
    """The model_type of the text model that a config.json describes, one of `ARCHITECTURES`.

    Raises:
        GGUFError: It is another one.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise GGUFError(
            f"GGUF: a model of type {kind} is not written; known are {', '.join(sorted(ARCHITECTURES))}"
        )
    return str(kind)


def names(config: dict[str, Any]) -> Callable[[str], str | None]:
    """What turns the name of a tensor, on disk or in memory, into llama.cpp's; None is no tensor of the text model.

    Raises:
        GGUFError: The family of the config, or, when it is called, the tensor is unknown.
    """
    kind = family(config)
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
        raise GGUFError(f"GGUF: llama.cpp has no place for {name} in a model of type {kind}")

    return translate
