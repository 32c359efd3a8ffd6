"""Folders for mlx-lm: the models that it computes as transformers does, their config, and how they are measured."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.data.chat import Chat
from finetune.export.transformers import write_format
from finetune.model.generate import Generator
from finetune.model.locate import read_config
from finetune.model.mlx import GROUP, dequantise
from finetune.model.shard_writer import ShardWriter
from finetune.model.shards import read_headers, read_tensor
from finetune.recipe.export_formats import MLX_BITS
from finetune.system.errors import ExportError
from finetune.system.extras import install_command
from finetune.system.files import WEIGHTS_INDEX, read_json
from finetune.system.terminal import quiet

_GELU, _SILU, _ROPES = ("gelu_pytorch_tanh",), ("silu",), ("default", "linear", "llama3", "yarn")
# The types of text models that were compared with transformers, and the values of settings that mlx-lm computes.
# Source: mlx-lm 0.32.2 `models/`, a file for each type (mistral is llama), whose settings are in `ModelArgs`.
_COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gemma": {"hidden_act": _GELU, "tie_word_embeddings": (True,), "attention_bias": (False,), "rope": ("default",)},
    "gemma2": {
        **{"hidden_activation": _GELU, "tie_word_embeddings": (True,), "attention_bias": (False,)},
        **{"rope": ("default",)},
    },
    "gemma3_text": {
        **{"hidden_activation": _GELU, "attention_bias": (False,), "rope": _ROPES},
        **{"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
        "use_bidirectional_attention": (False, None),
    },
    "gemma4_text": {
        **{"hidden_activation": _GELU, "attention_bias": (False,), "rope": ("proportional",)},
        "use_bidirectional_attention": (None, "vision"),
    },
    "llama": {"hidden_act": _SILU, "rope": _ROPES},
    "mistral": {"hidden_act": _SILU, "rope": _ROPES},
    "mixtral": {"hidden_act": _SILU, "rope": ("default",)},
    "qwen2": {"hidden_act": _SILU, "rope": _ROPES},
    "qwen3": {"hidden_act": _SILU, "rope": _ROPES, "attention_bias": (False,)},
}
# Models with a text model inside; mlx-lm leaves out the rest.
_MULTIMODAL = ("gemma3", "gemma4")
# Types that mlx-lm computes with full attention in all layers.
_WITHOUT_WINDOW = ("gemma2", "mistral", "mixtral", "qwen2", "qwen3")


def check_computable(config: Any, formats: Sequence[str]) -> None:
    """Refuses a model that mlx-lm does not load, or computes otherwise than transformers.

    Args:
        config: The model's config.
        formats: Some of `MLX_BITS`.

    Raises:
        ExportError: mlx-lm has no such model, or not this setting of it.
    """
    text = config.get_text_config()
    kind = str(text.model_type)
    if kind not in _COMPUTED or config.model_type not in (kind, *_MULTIMODAL):
        raise ExportError(
            f"--format {formats[0]}: a model of type {config.model_type} was not compared with mlx-lm's, or mlx-lm has "
            f"none; known are {', '.join(sorted((*_COMPUTED, *_MULTIMODAL)))}"
        )

    def refuse(key: str, value: Any, why: str) -> None:
        raise ExportError(
            f"--format {formats[0]}: config.json has {key}: {value}, which mlx-lm does not compute for {kind}: {why}"
        )

    ropes: dict[str, Any] = text.rope_parameters
    full = ropes.get("full_attention", ropes)
    values = {key: getattr(text, key, None) for key in _COMPUTED[kind]} | {"rope": full.get("rope_type", "default")}
    for key, computed in _COMPUTED[kind].items():
        if values[key] not in computed:
            refuse("rope_type" if key == "rope" else key, values[key], f"only {' or '.join(map(str, computed))}")
    local = ropes.get("sliding_attention", {}).get("rope_type", "default")
    if local != "default":
        refuse("rope_type of sliding_attention", local, "only default")
    if kind != "gemma4_text" and (part := full.get("partial_rotary_factor") or 1) != 1:
        refuse("partial_rotary_factor", part, "heads are rotated whole")
    if kind == "gemma2" and not (text.attn_logit_softcapping and text.final_logit_softcapping):
        name = "final_logit_softcapping" if text.attn_logit_softcapping else "attn_logit_softcapping"
        refuse(name, None, "scores are always capped")
    if kind == "gemma3_text" and not _is_periodic(text.layer_types):
        refuse("layer_types", text.layer_types, "each n-th layer has full attention, and no other")
    if kind == "qwen2" and getattr(text, "head_dim", None) not in (None, text.hidden_size // text.num_attention_heads):
        refuse("head_dim", text.head_dim, "num_attention_heads of them make hidden_size")
    experts = kind == "mixtral" or getattr(text, "enable_moe_block", False)
    if experts and (small := [name for name in formats if MLX_BITS[name] < 16]):
        raise ExportError(f"--format {small[0]}: this model has experts, which are written in 16 bit only: mlx-bf16")


def _is_periodic(kinds: Sequence[str]) -> bool:
    """True if each n-th layer has full attention, and all others a window."""
    if "full_attention" not in kinds:
        return False
    every = kinds.index("full_attention") + 1
    return all((kind == "full_attention") == (layer % every == 0) for layer, kind in enumerate(kinds, start=1))


def write_mlx(model: Path, output: Path, kind: str, progress: bool = False) -> None:
    """Writes a model for mlx-lm: as `mlx_lm.convert` would, but under the names of the model's own checkpoint.

    Args:
        model: A folder with a whole model.
        output: An empty folder.
        kind: One of `MLX_BITS`.
        progress: Shows a progress bar on a terminal.

    Raises:
        ExportError: As `check_computable`; a merge may have untied embeddings.
        MergeError: As `write_format`.
    """
    check_computable(read_config(str(model)), [kind])
    write_format(model, output, kind, progress)
    # mlx-lm has defaults of its own, so every setting is written out.
    config = read_config(str(output))
    whole, saved = json.loads(config.to_json_string()), read_json(output / "config.json")
    for part, given in ((whole, saved), (whole.get("text_config", {}), saved.get("text_config", {}))):
        for key, value in part.items():
            if isinstance(value, bool | int | float | str) and key not in ("dtype", "transformers_version"):
                given.setdefault(key, value)
    # mlx-lm reads the vocabulary size of a multimodal model here.
    saved["vocab_size"] = config.get_text_config().vocab_size
    if (bits := MLX_BITS[kind]) < 16:
        saved["quantization"] = saved["quantization_config"] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    text = json.dumps(saved, ensure_ascii=False, indent=2)
    (output / "config.json").write_text(text + "\n", encoding="utf-8")


def notes(config: Any, formats: Sequence[str]) -> list[str]:
    """Lines for the report: what measured the formats, and from which length on mlx-lm computes another model.

    Args:
        config: The model's config.
        formats: Some of `MLX_BITS`.
    """
    names, text = ", ".join(formats), config.get_text_config()
    if reader_of(formats[0]) == "mlx-lm":
        how = f"measured by mlx-lm {importlib.metadata.version('mlx-lm')}, which computes in the dtype of the weights"
    else:
        how = "mlx-lm is not installed, so transformers measured them, with dequantised weights"
        how += f" ({install_command('mlx')})"
    lines = [f"\n{names}: {how}."]
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if text.model_type in _WITHOUT_WINDOW and window and "sliding_attention" in (kinds or ["sliding_attention"]):
        lines.append(
            f"\n{names}: mlx-lm 0.32 has no sliding window for {text.model_type}; it answers texts of more than "
            f"{window:,} tokens otherwise than transformers."
        )
    return lines


def reader_of(kind: str) -> Literal["mlx-lm", "dequantised", "transformers"]:
    """The `verify.Job.reader` of one of `MLX_BITS`."""
    if importlib.util.find_spec("mlx_lm") is not None:
        return "mlx-lm"
    return "dequantised" if MLX_BITS[kind] < 16 else "transformers"


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def load_mlx(folder: Path) -> Generator:
    """A model that mlx-lm has loaded, with the tokenizer, chat template and stop tokens that mlx-lm takes."""
    from mlx_lm import load

    with quiet():
        model, tokenizer = load(str(folder))
    return _MlxGenerator(_MlxModel(model), Chat(tokenizer._tokenizer), tuple(sorted(tokenizer.eos_token_ids)))


@dataclass(frozen=True)
class _Output:
    """The logits (1, N, V) of a text, as transformers' models return them."""

    logits: torch.Tensor


