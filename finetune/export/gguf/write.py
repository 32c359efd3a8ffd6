"""Writes a merged model as a GGUF file, from its safetensors, a slice at a time."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUF_DEFAULT_ALIGNMENT, Keys
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from finetune.export.gguf.header import TensorEntry, pack_header, padded
from finetune.export.gguf.metadata import model_metadata, read_config, rope_factors
from finetune.export.gguf.quantize import (
    TYPES,
    UNQUANTIZED,
    ImportanceMatrix,
    ModelTraits,
    ggml_library,
    importance_shape,
    is_quantized,
    quantize_rows,
    tensor_order,
    tensor_types,
)
from finetune.export.gguf.tensors import (
    ARCHITECTURES,
    STACKED,
    converted_values,
    expected_shapes,
    gguf_names,
    head_dim,
    unread_tensors,
)
from finetune.model.shards import StoredTensor, read_headers, read_tensor
from finetune.system.devices import usable_cores
from finetune.system.errors import ExportError
from finetune.system.files import check_space, whole_file
from finetune.system.terminal import progress_bar

# These words in a model's name change how llama.cpp (October 2026) tokenizes.
_MISREAD = re.compile("phi-?3|modern-bert", re.IGNORECASE)
_FLOATS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
# Values in a slice. Each thread holds a slice as it was read, in float32, and as it is written.
_SLICE = 2**20


@dataclass(frozen=True)
class _Tensor(TensorEntry):
    """A tensor of the file, and its values or the place where a checkpoint stores them."""

    source: tuple[StoredTensor, ...] | NDArray[np.float32]
    """Matrices of a checkpoint that follow each other, whose first row stands for rows that they lack; or values."""


def write_gguf(
    model: Path,
    file: Path,
    kind: str,
    imatrix: ImportanceMatrix | None = None,
    progress: bool = False,
    vocabulary: dict[str, Any] | None = None,
) -> None:
    """Writes the text model of a checkpoint as a GGUF file, which appears when it is complete and on the disk.

    Before a byte is written, the config, the names and the shapes of all tensors are checked. llama.cpp requires an
    importance matrix for none of `TYPES`, but IQ3_S is hardly of use without one.

    Args:
        model: A folder with config.json, safetensors and tokenizer.
        file: The file, which must not exist; its folder must.
        kind: The file's type, from `TYPES`.
        imatrix: The mean squared input of each column, by the weight's name in the file; see `ImportanceMatrix`.
        progress: Shows a progress bar on a terminal.
        vocabulary: The tokenizer's fields that `read_tokenizer` returned; by default they are read.

    Raises:
        ExportError: The model cannot be written as GGUF, `imatrix` is of another model, there is no llama.cpp to
            quantise, a value does not fit the type, or the disk is too full.
        ModelError: A file of weights is damaged.
    """
    if kind not in TYPES:
        raise ExportError(f"GGUF: there is no type {kind}; write one of {', '.join(TYPES)}")
    if file.exists():
        raise ExportError(f"{file} exists; write another path, or delete it")
    config = read_config(model)
    fields: dict[str, Any] = {
        Keys.General.ARCHITECTURE: ARCHITECTURES[config.model_type],
        Keys.General.TYPE: "model",
        Keys.General.NAME: _MISREAD.sub("model", file.stem),
        Keys.General.FILE_TYPE: int(TYPES[kind][0]),
        Keys.General.QUANTIZATION_VERSION: int(GGML_QUANT_VERSION),
    }
    fields |= model_metadata(config)
    items = _planned_tensors(model, config, kind, imatrix)
    if vocabulary is None:
        from finetune.export.gguf.tokenizer.vocabulary import read_tokenizer

        vocabulary = read_tokenizer(model).fields
    _check_size(model, config, vocabulary)
    fields |= {key: value for key, value in vocabulary.items() if value not in ("", [])}
    if imatrix:
        fields["quantize.imatrix.entries_count"] = len(imatrix)
    if any(item.kind not in UNQUANTIZED for item in items):
        ggml_library()
    header = pack_header(fields, items)
    total = len(header) + sum(padded(item.bytes) for item in items)
    check_space(file.parent, total)
    bar = progress_bar(f"{kind}: weights", total, progress, "bytes")
    with whole_file(file) as part, part.open("wb") as out, bar as advance:
        out.write(header)
        advance(len(header))
        before = 0
        for done in _write_tensors(out, model, items, config, imatrix or {}):
            advance(done - before)
            before = done


def check_writable(model: Path, vocabulary: dict[str, Any]) -> None:
    """Refuses a model that cannot be written as GGUF, without reading its weights.

    Raises:
        ExportError, ModelError: The model has no GGUF form, or a file is damaged; see `write_gguf`.
    """
    config = read_config(model)
    model_metadata(config)
    _planned_tensors(model, config, "F32", None)
    _check_size(model, config, vocabulary)


def _check_size(model: Path, config: Any, vocabulary: dict[str, Any]) -> None:
    if len(vocabulary[Keys.Tokenizer.LIST]) != config.vocab_size:
        raise ExportError(
            f"GGUF: {model} has a tokenizer of {len(vocabulary[Keys.Tokenizer.LIST]):,} tokens and a config with "
            f"vocab_size {config.vocab_size:,}"
        )


def _planned_tensors(model: Path, config: Any, kind: str, imatrix: ImportanceMatrix | None) -> list[_Tensor]:
    """The tensors of the file, in llama.cpp's order.

    Raises:
        ExportError: One is missing, too many, of another shape or type than the config and llama.cpp want.
    """
    stored, wanted = _stored_tensors(model, config), expected_shapes(config)
    if config.tie_word_embeddings:
        del wanted["output.weight"]
        if (again := stored.pop("output.weight", None)) and not _tensors_equal(
            model, again, stored.get("token_embd.weight")
        ):
            raise ExportError(
                f"GGUF: {model} has tie_word_embeddings in its config and an output layer of its own in its weights"
            )
    elif config.model_type in ("gemma", "gemma2"):
        raise ExportError(
            f"GGUF: llama.cpp computes {config.model_type} with tied embeddings only, and these were trained apart"
        )
    unread = unread_tensors(config)
    sources: dict[str, tuple[StoredTensor, ...] | NDArray[np.float32]] = {
        name: np.zeros(wanted[name], np.float32) for name in unread
    }
    types: dict[str, Kind] = {}
    for name, shape in wanted.items():
        if name in unread:
            continue
        names = STACKED.get(name, [name])
        if missing := [part for part in names if part not in stored]:
            raise ExportError(f"GGUF: {missing[0]} is missing in the weights of {model}")
        parts = tuple(stored.pop(part) for part in names)
        types[name] = _FLOATS[parts[0].dtype]
        expected = shape[1:] if name in STACKED else shape
        if name == "per_layer_token_embd.weight":
            # transformers reads the first row for tokens that have none.
            expected = (config.vocab_size_per_layer_input, *shape[1:])
        for part in parts:
            if part.shape != expected:
                raise ExportError(f"GGUF: {name} is of shape {part.shape}, and by config.json of {expected}")
        sources[name] = parts
    for name in stored:
        raise ExportError(f"GGUF: {name} is in the weights, and not in a model of such a config.json")
    factors = rope_factors(config)
    if factors is not None:
        wanted["rope_freqs.weight"] = factors.shape
    wanted = {name: wanted[name] for name in sorted(wanted, key=tensor_order)}
    groups = config.num_attention_heads // config.per_layer_config[0].num_key_value_heads
    traits = ModelTraits(ARCHITECTURES[config.model_type], groups, getattr(config, "num_experts", None) or 0)
    kinds = tensor_types(wanted, kind, traits, imatrix is not None, types)
    _check_matrix(imatrix or {}, {name: shape for name, shape in wanted.items() if name not in unread}, bool(imatrix))
    if factors is not None:
        sources["rope_freqs.weight"] = factors
    return [_Tensor(name, shape, kinds[name], sources[name]) for name, shape in wanted.items()]


def _stored_tensors(model: Path, config: Any) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by their names in a GGUF file."""
    translate = gguf_names(config.to_dict())
    stored: dict[str, StoredTensor] = {}
    for name, place in read_headers(model).items():
        if (short := translate(name)) is None:
            continue
        if short in stored:
            raise ExportError(f"GGUF: {model} holds {short} twice, once as {name}")
        if place.dtype not in _FLOATS:
            raise ExportError(f"GGUF: {name} is of type {place.dtype}; write a merged model of floats")
        stored[short] = place
    return stored


