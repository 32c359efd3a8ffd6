"""The tensors that llama.cpp has for a model family: names, shapes, and how their values are converted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from numpy.typing import NDArray

from finetune.system.errors import ExportError

# The model_type of a config, and llama.cpp's architecture for it.
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma3n": "gemma3n",
    "gemma3n_text": "gemma3n",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
# Vectors of Gemma 4's router, which gguf's table lacks.
_SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
_BIAS_KEYS = {"attn": "attention_bias", "ffn": "mlp_bias"}
# The prefixes of a text model's names in checkpoints, old and new, with a vision tower or without.
_PREFIX = re.compile(r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?(.+)")
_NOT_TEXT = re.compile(
    r"(?:model\.)?(?:vision_tower|multi_modal_projector|vision_model|audio_tower|embed_vision|embed_audio)\.|.*\.rotary_emb\.inv_freq$"
)


def checked_model_type(config: dict[str, Any]) -> str:
    """The model_type of the text model that a config.json describes, one of `ARCHITECTURES`.

    Raises:
        ExportError: It is another one.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ExportError(f"GGUF: a model of type {kind} is not written; known are {', '.join(sorted(ARCHITECTURES))}")
    return str(kind)


def gguf_names(config: dict[str, Any]) -> Callable[[str], str | None]:
    """A function from a tensor's name, on disk or in memory, to llama.cpp's; None for no tensor of the text model.

    Each matrix of Gemma 3n's stacked AltUp projections has a name of its own (`altup_proj.0.weight`).

    Raises:
        ExportError: The config is of another family, or, when the function is called, llama.cpp has no such tensor.
    """
    model_type = checked_model_type(config)
    architectures = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    text = config.get("text_config") or config
    # From this layer on keys and values are those of an earlier one; transformers ignores weights for their own.
    shared = int(text.get("num_kv_shared_layers") or 0)
    first_shared = int(text["num_hidden_layers"]) - shared if shared else math.inf
    # The names of one layer do for all.
    known = get_tensor_name_map(architectures[ARCHITECTURES[model_type]], 1)

    def gguf_name(name: str) -> str | None:
        if _NOT_TEXT.match(name):
            return None
        match = _PREFIX.fullmatch(name)
        inner = match[1] if match else ""
        layer = re.match(r"layers\.(\d+)\.", inner)
        if layer and int(layer[1]) >= first_shared and re.match(r"self_attn\.[kv]_", inner[layer.end() :]):
            return None
        # gguf's table has no output layer for Gemma and Gemma 2, whose checkpoints may hold a copy of the embedding.
        if inner in ("lm_head.weight", "lm_head.bias"):
            return inner.replace("lm_head", "output")
        plain = "model." + (f"layers.0.{inner[layer.end() :]}" if layer else inner)
        if layer and (scale := _SCALES.get(inner[layer.end() :])):
            return f"blk.{layer[1]}.{scale}"
        if stacked := re.fullmatch(r"(altup_(?:unembed_)?projections)\.(\d)\.weight", inner):
            return f"{known.get_name(f'model.{stacked[1]}')}.{stacked[2]}.weight"
        found = known.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found and not plain.endswith((".weight", ".bias")):
            found += ".weight"
        if found is None or not found.endswith((".weight", ".bias")):
            raise ExportError(f"GGUF: llama.cpp has no place for {name} in a model of type {model_type}")
        return f"blk.{layer[1]}.{found.removeprefix('blk.0.')}" if layer else found

    return gguf_name


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a text model's tensors, by llama.cpp's names.

    `rope_freqs.weight` is not among them: it is in no checkpoint.

    Args:
        config: The text model's config, as transformers reads it.
    """
    if config.model_type == "gemma4_text":
        return _gemma4_shapes(config)
    if config.model_type == "gemma3n_text":
        return _gemma3n_shapes(config)
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
    biased = ["attn_q", "attn_k", "attn_v"]
    if kind != "qwen2":
        parts = [part for part in ("attn", "ffn") if getattr(config, _BIAS_KEYS[part], False)]
        biased = [name for name in linear if name.split("_")[0] in parts]
    norms = {"attn_norm": hidden, "ffn_norm": hidden}
    if kind in ("gemma2", "gemma3_text"):
        norms |= {"post_attention_norm": hidden, "post_ffw_norm": hidden}
    if kind in ("gemma3_text", "qwen3"):
        norms |= {"attn_q_norm": size, "attn_k_norm": size}
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    layer |= {f"{name}.bias": linear[name][:1] for name in biased}
    layer |= {f"{name}.weight": (length,) for name, length in norms.items()}
    found = _outer_shapes(config)
    for number in range(config.num_hidden_layers):
        found |= {f"blk.{number}.{name}": shape for name, shape in sorted(layer.items())}
    return found


def _outer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors around the layers."""
    table = (config.vocab_size, config.hidden_size)
    return {"output.weight": table, "output_norm.weight": table[1:], "token_embd.weight": table}


