"""Compares a tokenizer with a model's embeddings. Writes copies of models: with more rows of these, or dequantised."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.model.compatibility import check_fp8_blocks, dequantised_when_loaded
from finetune.system.errors import ModelError, first_line
from finetune.system.files import check_space
from finetune.system.terminal import quiet

if TYPE_CHECKING:  # it imports transformers, which a merge's own process never loads
    from finetune.data.chat import Chat

# The key of our copy's text config with the number of rows that its base has; no other model has it.
RESIZED_FROM = "finetune_resized_from"
_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
# Not copied: `save_pretrained` writes them, or they index weights that it writes.
_OWN_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def needed_rows(tokenizer: Any) -> int:
    """The embedding rows that a tokenizer can ask for: its highest token id and one; ids may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_token_ids(token_ids: Iterable[int | None], tokenizer: Any, config: Any) -> None:
    """Checks that a model's embedding has a row for each of some tokens.

    Only tokens that occur count: many tokenizers have tokens without a row that no text holds (Gemma 3 270M:
    `<image_soft_token>`).

    Args:
        token_ids: The tokens that occur.
        tokenizer: The model's tokenizer.
        config: The model's config.

    Raises:
        ModelError: A token that occurs has no row.
    """
    highest = max((token for token in token_ids if token is not None), default=0)
    rows = getattr(config.get_text_config(), "vocab_size", None) or highest + 1
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ModelError(
            f"model.name_or_path: the tokenizer has {needed_rows(tokenizer):,} tokens, the model's embedding {rows:,} "
            f"rows, and none for {token} (token {highest}), which occurs; write model.resize_embeddings: true in the "
            "recipe, or use the model's own tokenizer and chat template"
        )


def tokens_of_any_row(chat: Chat, streamed: bool, special_tokens: bool) -> list[int | None]:
    """The tokens that are known to occur before rows are read: padding, and what the chat template writes.

    Args:
        chat: The tokenizer and its chat template.
        streamed: True if rows are read while training: then all added tokens that rows may hold are returned, too.
        special_tokens: True if text may spell special tokens.
    """
    tokenizer = chat.tokenizer
    has_template = tokenizer.chat_template is not None
    known = [tokenizer.pad_token_id, *(chat.turn_token_ids if has_template else ())]
    if streamed:
        template = str(tokenizer.chat_template)
        for i, token in tokenizer.added_tokens_decoder.items():
            if special_tokens or not token.special or token.content in template:
                known.append(i)
    return known


def resized_config(config: Any, rows: int) -> Any:
    """Changes the config of a model to that of a copy with so many embedding rows, and returns it."""
    text = config.get_text_config()
    if rows > text.vocab_size:
        setattr(text, RESIZED_FROM, text.vocab_size)
        text.vocab_size = rows
    return config


def new_tokens(config: Any) -> list[int]:
    """The tokens whose rows a resized copy of a model has in addition, by its config; empty for other models."""
    text = config.get_text_config()
    return [*range(getattr(text, RESIZED_FROM, text.vocab_size), text.vocab_size)]


def write_resized(path: str, revision: str | None, trust_remote_code: bool, rows: int, into: Path) -> None:
    """Writes a copy of a model whose input and output embeddings have more rows.

    Each new row is the mean of the old rows, like transformers' `mean_resizing` without its noise of 1e-9. It is summed
    in float64, so that each machine and each rank gets the same bits. The model is loaded whole, on the CPU.

    Args:
        path: The model's directory, or its id on the Hub.
        revision: Its revision on the Hub.
        trust_remote_code: True if its own code may run.
        rows: The rows to have.
        into: The folder to write to.

    Raises:
        ModelError: The model is quantised, lacks weights, or has a third table with a row for each token.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"model.resize_embeddings: the weights of {path} are stored quantised; name the model that it was made from"
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"model.name_or_path: {path} does not hold {missing[0]}")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    old = ends[0].weight.shape[0]
    # Gemma 3n's embedding for each layer has fewer rows than the other one.
    per_token = {old, getattr(model.config.get_text_config(), "vocab_size_per_layer_input", old)}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module not in ends and module.num_embeddings in per_token:
            raise ModelError(
                f"model.resize_embeddings: {path} has a further row for each token in {name}, which cannot be grown"
            )
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in (module.weight, getattr(module, "bias", None)):
                if values is not None:
                    # A slice at a time: the table may have gigabytes.
                    total = sum(part.double().sum(0) for part in values[:old].split(4096))
                    values[old:] = (total / old).to(values.dtype)
    setattr(model.config.get_text_config(), RESIZED_FROM, old)
    check_cache_space(model, into)
    with quiet():
        model.save_pretrained(into)
    _copy_other_files(path, revision, into)


def check_cache_space(model: Any, into: Path) -> None:
    """Refuses to save a model into a folder that `made_once` made, if the cache's disk lacks the room.

    Raises:
        RunError: It does.
    """
    cache = into.parents[1]
    check_space(cache, model.get_memory_footprint(), "make room, or name a cache on another disk with XDG_CACHE_HOME")


def write_dequantised(path: str, revision: str | None, trust_remote_code: bool, into: Path) -> None:
    """Writes a copy of a model that is stored quantised, with the rounded weights that it computes with.

    The model is loaded whole, on the CPU.

    Args:
        path: The model's directory, or its id on the Hub.
        revision: Its revision on the Hub.
        trust_remote_code: True if its own code may run.
        into: The folder to write to.

    Raises:
        ModelError: transformers cannot dequantise weights of this method.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    arguments = source | {"dtype": "auto", "use_safetensors": True, "device_map": {"": "cpu"}}
    with quiet():
        config = dequantised_when_loaded(AutoConfig.from_pretrained(path, **source))
        model = AutoModelForCausalLM.from_pretrained(path, config=config, **arguments)
        try:
            model = model.dequantize() if model.is_quantized else model
        except (NotImplementedError, AttributeError, ValueError) as error:
            raise ModelError(
                f"--base dequantised: transformers cannot dequantise {path} ({first_line(error)}); write --base with "
                "the model that it was made from"
            ) from error
        check_fp8_blocks(model, config)
        check_cache_space(model, into)
        vars(model.config).pop("quantization_config", None)
        # In the original format, transformers 5.23 would reverse the reading of quantised tensors, which it cannot.
        model.save_pretrained(into, save_original_format=False)
    _copy_other_files(path, revision, into)


def _copy_other_files(path: str, revision: str | None, into: Path) -> None:
    """Copies the files of a model that `save_pretrained` of a copy has not written: tokenizer, template, code."""
    from huggingface_hub import snapshot_download

    folder = (
        Path(path) if Path(path).is_dir() else Path(snapshot_download(path, revision=revision, allow_patterns=_FILES))
    )
    for pattern in _FILES:
        for file in folder.glob(pattern):
            if file.name not in _OWN_FILES:
                shutil.copyfile(file, into / file.name)
