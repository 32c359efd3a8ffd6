"""Importance matrices: the mean squared input of each column of a model's weights, in llama.cpp's two file formats.

Quantisation with one rounds the columns that large inputs multiply with less error than the others. The sums are those
of llama.cpp's `imatrix` tool.

Source: llama.cpp `tools/imatrix/imatrix.cpp`, `IMatrixCollector`; `tools/quantize/quantize.cpp`, `load_imatrix`.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.export.gguf.quantize import ImportanceMatrix, importance_shape, is_quantized
from finetune.export.gguf.tensors import gguf_names
from finetune.model.shards import read_header, weight_files
from finetune.system.errors import ExportError, first_line
from finetune.system.files import whole_file

# llama.cpp counts in chunks of its default context.
CHUNK = 512


@dataclass(frozen=True)
class Importance:
    """Squared inputs of weights by column, summed over tokens.

    A column that was always 0 has the least sum that another column of its weight has: quantised with weights of 0, a
    whole block of such columns would become 0 (ggml, as of October 2026), and other text may well use it.
    """

    sums: dict[str, NDArray[np.float64]]
    """By llama.cpp's name of the weight (`blk.0.attn_q.weight`); those of experts one behind the other. All sums of a
    count above 0 are above 0."""
    counts: dict[str, tuple[int, ...]]
    """The tokens that each was summed over: one number, and of a weight of experts one for each expert. An expert
    without a token has 0."""
    datasets: tuple[str, ...] = ()
    """The sources of the tokens, in words or names of files."""
    chunk_size: int = CHUNK

    @property
    def means(self) -> dict[str, NDArray[np.float64]]:
        """The mean squared inputs; 1, the same for all columns, of an expert without a token, as in llama.cpp."""
        found = {}
        for name, own in self.sums.items():
            count = np.array(self.counts[name])[:, None]
            mean = own.reshape(len(count), -1) / np.maximum(count, 1)
            found[name] = np.where(count > 0, mean, 1).ravel()
        return found

    @property
    def matrix(self) -> ImportanceMatrix:
        """The mean squared inputs, as `write_gguf` takes them."""
        return {name: mean.astype(np.float32) for name, mean in self.means.items()}

    @property
    def tokens(self) -> int:
        """The most tokens that a weight was given."""
        return max(map(max, self.counts.values()))

    @property
    def note(self) -> str:
        """The sentence of reports on its origin."""
        return f"Importance matrix: of {self.tokens:,} tokens ({', '.join(self.datasets)})."

    @property
    def idle_experts(self) -> tuple[int, int]:
        """The number of experts' matrices that no token was given to, and of all experts' matrices."""
        counts = [count for own in self.counts.values() if len(own) > 1 for count in own]
        return counts.count(0), len(counts)

    @property
    def chunks(self) -> int:
        """The number of chunks of tokens, rounded up, which llama.cpp counts in."""
        return -(-self.tokens // self.chunk_size)


def check_fits(importance: Importance, model: Path, source: str) -> None:
    """Refuses a matrix that is not of the model in a folder.

    Args:
        importance: The matrix.
        model: A folder with a whole model.
        source: The matrix's name in messages.

    Raises:
        ExportError: A weight of a layer has no sums, or of another width; the matrix names weights that the model has
            not; or llama.cpp does not know the model.
        ModelError: The model's files cannot be read.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    translate = gguf_names(config)
    width = {
        name: math.prod(importance_shape(stored.shape))
        for file in weight_files(model)
        for on_disk, stored in read_header(model / file).items()
        if len(stored.shape) > 1 and (name := translate(on_disk))
    }
    for name, columns in width.items():
        own = importance.sums.get(name)
        if own is None and name.startswith("blk.") and is_quantized(name):
            raise ExportError(f"{source}: it has nothing on {name}; use a matrix of this very model")
        if own is not None and len(own) != columns:
            raise ExportError(
                f"{source}: {name} has {len(own):,} columns there and {columns:,} in {model}; "
                "use a matrix of this very model"
            )
    if other := sorted(importance.sums.keys() - width.keys()):
        raise ExportError(f"{source}: {model} has no {other[0]}; use a matrix of this very model")


def without_zeros(
    sums: dict[str, NDArray[np.float64]], counts: dict[str, tuple[int, ...]], source: str
) -> dict[str, NDArray[np.float64]]:
    """The sums with each 0 replaced by the least sum of its matrix; see `Importance`.

    Raises:
        ExportError: Every input of a matrix is zero, though it was given tokens.
    """
    found = {}
    for name, own in sums.items():
        matrices = own.reshape(len(counts[name]), -1).copy()
        for place, (row, count) in enumerate(zip(matrices, counts[name], strict=True)):
            if not row.any() and count:
                which = f"expert {place} of {name}" if len(matrices) > 1 else name
                raise ExportError(f"{source}: {which} was given nothing but zeros")
            if count:
                row[row == 0] = row[row > 0].min()
        found[name] = matrices.ravel()
    return found


# ---------------------------------------------------------------------------------------------------------------
# Files


def write_imatrix(importance: Importance, folder: Path) -> None:
    """Writes `imatrix.gguf` and `imatrix.dat` into a folder; each appears when it is complete."""
    for name, put in (("imatrix.gguf", _write_gguf), ("imatrix.dat", _write_dat)):
        with whole_file(folder / name) as part:
            put(importance, part)


