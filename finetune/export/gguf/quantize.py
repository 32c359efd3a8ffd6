"""Quantises tensors with llama.cpp's library, and applies llama.cpp's rules for the type of each tensor in a file.

`ggml_quantize_chunk` is taken from the shared library of an installed llama.cpp package. It is not a documented
interface of these packages, so it is tested before it is used.

Source: llama.cpp, src/llama-quant.cpp (`tensor_allows_quantization`, `llama_tensor_get_type_impl`,
`tensor_type_fallback`) as of October 2026; conversion/base.py for the tensors that are never quantised.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from finetune.system.errors import ExportError
from finetune.system.extras import install_command

GGMLType = GGMLQuantizationType
ImportanceMatrix = dict[str, NDArray[np.float32]]
"""The mean squared input of each column of a weight, by llama.cpp's name of the weight; of a weight of experts those of
one expert after the other."""

# The file types that users write: llama.cpp's number for such a file, and the type of a tensor without another rule.
TYPES: dict[str, tuple[LlamaFileType, GGMLQuantizationType]] = {
    "F32": (LlamaFileType.ALL_F32, GGMLType.F32),
    "F16": (LlamaFileType.MOSTLY_F16, GGMLType.F16),
    "BF16": (LlamaFileType.MOSTLY_BF16, GGMLType.BF16),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, GGMLType.Q8_0),
    "Q6_K": (LlamaFileType.MOSTLY_Q6_K, GGMLType.Q6_K),
    "Q5_K_M": (LlamaFileType.MOSTLY_Q5_K_M, GGMLType.Q5_K),
    "Q4_K_M": (LlamaFileType.MOSTLY_Q4_K_M, GGMLType.Q4_K),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, GGMLType.Q4_0),
    "IQ4_NL": (LlamaFileType.MOSTLY_IQ4_NL, GGMLType.IQ4_NL),
    "Q3_K_M": (LlamaFileType.MOSTLY_Q3_K_M, GGMLType.Q3_K),
    "IQ3_S": (LlamaFileType.MOSTLY_IQ3_S, GGMLType.IQ3_S),
    "Q2_K": (LlamaFileType.MOSTLY_Q2_K, GGMLType.Q2_K),
}
UNQUANTIZED = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
# For rows whose length is no multiple of 256.
_FALLBACK = {
    GGMLType.IQ3_S: GGMLType.IQ4_NL,
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}
# Q4_1 is for Q4_0 files with a matrix.
_USED_TYPES = sorted(
    ({kind for _, kind in TYPES.values()} | set(_FALLBACK.values()) | {GGMLType.Q4_1}) - set(UNQUANTIZED)
)
# Matrices that are float32 in every file; and those that no file has quantised.
_FLOAT32 = ("ffn_gate_inp", "altup_correct_coef", "altup_predict_coef")
_NOT_QUANTIZED = re.compile(r"altup|laurel|per_layer_model_proj")
_PACKAGES = ("xllamacpp", "llama_cpp")
_SYMBOLS = ("ggml_quantize_chunk", "ggml_row_size", "ggml_type_name", "ggml_validate_row_data")


# ---------------------------------------------------------------------------------------------------------------
# Which tensor gets which type


@dataclass(frozen=True)
class ModelTraits:
    """The facts about a model that llama.cpp's choice of types depends on."""

    architecture: str
    """llama.cpp's name."""
    groups: int
    """The number of query heads that share a key head, in the first layer."""
    experts: int = 0
    """The number of experts; 0 for a dense model."""


