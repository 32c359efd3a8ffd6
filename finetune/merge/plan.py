"""All that a merge or an export is made of: the base found, adapters understood, a plan of every tensor; and the files
beside the weights, written at once.

transformers and PEFT take more memory than a merge, so `plan_in_fresh_process` imports them in another process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.merge.adapter import Change, changes_of
from finetune.model.locate import locate
from finetune.model.provenance import environment_of
from finetune.model.shards import StoredTensor, fingerprint, parse_header, read_headers
from finetune.system import hub_errors
from finetune.system.errors import MergeError, ModelError
from finetune.system.files import MODEL_WEIGHTS, WEIGHTS_INDEX
from finetune.system.fresh_process import child_environment
from finetune.system.terminal import quiet

# Files beside weights, configs and tokenizer that a model needs: a multimodal one its processor, a custom one its code.
_TOKENIZER = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
]
_BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "*.py")


if TYPE_CHECKING:
    from finetune.merge.tensor_map import FusedTensors, OutputTensor
    from finetune.recipe.schema import ModelSection


@dataclass
class MergePlan:
    """Everything that a merge or an export needs to know before it reads a weight."""

    folder: str | None
    """The base's directory; None where its files are fetched one by one."""
    repo: tuple[str, str | None]
    stored: dict[str, StoredTensor]
    tensors: list[OutputTensor]
    fused: list[FusedTensors]
    adapters: list[tuple[str, float]]
    quantization: dict[str, Any] | None
    dtype: str
    untied: bool
    record: dict[str, Any]


@dataclass(frozen=True)
class MergeRequest:
    """What is to be planned: a model (or a run's base and adapters) and the folder for all that is not weights."""

    model: str
    adapters: tuple[tuple[str, float], ...]
    into: str
    dtype: str | None = None
    quantization: dict[str, Any] | None = None
    """That of the export; None keeps the run's, for its base."""
    stream: bool = False


def plan_in_fresh_process(request: MergeRequest) -> MergePlan:
    """`plan` in a process of its own, so that transformers and PEFT leave no trace in this one's memory."""
    with tempfile.TemporaryDirectory() as folder:
        ask, answer = Path(folder, "ask"), Path(folder, "answer")
        ask.write_bytes(pickle.dumps(request))
        code = f"from finetune.merge.plan import _answer; _answer({str(ask)!r}, {str(answer)!r})"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=child_environment(), stdout=subprocess.DEVNULL
        )
        if not answer.exists():
            raise MergeError(f"{request.model}: the process that plans ended with code {done.returncode}")
        result = pickle.loads(answer.read_bytes())
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, MergePlan)
    return result