def _tensors_equal(model: Path, one: StoredTensor, other: StoredTensor | None) -> bool:
    """True if two tensors hold equal values; compared slice by slice."""
    if other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with _open_files(model, [one, other]) as files:
        return all(
            torch.equal(*(read_tensor(files[t.file], t, start, min(start + _SLICE, t.count)) for t in (one, other)))
            for start in range(0, one.count, _SLICE)
        )


def _check_matrix(imatrix: ImportanceMatrix, wanted: Mapping[str, tuple[int, ...]], given: bool) -> None:
    for name, weights in imatrix.items():
        if name not in wanted or weights.shape != (math.prod(importance_shape(wanted[name])),):
            raise ExportError(f"GGUF: the importance matrix is of another model: {name} {weights.shape}")
        if not np.isfinite(weights).all():
            raise ExportError(f"GGUF: the importance matrix is damaged: {name} is not finite")
    for name, shape in wanted.items():
        if given and name.startswith("blk.") and len(shape) > 1 and is_quantized(name) and name not in imatrix:
            raise ExportError(f"GGUF: the importance matrix lacks {name}; it is of another model, or damaged")


# ---------------------------------------------------------------------------------------------------------------
# The tensors, in slices that threads quantise side by side


def _write_tensors(
    out: IO[bytes], model: Path, items: list[_Tensor], config: Any, imatrix: ImportanceMatrix
) -> Iterator[int]:
    """Writes the tensors; yields how many bytes have been written after each slice."""
    threads = usable_cores()
    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    done = 0
    sources = [part for item in items if isinstance(item.source, tuple) for part in item.source]
    with _open_files(model, sources) as files, ThreadPoolExecutor(threads) as pool:

        def slice_of(item: _Tensor, start: int, stop: int) -> NDArray[np.uint8]:
            rows = _float32_rows(item, files, start, stop)
            if not np.isfinite(rows.sum()) and not np.isfinite(rows).all():
                raise ExportError(f"GGUF: {item.name} holds numbers that are not finite")
            rows = converted_values(item.name, rows, config).reshape(-1, item.shape[-1])
            try:
                weights = imatrix.get(item.name)
                if weights is None or len(item.shape) == 2:
                    return quantize_rows(item.kind, rows, weights)
                # Each expert's rows with the expert's own weights.
                height, by_expert = item.shape[-2], weights.reshape(-1, item.shape[-1])
                edges = [start, *range(start // height * height + height, stop, height), stop]
                return np.concatenate(
                    [
                        quantize_rows(item.kind, rows[begin - start : end - start], by_expert[begin // height])
                        for begin, end in itertools.pairwise(edges)
                    ]
                )
            except ExportError as error:
                raise ExportError(f"{item.name}: {error}") from error

        def finish(left: int) -> None:
            nonlocal done
            while len(waiting) > left:
                done += out.write(waiting.popleft().result().data)

        try:
            for item in items:
                # Rows in whole heads, as Llama's are put in another order within one.
                rows = math.prod(item.shape[:-1])
                step = max(1, _SLICE // item.shape[-1])
                step = -(-step // head_dim(config)) * head_dim(config) if len(item.shape) > 1 else 1
                for start in range(0, rows, step):
                    waiting.append(pool.submit(slice_of, item, start, min(start + step, rows)))
                    finish(threads + 1)
                    yield done
                if item.bytes % GGUF_DEFAULT_ALIGNMENT:
                    finish(0)
                    done += out.write(bytes(padded(item.bytes) - item.bytes))
            finish(0)
        finally:
            for future in waiting:
                future.cancel()
    yield done


def _float32_rows(item: _Tensor, files: dict[str, int], start: int, stop: int) -> NDArray[np.float32]:
    """The rows `start` to `stop` of a tensor in float32; a bias or norm has one, and is flat."""
    width = item.shape[-1]
    if isinstance(item.source, np.ndarray):
        return item.source if len(item.shape) == 1 else item.source[start:stop]
    pieces, before = [], 0
    for part in item.source:
        end = before + part.count // width
        if start < end and before < stop:
            pieces.append(_read_float32(part, files, max(start - before, 0) * width, (min(stop, end) - before) * width))
        before = end
    if stop > before:
        pieces.append(np.tile(_read_float32(item.source[0], files, 0, width), stop - max(start, before)))
    rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return rows.reshape(-1, width) if len(item.shape) > 1 else rows


def _read_float32(part: StoredTensor, files: dict[str, int], start: int, stop: int) -> NDArray[np.float32]:
    """The values `start` to `stop` of a stored tensor."""
    values = read_tensor(files[part.file], part, start, stop)
    found: NDArray[np.float32]
    if values.dtype == torch.bfloat16:
        # torch would start threads of its own.
        found = (values.view(torch.uint16).numpy().astype(np.uint32) << 16).view(np.float32)
    else:
        found = values.numpy().astype(np.float32, copy=False)
    return found


@contextlib.contextmanager
def _open_files(model: Path, stored: list[StoredTensor]) -> Iterator[dict[str, int]]:
    with contextlib.ExitStack() as stack:
        files = {name: os.open(model / name, os.O_RDONLY) for name in sorted({item.file for item in stored})}
        for descriptor in files.values():
            stack.callback(os.close, descriptor)
        yield files