def tensor_types(
    shapes: Mapping[str, tuple[int, ...]],
    kind: str,
    model: ModelTraits,
    matrix: bool,
    stored: Mapping[str, GGMLQuantizationType] | None = None,
) -> dict[str, GGMLQuantizationType]:
    """The type of each tensor in a file, by llama.cpp's rules; F16 for rows whose length is no multiple of 32.

    Matrices that llama.cpp never quantises keep the type that they have in the checkpoint.

    Args:
        shapes: The shape of each tensor of the file, by llama.cpp's name, in the order of layers; the last length is a
            row's.
        kind: The file's type, from `TYPES`.
        model: The model.
        matrix: True if there is an importance matrix.
        stored: The type of each tensor in the checkpoint; F32 for those that it lacks.
    """
    layers = 1 + max((_layer(name) for name in shapes), default=0)
    # Layers that share the keys and values of another layer have no attn_v, and are not counted.
    values = [name for name in shapes if name.endswith("attn_v.weight")]
    # 70B models: their attn_v is small, and worth more bits.
    large = layers == 80 and (model.architecture == "qwen2" or (model.architecture == "llama" and model.groups > 1))
    plain = TYPES[kind][1]
    found = {}
    for name, shape in shapes.items():
        part = name.split(".")[-2]
        if len(shape) < 2 or part in _FLOAT32:
            found[name] = GGMLType.F32
        elif plain in UNQUANTIZED:
            found[name] = plain
        elif not is_quantized(name):
            found[name] = (stored or {}).get(name, GGMLType.F32)
        elif part == "output" or (part in ("token_embd", "per_layer_token_embd") and "output.weight" not in shapes):
            wide = plain != GGMLType.Q8_0 and shape[-1] % GGML_QUANT_SIZES[plain][0] == 0
            found[name] = _type_that_fits(GGMLType.Q6_K if wide else GGMLType.Q8_0, shape[-1])
        else:
            place, count = (values.index(name), len(values)) if name in values else (_layer(name), layers)
            chosen = _type_by_rule(part, place, count, kind, model, matrix)
            if large and part == "attn_v" and chosen in (GGMLType.Q3_K, GGMLType.Q4_K):
                chosen = GGMLType.Q5_K
            found[name] = _type_that_fits(chosen, shape[-1])
    return found


def _type_by_rule(
    part: str, place: int, count: int, kind: str, model: ModelTraits, matrix: bool
) -> GGMLQuantizationType:
    """The type of a weight of a layer, before it is made to fit its rows.

    Args:
        part: The last part of its name, such as `attn_v`.
        place: Its place among the weights of that part.
        count: The number of these.
        kind: The file's type.
        model: The model.
        matrix: True if there is an importance matrix.
    """
    plain = TYPES[kind][1]
    eight = model.experts == 8  # Mixtral, which llama.cpp tuned these rules for
    if eight and part in ("attn_v", "attn_k"):
        return GGMLType.Q8_0
    if eight and part == "attn_output":
        return GGMLType.Q5_K if kind in ("Q2_K", "Q3_K_M", "IQ4_NL", "Q4_K_M", "IQ3_S") else plain
    more = place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2
    down = part.startswith("ffn_down")  # of experts too
    if (down or part == "attn_v") and kind in ("Q4_K_M", "Q5_K_M") and more:
        return GGMLType.Q6_K
    if part == "attn_v":
        if kind == "Q3_K_M":
            return GGMLType.Q5_K if place < 2 else GGMLType.Q4_K
        few = {"Q2_K": GGMLType.Q3_K}
        many = {"Q2_K": GGMLType.Q4_K, "IQ3_S": GGMLType.Q4_K, "IQ4_NL": GGMLType.Q5_K}
        return (many if model.groups >= 4 else few).get(kind, plain)
    if down:
        if kind == "Q3_K_M":
            return GGMLType.Q5_K if place < count // 16 else GGMLType.Q4_K
        if place < count // 8 and (kind, matrix) == ("IQ4_NL", False):
            return GGMLType.Q5_K
        if place < count // 8 and (kind, matrix) == ("Q4_0", True):
            return GGMLType.Q4_1
        return GGMLType.Q3_K if kind == "Q2_K" else plain
    if part == "attn_output":
        return {"Q2_K": GGMLType.Q3_K, "Q3_K_M": GGMLType.Q4_K}.get(kind, plain)
    return plain


