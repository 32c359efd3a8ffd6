"""Converts a model's config to GGUF metadata; refuses models that llama.cpp computes differently from transformers.

Source: llama.cpp, src/models/*.cpp and src/llama-model.cpp as of October 2026; transformers 5.23 for the configs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from gguf import Keys, RopeScalingType
from numpy.typing import NDArray

from finetune.export.gguf.tensors import ARCHITECTURES, checked_model_type, head_dim
from finetune.system.errors import ExportError

# Without a pattern in the file, llama.cpp gives each second or sixth layer full attention.
_FULL_ATTENTION_EVERY = {"gemma2": 2, "gemma3_text": 6}
# llama.cpp recognises models of 27B by their number of layers, and scales their scores by hidden_size / heads.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
_ACTIVATION = {"gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}
_ACTIVATION |= dict.fromkeys(("gemma3n_text", "gemma4_text"), "gelu_pytorch_tanh")
# llama.cpp computes Gemma 3n with these numbers, whatever the file says (src/models/gemma3n.cpp, src/llama-hparams.h).
_GEMMA3N = {
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "laurel_rank": 64,
    "hidden_size_per_layer_input": 256,
    "final_logit_softcapping": 30.0,
}
_OWN_KV_LAYERS_OF_3N = 20
_SPARSE_LAYERS_OF_3N, _SPARSITY_OF_3N = 10, 0.95


def read_config(model: Path) -> Any:
    """The text model's config of a checkpoint, as transformers reads it, old keys and new ones.

    Raises:
        ExportError: The config is missing, damaged, or of a family that cannot be written.
    """
    from transformers import AutoConfig

    from finetune.system.terminal import quiet

    file = model / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("no map of keys")
        checked_model_type(raw)
        with quiet():
            whole = AutoConfig.from_pretrained(model)
        config = whole.get_text_config()
        # transformers 5.23 ties by the outer config alone.
        config.tie_word_embeddings = whole.tie_word_embeddings
    except ExportError:
        raise
    except OSError as error:
        raise ExportError(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # each class of config checks itself in its own way
        why = " ".join(str(error).split())
        raise ExportError(f"{file} is damaged, or no config of a model: {why}") from error
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{file}: the weights are quantised (quantization_config); write a merged model in 16 bit")
    checked_model_type({"model_type": config.model_type})
    return config


def model_metadata(config: Any) -> dict[str, Any]:
    """The metadata of a GGUF file, without its tokenizer.

    Raises:
        ExportError: llama.cpp would compute something else than transformers does.
    """
    kind = config.model_type
    _check_computable(config)
    size = head_dim(config)
    groups = config.per_layer_config[0].num_key_value_heads
    found = {
        Keys.LLM.CONTEXT_LENGTH: _context_length(config),
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        Keys.LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        Keys.LLM.VOCAB_SIZE: config.vocab_size,
        Keys.Attention.HEAD_COUNT: config.num_attention_heads,
        Keys.Attention.HEAD_COUNT_KV: groups,
        Keys.Attention.KEY_LENGTH: size,
        Keys.Attention.VALUE_LENGTH: size,
        Keys.Attention.LAYERNORM_RMS_EPS: float(config.rms_norm_eps),
        Keys.Rope.DIMENSION_COUNT: size,
    }
    found |= _rope_metadata(config)
    if kind == "gemma4_text":
        found |= _gemma4_metadata(config)
    if kind == "gemma3n_text":
        found |= _gemma3n_metadata(config)
    if kind == "gemma2":
        found[Keys.LLM.ATTN_LOGIT_SOFTCAPPING] = float(config.attn_logit_softcapping)
    if kind in ("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text") and config.final_logit_softcapping:
        found[Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = float(config.final_logit_softcapping)
    if kind in _FULL_ATTENTION_EVERY and "sliding_attention" in config.layer_types:
        found[Keys.Attention.SLIDING_WINDOW] = config.sliding_window
    if kind in _FULL_ATTENTION_EVERY:
        slides = [layer == "sliding_attention" for layer in config.layer_types]
        usual = [(number + 1) % _FULL_ATTENTION_EVERY[kind] != 0 for number in range(len(slides))]
        # Programs that know no other pattern must not be given the usual one in words.
        if slides != usual and (kind == "gemma2" or any(slides)):
            found[Keys.Attention.SLIDING_WINDOW_PATTERN] = slides
    architecture = ARCHITECTURES[kind]
    return {key.format(arch=architecture): value for key, value in found.items()}


def _gemma4_metadata(config: Any) -> dict[str, Any]:
    """The metadata of heads, keys and values, MLP and experts, which differ by layer in Gemma 4."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    layers = config.per_layer_config
    # The last layer has full attention (transformers 5.23).
    sliding, full = layers[slides.index(True) if any(slides) else -1], layers[-1]
    found = {
        Keys.Attention.HEAD_COUNT_KV: [layer.num_key_value_heads for layer in layers],
        Keys.Attention.KEY_LENGTH: full.head_dim,
        Keys.Attention.VALUE_LENGTH: full.head_dim,
        Keys.Attention.KEY_LENGTH_SWA: sliding.head_dim,
        Keys.Attention.VALUE_LENGTH_SWA: sliding.head_dim,
        Keys.Attention.SHARED_KV_LAYERS: config.num_kv_shared_layers,
        Keys.Attention.SLIDING_WINDOW: config.sliding_window,
        Keys.Attention.SLIDING_WINDOW_PATTERN: slides,
        Keys.LLM.EMBD_LENGTH_PER_LAYER_INP: config.hidden_size_per_layer_input,
        Keys.Rope.DIMENSION_COUNT: full.head_dim,
        Keys.Rope.DIMENSION_COUNT_SWA: sliding.head_dim,
    }
    if config.use_double_wide_mlp:
        inner, modes = config.intermediate_size, config.kv_sharing_modes
        found[Keys.LLM.FEED_FORWARD_LENGTH] = [inner * (2 if mode == "reuse" else 1) for mode in modes]
    if config.enable_moe_block:
        found[Keys.LLM.EXPERT_COUNT] = config.num_experts
        found[Keys.LLM.EXPERT_USED_COUNT] = config.top_k_experts
        found[Keys.LLM.EXPERT_FEED_FORWARD_LENGTH] = config.moe_intermediate_size
    return found


