"""What a recipe changed since its run began: told, or refused where going on from a checkpoint would mean nothing."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe.load import Recipe
from finetune.recipe.schema import DataSection, DataSource, ModelSection
from finetune.recipe.yaml_tree import scalar_text
from finetune.system.errors import RunError
from finetune.system.terminal import Say

Sections = dict[str, dict[str, Any]]

# This start's own, which no number of the run depends on.
_NO_MATTER = {"training.output_dir", "training.resume_from_checkpoint", "training.disable_tqdm"}
# Of model, lora and quantization every other key decides what the numbers in a checkpoint mean.
_FREE = {"model.attn_implementation", "model.trust_remote_code", "lora.lora_dropout"}
_FIXED = {
    # The order of the rows, and where they end.
    *("seed", "data_seed", "train_sampling_strategy", "shuffle_dataset", "dataloader_drop_last"),
    *("max_length", "packing", "packing_strategy", "accelerator_config", "auto_find_batch_size"),
    # What the optimizer keeps of each weight.
    *("optim", "optim_args", "optim_target_modules"),
}
# These schedules take their rate and options from the checkpoint, and cannot read another's (torch 2.13, transformers
# 5.23); all others are computed from the step alone.
_KEEP_RATE = ("reduce_lr_on_plateau", "greedy")
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
# All other inits of peft 0.21 change the base too, or leave half of the adapter untrained.
_ADAPTER_ALONE = (True, False, "gaussian", "orthogonal")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def check_changes(saved: Path, recipe: Recipe, say: Say, same_rows: bool, processes: tuple[int, int]) -> None:
    """Says what a recipe changed since the run began; refuses what would make going on meaningless.

    Args:
        saved: The resolved recipe of the run so far; where there is none, nothing is known and nothing is said.
        recipe: The recipe that the run is to go on with.
        say: Takes one line with all changes; not called where there are none.
        same_rows: Whether the rows that are trained on are those of the run so far.
        processes: How many the run had when the checkpoint was written, and how many it has now.

    Raises:
        RunError: The checkpoint cannot go on with what has changed, or `saved` is damaged.
    """
    if not saved.is_file():
        return
    # Through its own text, in which a secret stands by the name of its variable: never shown, and no change.
    new = _sections(recipe.to_yaml())
    try:
        old = _sections(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        cure = "put back the one that the run wrote, or train anew in another training.output_dir"
        raise RunError(f"{saved} is damaged: {' '.join(str(error).split())}; {cure}") from error

    changes = {
        key: values for name in old if name in new for key, *values in _changed(old[name], new[name], name)
    }
    keeps_rate = any(side["training"]["lr_scheduler_type"] in _KEEP_RATE for side in (old, new))
    refused = {key for key, values in changes.items() if _is_refused(key, values, same_rows, keeps_rate)}
    faults = []
    for section in ("lora", "quantization"):
        if (section in old) != (section in new):
            was, now = ("given", "absent") if section in old else ("absent", "given")
            faults.append(f"{section} was {was} and is {now}")
    before, after = (
        [*(side["training"][name] for name in _BATCH), count]
        for side, count in zip((old, new), processes, strict=True)
    )
    if math.prod(before) != math.prod(after):
        step = f"{' x '.join(map(str, before))} = {math.prod(before)} rows and is {math.prod(after)}"
        faults.append(f"a step was {step} (training.{_BATCH[0]} x training.{_BATCH[1]} x processes)")

    # Where such a key is refused, it may be what made the rows others.
    others = not same_rows and not any(key.startswith(("model.", "data.", "training.")) for key in refused)
    if others:  # so may what is evaluated on, which is not trained on
        refused |= {key for key in changes if key.startswith("data.eval")}
    told = [
        f"{key} was {_shown(was)} and is {_shown(now)}"
        for key, (was, now) in changes.items()
        if key in refused
    ]
    told += faults
    cures = ["write the old values"] if told else []
    if others:
        told.append("the rows of data.train are not those that the run was trained on")
        cures.append("put the old rows back")
    if told:
        raise RunError(
            f"training.resume_from_checkpoint: {'; '.join(told)}, which the checkpoint cannot go on with; "
            f"{' and '.join(cures)}, or train anew in another training.output_dir"
        )
    changes |= {"processes": [*processes]} if processes[0] != processes[1] else {}
    named = [
        f"{key} {_shown(was)} -> {_shown(now)}"
        for key, (was, now) in changes.items()
        if key not in _NO_MATTER
    ]
    if named:
        say(f"going on with changes: {'; '.join(named)}")


def _is_refused(key: str, values: list[Any], same_rows: bool, keeps_rate: bool) -> bool:
    section, name = key.split(".")[:2]
    if section == "data":
        return not same_rows and name != "eval"
    if section == "training":
        return name in _FIXED or (keeps_rate and name in _SCHEDULE)
    if key == "lora.init_lora_weights":
        return any(value not in _ADAPTER_ALONE for value in values)
    return key not in _FREE


def _changed(was: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Each part that is another: its dotted key, what it was, what it is."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*was, *now]):
            yield from _changed(was.get(name), now.get(name), f"{key}.{name}")
    elif key in ("data.train", "data.eval") and was and now and len(was) == len(now):
        for i, (before, after) in enumerate(zip(was, now, strict=True)):
            yield from _changed(before, after, f"{key}.{i}")
    # As text, in which 1 is not true.
    elif json.dumps(was, sort_keys=True) != json.dumps(now, sort_keys=True):
        yield key, was, now


def _shown(value: Any) -> str:
    """A value on one line; sources by their paths."""
    if isinstance(value, dict) and "path" in value:
        return _shown(value["path"])
    if isinstance(value, dict):
        return f"{{{', '.join(f'{scalar_text(name)}: {_shown(child)}' for name, child in value.items())}}}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else scalar_text(value)


# ---------------------------------------------------------------------------------------------------------------
# Reading


def _sections(text: str) -> Sections:
    """The sections of a resolved recipe that bear on training, with nothing left out.

    Raises:
        ValueError, yaml.YAMLError: No run wrote it.
    """
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from transformers.trainer_pt_utils import AcceleratorConfig
    from trl import SFTConfig

    root = yaml.compose(text, Loader=yaml.BaseLoader)
    tree = _tree(root) if root else None
    owners: dict[str, Any] = {"model": ModelSection, "data": DataSection, "training": SFTConfig}
    if not isinstance(tree, dict) or not tree.keys() >= owners.keys():
        raise ValueError(f"it lacks one of the sections {', '.join(owners)}")
    owners |= {"lora": LoraConfig, "quantization": BitsAndBytesConfig}
    sections = {name: _filled(name, tree[name], owner) for name, owner in owners.items() if name in tree}
    for name in ("train", "eval"):
        sources = sections["data"][name]
        if not isinstance(sources, list):
            raise ValueError(f"data.{name} is no list")
        sections["data"][name] = [_filled(f"data.{name}", source, DataSource) for source in sources]
    training = sections["training"]
    found = training["accelerator_config"] or {}
    if isinstance(found, dict):  # and not the name of a file
        training["accelerator_config"] = _filled("training.accelerator_config", found, AcceleratorConfig)
    if not all(isinstance(training[name], int) for name in _BATCH):
        raise ValueError(f"training.{' or training.'.join(_BATCH)} is no number")
    if "quantization" in sections and "bnb_4bit_compute_dtype" not in tree["quantization"]:
        sections["quantization"]["bnb_4bit_compute_dtype"] = "model.dtype"  # null is float32
    plain: Sections = _plain(sections)
    return plain


def _filled(name: str, values: Any, owner: Callable[..., Any]) -> dict[str, Any]:
    """Values, and the defaults of what is not among them."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is no map")
    return {key: found.default for key, found in inspect.signature(owner).parameters.items()} | values


def _tree(node: yaml.Node) -> Any:
    """The values that `Recipe.to_yaml` wrote: a plain scalar is JSON's, or text; `${NAME}` stays as it is."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _tree(child) for key, child in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_tree(child) for child in node.value]
    assert isinstance(node, yaml.ScalarNode)
    try:
        return node.value if node.style else json.loads(node.value)
    except ValueError:
        return node.value


def _plain(value: Any) -> Any:
    """A value in the form that it is compared in; what is empty, or no value at all, is None."""
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()} or None
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value] or None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float) else None