def _answer(ask: str, answer: str) -> None:
    logging.basicConfig(level=logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    result: Any
    try:
        result = make_plan(pickle.loads(Path(ask).read_bytes()))
    except Exception as error:
        result = error.with_traceback(None)
        result.__cause__ = result.__context__ = None
    Path(answer).write_bytes(pickle.dumps(result))


def make_plan(request: MergeRequest) -> MergePlan:
    """What to write for a model, and in `request.into` its config, tokenizer and whatever else is not weights.

    Raises:
        MergeError: An adapter is not for this base, or holds what cannot be merged.
        ModelError, ShardError: The base cannot be found or read.
    """
    from transformers import AutoConfig

    from finetune.merge.tensor_map import TensorNames, plan_tensors, quantised_weights, skeleton
    from finetune.model.provenance import adapter_base_sections
    from finetune.recipe.schema import ModelSection

    run = Path(request.model)
    is_run = bool(request.adapters)
    section, quantization = (
        adapter_base_sections(run) if is_run else (ModelSection(name_or_path=request.model), None)
    )
    environment = environment_of(run) if is_run else {}
    path = locate(section.name_or_path)
    revision = environment.get("base_commit") or section.revision
    folder = Path(path) if Path(path).is_dir() else None
    if folder and request.stream:
        raise MergeError(f"--stream-base: {section.name_or_path} is on this machine already; leave it out")
    if folder is None and not request.stream:
        folder = _download(path, revision)
    stored = read_headers(folder) if folder else _remote_headers(path, revision)
    mark = fingerprint(folder) if folder and request.adapters else None
    for trained, _ in request.adapters:
        if mark and environment_of(Path(trained)).get("base_fingerprint") not in (None, mark):
            raise MergeError(
                f"{trained}: was trained on another {section.name_or_path}: the weights in {folder} are not those "
                "that environment.json knows by base_fingerprint; write the directory of the very base"
            )
    with quiet(), _told(section.name_or_path):
        where = str(folder) if folder else path
        options = {"trust_remote_code": section.trust_remote_code} | (
            {} if folder else {"revision": revision}
        )
        config = AutoConfig.from_pretrained(where, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise MergeError(
            f"{section.name_or_path}: its weights are quantised already, and what is merged into them is rounded "
            "again; name the model that it was made from in model.name_or_path"
        )
    floats = (entry.dtype for entry in stored.values() if entry.dtype.is_floating_point)
    own = str(getattr(config, "dtype", None) or next(floats, torch.float32)).removeprefix("torch.")
    held = getattr(torch, environment.get("dtype") or own)
    written = getattr(torch, request.dtype) if request.dtype else held

    with _told(section.name_or_path):
        model, types = skeleton(config, held, section.trust_remote_code)
    out_types = types if written == held else skeleton(config, written, section.trust_remote_code)[1]
    names = TensorNames(model, stored)
    changes: dict[str, list[Change]] = defaultdict(list)
    tied = dict(model.all_tied_weights_keys)
    follows: set[str] = set()
    alike: list[tuple[set[str], set[str]]] = []
    quantised = quantised_weights(config, section, held, request.quantization or quantization)
    for number, (adapter, _) in enumerate(request.adapters):
        fresh, _ = skeleton(config, held, section.trust_remote_code)
        found, same = changes_of(Path(adapter), number, fresh)
        follows |= same
        alike.append((same, {name for name, _ in found}))
        for name, change in found:
            changes[name].append(change)

    for name in follows:
        if any(changed & {name, tied.get(name)} and name not in same for same, changed in alike):
            raise MergeError(
                f"{name} is tied to {tied.get(name)}, which only one of the adapters keeps; merge them apart"
            )
    tensors, fused, untied = plan_tensors(
        stored, names, changes, follows, tied, types, out_types, quantised, (held, written)
    )
    record: dict[str, Any] = {"base": section.name_or_path, "revision": revision}
    if is_run:
        record["dtype_of_training"] = str(held).removeprefix("torch.")
    _write_rest(request, section, folder or _small_files(path, revision), written, untied)
    return MergePlan(
        folder=str(folder) if folder else None,
        repo=(path, revision),
        stored=stored,
        tensors=tensors,
        fused=fused,
        adapters=list(request.adapters),
        quantization=request.quantization or quantization,
        dtype=str(written).removeprefix("torch."),
        untied=untied,
        record=record,
    )


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """What upstream says of a config that it cannot use, in a line that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{name}: its config.json cannot be used: {reason}") from error


def _download(repo: str, revision: str | None) -> Path:
    """The folder of a model on the Hub with its weights and configs in it, and nothing else fetched."""
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "generation_config.json", *_TOKENIZER, *_BESIDE]
    patterns += [MODEL_WEIGHTS, "model-*-of-*.safetensors", WEIGHTS_INDEX]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(_refused(repo, error)) from error
    return folder


def _remote_headers(repo: str, revision: str | None) -> dict[str, StoredTensor]:
    """The tensors of a model on the Hub, without its weights; where in its file each lies is seen once it is here."""
    from huggingface_hub import get_safetensors_metadata, model_info

    try:
        model_info(
            repo, revision=revision
        )  # which says what is wrong; the next one only that there is no file
        metadata = get_safetensors_metadata(repo, revision=revision)
    except Exception as error:
        if hub_errors.hub_problem(repo, error):
            raise ModelError(_refused(repo, error)) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{repo} has no safetensors weights to stream: {reason}") from error
    found: dict[str, StoredTensor] = {}
    for file, entry in sorted(metadata.files_metadata.items()):
        header = {
            n: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            for n, t in entry.tensors.items()
        }
        found |= dict(sorted(parse_header(file, header, 0).items(), key=lambda item: item[1].begin))
    return found


def _write_rest(
    request: MergeRequest, section: ModelSection, base: Path, written: torch.dtype, untied: bool
) -> None:
    """Config, generation config, tokenizer and template, and what else the base has beside its weights."""
    into, run = Path(request.into), Path(request.model)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if "torch_dtype" in part or "dtype" in part or part is config:
            part.pop("torch_dtype", None)
            part["dtype"] = str(written).removeprefix("torch.")
        if untied and ("tie_word_embeddings" in part or part is config or "vocab_size" in part):
            part["tie_word_embeddings"] = False
    if request.quantization:
        from transformers import BitsAndBytesConfig

        config["quantization_config"] = BitsAndBytesConfig(**request.quantization).to_dict()
    (into / "config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    whole = (run / "tokenizer_config.json").exists() and (run / "generation_config.json").exists()
    if whole:  # as training left them: a large tokenizer takes longer to load than a small model to merge
        for pattern in (*_TOKENIZER, "generation_config.json"):
            for path in run.glob(pattern):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, into / path.name)
    else:
        _save_tokenizer(section, run, base, into)
    for pattern in _BESIDE:
        for path in base.glob(pattern):
            shutil.copy(path, into / path.name)


def _save_tokenizer(section: ModelSection, run: Path, base: Path, into: Path) -> None:
    """Of somebody else's adapter: its tokenizer or the base's, and a generation config that ends where a turn does."""
    from transformers import GenerationConfig

    from finetune.model.load import eos_tokens, load_tokenizer
    from finetune.recipe.schema import ModelSection

    own = (run / "tokenizer_config.json").exists()
    with quiet():
        tokenizer = load_tokenizer(ModelSection(name_or_path=str(run)) if own else section)
        tokenizer.save_pretrained(into)
        there = next((p for p in (run, base) if (p / "generation_config.json").exists()), None)
        generation = GenerationConfig.from_pretrained(str(there)) if there else GenerationConfig()
        generation.eos_token_id = eos_tokens(generation, tokenizer)
        # As JSON: upstream refuses to save what many a base has, a temperature without sampling.
        generation.to_json_file(into / "generation_config.json")


def _small_files(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "generation_config.json", *_TOKENIZER, *_BESIDE]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(_refused(repo, error)) from error


def _refused(repo: str, error: Exception) -> str:
    words = hub_errors.hub_problem(repo, error)
    return f"{repo} {words}" if words else f"{repo} cannot be fetched: {str(error).strip().splitlines()[0]}"


def adapters_of(run: Path, others: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """The run's own adapter, weighing 1 unless it is named among `others`, and those."""
    mine = str(run)
    if any(Path(path).resolve() == run.resolve() for path, _ in others):
        return tuple(others)
    return ((mine, 1.0), *others)