def _type_that_fits(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    if columns % GGML_QUANT_SIZES[kind][0]:
        kind = _FALLBACK.get(kind, GGMLType.F16)
    return GGMLType.F16 if columns % GGML_QUANT_SIZES[kind][0] else kind


def is_quantized(name: str) -> bool:
    """True if a quantised file holds a layer's matrix of that name quantised."""
    part = name.split(".")[-2]
    return part not in _FLOAT32 and not _NOT_QUANTIZED.match(part)


def importance_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight's importance: a number for each column, of a weight of experts for each expert too."""
    return (*shape[:-2], shape[-1])


def tensor_order(name: str) -> tuple[int, str]:
    """The key that sorts tensors as llama.cpp writes them: those of no layer, then by layer, each by name."""
    return _layer(name), name


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    """The bytes of a row of `columns` values."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(columns // block * size)


# ---------------------------------------------------------------------------------------------------------------
# Numbers


def quantize_rows(
    kind: GGMLQuantizationType, rows: NDArray[np.float32], weights: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantised rows, uint8 (n, bytes of a row). The GIL is released meanwhile.

    Args:
        kind: The type.
        rows: float32 (n, columns), finite.
        weights: float32 (columns), the importance of each column; None: the type's own measure.

    Raises:
        ExportError: A value does not fit the type, or there is no library (see `ggml_library`).
    """
    count, columns = rows.shape
    out = np.empty((count, row_bytes(kind, columns)), dtype=np.uint8)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if kind == GGMLType.F32:
        return rows.view(np.uint8)
    if kind == GGMLType.F16:
        with np.errstate(over="ignore"):
            half = rows.astype(np.float16)
        if not np.isfinite(half).all():
            raise ExportError(f"{np.abs(rows).max():,.0f} does not fit float16 (65,504 at most); write BF16 or Q8_0")
        return half.view(np.uint8)
    if kind == GGMLType.BF16:
        bits = rows.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    # The library would abort the process.
    assert columns % GGML_QUANT_SIZES[kind][0] == 0, (kind, columns)
    assert weights is None or weights.shape == (columns,), (weights, columns)
    column_weights = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32)
    ggml = ggml_library()
    written = ggml.ggml_quantize_chunk(
        int(kind),
        rows.ctypes.data,
        out.ctypes.data,
        0,
        count,
        columns,
        column_weights.ctypes.data if column_weights is not None else None,
    )
    if written != out.nbytes or not ggml.ggml_validate_row_data(int(kind), out.ctypes.data, out.nbytes):
        raise ExportError(f"cannot be quantised to {kind.name}; its largest value is {np.abs(rows).max():,.0f}")
    return out


@functools.cache
def ggml_library() -> ctypes.CDLL:
    """The first installed llama.cpp library that quantises as expected.

    Raises:
        ExportError: There is none; the message has a reason for each package.
    """
    reasons = []
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            continue
        reason = "it holds no shared library"
        for path in _shared_libraries(Path(next(iter(found.submodule_search_locations)))):
            try:
                loaded = ctypes.CDLL(str(path))
            except OSError as error:
                reason = f"{path.name} cannot be loaded ({error})"
                continue
            if not (reason := _why_unusable(loaded)):
                return loaded
        reasons.append(f"{package} cannot be used: {reason}")
    if reasons:
        raise ExportError(f"GGUF: {'; '.join(reasons)}; install another release of xllamacpp")
    raise ExportError(f"GGUF needs llama.cpp; run {install_command('gguf')}")


def _shared_libraries(folder: Path) -> list[Path]:
    found = [path for end in ("so", "dylib", "dll", "pyd") for path in sorted(folder.rglob(f"*.{end}"))]
    return [path for path in found if re.match(r"xllamacpp|(lib)?ggml-base\.", path.name)]


def _why_unusable(ggml: ctypes.CDLL) -> str:
    """The reason why a library cannot be used; empty if it quantises as expected."""
    for symbol in _SYMBOLS:
        if not hasattr(ggml, symbol):
            return f"it has no {symbol}"
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, whole]
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_name.argtypes = [ctypes.c_int]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    for kind in _USED_TYPES:
        named = ggml.ggml_type_name(int(kind)) or b""
        if named.decode().lower() != kind.name.lower() or ggml.ggml_row_size(int(kind), 256) != row_bytes(kind, 256):
            return f"type {int(kind)} is not its {kind.name}"
    # Two rows of whole numbers up to 127, which Q8_0 holds as they are, after a scale of 1.
    numbers = np.stack([np.arange(96, 128), -np.arange(96, 128)]).astype(np.float32)
    out = np.zeros((2, 34), dtype=np.uint8)
    expected = np.concatenate(
        [np.tile(np.frombuffer(np.float16(1).tobytes(), np.uint8), (2, 1)), numbers.astype(np.int8).view(np.uint8)], 1
    )
    ggml.ggml_quantize_chunk(int(GGMLType.Q8_0), numbers.ctypes.data, out.ctypes.data, 0, 2, 32, None)
    return "" if np.array_equal(out, expected) else "its ggml_quantize_chunk does not do what was expected"
