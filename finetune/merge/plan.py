"""Plans a merge or an export: where the base is, what adapters change, every tensor to write. Also writes the config,
tokenizer and other small files of the output.

transformers and PEFT take more memory than a merge, so `plan_in_fresh_process` imports them in another process, and the
files of this package import nothing at their top that imports them.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.merge.changes import Change, changes_of
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
from finetune.model.provenance import adapter_base_sections, environment_of
from finetune.model.quantization import COMPRESSED
from finetune.model.resize import RESIZED_FROM
from finetune.model.shards import StoredTensor, dtype_name, fingerprint, parse_header, read_headers
from finetune.recipe.schema import ModelSection
from finetune.system import fresh_process
from finetune.system.errors import FinetuneError, MergeError, ModelError, first_line, reworded
from finetune.system.files import MODEL_WEIGHTS, WEIGHTS_INDEX
from finetune.system.hub_errors import hub_problem
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
_SMALL_FILES = ["config.json", "generation_config.json", *_TOKENIZER_FILES, *_OTHER_FILES]


@dataclass(frozen=True)
class MergeRequest:
    """A merge or export to plan.

    Attributes:
        model: A whole model; or a run, if there are adapters.
        adapters: The adapters' folders and weights.
        into: The folder that the config, the tokenizer and other small files are written to.
        dtype: The name of the type to write; None keeps the one that the run trained in.
        quantization: The export's arguments of `transformers.BitsAndBytesConfig`; None takes the run's, for its base.
        stream: True leaves the weights of a base on the Hub there.
    """

    model: str
    adapters: tuple[tuple[str, float], ...]
    into: str
    dtype: str | None = None
    quantization: dict[str, Any] | None = None
    stream: bool = False


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
        adapters: The adapters' folders and weights.
        quantization: The arguments of `transformers.BitsAndBytesConfig` of the export, or of the run's base.
        held: The name of the dtype that the run held the base in.
        dtype: The name of the dtype to write.
        untied: True if tied embeddings become two stored tensors.
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


def plan_in_fresh_process(request: MergeRequest) -> MergePlan:
    """`make_plan` in another process, so that transformers and PEFT leave nothing in this one's memory.

    Raises:
        MergeError: An adapter was trained on another base or cannot be merged, or the process failed.
        ModelError: The base cannot be found or read.
        RunError: A file of the run is damaged.
    """
    try:
        return fresh_process.call(make_plan, request, keep_stderr=False)
    except fresh_process.ProcessFailed as failure:
        raise MergeError(f"{request.model}: planning failed: {failure}") from failure


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
    quantised = quantised_weights(config, base.section, held, quantization)
    changes, follows = _all_changes(request.adapters, base, held, names.tied)
    tensors, fused, untied = plan_tensors(names, changes, follows, held_types, written_types, quantised)
    _write_small_files(request, base, written, untied)
    return MergePlan(
        base=base.section.name_or_path,
        path=base.path,
        revision=base.revision,
        folder=str(base.folder) if base.folder else None,
        trust_remote_code=trust,
        stored=base.stored,
        tensors=tensors,
        fused=fused,
        adapters=list(request.adapters),
        quantization=quantization,
        held=dtype_name(held),
        dtype=dtype_name(written),
        untied=untied,
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
    """

    section: ModelSection
    quantization: dict[str, Any] | None
    trained_dtype: str | None
    path: str
    revision: str | None
    folder: Path | None
    stored: dict[str, StoredTensor]
    config: Any