def _gemma3n_metadata(config: Any) -> dict[str, Any]:
    """The keys of llama.cpp's conversion of Gemma 3n, of which llama.cpp reads the window alone; see `_GEMMA3N`."""
    sparsity = [NormalDist().inv_cdf(part) if part else -math.inf for part in config.activation_sparsity_pattern]
    return {
        Keys.LLM.FEED_FORWARD_LENGTH: config.intermediate_size[0],
        Keys.LLM.EMBD_LENGTH_PER_LAYER_INP: config.hidden_size_per_layer_input,
        Keys.LLM.ALTUP_ACTIVE_IDX: config.altup_active_idx,
        Keys.LLM.ALTUP_NUM_INPUTS: config.altup_num_inputs,
        Keys.LLM.ACTIVATION_SPARSITY_SCALE: sparsity,
        Keys.Attention.SHARED_KV_LAYERS: config.num_kv_shared_layers,
        Keys.Attention.SLIDING_WINDOW: config.sliding_window,
        Keys.Attention.SLIDING_WINDOW_PATTERN: [layer == "sliding_attention" for layer in config.layer_types],
    }


def rope_factors(config: Any) -> NDArray[np.float32] | None:
    """The divisors of each rotation frequency, float32 (head_dim / 2); None for models that have none.

    Those of a llama3 model are its scaling. Gemma 4's layers with full attention rotate a part of each head: the other
    frequencies are divided by so much that they do not rotate.
    """
    if config.model_type == "gemma4_text":
        half = config.per_layer_config[-1].head_dim // 2
        rotated = int(_full_attention_rope(config).get("partial_rotary_factor", 1.0) * half)
        return np.where(np.arange(half) < rotated, 1, 1e30).astype(np.float32)
    if _full_attention_rope(config)["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config)[0].double().numpy()
    size = head_dim(config)
    plain = 1 / (_full_attention_rope(config)["rope_theta"] ** (np.arange(0, size, 2) / size))
    factors: NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return factors


def _full_attention_rope(config: Any) -> dict[str, Any]:
    """The RoPE parameters of the layers with full attention."""
    rope: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def _rope_metadata(config: Any) -> dict[str, Any]:
    rope, kind = _full_attention_rope(config), config.model_type
    rope_type = rope["rope_type"]
    known = {"default", "linear"}
    known |= set() if kind.startswith("gemma") else {"yarn"}
    known = {"gemma3n_text": {"default"}, "gemma4_text": {"proportional"}}.get(kind, known)
    known |= {"llama3"} if ARCHITECTURES[kind] == "llama" else set()
    if rope_type not in known:
        _refuse(config, "rope_type", rope_type, f"known are {', '.join(sorted(known))}")
    found = {Keys.Rope.FREQ_BASE: float(rope["rope_theta"])}
    if "sliding_attention" in config.rope_parameters:
        local = config.rope_parameters["sliding_attention"]
        if local["rope_type"] != "default":
            _refuse(config, "rope_type of sliding_attention", local["rope_type"], "only default is computed")
        found[Keys.Rope.FREQ_BASE_SWA] = float(local["rope_theta"])
    if rope_type in ("linear", "yarn"):
        kinds = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
        factor = float(rope["factor"])
        found |= {Keys.Rope.SCALING_TYPE: kinds[rope_type].value, Keys.Rope.SCALING_FACTOR: factor}
    if rope_type == "yarn":
        for key, only in (("truncate", True), ("beta_fast", 32), ("beta_slow", 1)):
            if (rope.get(key) if rope.get(key) is not None else only) != only:
                _refuse(config, key, rope[key], f"only {only} is computed")
        found[Keys.Rope.SCALING_ORIG_CTX_LEN] = rope["original_max_position_embeddings"]
        # llama.cpp multiplies its own scale by this one.
        ratio = _attention_factor(rope, factor) / _magnitude(factor, 1)
        if not math.isclose(ratio, 1, rel_tol=1e-6):
            found[Keys.Rope.SCALING_ATTN_FACTOR] = ratio
    return found


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """Source: transformers 5.23, `modeling_rope_utils._compute_yarn_parameters`."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if (one := rope.get("mscale")) and (other := rope.get("mscale_all_dim")):
        return _magnitude(factor, one) / _magnitude(factor, other)
    return _magnitude(factor, 1)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _context_length(config: Any) -> int:
    """The longest context that llama.cpp computes correctly: it has no sliding window for Llama and Qwen."""
    length: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if config.model_type in (*_FULL_ATTENTION_EVERY, "gemma3n_text", "gemma4_text") or not window:
        return length
    if config.model_type != "mistral" and layers and "sliding_attention" not in layers:
        return length
    return min(length, int(window))


def _check_computable(config: Any) -> None:
    """Refuses a config that llama.cpp does not compute, or computes otherwise."""
    kind, size = config.model_type, head_dim(config)

    def value(key: str) -> Any:
        return getattr(config, key, None)

    named = ("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text")
    key = "hidden_activation" if kind in named else "hidden_act"
    gate = _ACTIVATION.get(kind, "silu")
    if value(key) != gate:
        _refuse(config, key, value(key), f"only {gate} is computed")
    both_ways = value("use_bidirectional_attention")
    if (both_ways and both_ways != "vision") or value("is_causal") is False:
        _refuse(config, "use_bidirectional_attention", True, "each token sees only those before it")
    if value("attention_bias") and kind != "llama":
        _refuse(config, "attention_bias", True, "it has no place for attn_output.bias")
    ropes = config.rope_parameters
    parts = [ropes, *(part for key, part in ropes.items() if isinstance(part, dict) and key != "full_attention")]
    parts += [_full_attention_rope(config)] if kind != "gemma4_text" else []
    for rope in parts:
        if (part := rope.get("partial_rotary_factor") or value("partial_rotary_factor") or 1) != 1:
            _refuse(config, "partial_rotary_factor", part, "heads are rotated whole")
    if kind == "qwen2" and config.num_attention_heads * size != config.hidden_size:
        _refuse(config, "head_dim", size, "num_attention_heads of them must make hidden_size")
    if kind == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        name = "final_logit_softcapping" if config.attn_logit_softcapping else "attn_logit_softcapping"
        _refuse(config, name, None, "scores are always capped")
    if kind == "gemma3_text" and config.attn_logit_softcapping:
        _refuse(config, "attn_logit_softcapping", config.attn_logit_softcapping, "scores are never capped")
    if kind == "gemma3n_text":
        _check_gemma3n(config)
    if kind in ("gemma3n_text", "gemma4_text"):
        _check_shared_layers(config)
    per_layer = kind == "gemma4_text" and config.hidden_size_per_layer_input
    if per_layer and (rows := config.vocab_size_per_layer_input) != config.vocab_size:
        _refuse(config, "vocab_size_per_layer_input", rows, "it must be vocab_size")
    if kind in _FULL_ATTENTION_EVERY:
        large = config.num_hidden_layers == _LAYERS_OF_27B[kind]
        scale = config.hidden_size // config.num_attention_heads if large else size
        if config.query_pre_attn_scalar != scale:
            _refuse(
                config,
                "query_pre_attn_scalar",
                config.query_pre_attn_scalar,
                f"with {config.num_hidden_layers} layers only {scale} is computed",
            )
        if not set(config.layer_types) <= {"sliding_attention", "full_attention"}:
            _refuse(config, "layer_types", sorted(set(config.layer_types)), "known are sliding and full attention")
        if "sliding_attention" in config.layer_types and not config.sliding_window:
            _refuse(config, "sliding_window", config.sliding_window, "layers of sliding attention need one")


def _check_gemma3n(config: Any) -> None:
    for key, only in _GEMMA3N.items():
        if getattr(config, key) != only:
            _refuse(config, key, getattr(config, key), f"only {only} is computed")
    count = config.num_hidden_layers
    if len(set(config.intermediate_size)) > 1:
        _refuse(config, "intermediate_size", config.intermediate_size, "all layers have the first one's")
    sparse = min(count, _SPARSE_LAYERS_OF_3N)
    wanted = [_SPARSITY_OF_3N] * sparse + [0.0] * (count - sparse)
    if list(config.activation_sparsity_pattern) != wanted:
        _refuse(
            config,
            "activation_sparsity_pattern",
            config.activation_sparsity_pattern,
            f"the first {_SPARSE_LAYERS_OF_3N} layers have {_SPARSITY_OF_3N}, all others 0",
        )
    shared = max(count - _OWN_KV_LAYERS_OF_3N, 0)
    if config.num_kv_shared_layers != shared:
        _refuse(
            config,
            "num_kv_shared_layers",
            config.num_kv_shared_layers,
            f"of {count} layers {shared} share, those from {_OWN_KV_LAYERS_OF_3N} on",
        )
    if (rows := config.vocab_size_per_layer_input) > config.vocab_size:
        _refuse(config, "vocab_size_per_layer_input", rows, "it must be vocab_size at most")


def _check_shared_layers(config: Any) -> None:
    """Refuses layers that share other keys and values than llama.cpp: those of the last layer of their kind do.

    Source: llama.cpp, src/llama-model.cpp (`create_memory`): of the last layer, or of the last but one for a window.
    """
    kinds, first = config.layer_types, config.num_hidden_layers - config.num_kv_shared_layers
    for kind, back in (("full_attention", 1), ("sliding_attention", 2)):
        read = kinds[max(first - back, 0) : first]
        if kind in kinds[first:] and (read[:1] != [kind] or kind in read[1:]):
            _refuse(config, "layer_types", kinds, f"layers that share read layer {first - back}, which must be {kind}")


def _refuse(config: Any, key: str, value: Any, why: str) -> None:
    raise ExportError(
        f"GGUF: config.json has {key}: {value}, which llama.cpp does not compute for {config.model_type}: {why}"
    )
