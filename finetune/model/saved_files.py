"""Completes the small files of a saved model, so that transformers 4 and readers of its keys find all that they need.

transformers 5 saves the rotary settings as `rope_parameters` alone, the dtype as `dtype`, and a tokenizer under classes
and keys that transformers 4 refuses. Readers of the older keys (transformers 4.57, mlx-lm 0.32) then take theta 10,000
and no scaling without a message. Here both forms are written; transformers 5.23 reads the result as it reads its own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.system.files import read_json

Keys = dict[str, Any]

_ROPE_KEYS = (
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"),
    *("rotary_emb_base", "rotary_pct"),  # GPT-NeoX
)
# Models of transformers 4.57 that rotate by the type of a layer; those of later releases have no older keys.
_BY_LAYER_TYPE = ("gemma3_text", "gemma3n_text", "olmo3")
# Keys about the process that saved a tokenizer.
_OF_THE_PROCESS = ("is_local", "local_files_only", "backend")
# Set before other keys of a generation config, which are refused without them.
_MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")


@dataclass(frozen=True)
class BaseFiles:
    """The small files of a base model that a model made from it continues.

    Attributes:
        config: Its config.json.
        tokenizer: Its tokenizer_config.json.
        sentencepiece: The path of its tokenizer.model; None if it has none.
    """

    config: Keys
    tokenizer: Keys
    sentencepiece: Path | None

    @classmethod
    def of(cls, path: str, revision: str | None = None) -> BaseFiles:
        """The files of a base in a directory, or on the Hub, where they are fetched if they are not cached.

        Args:
            path: The directory, or the id on the Hub.
            revision: The revision on the Hub.

        Raises:
            RunError: A file is damaged.
        """
        from transformers.utils import cached_file

        def find(name: str) -> Path | None:
            lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            found = cached_file(path, name, revision=revision, **lenient)
            return Path(found) if found else None

        config, tokenizer = (find(name) for name in ("config.json", "tokenizer_config.json"))
        return cls(read_json(config), read_json(tokenizer), find("tokenizer.model"))

    def complete(self, folder: Path, same_tokens: bool = True) -> None:
        """Adds the older keys to a folder's config.json and tokenizer_config.json, and the base's `tokenizer.model`.

        Calling it again changes nothing.

        Args:
            folder: A folder that transformers or PEFT saved to.
            same_tokens: False if its tokenizer has other tokens than the base's, whose files then do not describe it.

        Raises:
            RunError: A file of the folder is damaged.
        """
        _rewrite(folder / "config.json", lambda config: complete_config(config, self.config))
        before = self.tokenizer if same_tokens else {}
        _rewrite(folder / "tokenizer_config.json", lambda config: complete_tokenizer_config(config, before))
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        if self.sentencepiece and same_tokens and has_tokenizer and not (folder / "tokenizer.model").exists():
            shutil.copyfile(self.sentencepiece, folder / "tokenizer.model")


def _rewrite(file: Path, change: Any) -> None:
    """Applies a function to the object in a JSON file, if there is such a file."""
    if file.is_file() and (before := read_json(file)) != (after := change(dict(before))):
        file.write_text(json.dumps(after, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def complete_config(config: Keys, base: Keys) -> Keys:
    """A config.json with the keys of transformers 4 beside those of transformers 5.

    Args:
        config: The config as it was saved.
        base: The base's. Where it has keys of transformers 4 about rotation, these are taken over. `use_cache`, which a
            run turns off, becomes the base's again.

    Source: transformers 5.23 `modeling_rope_utils.convert_rope_params_to_dict`, which reads both forms.
    """
    names = [None, *(name for name, value in config.items() if isinstance(value, dict))]
    for name in names:
        part = config if name is None else dict(config[name])
        before = base if name is None else base.get(name) or {}
        if name is None and "text_config" not in config:
            before = (base.get("text_config") or {}) | base
        if part.get("dtype"):
            part["torch_dtype"] = part["dtype"]
        if "use_cache" in part and base:
            part.pop("use_cache")
            part |= {key: before[key] for key in ("use_cache",) if key in before}
        if isinstance(part.get("rope_parameters"), dict):
            known = {key: before[key] for key in _ROPE_KEYS if key in before}
            part |= known or _older_rope_keys(part["rope_parameters"], str(part.get("model_type")))
        part |= {key: before.get(key, value) for key, value in _older_layer_keys(part).items()}
        if name is not None:
            config[name] = part
    return config


def _older_rope_keys(rope: Keys, model_type: str) -> Keys:
    """The keys of transformers 4 for `rope_parameters`; empty where only transformers 5 has the model."""
    keys: Keys = {}
    if isinstance(rope.get("full_attention"), dict):
        if model_type not in _BY_LAYER_TYPE:
            return {}
        if model_type != "olmo3" and isinstance(rope.get("sliding_attention"), dict):
            keys["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    elif any(isinstance(value, dict) for value in rope.values()):
        return {}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    keys |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    if scaling.get("rope_type", "default") != "default":
        keys["rope_scaling"] = scaling
    return keys


def _older_layer_keys(config: Keys) -> Keys:
    """The keys in which Gemma 3 and 4 were released, for settings that transformers 5.23 saves layer by layer.

    Source: mlx-lm 0.32 `models/gemma3_text.py` and `gemma4_text.py`; transformers 4.51 for Gemma 3, and releases of
    transformers 5 without `per_layer_config` for Gemma 4. transformers 5.23 reads the keys by layer first.
    """
    kinds = config.get("layer_types") or []
    if config.get("model_type") == "gemma3_text" and "full_attention" in kinds:
        every = kinds.index("full_attention") + 1
        pattern = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(len(kinds))]
        return {"sliding_window_pattern": every} if kinds == pattern else {}
    by_layer = config.get("per_layer_config") or {}
    if config.get("model_type") != "gemma4_text" or not by_layer:
        return {}
    # `Gemma4TextConfig` makes one set of values for all layers of full attention.
    first = next(iter(by_layer.values()))
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return {older: first[name] for name, older in names.items() if name in first}


def complete_tokenizer_config(config: Keys, base: Keys) -> Keys:
    """A tokenizer_config.json that transformers 4 reads, with all that the base's has.

    Args:
        config: The tokenizer's config as transformers 5 saved it.
        base: That of the base, from which the tokenizer was loaded; empty if its tokens are others.

    Source: transformers 5.23 `tokenization_utils_base.save_pretrained`: it saves the class `TokenizersBackend`, which
    transformers 4.57 lacks, `extra_special_tokens` as a list, which 4.57 takes for a map, and no `add_bos_token`.
    """
    saved = {key: value for key, value in config.items() if key not in _OF_THE_PROCESS}
    if isinstance(saved.get("extra_special_tokens"), list):
        saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
    if named := saved.pop("model_specific_special_tokens", None):
        saved["extra_special_tokens"] = named
    name = saved.get("tokenizer_class")
    if name in (None, "TokenizersBackend"):
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif name == str(base.get("tokenizer_class")).removesuffix("Fast"):
        saved["tokenizer_class"] = base["tokenizer_class"]
    # The template is in a file of its own, which may be another than the base's.
    return {key: value for key, value in base.items() if key not in (*_OF_THE_PROCESS, "chat_template")} | saved


def drop_refused_settings(generation_config: Any) -> str:
    """Removes settings with which transformers refuses to save a generation config.

    They have no effect (a temperature without sampling) or no meaning (a padding token of -1).

    Args:
        generation_config: A `transformers.GenerationConfig`, which is changed.

    Returns:
        A line about the removed settings; empty if there are none.
    """
    from transformers import GenerationConfig

    accepted, refused = GenerationConfig(), []
    values = generation_config.to_diff_dict()
    for key in sorted(values, key=lambda name: name not in _MODES):
        setattr(accepted, key, values[key])
        try:
            accepted.validate(strict=True)
        except ValueError:
            refused.append(f"{key}: {values[key]}")
            setattr(accepted, key, None)
            setattr(generation_config, key, None)
    if not refused:
        return ""
    return f"generation_config.json: {', '.join(refused)} left out: transformers ignores it, and refuses to save it"
