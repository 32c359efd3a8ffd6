"""Plans a merge or an export: where the base is, what adapters change, every tensor to write.

transformers and PEFT take more memory than a merge, so `plan_in_fresh_process` imports them in another process, and the
files of this package import nothing at their top that imports them.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.merge.changes import Change, changes_of
from finetune.merge.request import CONVERTED, MergeRequest
from finetune.merge.small_files import SMALL_FILES, write_small_files
from finetune.merge.tensor_map import (
    FusedTensors,
    OutputTensor,
    TensorNames,
    plan_tensors,
    quantised_weights,
    skeleton,
    weight_converters,
)
from finetune.model import compressed
from finetune.model.compatibility import can_be_dequantised, stored_quantisation
from finetune.model.provenance import adapter_base_sections, environment_of
from finetune.model.quantization import COMPRESSED, MLX
from finetune.model.shards import StoredTensor, dtype_name, fingerprint, parse_header, read_headers
from finetune.recipe.schema import ModelSection
from finetune.system.errors import FinetuneError, MergeError, ModelError, first_line, reworded
from finetune.system.files import MODEL_WEIGHTS, WEIGHTS_INDEX
from finetune.system.hub_errors import hub_problem


@dataclass(frozen=True)
class MergePlan:
    """The plan of a merge or an export, made before a weight is read.

    Attributes:
        base: The base's name in the run's recipe.
        path: The base's directory, or its id on the Hub.
        revision: Its revision on the Hub.
        folder: Its directory; None if its weights are fetched file by file.
        trust_remote_code: True if code from the base's repository may run.
        stored: The base's tensors, in the order of its files.
        tensors: The tensors to write, in the same order.
        fused: Tensors to write that are fused in memory and changed.
        adapters: The folders that the adapters' tensors are read from, and their weights.
        quantization: The arguments of `transformers.BitsAndBytesConfig` of the export, or of the run's base.
        held: The name of the dtype that the run held the base in.
        dtype: The name of the dtype to write.
        untied: True if tied embeddings become two stored tensors.
        rounded: True if the base is a dequantised copy of one that is stored quantised.
    """

    base: str
    path: str
    revision: str | None
    folder: str | None
    trust_remote_code: bool
    stored: dict[str, StoredTensor]
    tensors: list[OutputTensor]
    fused: list[FusedTensors]
    adapters: list[tuple[str, float]]
    quantization: dict[str, Any] | None
    held: str
    dtype: str
    untied: bool
    rounded: bool


def make_plan(request: MergeRequest) -> MergePlan:
    """The plan of a merge or an export; also writes to `request.into` all files but the weights.

    Raises:
        MergeError: An adapter was trained on another base, or has a part that cannot be merged.
        ModelError: The base cannot be found or read.
        RunError: A file of the run is damaged.
    """
    base = _locate_base(request)
    config, trust = base.config, base.section.trust_remote_code
    floats = (entry.dtype for entry in base.stored.values() if entry.dtype.is_floating_point)
    # An export keeps the type that the model is stored in.
    held: torch.dtype = getattr(
        torch, base.trained_dtype or dtype_name(getattr(config, "dtype", None) or next(floats, torch.float32))
    )
    written: torch.dtype = getattr(torch, request.dtype) if request.dtype else held
    quantization = request.quantization or base.quantization
    with _config_errors(base.section.name_or_path):
        model, held_types = skeleton(config, held, trust)
    written_types = held_types if written == held else skeleton(config, written, trust)[1]
    names = TensorNames(model, base.stored)
    quantised = quantised_weights(model, config, base.section, held, quantization)
    changes, follows, folders = _all_changes(request, base, held, names.tied)
    tensors, fused, untied = plan_tensors(names, changes, follows, held_types, written_types, quantised)
    write_small_files(
        Path(request.into),
        Path(request.model),
        base.folder or _download(base.path, base.revision, weights=False),
        base.section,
        _quantization_config(request.quantization, model),
        dtype_name(written),
        untied,
    )
    return MergePlan(
        base=base.section.name_or_path,
        path=base.path,
        revision=base.revision,
        folder=str(base.folder) if base.folder else None,
        trust_remote_code=trust,
        stored=base.stored,
        tensors=tensors,
        fused=fused,
        adapters=[(str(place), weight) for place, (_, weight) in zip(folders, request.adapters, strict=True)],
        quantization=quantization,
        held=dtype_name(held),
        dtype=dtype_name(written),
        untied=untied,
        rounded=base.rounded,
    )


def fused_converters(plan: MergePlan) -> tuple[dict[str, Any], Any]:
    """The base's `WeightConverter`s by source pattern, and its config.

    Neither can be written as JSON, so the process that writes a plan with fused tensors computes them again.

    Raises:
        ModelError: The base's config cannot be loaded.
    """
    from finetune.model.locate import read_config

    config = read_config(plan.folder or plan.path, plan.revision, plan.trust_remote_code)
    model, _ = skeleton(config, torch.float32, plan.trust_remote_code)
    return weight_converters(model), model.config


# ---------------------------------------------------------------------------------------------------------------
# The base and the adapters


@dataclass(frozen=True)
class _Base:
    """The base of a merge, or the model of an export.

    Attributes:
        section: The `model` section that names it.
        quantization: The run's `quantization` section.
        trained_dtype: The name of the dtype that the run trained in, if it is recorded.
        path: Its directory, or its id on the Hub.
        revision: Its revision on the Hub.
        folder: Its directory; None if its weights stay on the Hub.
        stored: Its tensors.
        config: Its config.
        rounded: True if it is a dequantised copy of the run's base.
    """

    section: ModelSection
    quantization: dict[str, Any] | None
    trained_dtype: str | None
    path: str
    revision: str | None
    folder: Path | None
    stored: dict[str, StoredTensor]
    config: Any
    rounded: bool = False


def _locate_base(request: MergeRequest) -> _Base:
    """The base, whose weights are fetched if they are on the Hub and are not to be streamed."""
    # Imports transformers.
    from finetune.model.locate import Base, read_config

    run, trust = Path(request.model), request.trust_remote_code
    section, quantization, environment = ModelSection(name_or_path=request.model, trust_remote_code=trust), None, {}
    if request.adapters:
        (section, quantization), environment = adapter_base_sections(run, request.base, trust), environment_of(run)
    revision = (not request.base and environment.get("base_commit")) or section.revision
    base = Base.of(section.model_copy(update={"revision": revision}))
    path = base.path
    folder = Path(path) if Path(path).is_dir() else None
    if folder and request.stream:
        raise MergeError(f"--stream-base: {section.name_or_path} is on this machine already; leave it out")
    if folder is None and not request.stream:
        folder = _download(path, revision, weights=True)
    stored = read_headers(folder) if folder else _remote_headers(path, revision)
    if folder and request.adapters:
        _check_same_base(request, section.name_or_path, folder)
    with _config_errors(section.name_or_path):
        config = read_config(str(folder or path), revision, section.trust_remote_code)
    method = stored_quantisation(config)
    if method and not request.dequantised:
        where = "write that model"
        if request.adapters:
            where = "write its path or id with --base"
            if can_be_dequantised(config):
                where += "; or merge into the rounded weights, with --base dequantised"
        raise MergeError(
            f"{section.name_or_path}: its weights are stored quantised ({method}), and would be rounded again; the "
            f"model that they were made from is needed: {where}"
        )
    if method:
        base = base.dequantised()
        path, folder, config = base.path, Path(base.path), base.config
        stored = read_headers(folder)
    dtype = environment.get("dtype")
    return _Base(section, quantization, dtype, path, revision, folder, stored, config, rounded=bool(method))


def _check_same_base(request: MergeRequest, name: str, folder: Path) -> None:
    """Refuses adapters whose runs recorded another base, unless it was quantised and its original is given."""
    actual = fingerprint(folder)
    for adapter, _ in request.adapters:
        environment = environment_of(Path(adapter))
        original_given = request.base and environment.get("base_quantization")
        if environment.get("base_fingerprint") not in (None, actual) and not original_given:
            raise MergeError(
                f"{adapter}: was trained on another {name}: the weights in {folder} are not those that "
                "environment.json records in base_fingerprint; write the directory of that base"
            )


def _config_errors(name: str) -> AbstractContextManager[None]:
    """Rewords upstream's errors about a config that cannot be used."""
    kinds = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
    return reworded(ModelError, f"{name}: its config.json cannot be used", *kinds)


