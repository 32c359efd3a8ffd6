"""A checkpoint on disk against the model in memory: which tensor becomes which, in what type, tied, fused or quantised.

transformers renames tensors when it loads them, fuses experts that are stored singly and ties embeddings. It is asked,
with a model on the meta device, so that nothing is guessed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finetune.merge.adapter import Change
from finetune.model.shards import StoredTensor
from finetune.system.errors import MergeError
from finetune.system.terminal import quiet

if TYPE_CHECKING:
    from finetune.recipe.schema import ModelSection


@dataclass
class OutputTensor:
    """A tensor of the checkpoint to write, from the one of the base called `source`."""

    name: str
    source: str
    held: torch.dtype
    """What the run held it in."""
    written: torch.dtype
    changes: list[Change] = field(default_factory=list)
    quantised: str = ""
    """Of a base or an export in 4 or 8 bit: "linear", or "conv1d", which is turned before it is quantised."""


@dataclass
class FusedTensors:
    """Tensors that are stored one by one and are one parameter in memory, of which an adapter changes something."""

    sources: dict[str, list[str]]
    """By the converter's pattern: names on disk, in the order of the converter."""
    stored_as: dict[str, str]
    """Names that the reversed converter gives, to names on disk."""
    target: str
    converter: Any
    config: Any
    held: torch.dtype
    written: torch.dtype
    changes: dict[str, list[Change]]
    """By name in memory."""


def skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, dict[str, torch.dtype]]:
    """The model without weights, and the type in which `from_pretrained` would hold each of its tensors.

    Source: transformers 5.23 `core_model_loading.convert_and_load_state_dict_in_model`, "Handle dtype casting".
    """
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import build_glob_alternation

    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    special = model._get_dtype_plan(dtype)
    pattern, groups, _ = build_glob_alternation(list(special)) if special else (re.compile("(?!)"), {}, None)
    types = {}
    for name, tensor in model.state_dict().items():
        match = pattern.search(name)
        types[name] = special[groups[match.lastgroup]] if match else tensor.dtype
    return model, types


class TensorNames:
    """Names on disk and in memory, by transformers' own rules for this model.

    Source: transformers 5.23 `core_model_loading.convert_and_load_state_dict_in_model`, "Rename the key".
    """

    def __init__(self, model: Any, stored: dict[str, StoredTensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_renamings,
            rename_source_key,
        )

        self.state = model.state_dict()
        self.parameters = {name for name, _ in model.named_parameters()}
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

        def rename(name: str) -> tuple[str, str | None]:
            new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, self.state)
            if new not in self.state and name in self.state:
                new, pattern = rename_source_key(name, [], [], model.base_model_prefix, self.state)
            return new, pattern

        def halfway(name: str) -> str:
            return str(apply_renamings(name, renamings))

        self.rename, self.halfway = rename, halfway
        self.converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        self.config = model.config
        self.one: dict[str, str] = {}  # in memory -> on disk
        self.many: dict[str, list[tuple[str, str]]] = defaultdict(
            list
        )  # first in memory -> (pattern, on disk)
        from transformers.core_model_loading import dot_natural_key

        for name in sorted(stored, key=dot_natural_key):
            new, pattern = rename(name)
            if new not in self.state:
                continue  # of another head of the same checkpoint; it is copied
            if pattern is None:
                if stored[name].shape != tuple(self.state[new].shape):
                    raise MergeError(
                        f"{name} of the base is {list(stored[name].shape)}, where its config.json makes "
                        f"{list(self.state[new].shape)}: the weights and the config are of two models"
                    )
                self.one[new] = name
            else:
                self.many[new].append((pattern, name))

    def targets(self, first: str) -> list[str]:
        """All parameters in memory that a converter makes where `first` is the first."""
        converter = self.converter_of[self.many[first][0][0]]
        targets = converter.target_patterns
        return [first, *(first.replace(targets[0], other) for other in targets[1:])]

    def on_disk(self, name: str, like: str) -> str:
        """The name under which a parameter that the base does not store is to be stored, so that it is found again."""
        beside = self.one[like]
        for end in range(len(like)):
            if beside.endswith(like[end:]) and (prefix := beside[: len(beside) - len(like[end:])]):
                candidate = prefix + name
                if self.rename(candidate) == (name, None):
                    return candidate
                break
        if self.rename(name) == (name, None):
            return name
        raise MergeError(f"{name} has to be stored apart, but no name on disk leads to it")


