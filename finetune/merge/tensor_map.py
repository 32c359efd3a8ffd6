"""The tensors of a checkpoint on disk and those of the model in memory: names, types, ties, fused and quantised ones.

transformers renames tensors when it loads them, fuses experts that are stored one by one, and ties embeddings. All
of this is read from transformers, with a model on the meta device.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.merge.changes import Change
from finetune.model import compressed, mlx
from finetune.model.quantization import COMPRESSED, MLX
from finetune.model.shards import Dtype, StoredTensor
from finetune.system.errors import MergeError
from finetune.system.terminal import quiet

if TYPE_CHECKING:
    from finetune.recipe.schema import ModelSection


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Attributes:
        name: Its name on disk.
        source: The name of the base's tensor that it is made from.
        held: The dtype that the run held it in.
        written: The dtype to write it in.
        changes: What the adapters change.
        quantised: "linear" or "conv1d" (which is transposed before it is quantised) for a weight that is quantised in
            a 4- or 8-bit base or export; else empty.
    """

    name: str
    source: str
    held: Dtype
    written: Dtype
    changes: list[Change]
    quantised: str = ""


@dataclass(frozen=True)
class FusedTensors:
    """Tensors that are stored one by one and fused to one parameter in memory, which an adapter changes.

    Attributes:
        sources: The names on disk by the converter's pattern, in the converter's order.
        stored_as: The name on disk by the name that the reversed converter gives.
        target: The parameter's name in memory, or the first one's if the converter makes several.
        held: The dtype that the run held it in.
        written: The dtype to write it in.
        changes: What the adapters change, by the name in memory.
    """

    sources: dict[str, list[str]]
    stored_as: dict[str, str]
    target: str
    held: Dtype
    written: Dtype
    changes: dict[str, list[Change]]


@dataclass(frozen=True)
class TensorTypes:
    """The types in which `from_pretrained(dtype=default)` holds a model's tensors, by the name in memory."""

    by_name: dict[str, torch.dtype]
    default: torch.dtype


def skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, TensorTypes]:
    """A model on the meta device, and the types in which `from_pretrained` would hold its tensors.

    Args:
        config: The model's config.
        dtype: The type that `from_pretrained` is given.
        trust_remote_code: Whether the model's own code may run.

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
    return model, TensorTypes(types, dtype)


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """The `WeightRenaming`s and `WeightConverter`s with which transformers loads a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    renamings, converters = (
        [entry for entry in mapping if isinstance(entry, kind)] for kind in (WeightRenaming, WeightConverter)
    )
    return renamings, converters


def weight_converters(model: Any) -> dict[str, Any]:
    """The `WeightConverter`s with which transformers loads a model, by their source patterns."""
    return {pattern: entry for entry in _conversions(model)[1] for pattern in entry.source_patterns}


