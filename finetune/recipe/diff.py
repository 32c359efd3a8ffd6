"""Changes of a recipe between two starts of a run: logged, or refused where a checkpoint cannot be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import yaml

from finetune.recipe.load import Recipe
from finetune.recipe.schema import CONFIGS, DataSection, DataSource, ModelSection
from finetune.recipe.upstream_tables import config_class
from finetune.recipe.yaml_scalars import scalar_text
from finetune.recipe.yaml_tree import Section, Sections
from finetune.system.errors import RunError
from finetune.system.terminal import Say

# Changes that are not logged, because no number of the run depends on them.
_UNMENTIONED = {"training.output_dir", "training.resume_from_checkpoint", "training.disable_tqdm"}
# Every other key of model, lora and quantization decides what the numbers in a checkpoint mean.
_FREE = {"model.attn_implementation", "model.trust_remote_code", "lora.lora_dropout"}
_FIXED = {
    # The order of the rows, and where they end.
    *("seed", "data_seed", "train_sampling_strategy", "shuffle_dataset", "dataloader_drop_last"),
    *("max_length", "packing", "packing_strategy", "accelerator_config", "auto_find_batch_size"),
    # The optimizer's state of each weight.
    *("optim", "optim_args"),
}
# These schedules load their learning rate and options from the checkpoint, and cannot load another schedule's (torch
# 2.13, transformers 5.23); all others are computed from the step.
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
# Interchangeable in a resumed run. All other inits of peft 0.21 change the base, or freeze half of the adapter.
_ADAPTER_ONLY_INITS = (True, False, "gaussian", "orthogonal")
# Stands for a value from the environment of which only the digest is known.
_OTHER = "another value in the environment"
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


class Digests(TypedDict):
    """Digests of a recipe's values from the environment, by dotted key, by which a change of one is recognised.

    A checkpoint's `complete.json` holds them. Their values are saved nowhere; scrypt makes guesses expensive.
    """

    salt: str
    values: dict[str, str]


def digests(recipe: Recipe) -> Digests:
    """The digests of a recipe's values from the environment; secrets have none."""
    salt = secrets.token_hex(16)
    return {"salt": salt, "values": {key: _digest(v, salt) for key, v in recipe.environment_values().items()}}


def _digest(value: Any, salt: str) -> str:
    return hashlib.scrypt(json.dumps(value).encode(), salt=salt.encode(), n=2**14, r=8, p=1, dklen=16).hex()


def _values_then(known: Digests | None, recipe: Recipe) -> dict[str, Any]:
    """The values from the environment when the digests were made, by dotted key, as far as they are those of now."""
    then, now = recipe.environment_values(), recipe.sections()
    for key, digest in (known["values"] if known else {}).items():
        value = _value_at(now, key)
        then[key] = value if known and _digest(value, known["salt"]) == digest else _OTHER
    return then