def _locate_base(request: MergeRequest) -> _Base:
    """The base, whose weights are fetched if they are on the Hub and are not to be streamed."""
    # Imports transformers.
    from finetune.model.locate import Base, read_config

    run = Path(request.model)
    section, quantization, environment = ModelSection(name_or_path=request.model), None, {}
    if request.adapters:
        (section, quantization), environment = adapter_base_sections(run), environment_of(run)
    revision = environment.get("base_commit") or section.revision
    path = Base.of(section.model_copy(update={"revision": revision})).path
    folder = Path(path) if Path(path).is_dir() else None
    if folder and request.stream:
        raise MergeError(f"--stream-base: {section.name_or_path} is on this machine already; leave it out")
    if folder is None and not request.stream:
        folder = _download(path, revision, weights=True)
    stored = read_headers(folder) if folder else _remote_headers(path, revision)
    if folder and request.adapters:
        _check_same_base(request.adapters, section.name_or_path, folder)
    with _config_errors(section.name_or_path):
        config = read_config(str(folder or path), revision, section.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise MergeError(
            f"{section.name_or_path}: its weights are quantised already, and a merge would round them again; "
            "write the model that they were made from in model.name_or_path"
        )
    dtype = environment.get("dtype")
    return _Base(section, quantization, dtype, path, revision, folder, stored, config)


def _check_same_base(adapters: Sequence[tuple[str, float]], name: str, folder: Path) -> None:
    """Refuses adapters whose runs recorded another base."""
    actual = fingerprint(folder)
    for adapter, _ in adapters:
        if environment_of(Path(adapter)).get("base_fingerprint") not in (None, actual):
            raise MergeError(
                f"{adapter}: was trained on another {name}: the weights in {folder} are not those that "
                "environment.json records in base_fingerprint; write the directory of that base"
            )


def _config_errors(name: str) -> AbstractContextManager[None]:
    """Rewords upstream's errors about a config that cannot be used."""
    kinds = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
    return reworded(ModelError, f"{name}: its config.json cannot be used", *kinds)


def _all_changes(
    adapters: Sequence[tuple[str, float]], base: _Base, held: torch.dtype, tied: dict[str, str]
) -> tuple[dict[str, list[Change]], set[str]]:
    """The changes of all adapters by name in memory, and the tied tensors that take over another's changes."""
    changes: dict[str, list[Change]] = defaultdict(list)
    of_each: list[tuple[set[str], set[str]]] = []
    for number, (adapter, _) in enumerate(adapters):
        # PEFT changes the model that it wraps.
        model, _ = skeleton(base.config, held, base.section.trust_remote_code)
        named_changes, follows = changes_of(Path(adapter), number, model)
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
    return changes, all_follows


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

    patterns = [*_SMALL_FILES]
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
        stored |= dict(sorted(parse_header(file, header, 0).items(), key=lambda item: item[1].begin))
    return stored


# ---------------------------------------------------------------------------------------------------------------
# The files beside the weights


def _write_small_files(request: MergeRequest, base: _Base, written: torch.dtype, untied: bool) -> None:
    """Writes the config, generation config, tokenizer, chat template and other files that the base has."""
    into, run = Path(request.into), Path(request.model)
    folder = base.folder or _download(base.path, base.revision, weights=False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        part.pop(RESIZED_FROM, None)
        if "torch_dtype" in part or "dtype" in part or part is config:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype_name(written)
        if untied and ("tie_word_embeddings" in part or part is config or "vocab_size" in part):
            part["tie_word_embeddings"] = False
    if request.quantization and (kind := request.quantization.get(COMPRESSED)):
        model, _ = skeleton(base.config, written, base.section.trust_remote_code)
        config["quantization_config"] = compressed.config(model, kind)
    elif request.quantization:
        from transformers import BitsAndBytesConfig

        config["quantization_config"] = BitsAndBytesConfig(**request.quantization).to_dict()
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (into / "config.json").write_text(text + "\n", encoding="utf-8")
    if (run / "tokenizer_config.json").exists() and (run / "generation_config.json").exists():
        # Copied as training saved them: loading a large tokenizer takes longer than merging a small model.
        for pattern in (*_TOKENIZER_FILES, "generation_config.json"):
            for path in run.glob(pattern):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, into / path.name)
    else:
        _save_tokenizer(base.section, run, folder, into)
    for pattern in _OTHER_FILES:
        for path in folder.glob(pattern):
            shutil.copy(path, into / path.name)


def _save_tokenizer(section: ModelSection, run: Path, base: Path, into: Path) -> None:
    """Saves the tokenizer of an adapter that was trained elsewhere, or its base's; and a generation config.

    The generation config stops at the end of a turn.
    """
    from transformers import GenerationConfig

    from finetune.model.load import eos_tokens, load_tokenizer

    own = (run / "tokenizer_config.json").exists()
    with quiet():
        tokenizer = load_tokenizer(ModelSection(name_or_path=str(run)) if own else section)
        tokenizer.save_pretrained(into)
        folder = next((p for p in (run, base) if (p / "generation_config.json").exists()), None)
        generation = GenerationConfig.from_pretrained(str(folder)) if folder else GenerationConfig()
        generation.eos_token_id = eos_tokens(generation, tokenizer)
        # As JSON, because transformers refuses to save a temperature without sampling, which many bases have.
        generation.to_json_file(into / "generation_config.json")


def adapters_of(run: Path, others: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """The adapters of a merge: the run's own with weight 1, unless `others` names it, and `others`."""
    if any(Path(path).resolve() == run.resolve() for path, _ in others):
        return tuple(others)
    return ((str(run), 1.0), *others)