def read_imatrix(file: Path) -> Importance:
    """A matrix from a file in either format, which its first bytes tell.

    A `.dat` file does not hold the number of tokens in a chunk; 512 are assumed, as llama.cpp does. The means do not
    depend on it. It does not tell experts apart either: their sums are those of one weight.

    Raises:
        ExportError: There is no such file, it is damaged, no matrix, or holds sums that no quantiser can use.
    """
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
        found = _read_gguf(file) if magic == b"GGUF" else _read_dat(file)
    except OSError as error:
        raise ExportError(f"{file} cannot be read: {error.strerror or error}") from error
    for name, own in found.sums.items():
        if not np.isfinite(own).all() or (own < 0).any():
            raise ExportError(f"{file} is damaged: {name} has sums of squares that are negative or not finite")
        if max(found.counts[name]) < 1:
            raise ExportError(f"{file}: {name} was given no token; collect the matrix from more text")
    return replace(found, sums=without_zeros(found.sums, found.counts, str(file)))


def _write_gguf(importance: Importance, file: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "")  # it is no model, and has no architecture
    writer.add_type("imatrix")
    # llama.cpp reads the first without asking whether there is one.
    writer.add_array("imatrix.datasets", list(importance.datasets or ("unknown",)))
    writer.add_uint32("imatrix.chunk_count", importance.chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk_size)
    for name, own in sorted(importance.sums.items()):
        counts = np.array(importance.counts[name], np.float32)[:, None]
        writer.add_tensor(f"{name}.in_sum2", own.astype(np.float32).reshape(len(counts), -1))
        writer.add_tensor(f"{name}.counts", counts)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _read_gguf(file: Path) -> Importance:
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(file)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise ExportError(f"{file} is damaged, or no GGUF file: {first_line(error)}") from error
    if (kind := fields.get("general.type")) != "imatrix":
        raise ExportError(f"{file} is no importance matrix: its general.type is {kind or 'missing'}")
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, tuple[int, ...]] = {}
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        if name + ".in_sum2" not in tensors and name + ".counts" not in tensors:
            continue  # newer tools store more
        pair = [tensors.get(name + end) for end in (".in_sum2", ".counts")]
        for end, tensor in zip((".in_sum2", ".counts"), pair, strict=True):
            if tensor is None or tensor.tensor_type != GGMLQuantizationType.F32:
                raise ExportError(f"{file} is damaged: it has no {name}{end} in float32")
        own, count = (np.array(tensor.data, np.float64).ravel() for tensor in pair if tensor)
        if not len(count) or len(own) % len(count):
            raise ExportError(f"{file} is damaged: {name} has {len(own)} sums of {len(count)} matrices")
        sums[name] = own
        counts[name] = tuple(round(float(number)) if np.isfinite(number) else 0 for number in count)
    if not sums:
        raise ExportError(f"{file} holds no importance matrix: it has no tensor")
    datasets = fields.get("imatrix.datasets") or []
    size = fields.get("imatrix.chunk_size")
    return Importance(sums, counts, tuple(map(str, datasets)), size if isinstance(size, int) and size > 0 else CHUNK)


def _write_dat(importance: Importance, file: Path) -> None:
    """Writes entries (name, chunks, columns, means times chunks), the chunks of all, the names of the datasets."""
    with file.open("wb") as out:
        out.write(struct.pack("<i", len(importance.sums)))
        for name, means in sorted(importance.means.items()):
            chunks = -(-max(importance.counts[name]) // importance.chunk_size)
            out.write(_pack_string(name) + struct.pack("<ii", chunks, len(means)))
            out.write((means * chunks).astype("<f4").tobytes())
        out.write(struct.pack("<i", importance.chunks) + _pack_string(", ".join(importance.datasets)))


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<i", len(data)) + data


def _read_dat(file: Path) -> Importance:
    data = file.read_bytes()
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        if not 0 <= count <= len(data) - place:
            raise ExportError(
                f"{file} is damaged, or no importance matrix: at byte {place:,} {count:,} more belong, "
                f"and it has {len(data) - place:,}"
            )
        place += count
        return data[place - count : place]

    def number() -> int:
        return int.from_bytes(take(4), "little", signed=True)

    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, tuple[int, ...]] = {}
    try:
        for _ in range(number()):
            name = take(number()).decode()
            chunks, columns = number(), number()
            if name in sums or columns < 1:
                raise ExportError(f"{file} is damaged: {name!r} is listed twice, or has no columns")
            sums[name] = np.frombuffer(take(4 * columns), "<f4").astype(np.float64) * CHUNK
            counts[name] = (chunks * CHUNK,)
        # Older tools end here.
        datasets = (number(), take(number()).decode())[1:] if place < len(data) else ()
    except UnicodeDecodeError as error:
        raise ExportError(f"{file} is damaged, or no importance matrix: a name is not UTF-8") from error
    if not sums or place < len(data):
        raise ExportError(f"{file} is damaged, or no importance matrix: {len(data) - place:,} bytes are left over")
    return Importance(sums, counts, datasets)