def _gemma4_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """As `expected_shapes`: heads, their keys and values, and the MLP differ by layer."""
    hidden, per_layer, experts = config.hidden_size, config.hidden_size_per_layer_input, config.num_experts
    found = _outer_shapes(config)
    if per_layer:
        packed = config.num_hidden_layers * per_layer
        found["per_layer_model_proj.weight"] = (packed, hidden)
        found["per_layer_proj_norm.weight"] = (per_layer,)
        found["per_layer_token_embd.weight"] = (config.vocab_size_per_layer_input, packed)
    modes = config.kv_sharing_modes
    for number, (own, kind) in enumerate(zip(config.per_layer_config, config.layer_types, strict=True)):
        shared = modes[number] == "reuse"
        queries, keys = own.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim
        inner = own.intermediate_size * (2 if shared and config.use_double_wide_mlp else 1)
        norms = ["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"]
        layer: dict[str, tuple[int, ...]] = {
            "attn_q": (queries, hidden),
            "attn_q_norm": (own.head_dim,),
            "attn_output": (hidden, queries),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
            "layer_output_scale": (1,),
        }
        if not shared:
            layer |= {"attn_k": (keys, hidden), "attn_k_norm": (own.head_dim,)}
        if not shared and not (config.attention_k_eq_v and kind == "full_attention"):
            layer["attn_v"] = (keys, hidden)
        if per_layer:
            layer |= {"inp_gate": (per_layer, hidden), "proj": (hidden, per_layer)}
            norms.append("post_norm")
        if config.enable_moe_block:
            narrow = own.moe_intermediate_size
            layer |= {
                "ffn_gate_inp": (experts, hidden),
                "ffn_gate_up_exps": (experts, 2 * narrow, hidden),
                "ffn_down_exps": (experts, hidden, narrow),
            }
            norms += ["pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"]
            found |= {f"blk.{number}.ffn_gate_inp.scale": (hidden,), f"blk.{number}.ffn_down_exps.scale": (experts,)}
        layer |= dict.fromkeys(norms, (hidden,))
        found |= {f"blk.{number}.{name}.weight": shape for name, shape in sorted(layer.items())}
    return found


# Gemma 3n's AltUp has four inputs, of which the first needs no projection.
_ALTUP = 4
STACKED = {
    f"{name}.weight": [f"{name}.{number}.weight" for number in range(_ALTUP - 1)]
    for name in ("altup_proj", "altup_unembd_proj")
}


def unread_tensors(config: Any) -> set[str]:
    """The names of Gemma 3n's keys and values of layers that share those of others: llama.cpp loads, and reads not."""
    if config.model_type != "gemma3n_text":
        return set()
    shared = [number for number, mode in enumerate(config.kv_sharing_modes) if mode == "reuse"]
    return {f"blk.{number}.{part}.weight" for number in shared for part in ("attn_k", "attn_v", "attn_k_norm")}


def _gemma3n_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """As `expected_shapes`. Layers that share keys and values have weights for their own too, which nobody reads."""
    hidden, per_layer, inner = config.hidden_size, config.hidden_size_per_layer_input, config.intermediate_size[0]
    packed = config.num_hidden_layers * per_layer
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "post_norm", "laurel_post_norm")
    layer: dict[str, tuple[int, ...]] = dict.fromkeys((*norms, "altup_router_norm", "altup_correct_scale"), (hidden,))
    layer |= {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "attn_q_norm": (config.head_dim,),
        "attn_k_norm": (config.head_dim,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "inp_gate": (per_layer, hidden),
        "proj": (hidden, per_layer),
        "laurel_l": (config.laurel_rank, hidden),
        "laurel_r": (hidden, config.laurel_rank),
        "altup_router": (_ALTUP, hidden),
        "altup_correct_coef": (_ALTUP, _ALTUP),
        "altup_predict_coef": (_ALTUP**2, _ALTUP),
    }
    found = _outer_shapes(config) | {
        "per_layer_token_embd.weight": (config.vocab_size, packed),
        "per_layer_model_proj.weight": (packed, hidden),
        "per_layer_proj_norm.weight": (per_layer,),
        "altup_proj.weight": (_ALTUP - 1, hidden, hidden),
        "altup_unembd_proj.weight": (_ALTUP - 1, hidden, hidden),
    }
    for number in range(config.num_hidden_layers):
        found |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
    return found


def head_dim(config: Any) -> int:
    """The size of an attention head; the first layer's where layers differ."""
    config = config.per_layer_config[0]
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def converted_values(name: str, rows: NDArray[np.float32], config: Any) -> NDArray[np.float32]:
    """Values as llama.cpp computes with them: 1 is added to Gemma 1 to 3's norms, Llama's rotated pairs are neighbours.

    transformers rotates the number i of a head with i + half of the head, llama.cpp's `llama` 2i with 2i + 1.

    Args:
        name: llama.cpp's name for the tensor.
        rows: The tensor or some of its rows; attn_q and attn_k come in whole heads.
        config: The text model's config.
    """
    kind = config.model_type
    if kind in ("gemma", "gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return rows + np.float32(1)
    if ARCHITECTURES[kind] == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
        rest = rows.shape[1:]
        return rows.reshape(-1, 2, head_dim(config) // 2, *rest).swapaxes(1, 2).reshape(-1, *rest)
    return rows
