"""Builds the model that a recipe trains: the base with a new or an earlier adapter, or for full fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch

from finetune.data.chat import Chat
from finetune.model import compatibility, provenance
from finetune.model.attach import attach_adapter
from finetune.model.load import load_model
from finetune.model.locate import Base
from finetune.model.patterns import check_patterns
from finetune.model.precision import Precision, keep_residual_in_float32
from finetune.model.resize import RESIZED_FROM, new_tokens
from finetune.model.token_rows import (
    lighten_trainable_tokens,
    trainable_token_indices,
    unlearned_tokens,
    with_new_tokens,
)
from finetune.recipe.load import Recipe
from finetune.recipe.yaml_tree import Section
from finetune.system import devices, distributed
from finetune.system.errors import ModelError, reworded
from finetune.system.terminal import Say


def load_trainable(recipe: Recipe, base: Base, precision: Precision, chat: Chat | None, say: Say) -> Any:
    """The model to train: the base with its weights, and the adapter of the recipe on it.

    Args:
        recipe: The recipe.
        base: The base model.
        precision: The dtypes of weights and computation.
        chat: The tokenizer and chat template; None if the rows are plain text. With `trainable_token_indices: auto`,
            the embedding rows of turn tokens that the base never learned are trained with the adapter.
        say: Called with lines on the choices that were made and the number of trained parameters.

    Raises:
        ModelError: The base cannot be loaded, or `lora` or an earlier adapter does not fit it.
        RunError: A file of the earlier adapter is damaged.
    """
    model = load_model(recipe, precision.loaded, base)
    choice = (recipe.model.dtype, recipe.model.attn_implementation)
    if line := compatibility.describe_choices(choice, precision.asked, model, devices.device_of()):
        say(line)
    adapter = Path(recipe.model.adapter).expanduser() if recipe.lora is not None and recipe.model.adapter else None
    unlearned: list[int] = []
    if adapter is not None:
        trained_on = provenance.environment_of(adapter).get("base_fingerprint")
        if trained_on and base.fingerprint and trained_on != base.fingerprint:
            raise ModelError(f"model.adapter: {adapter} was trained on another base than {base.name}")
    elif chat and recipe.lora is not None and recipe.lora.get("trainable_token_indices") == "auto":
        # Sharded loading gives the other ranks empty weights.
        first = distributed.rank() == 0
        unlearned = distributed.broadcast_from_first(unlearned_tokens(model, chat.turn_token_ids) if first else [])
        if unlearned:
            names = ", ".join(chat.tokenizer.convert_ids_to_tokens(unlearned))
            say(f"turn tokens that the base never learned, their embedding rows are trained too: {names}")
    if recipe.lora is not None and adapter is None and (new := new_tokens(model.config)):
        say(f"embeddings: {len(new):,} new rows, which are trained too")
    frozen = compatibility.non_text_modules(model)
    chooses = recipe.lora is not None and adapter is None and recipe.lora["target_modules"] == "all-linear"
    if chooses and (line := compatibility.all_linear_targets(model).describe()):
        say(line)
    model = trainable_model(recipe, model, precision, unlearned, adapter)
    if adapter is not None:
        say(f"training continues from the adapter in {adapter}")
    frozen_note = f"; {', '.join(frozen)} stay as they are: the rows are text" if frozen else ""
    if recipe.lora is None:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"model: {base.name}, full fine-tuning of {count:,} parameters{frozen_note}")
    else:
        if method := compatibility.stored_quantisation(base.config):
            rounded = "--base dequantised, or " if compatibility.can_be_dequantised(base.config) else ""
            say(
                f"{base.name} is stored quantised ({method}), and the adapter is trained on the rounded weights; merge "
                f"and export take {rounded}the model that they were made from: --base PATH_OR_ID"
            )
        quantised = "" if recipe.quantization is None else " on a quantised base"
        trained, total = model.get_nb_trainable_parameters()
        say(f"model: {base.name}, LoRA{quantised}: {trained:,} of {total:,} parameters are trained{frozen_note}")
    return model


def trainable_model(
    recipe: Recipe, model: Any, precision: Precision, unlearned: Sequence[int] = (), adapter: Path | None = None
) -> Any:
    """The base prepared for training: frozen parameters, the adapter, and the dtype of each parameter.

    `train` calls it with loaded weights, `plan` on the meta device.

    Args:
        recipe: The recipe; only its sections `lora` and `quantization` are read.
        model: The base, in `precision.loaded`; it is changed in place.
        precision: The recipe's dtypes.
        unlearned: The tokens whose embedding rows are trained with `lora.trainable_token_indices: auto`.
        adapter: The folder of an adapter to continue; None makes a new one.

    Raises:
        ModelError: `lora` or the adapter does not fit the base.
    """
    if recipe.quantization is not None and model.config.get_text_config().model_type == "gemma3n_text":
        # transformers 5.23, `Gemma3nTextAltUp.predict`.
        raise ModelError(
            "quantization: Gemma 3n clamps weights in place while it trains, which damages quantised ones; "
            "remove quantization"
        )
    if precision.computes == "fp16" and precision.loaded == torch.float32:
        keep_residual_in_float32(model)  # autocast rounds as float16 weights would
    frozen = compatibility.non_text_modules(model)
    new = new_tokens(model.config)
    vars(model.config.get_text_config()).pop(RESIZED_FROM, None)  # it is saved with a model that is trained whole
    if recipe.lora is None:
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        return model
    model.config.use_cache = False
    if adapter is not None:
        with reworded(ModelError, "model.adapter", ModelError):
            model = attach_adapter(model, adapter, trainable=True)
    else:
        options = dict(recipe.lora)
        options["exclude_modules"] = compatibility.exclude_modules(frozen, options.get("exclude_modules"))
        if options.get("trainable_token_indices") == "auto":
            options["trainable_token_indices"] = trainable_token_indices(model, list(unlearned)) if unlearned else None
        if new:
            options["trainable_token_indices"] = with_new_tokens(model, options, new)
        if options.get("layers_to_transform") is not None:
            _check_layers(options["layers_to_transform"], model)
        if options["target_modules"] == "all-linear":
            targets = compatibility.all_linear_targets(model)
            options["target_modules"] = targets.modules
            options["target_parameters"] = [*(options.get("target_parameters") or []), *targets.experts] or None
        # peft 0.21 raises all of these for a value that does not fit the base.
        refusals = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, ImportError, RuntimeError)
        with reworded(ModelError, "lora", *refusals, re.error), _experts_explained(options):
            check_patterns(recipe.lora, model, "lora.")
            _check_names(recipe.lora, model)
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    lighten_trainable_tokens(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(_trained_dtype(name, parameter, recipe, precision))
    return model


@contextmanager
def _experts_explained(options: dict[str, Any]) -> Iterator[None]:
    """Says which option cannot be where PEFT's adapter of experts, `ParamWrapper`, refuses it (0.21)."""
    try:
        yield
    except ValueError as error:
        key, value = next(
            ((key, off) for key, off in (("lora_dropout", 0), ("use_dora", "false")) if options.get(key)), ("", "")
        )
        if "ParamWrapper" not in str(error) or not key:
            raise
        raise ModelError(
            f"lora.{key}: is {str(options[key]).lower()}, but the adapter is also on the weights of experts, where "
            f"PEFT has no {key}; write {value}, or name only layers of attention in lora.target_modules"
        ) from error


