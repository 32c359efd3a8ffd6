"""Writes the files of a merge or an export beside its weights: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from finetune.model.provenance import environment_of, has_tokenizer
from finetune.model.resize import RESIZED_FROM
from finetune.model.saved_files import BaseFiles, drop_refused_settings
from finetune.recipe.schema import ModelSection
from finetune.system.files import read_json
from finetune.system.terminal import quiet

_TOKENIZER_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
]
# For multimodal models and models with code of their own.
_OTHER_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "*.py")
# Patterns of the files of a base that are read here.
SMALL_FILES = ["config.json", "generation_config.json", *_TOKENIZER_FILES, *_OTHER_FILES]


def write_small_files(
    into: Path,
    run: Path,
    base: Path,
    section: ModelSection,
    quantization_config: dict[str, Any] | None,
    dtype: str,
    untied: bool,
) -> None:
    """Writes the config, generation config, tokenizer, chat template and other files that the base has.

    Args:
        into: The folder to write to.
        run: The run that is merged, or the model that is exported.
        base: The folder of the base's small files.
        section: The `model` section that names the base.
        quantization_config: That of the config.json to write; None if the weights are not quantised.
        dtype: The name of the dtype that the weights are written in.
        untied: True if tied embeddings become two stored tensors.

    Raises:
        RunError: A file of the run or the base is damaged.
    """
    config = read_json(base / "config.json")
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        part.pop(RESIZED_FROM, None)
        if "torch_dtype" in part or "dtype" in part or part is config:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
        if untied and ("tie_word_embeddings" in part or part is config or "vocab_size" in part):
            part["tie_word_embeddings"] = False
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (into / "config.json").write_text(text + "\n", encoding="utf-8")
    if (run / "tokenizer_config.json").exists() and (run / "generation_config.json").exists():
        # Copied as training saved them: loading a large tokenizer takes longer than merging a small model.
        for pattern in (*_TOKENIZER_FILES, "generation_config.json"):
            for path in run.glob(pattern):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, into / path.name)
    else:
        _save_tokenizer(section, run, base, into)
    for pattern in _OTHER_FILES:
        for path in base.glob(pattern):
            shutil.copy(path, into / path.name)
    # Our runs never change tokens; those of another tool may.
    foreign = (run / "tokenizer.json").is_file() and not environment_of(run)
    BaseFiles.of(str(base)).complete(into, same_tokens=not foreign or _same_tokens(into, base))


def _save_tokenizer(section: ModelSection, run: Path, base: Path, into: Path) -> None:
    """Saves the tokenizer of an adapter that was trained elsewhere, or its base's; and a generation config.

    The generation config stops at the end of a turn.
    """
    from transformers import GenerationConfig

    from finetune.model.load import eos_tokens, load_tokenizer

    own = has_tokenizer(run)
    with quiet():
        in_run = ModelSection(name_or_path=str(run), trust_remote_code=section.trust_remote_code)
        tokenizer = load_tokenizer(in_run if own else section)
        tokenizer.save_pretrained(into)
        folder = next((p for p in (run, base) if (p / "generation_config.json").exists()), None)
        generation = GenerationConfig.from_pretrained(str(folder)) if folder else GenerationConfig()
        generation.eos_token_id = eos_tokens(generation, tokenizer)
        drop_refused_settings(generation)
        generation.save_pretrained(into)


def _same_tokens(folder: Path, base: Path) -> bool:
    """True if the tokenizers in two folders have the same tokens with the same ids."""

    def tokens(file: Path) -> tuple[Any, dict[int, str]]:
        whole = read_json(file)
        added = {token["id"]: token["content"] for token in whole.get("added_tokens") or []}
        return (whole.get("model") or {}).get("vocab"), added

    return tokens(folder / "tokenizer.json") == tokens(base / "tokenizer.json")
