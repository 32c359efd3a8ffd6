"""The model that a recipe trains: its base, loaded, with a new adapter or an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import try_to_load_from_cache

from finetune.data.chat import Chat
from finetune.model import compatibility, precision, provenance
from finetune.model.load import load_model
from finetune.model.locate import locate
from finetune.model.precision import mixed_precision_of, resolve_dtype
from finetune.model.shards import fingerprint
from finetune.model.token_rows import lighten_trainable_tokens, trainable_token_indices, unlearned_tokens
from finetune.recipe.load import Recipe
from finetune.system import devices, distributed
from finetune.system.errors import ModelError
from finetune.system.terminal import quiet


def adapted(recipe: Recipe, chat: Chat | None, say: Callable[[str], None]) -> Any:
    """The model to train, its adapter on it.

    Args:
        recipe: What is trained.
        chat: How its rows are rendered; None where they are no conversations. Turn tokens that the base never learned
            are trained with the adapter.
        say: Told what is trained.

    Raises:
        AdaptError: `lora` does not fit the base, or an earlier adapter does not.
        ModelError: The base cannot be loaded.
    """
    dtype = resolve_dtype(recipe.model)
    # float16 weights cannot be trained themselves: the gradient scaler needs float32 ones.
    whole = recipe.lora is None and dtype == torch.float16
    model = load_model(recipe, torch.float32 if whole else dtype)
    if mixed_precision_of(recipe) == "fp16" and model.dtype == torch.float32:
        precision.keep_residual_in_float32(model)  # autocast rounds as the weights would
    choice = (recipe.model.dtype, recipe.model.attn_implementation)
    if line := compatibility.describe_choices(choice, dtype, model, devices.device_of()):
        say(line)
    beside = compatibility.non_text_modules(model)
    if recipe.lora is None:
        for name in beside:
            model.get_submodule(name).requires_grad_(False)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"model: {recipe.model.name_or_path}, full fine-tuning of {count:,} parameters{_left(beside)}")
        return model
    model.config.use_cache = False
    options = dict(recipe.lora)
    if recipe.model.adapter:
        return _gone_on(recipe, model, beside, say)
    options["exclude_modules"] = compatibility.exclude_modules(beside, options.get("exclude_modules"))
    if options.get("trainable_token_indices") == "auto":
        del options["trainable_token_indices"]
        # Sharded loading gives the other ranks empty weights.
        main = distributed.rank() == 0
        unlearned = distributed.broadcast_from_first(
            unlearned_tokens(model, chat.turn_token_ids) if chat and main else []
        )
        if chat and unlearned:
            options["trainable_token_indices"] = trainable_token_indices(model, unlearned)
            names = ", ".join(chat.tokenizer.convert_ids_to_tokens(unlearned))
            say(f"turn tokens that the base never learned, their embedding rows are trained too: {names}")
    try:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:
        raise ModelError(f"lora: {str(error).splitlines()[0]}") from error
    return _told(recipe, model, beside, say)


def _gone_on(recipe: Recipe, base: Any, beside: list[str], say: Callable[[str], None]) -> Any:
    """The recipe's earlier adapter on its base, to be trained on."""
    folder = Path(recipe.model.adapter or "").expanduser()
    its, ours = (
        provenance.environment_of(folder).get("base_fingerprint"),
        known_by(recipe).get("base_fingerprint"),
    )
    if its and ours and its != ours:
        raise ModelError(
            f"model.adapter: {folder} was trained on another base than {recipe.model.name_or_path}"
        )
    try:
        with quiet():
            model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"model.adapter: {folder} does not fit the base: {lines[-1] if lines else error}"
        ) from error
    say(f"going on from the adapter in {folder}")
    return _told(recipe, model, beside, say)


def _told(recipe: Recipe, model: Any, beside: list[str], say: Callable[[str], None]) -> Any:
    lighten_trainable_tokens(model)
    trained, total = model.get_nb_trainable_parameters()
    kind = "" if recipe.quantization is None else " on a quantised base"
    of = f"{trained:,} of {total:,} parameters are trained{_left(beside)}"
    say(f"model: {recipe.model.name_or_path}, LoRA{kind}: {of}")
    return model


def _left(beside: list[str]) -> str:
    return f"; {', '.join(beside)} stay as they are: the rows are text" if beside else ""


def known_by(recipe: Recipe) -> dict[str, str]:
    """What a merge knows the base by; one on the Hub is known by its commit."""
    path = Path(locate(recipe.model.name_or_path))
    if path.is_dir():
        return {"base_fingerprint": fingerprint(path)}
    # A config no longer knows its commit (transformers 5.23), but its place in the cache is called by it.
    config = try_to_load_from_cache(recipe.model.name_or_path, "config.json", revision=recipe.model.revision)
    return {"base_commit": Path(config).parent.name} if isinstance(config, str) else {}