def _all_changes(
    request: MergeRequest, base: _Base, held: torch.dtype, tied: dict[str, str]
) -> tuple[dict[str, list[Change]], set[str], list[Path]]:
    """The changes of all adapters by name in memory, the tied tensors that take over another's, and the folders."""
    changes: dict[str, list[Change]] = defaultdict(list)
    of_each: list[tuple[set[str], set[str]]] = []
    folders = []
    for number, (adapter, _) in enumerate(request.adapters):
        # PEFT changes the model that it wraps.
        model, _ = skeleton(base.config, held, base.section.trust_remote_code)
        converted = Path(request.into, CONVERTED, str(number))
        named_changes, follows, folder = changes_of(Path(adapter), number, model, converted)
        folders.append(folder)
        of_each.append((follows, {name for name, _ in named_changes}))
        for name, change in named_changes:
            changes[name].append(change)
    all_follows = {name for follows, _ in of_each for name in follows}
    for name in all_follows:
        for follows, changed in of_each:
            if name not in follows and changed & {name, tied.get(name)}:
                raise MergeError(
                    f"{name} is tied to {tied.get(name)}, and only one of the adapters keeps that; merge them one "
                    "after the other"
                )
    return changes, all_follows, folders


# ---------------------------------------------------------------------------------------------------------------
# A base on the Hub