class _MlxModel:
    """A model of mlx-lm, called as `evaluate.perplexity.score` calls transformers' models."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.inner = model

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: torch.Tensor) -> _Output:
        """The logits of one text at some positions."""
        import mlx.core as mx
        import numpy as np

        logits = self.inner(mx.array(input_ids.numpy()))[:, mx.array(logits_to_keep.numpy())]
        return _Output(torch.from_numpy(np.array(logits.astype(mx.float32))))

    __call__ = forward


class _MlxGenerator(Generator):
    """Greedy answers by mlx-lm."""

    def answers(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """As `Generator.answers`, one prompt after the other."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        found = []
        for prompt in prompts:
            answer: list[int] = []
            for token, _ in generate_step(mx.array(list(prompt)), self.model.inner, max_tokens=max_new_tokens):
                answer.append(int(token))
                if answer[-1] in self.stop_ids:
                    break
            found.append(answer)
        return found


def write_dequantised(folder: Path, into: Path) -> None:
    """Writes a folder for mlx-lm again with the weights that mlx-lm computes with, for transformers.

    Args:
        folder: A folder that `write_mlx` wrote.
        into: An empty folder.
    """
    stored = read_headers(folder)
    layers = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", WEIGHTS_INDEX):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, into / path.name)
    config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("quantiz")}
    (into / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with ExitStack() as stack:
        files = {name: os.open(folder / name, os.O_RDONLY) for name in {entry.file for entry in stored.values()}}
        for descriptor in files.values():
            stack.callback(os.close, descriptor)
        shards = ShardWriter(into, 2**62, sum(len(name) + 200 for name in stored))
        stack.callback(shards.abort)
        for name, entry in stored.items():
            layer = name.rpartition(".")[0]
            if layer not in layers:
                shards.copy(name, files[entry.file], entry)
            elif name.endswith(".weight"):
                parts = {part: stored[f"{layer}.{part}"] for part in ("weight", "scales", "biases")}
                weight = dequantise({part: read_tensor(files[place.file], place) for part, place in parts.items()})
                shards.add(name, weight.dtype, weight.shape, [weight])
        shards.close()