def _value_at(value: Any, key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    for name in key.split("."):
        children = dict(zip(map(str, range(len(value))), value, strict=True)) if isinstance(value, list) else value
        value = children.get(name) if isinstance(children, dict) else None
    return value


def check_changes(
    saved: Path, recipe: Recipe, say: Say, same_rows: bool, processes: tuple[int, int], known: Digests | None = None
) -> None:
    """Logs what a recipe changed since the run began; refuses changes with which a checkpoint cannot be resumed.

    Args:
        saved: The run's `recipe.yaml`; without it nothing is checked.
        recipe: The recipe to resume with.
        say: Called with one line that lists all changes, if there are any.
        same_rows: True if the training rows are those of the run so far.
        processes: The number of processes when the checkpoint was written, and now.
        known: The digests of the run's values from the environment.

    Raises:
        RunError: A change is refused, or `saved` is damaged.
    """
    if not saved.is_file():
        return
    old, new = _old_and_new(saved, recipe, known)
    # Two methods have other keys in `training`.
    skipped = {"method"} if old["method"] == new["method"] else {"method", "training"}
    names = [name for name in old if name in new and name not in skipped]
    changes = {key: values for name in names for key, *values in _changed(old[name], new[name], name)}
    stateful = any(side["training"]["lr_scheduler_type"] in _STATEFUL_SCHEDULES for side in (old, new))

    def shown(key: str, value: Any) -> str:
        return _shown(recipe.templates.get(key, value))

    refused = {key for key, values in changes.items() if _is_refused(key, values, same_rows, stateful)}
    faults = _structural_faults(old, new, processes)
    # A refused key of these sections explains why the rows differ; otherwise the files themselves have changed.
    other_files = not same_rows and not any(key.startswith(("model.", "data.", "training.")) for key in refused)
    if other_files:
        # Evaluation rows are taken out of the training rows, so they may be the reason, too.
        refused |= {key for key in changes if key.startswith("data.eval")}
    faults = [
        *(f"{key} was {_shown(was)} and is {shown(key, now)}" for key, (was, now) in changes.items() if key in refused),
        *faults,
    ]
    cures = ["write the old values"] if faults else []
    if other_files:
        faults.append("the rows of data.train are not those that the run was trained on")
        cures.append("restore the old rows")
    if faults:
        raise RunError(
            f"training.resume_from_checkpoint: {'; '.join(faults)}, with which the checkpoint cannot be resumed; "
            f"{' and '.join(cures)}, or train anew in another training.output_dir"
        )
    changes |= {"processes": [*processes]} if processes[0] != processes[1] else {}
    mentioned = {key: values for key, values in changes.items() if key not in _UNMENTIONED}
    if mentioned:
        lines = (f"{key} {_shown(was)} -> {shown(key, now)}" for key, (was, now) in mentioned.items())
        say(f"resuming with changes: {'; '.join(lines)}")


def _old_and_new(saved: Path, recipe: Recipe, known: Digests | None) -> tuple[Sections, Sections]:
    """The sections of a run's `recipe.yaml`, and those of the recipe to resume with.

    Both are read from text, which has `${NAME}` in place of a secret: never shown, and not a change. Other values from
    the environment are compared by their digests.
    """
    new = _sections(recipe.to_yaml(), recipe.environment_values())
    try:
        old = _sections(saved.read_text(encoding="utf-8"), _values_then(known, recipe))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        cure = "restore the file that the run wrote, or train anew in another training.output_dir"
        raise RunError(f"{saved} is damaged: {' '.join(str(error).split())}; {cure}") from error
    if unknown := [f"training.{name}" for name in _BATCH if old["training"][name] == _OTHER]:
        raise RunError(
            f"training.resume_from_checkpoint: {unknown[0]} had {_OTHER}, with which the checkpoint cannot be resumed; "
            "set the variable as it was, or train anew in another training.output_dir"
        )
    return old, new


# A run's name and trackers, and what other commands read, change no number of a run.
_OF_NO_RUN = {"training.report_to", "training.run_name", "training.project", *_UNMENTIONED}


def recipe_changes(saved: Path, recipe: Recipe) -> list[str]:
    """The values with which a run was trained and that are others in a recipe, each as `KEY was X and is Y`.

    Args:
        saved: The run's `recipe.yaml`.
        recipe: The recipe to compare with.

    Raises:
        RunError: `saved` is damaged.
    """
    try:
        old, new = (
            _tree(yaml.compose(text, Loader=yaml.BaseLoader) or yaml.ScalarNode("", ""), {})
            for text in (saved.read_text(encoding="utf-8"), recipe.to_yaml())
        )
        old, new = ({k: v for k, v in side.items() if k not in ("export", "evaluate", "hub")} for side in (old, new))
    except (OSError, ValueError, AttributeError, AssertionError, RecursionError, yaml.YAMLError) as error:
        raise RunError(f"{saved} is damaged: {' '.join(str(error).split())}; restore it, or remove the run") from error
    changed = ((key.lstrip("."), was, now) for key, was, now in _changed(old, new, ""))
    return [f"{key} was {_shown(was)} and is {_shown(now)}" for key, was, now in changed if key not in _OF_NO_RUN]


def _structural_faults(old: Sections, new: Sections, processes: tuple[int, int]) -> list[str]:
    """Refused changes that are not of one key: a section that comes or goes, the rows of an optimizer step."""
    faults = []
    if old["method"] != new["method"]:
        faults.append(f"method was {old['method']['name']} and is {new['method']['name']}")
    for section in ("lora", "quantization"):
        if (section in old) != (section in new):
            was, now = ("given", "absent") if section in old else ("absent", "given")
            faults.append(f"{section} was {was} and is {now}")
    before, after = (
        [*(side["training"][name] for name in _BATCH), count] for side, count in zip((old, new), processes, strict=True)
    )
    if math.prod(before) != math.prod(after):
        step = f"{' x '.join(map(str, before))} = {math.prod(before)} rows and is {math.prod(after)}"
        faults.append(f"a step was {step} (training.{_BATCH[0]} x training.{_BATCH[1]} x processes)")
    return faults


def _is_refused(key: str, values: list[Any], same_rows: bool, stateful: bool) -> bool:
    section, name = key.split(".")[:2]
    if section == "early_stopping":
        return False
    if section == "data":
        return not same_rows and name != "eval"
    if section == "training":
        return name in _FIXED or (stateful and name in _SCHEDULE)
    if key == "lora.init_lora_weights":
        return any(value not in _ADAPTER_ONLY_INITS for value in values)
    return key not in _FREE


def _changed(was: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """The dotted key, old value and new value of each part that differs."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*was, *now]):
            yield from _changed(was.get(name), now.get(name), f"{key}.{name}")
    elif key in ("data.train", "data.eval") and was and now and len(was) == len(now):
        for i, (before, after) in enumerate(zip(was, now, strict=True)):
            yield from _changed(before, after, f"{key}.{i}")
    # As JSON, in which 1 is not true.
    elif json.dumps(was, sort_keys=True) != json.dumps(now, sort_keys=True):
        yield key, was, now


def _shown(value: Any) -> str:
    """A value on one line; a source by its path."""
    if value == _OTHER:
        return _OTHER
    if isinstance(value, dict) and "path" in value:
        return _shown(value["path"])
    if isinstance(value, dict):
        return f"{{{', '.join(f'{scalar_text(name)}: {_shown(child)}' for name, child in value.items())}}}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else scalar_text(value)


# ---------------------------------------------------------------------------------------------------------------
# Reading


def _sections(text: str, values: Mapping[str, Any] = MappingProxyType({})) -> Sections:
    """The sections of a resolved recipe that concern training, with upstream's defaults filled in.

    Args:
        text: The recipe.
        values: The values in place of `${NAME}`, by dotted key.

    Raises:
        ValueError, yaml.YAMLError: No run can have written the text.
    """
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from transformers.trainer_pt_utils import AcceleratorConfig

    root = yaml.compose(text, Loader=yaml.BaseLoader)
    tree = _tree(root, values) if root else None
    method = tree.get("method", "sft") if isinstance(tree, dict) else "sft"
    if not isinstance(method, str) or method not in CONFIGS:
        raise ValueError(f"its method is {method}")
    owners: dict[str, Any] = {"model": ModelSection, "data": DataSection, "training": config_class(method)}
    if not isinstance(tree, dict) or not tree.keys() >= owners.keys():
        raise ValueError(f"it lacks one of the sections {', '.join(owners)}")
    owners |= {"lora": LoraConfig, "quantization": BitsAndBytesConfig}
    sections = {name: _filled(name, tree[name], owner) for name, owner in owners.items() if tree.get(name) is not None}
    for name in ("train", "eval"):
        sources = sections["data"][name]
        if not isinstance(sources, list):
            raise ValueError(f"data.{name} is not a list")
        sections["data"][name] = [_filled(f"data.{name}", source, DataSource) for source in sources]
    training = sections["training"]
    if method == "dpo" and isinstance(training["loss_type"], str):
        training["loss_type"] = [training["loss_type"]]  # as DPOConfig does
    accelerator = training["accelerator_config"] or {}
    if isinstance(accelerator, dict):  # not the path of a file
        training["accelerator_config"] = _filled("training.accelerator_config", accelerator, AcceleratorConfig)
    if not all(isinstance(training[name], int) or training[name] == _OTHER for name in _BATCH):
        raise ValueError(f"training.{' or training.'.join(_BATCH)} is not a number")
    if "quantization" in sections and "bnb_4bit_compute_dtype" not in tree["quantization"]:
        sections["quantization"]["bnb_4bit_compute_dtype"] = "model.dtype"  # null is float32
    plain: Sections = _plain(sections)
    return plain | {"method": {"name": method}, "early_stopping": tree.get("early_stopping") or {}}


def _filled(name: str, values: Any, owner: Callable[..., Any]) -> Section:
    """Values, and the defaults of the parameters of `owner` that are not among them."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a map")
    defaults = {key: parameter.default for key, parameter in inspect.signature(owner).parameters.items()}
    made = dataclasses.fields(owner) if isinstance(owner, type) and dataclasses.is_dataclass(owner) else ()
    defaults |= {field.name: field.default_factory() for field in made if callable(field.default_factory)}
    return defaults | values


def _tree(node: yaml.Node, values: Mapping[str, Any], key: str = "") -> Any:
    """The values that `Recipe.to_yaml` wrote: unquoted scalars are JSON or text; `values` as in `_sections`."""
    if isinstance(node, yaml.MappingNode):
        entries = ((str(name.value), child) for name, child in node.value)
        return {name: _tree(child, values, f"{key}.{name}".lstrip(".")) for name, child in entries}
    if isinstance(node, yaml.SequenceNode):
        return [_tree(child, values, f"{key}.{i}") for i, child in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if key in values and "${" in node.value:
        return values[key]
    try:
        return node.value if node.style else json.loads(node.value)
    except ValueError:
        return node.value


def _plain(value: Any) -> Any:
    """A value in the form that is compared: enums by value, whole floats as ints, empty as None."""
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()} or None
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value] or None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float) else None