def quantised_weights(
    config: Any, section: ModelSection, held: torch.dtype, quantization: dict[str, Any] | None
) -> dict[str, str]:
    """The weights that bitsandbytes would quantise, by name in memory."""
    if not quantization or not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        return {}
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import AutoHfQuantizer

    model, _ = skeleton(config, held, section.trust_remote_code)
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**quantization), pre_quantized=False)
    with quiet():
        quantizer.preprocess_model(model=model, dtype=held, device_map={"": "cpu"})
    return {
        f"{name}.weight": "conv1d" if module.source_cls is Conv1D else "linear"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }


def plan_tensors(
    stored: dict[str, StoredTensor],
    names: TensorNames,
    changes: dict[str, list[Change]],
    follows: set[str],
    tied: dict[str, str],
    types: dict[str, torch.dtype],
    out_types: dict[str, torch.dtype],
    quantised: dict[str, str],
    whole: tuple[torch.dtype, torch.dtype],
) -> tuple[list[OutputTensor], list[FusedTensors], bool]:
    """Every tensor to write, in the order in which the base stores them."""
    untied: dict[str, OutputTensor] = {}
    aliases, apart = set(), False
    for name, source in tied.items():
        if not (changes.get(name) or changes.get(source)):
            continue
        if name in follows:
            changes[name] = changes[source] if name in names.one else []
            aliases.add(name)
            continue
        # Only one side was trained, or each by itself: from here on they are two.
        apart = True
        if name not in names.one and source in names.one:
            aliases.add(name)
            untied[names.one[source]] = OutputTensor(
                names.on_disk(name, source),
                names.one[source],
                types[name],
                out_types[name],
                changes.get(name, []),
            )
    known = set(names.one) | aliases
    for first in names.many:
        known.update(names.targets(first))
    for name in changes:
        if name not in known:
            raise MergeError(f"{name} is trained by the adapter, but no file of the base holds it")
    missing = sorted(names.parameters - known - set(tied))
    if missing:
        raise MergeError(
            f"the base's files do not hold {missing[0]} (and {len(missing) - 1} more): they are of another model"
        )

    tensors, fused = [], []
    in_memory = {disk: name for name, disk in names.one.items()}
    done: set[str] = set()
    group_of = {disk: first for first, entries in names.many.items() for _, disk in entries}
    for disk, entry in stored.items():
        if disk in in_memory:
            name = in_memory[disk]
            tensors.append(
                OutputTensor(
                    disk, disk, types[name], out_types[name], changes.get(name, []), quantised.get(name, "")
                )
            )
            if disk in untied:
                tensors.append(untied[disk])
        elif disk in group_of and any(changes.get(name) for name in names.targets(group_of[disk])):
            first = group_of[disk]
            if first not in done:
                done.add(first)
                fused.append(_fuse(first, names, changes, types, out_types))
        else:
            # Stored otherwise than held, or not of this model: copied, in the types of all.
            floats = entry.dtype in (torch.float32, torch.float16, torch.bfloat16)
            held, written = whole if floats else (entry.dtype, entry.dtype)
            tensors.append(OutputTensor(disk, disk, held, written))
    for item in tensors:
        if not stored[item.source].dtype.is_floating_point:
            item.held = item.written = stored[item.source].dtype
    return tensors, fused, apart


def _fuse(
    first: str,
    names: TensorNames,
    changes: dict[str, list[Change]],
    types: dict[str, torch.dtype],
    out_types: dict[str, torch.dtype],
) -> FusedTensors:
    sources: dict[str, list[str]] = defaultdict(list)
    for pattern, disk in names.many[first]:
        sources[pattern].append(disk)
    return FusedTensors(
        sources=dict(sources),
        stored_as={names.halfway(disk): disk for _, disk in names.many[first]},
        target=first,
        converter=names.converter_of[names.many[first][0][0]],
        config=names.config,
        held=types[first],
        written=out_types[first],
        changes={name: changes.get(name, []) for name in names.targets(first)},
    )