class TensorNames:
    """The names of a checkpoint's tensors on disk and in memory, by transformers' rules for the model.

    Args:
        model: The model on the meta device.
        stored: The checkpoint's tensors.

    Attributes:
        on_disk_of: The name on disk by the name in memory.
        fused: For the first parameter that a fused tensor is split into, by its name in memory: the pattern of the
            rule and the tensor's name on disk.
        tied: For each tied tensor the name of the tensor whose weights it shares.

    Raises:
        MergeError: A tensor has another shape than the model's config gives it.

    Source: transformers 5.23 `core_model_loading.convert_and_load_state_dict_in_model`, "Rename the key".
    """

    def __init__(self, model: Any, stored: Mapping[str, StoredTensor]) -> None:
        from transformers.core_model_loading import dot_natural_key

        self.stored, self.state, self.prefix = stored, model.state_dict(), model.base_model_prefix
        self.parameters = {name for name, _ in model.named_parameters()}
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self.renamings, self.converters = _conversions(model)
        self.converter_of = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        self.on_disk_of: dict[str, str] = {}
        self.fused: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in sorted(stored, key=dot_natural_key):
            in_memory, pattern = self._in_memory(name)
            if in_memory not in self.state:
                continue  # the tensor belongs to another head of the checkpoint; it is copied
            if pattern is not None:
                self.fused[in_memory].append((pattern, name))
                continue
            if stored[name].shape != tuple(self.state[in_memory].shape):
                raise MergeError(
                    f"{name} of the base is {list(stored[name].shape)}, where its config.json makes "
                    f"{list(self.state[in_memory].shape)}: the weights and the config are of two models"
                )
            self.on_disk_of[in_memory] = name

    def _in_memory(self, name: str) -> tuple[str, str | None]:
        """The name in memory of a tensor on disk, and the pattern of the converter that takes it."""
        from transformers.core_model_loading import rename_source_key

        found: tuple[str, str | None]
        found = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        if found[0] not in self.state and name in self.state:
            found = rename_source_key(name, [], [], self.prefix, self.state)
        return found

    def fused_names(self, first: str) -> list[str]:
        """The names in memory of all parameters that a converter makes, of which `first` is the first."""
        patterns = self.converter_of[self.fused[first][0][0]].target_patterns
        return [first, *(first.replace(patterns[0], other) for other in patterns[1:])]

    def new_name_on_disk(self, name: str, like: str) -> str:
        """The name on disk for a parameter that the base does not store, so that transformers finds it.

        Args:
            name: The parameter's name in memory.
            like: The name in memory of a parameter that is stored, whose prefix is tried first.

        Raises:
            MergeError: No name leads to the parameter.
        """
        stored_like = self.on_disk_of[like]
        for end in range(len(like)):
            if stored_like.endswith(like[end:]) and (prefix := stored_like[: len(stored_like) - len(like[end:])]):
                if self._in_memory(prefix + name) == (name, None):
                    return prefix + name
                break
        if self._in_memory(name) == (name, None):
            return name
        raise MergeError(f"{name} must become a tensor of its own, but transformers loads it from no name on disk")


def quantised_weights(
    model: Any, config: Any, section: ModelSection, held: torch.dtype, quantization: dict[str, Any] | None
) -> dict[str, str]:
    """The weights to quantise, by name in memory: "linear" or "conv1d".

    Args:
        model: The model on the meta device; it is not changed.
        config: Its config.
        section: The recipe's `model` section.
        held: The type of the model's other weights.
        quantization: As `finetune.model.quantization.quantise` takes it; None quantises nothing.
    """
    if quantization and {COMPRESSED, MLX} & quantization.keys():
        kind, bits = quantization.get(COMPRESSED), quantization.get(MLX, 16)
        layers = compressed.quantised_layers(model, kind) if kind else mlx.quantised_layers(model) if bits < 16 else []
        return {f"{name}.weight": "linear" for name in layers}
    if not quantization or not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        return {}
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import AutoHfQuantizer

    model, _ = skeleton(config, held, section.trust_remote_code)  # bitsandbytes changes it
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**quantization), pre_quantized=False)
    with quiet():
        quantizer.preprocess_model(model=model, dtype=held, device_map={"": "cpu"})
    return {
        f"{name}.weight": "conv1d" if module.source_cls is Conv1D else "linear"
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }


def plan_tensors(
    names: TensorNames,
    changes: Mapping[str, list[Change]],
    follows: set[str],
    held: TensorTypes,
    written: TensorTypes,
    quantised: Mapping[str, str],
) -> tuple[list[OutputTensor], list[FusedTensors], bool]:
    """The tensors to write, in the order in which the base stores them.

    Args:
        names: The base's tensors.
        changes: What the adapters change, by name in memory.
        follows: Tied tensors that take over the changes of the tensor that they are tied to.
        held: The types in which the run held the model.
        written: The types in which it is written.
        quantised: As `quantised_weights` returns them.

    Returns:
        The tensors; those that are fused in memory and changed; True if tied embeddings are stored apart.

    Raises:
        MergeError: A changed tensor, or another tensor of the model, is not in the base's files.
    """
    ties = _resolve_ties(names, changes, follows, held, written)
    _check_complete(names, ties)
    in_memory = {disk: name for name, disk in names.on_disk_of.items()}
    first_of = {disk: first for first, entries in names.fused.items() for _, disk in entries}
    tensors: list[OutputTensor] = []
    fused: dict[str, FusedTensors] = {}
    for disk, entry in names.stored.items():
        name, first = in_memory.get(disk), first_of.get(disk)
        if first is not None and any(ties.changes.get(target) for target in names.fused_names(first)):
            if first not in fused:
                fused[first] = _fused_tensors(first, names, ties.changes, held, written)
            continue
        if not entry.dtype.is_floating_point:
            types = (entry.dtype, entry.dtype)
        elif name is not None:
            types = (held.by_name[name], written.by_name[name])
        elif entry.dtype in (torch.float32, torch.float16, torch.bfloat16):
            # Copied: it is fused in memory and not changed, or it does not belong to this model.
            types = (held.default, written.default)
        else:
            types = (entry.dtype, entry.dtype)
        its_changes = ties.changes.get(name, []) if name is not None else []
        tensors.append(OutputTensor(disk, disk, *types, its_changes, quantised.get(name or "", "")))
        tensors += ties.stored_apart.get(disk, [])
    return tensors, list(fused.values()), ties.untied


@dataclass(frozen=True)
class _Ties:
    """The tied tensors of a checkpoint, and how each is written.

    Attributes:
        changes: All changes by name in memory, with those that tied tensors take over.
        stored_apart: Tensors that the base does not store, by the name on disk of the one that they were tied to.
        known: The names in memory of tied tensors that need no tensor of the base's files.
        untied: True if tied tensors become two stored tensors.
    """

    changes: dict[str, list[Change]]
    stored_apart: dict[str, list[OutputTensor]]
    known: set[str]
    untied: bool


def _resolve_ties(
    names: TensorNames, changes: Mapping[str, list[Change]], follows: set[str], held: TensorTypes, written: TensorTypes
) -> _Ties:
    """Decides for each tied tensor that is changed: it takes over the other's changes, or becomes a separate tensor."""
    result = dict(changes)
    stored_apart: dict[str, list[OutputTensor]] = defaultdict(list)
    known, untied = set(), False
    for name, source in names.tied.items():
        if not (result.get(name) or result.get(source)):
            continue
        if name in follows:
            result[name] = result.get(source, []) if name in names.on_disk_of else []
            known.add(name)
            continue
        # Only one of the two was trained, or each by itself.
        untied = True
        if name not in names.on_disk_of and source in names.on_disk_of:
            known.add(name)
            disk = names.on_disk_of[source]
            types = (held.by_name[name], written.by_name[name])
            new_name = names.new_name_on_disk(name, source)
            stored_apart[disk].append(OutputTensor(new_name, disk, *types, result.get(name, [])))
    return _Ties(result, stored_apart, known, untied)


def _check_complete(names: TensorNames, ties: _Ties) -> None:
    """Refuses files of a base that lack a changed tensor or one of the model's parameters."""
    known = set(names.on_disk_of) | ties.known
    for first in names.fused:
        known.update(names.fused_names(first))
    for name in ties.changes:
        if name not in known:
            raise MergeError(f"{name} is trained by the adapter, but no file of the base holds it")
    missing = sorted(names.parameters - known - set(names.tied))
    if missing:
        raise MergeError(
            f"the base's files do not hold {missing[0]} (and {len(missing) - 1} more): they are of another model"
        )


def _fused_tensors(
    first: str, names: TensorNames, changes: Mapping[str, list[Change]], held: TensorTypes, written: TensorTypes
) -> FusedTensors:
    """The tensors on disk that make the parameter `first`, and those that are made with it."""
    from transformers.core_model_loading import apply_renamings

    sources: dict[str, list[str]] = defaultdict(list)
    for pattern, disk in names.fused[first]:
        sources[pattern].append(disk)
    return FusedTensors(
        sources=dict(sources),
        stored_as={str(apply_renamings(disk, names.renamings)): disk for _, disk in names.fused[first]},
        target=first,
        held=held.by_name[first],
        written=written.by_name[first],
        changes={name: changes.get(name, []) for name in names.fused_names(first)},
    )