def fetch_error(repo: str, error: Exception, file: str | None = None) -> FinetuneError:
    """A `ModelError` that says why a repository, or a file of it, cannot be fetched from the Hub."""
    if problem := hub_problem(repo, error):
        return ModelError(f"{repo} {problem}")
    return ModelError(f"{repo}{f': {file}' if file else ''} cannot be fetched: {first_line(error)}")


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    """The local folder of a model on the Hub: configs, tokenizer and, if asked for, safetensors weights."""
    from huggingface_hub import snapshot_download

    patterns = [*SMALL_FILES]
    if weights:
        patterns += [MODEL_WEIGHTS, "model-*-of-*.safetensors", WEIGHTS_INDEX]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise fetch_error(repo, error) from error


def _remote_headers(repo: str, revision: str | None) -> dict[str, StoredTensor]:
    """The tensors of a model on the Hub, read from its files' headers; their offsets are not those in the files."""
    from huggingface_hub import get_safetensors_metadata, model_info

    try:
        # This call reports what is wrong with a repository; the next one reports only a missing file.
        model_info(repo, revision=revision)
        metadata = get_safetensors_metadata(repo, revision=revision)
    except Exception as error:
        if hub_problem(repo, error):
            raise fetch_error(repo, error) from error
        raise ModelError(f"{repo} has no safetensors weights to stream: {first_line(error)}") from error
    stored: dict[str, StoredTensor] = {}
    for file, entry in sorted(metadata.files_metadata.items()):
        header = {
            name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
            for name, tensor in entry.tensors.items()
        }
        stored |= parse_header(file, header, 0)
    return stored


def _quantization_config(quantization: dict[str, Any] | None, model: Any) -> dict[str, Any] | None:
    """The `quantization_config` of the config.json to write; None if the weights are not quantised."""
    # mlx-lm reads other keys, which `export/mlx.py` writes.
    if not quantization or MLX in quantization:
        return None
    if kind := quantization.get(COMPRESSED):
        return compressed.config(model, kind)
    from transformers import BitsAndBytesConfig

    found: dict[str, Any] = BitsAndBytesConfig(**quantization).to_dict()
    return found