def _check_layers(wanted: int | list[int], model: Any) -> None:
    """Refuses layers that the model does not have, of which PEFT passes over all but the last one in silence."""
    count = model.config.get_text_config().num_hidden_layers
    if absent := [layer for layer in ([wanted] if isinstance(wanted, int) else wanted) if layer >= count]:
        raise ModelError(f"lora.layers_to_transform: names layer {absent[0]}, but the base has layers 0 to {count - 1}")


def _check_names(lora: Section, model: Any) -> None:
    """Refuses names that nothing in the base has; PEFT 0.21 passes over them in silence if another name is found."""
    modules, parameters = ([name for name, _ in found] for found in (model.named_modules(), model.named_parameters()))
    for key, names in (("target_modules", modules), ("modules_to_save", modules), ("target_parameters", parameters)):
        for wanted in lora[key] if isinstance(lora.get(key), list) else ():
            if not any(name.endswith(wanted) for name in names):
                raise ModelError(f"lora.{key}: names {wanted}, which the base does not have")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules + parameters):
                raise ModelError(f"lora.{key}: {pattern} matches no module of the base")


def _trained_dtype(name: str, parameter: torch.Tensor, recipe: Recipe, precision: Precision) -> torch.dtype:
    """The dtype in which a parameter of an adapter is trained.

    It is float32. On a quantised base that computes in bfloat16 it is bfloat16, as in QLoRA and trl, except for DoRA's
    magnitudes, whose steps are too small for bfloat16. PEFT 0.21 would give token rows the base's dtype, in which small
    steps are rounded away.
    """
    if precision.asked != torch.bfloat16 or "trainable_tokens" in name:
        return torch.float32
    if recipe.quantization is not None and "lora_magnitude_vector" not in name:
        return torch.bfloat16
    return parameter.dtype
