"""Puts a saved adapter on its base as PEFT does, and refuses one of which PEFT would use only a part, or nothing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.model.patterns import check_patterns
from finetune.system.errors import ModelError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, git_lfs_pointer, read_json
from finetune.system.terminal import quiet


def base_of(model: Any) -> Any:
    """The model under its adapter; the model itself if it has none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """The `peft.PeftModel` of a base and a saved adapter, all of whose tensors are in use.

    PEFT 0.21 only warns of missing tensors, and ignores unknown ones: an adapter of another model leaves the base as it
    is.

    Args:
        model: The base, which is changed.
        folder: The adapter's folder.
        trainable: True if the adapter is to be trained further.

    Raises:
        ModelError: The adapter cannot be read, or is of another base.
        RunError: Its config is damaged.
    """
    import peft

    check_adapter_files(folder)
    refuse_later_options(folder)
    check_patterns(read_json(folder / ADAPTER_CONFIG), model, f"{folder / ADAPTER_CONFIG}: ")
    try:
        with without_warnings():
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
            result = peft.set_peft_model_state_dict(wrapped, peft_weights(model, folder))
    except KeyError as error:
        raise ModelError(f"{folder} is of another base, or damaged: it lacks {error.args[0]}") from error
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"{folder} does not fit the base: {lines[-1] if lines else error}") from error
    if problem := misfit(result.missing_keys, result.unexpected_keys):
        raise ModelError(f"{folder} {problem}")
    return wrapped


def peft_weights(model: Any, folder: Path) -> dict[str, Any]:
    """The tensors of an adapter under the names that PEFT reads them by, as its `from_pretrained` gets them."""
    from peft import load_peft_weights

    weights: dict[str, Any] = load_peft_weights(
        str(folder), device="cpu", key_mapping=getattr(model, "_checkpoint_conversion_mapping", {})
    )
    return weights


def misfit(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """The problem of an adapter with these keys in the result of `set_peft_model_state_dict`; empty if it fits.

    Args:
        missing: All names that were not in the adapter's file; only those of the adapter count.
        unexpected: Names in the file that the model with its adapter does not have.
    """
    # Where a whole module or a token row is missing, PEFT raises KeyError; rows of tied embeddings are saved once.
    absent = sorted(key for key in missing if "lora_" in key and "default" in key.split("."))
    # PEFT 0.21 saves a module of `modules_to_save` three times with `save_embedding_layers`, and reads it once.
    if unknown := sorted(key for key in unexpected if ".modules_to_save." not in key):
        return f"is of another base: it holds {unknown[0].replace('.default', '')}, which is no part of this one"
    return f"is of another base, or damaged: it lacks {absent[0].replace('.default', '')}" if absent else ""


def check_adapter_files(folder: Path) -> None:
    """Checks that the files of an adapter are PEFT's, and whole.

    Raises:
        ModelError: They are of another tool, a pickle, in several files, or pointers of Git LFS.
        RunError: The config is damaged.
    """
    if pointer := git_lfs_pointer(folder):
        raise ModelError(f"{pointer} is a pointer of Git LFS; run git lfs pull beside it")
    config = read_json(folder / ADAPTER_CONFIG)
    if "fine_tune_type" in config or "lora_parameters" in config:
        raise ModelError(
            f"{folder} is an adapter of mlx-lm, not of PEFT; merge it there with mlx_lm.fuse --dequantize, and use the "
            "merged model"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder} holds {_instead_of_weights(folder)}")


def _instead_of_weights(folder: Path) -> str:
    """The words for what a folder holds in place of `adapter_model.safetensors`."""
    if parts := sorted(folder.glob("adapter_model-*-of-*.safetensors")):
        return f"the adapter in {len(parts)} files, which PEFT does not read; save it as one {ADAPTER_WEIGHTS}"
    if (folder / "adapter_model.bin").exists():
        pickle = "only adapter_model.bin, a pickle, which can run code when it is read"
        return f"{pickle}; an adapter must be saved as {ADAPTER_WEIGHTS}"
    return f"no {ADAPTER_WEIGHTS}; an adapter must be saved as {ADAPTER_WEIGHTS}"


def refuse_later_options(folder: Path) -> None:
    """Refuses an adapter with an option that the installed PEFT does not know, and that is on.

    Raises:
        ModelError: It has one: PEFT would leave it out with a warning, and the results would differ.
        RunError: The config is damaged.

    Source: peft 0.21 `config.py`, `PeftConfigMixin.from_peft_type`.
    """
    import dataclasses

    from peft import LoraConfig

    config = read_json(folder / ADAPTER_CONFIG)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name, value in config.items() if config.get("peft_type") == "LORA" else ():
        if name not in known and value not in (None, False, "", 0, [], {}):
            raise ModelError(
                f"{folder / ADAPTER_CONFIG}: {name} is {json.dumps(value)}, an option that the installed PEFT does not "
                "know, and without which the results differ; install the PEFT that wrote it"
            )


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keeps PEFT's warnings and log lines from the terminal where its result is checked."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
