"""Safetensors files read in slices, so that a model is never whole in memory; `shard_writer.py` writes them.

The safetensors library maps whole files, whose pages count as this process's memory, and writes only tensors that are
all in memory. The format is the header's length, a header in JSON and the tensors' bytes.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import PlainSerializer, PlainValidator

from finetune.system.errors import ModelError
from finetune.system.files import MODEL_WEIGHTS, WEIGHTS_INDEX, with_repeated_key

# The most bytes of a tensor in memory at once.
SLICE = 2 * 2**20
# The types by their names in a header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The largest header that the safetensors library reads (0.8, `MAX_HEADER_SIZE`).
_MAX_HEADER = 100_000_000


def dtype_name(dtype: torch.dtype | str) -> str:
    """The name of a type without its module: `bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


# The type of a dtype field in a dataclass that passes to another process as JSON, where it is the dtype's name.
Dtype = Annotated[torch.dtype, PlainValidator(lambda name: getattr(torch, name)), PlainSerializer(dtype_name)]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place on disk.

    Attributes:
        file: The name of its file.
        dtype: Its type.
        shape: Its shape.
        begin: The offset of its first byte in the file.
        end: The offset after its last byte.
    """

    file: str
    dtype: Dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """The number of its elements."""
        return (self.end - self.begin) // self.dtype.itemsize


def parse_header(file: str, header: dict[str, Any], offset: int) -> dict[str, StoredTensor]:
    """The tensors that a header describes, in the order of their bytes.

    Args:
        file: The file's name.
        header: The header, as JSON.
        offset: The offset at which the tensors' bytes begin in the file, to which the header's offsets are added.

    Raises:
        ModelError: A dtype is unknown, or the header breaks a rule of the format: whole numbers, as many bytes as type
            and shape need, and each tensor's bytes directly after those of the one before.

    Source: safetensors 0.8 `src/tensor.rs`, `Metadata.validate`.
    """
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise ModelError(f"{file} is damaged: its __metadata__ is no map of texts")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ModelError(f"{file}: {name} is of type {entry['dtype']}, which cannot be read here")
        (begin, end), shape = entry["data_offsets"], entry["shape"]
        # `type`, because True is an int.
        if not isinstance(shape, list) or any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
            raise ModelError(f"{file} is damaged: {name} has a shape or an offset that is no whole number from 0")
        dtype = DTYPES[entry["dtype"]]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ModelError(f"{file} is damaged: {name} does not have the bytes that its shape needs")
        tensors[name] = StoredTensor(file, dtype, tuple(shape), offset + begin, offset + end)
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    place = offset
    for name, stored in tensors.items():
        if stored.begin != place:
            problem = "overlaps the tensor before it" if stored.begin < place else "comes after bytes of no tensor"
            raise ModelError(f"{file} is damaged: {name} {problem}")
        place = stored.end
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        ModelError: It is missing, cut off or not a safetensors file, or its header breaks a rule of the format.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if size < 8 or length > size - 8:
                raise ModelError(f"{path} is damaged: it ends within its header")
            if length > _MAX_HEADER:
                raise ModelError(f"{path} is damaged: its header has {length:,} bytes, and {_MAX_HEADER:,} are allowed")
            text = file.read(length)
        if not text.startswith(b"{"):
            raise ValueError("its header does not begin with {")
        header = json.loads(text.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        tensors = parse_header(path.name, header, 8 + length)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ModelError(f"{path} is damaged: its header is nested too deeply") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is damaged, or no safetensors file: {error}") from error
    end = max((stored.end for stored in tensors.values()), default=8 + length)
    if end != size:
        raise ModelError(f"{path} is damaged: it has {size:,} bytes where its header says {end:,}")
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a key that is written twice, of which readers take one or the other, is refused."""
    entries, twice = with_repeated_key(pairs)
    if twice is not None:
        raise ValueError(f"{twice} is written twice in its header")
    return entries


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} stands in its header")


def weight_files(folder: Path) -> list[str]:
    """The names of a checkpoint's weight files, by its index if it has one.

    Raises:
        ModelError: There are none, the index is damaged, or a file of the index is missing.
    """
    index = folder / WEIGHTS_INDEX
    if not index.exists():
        if (folder / MODEL_WEIGHTS).exists():
            return [MODEL_WEIGHTS]
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise ModelError(f"{folder} holds no .safetensors weights")
        return names
    try:
        names = sorted(map(str, set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error}") from error
    for name in names:
        # Weights lie beside their index; a link may lead elsewhere, as the Hub's cache is made of links.
        if Path(name).name != name or "\\" in name:
            raise ModelError(f"{index} is damaged: it names {name}, and weights lie in the folder of their index")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, though {WEIGHTS_INDEX} names it")
    return names


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, in the order of their bytes in its files.

    Raises:
        ModelError: A file is missing or damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for name in weight_files(folder):
        tensors |= read_header(folder / name)
    return tensors


def read_tensor(descriptor: int, stored: StoredTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """A whole tensor in its shape, or its elements `start` to `stop`, flat.

    Args:
        descriptor: The open file.
        stored: The tensor's place in it.
        start: The first element.
        stop: The element after the last; None reads the whole tensor.

    Raises:
        ModelError: The file ends within the tensor.
    """
    whole = stop is None
    stop = stored.count if stop is None else stop
    out = torch.empty(stop - start, dtype=stored.dtype)
    if len(out):
        view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
        position = stored.begin + start * stored.dtype.itemsize
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done : done + 2**30]], position + done)
            if not got:
                raise ModelError(f"{stored.file} is damaged: it ends within a tensor")
            done += got
    return out.view(stored.shape) if whole else out


def all_finite(tensor: torch.Tensor) -> bool:
    """True if no element is NaN or infinite. A finite sum proves that, 50 times as fast as a test of each element."""
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(tensor.isfinite().all())


def fingerprint(folder: Path) -> str:
    """A digest of a checkpoint's weights that does not depend on how they are distributed over files.

    It covers the name, type and shape of each tensor and its first, middle and last kilobyte: enough to tell two models
    apart, and quick to read for a model of 18 GB.

    Raises:
        ModelError: A file is missing or damaged.
    """
    tensors = read_headers(folder)
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        files: dict[str, int] = {}
        for name, stored in sorted(tensors.items()):
            if stored.file not in files:
                files[stored.file] = os.open(folder / stored.file, os.O_RDONLY)
                stack.callback(os.close, files[stored.file])
            digest.update(f"{name} {stored.dtype} {stored.shape} ".encode())
            middle, last = (stored.begin + stored.end) // 2, max(stored.begin, stored.end - 1024)
            for place in (stored.begin, middle, last):
                digest.update(os.pread(files[stored.file], min(1024, stored.end - place), place))
    return digest.hexdigest()[:32]


def row_ranges(count: int, width: int = 1, itemsize: int = 4) -> Iterator[tuple[int, int]]:
    """Yields ranges `(start, stop)` that cover `count` rows, each of about `SLICE` bytes.

    Args:
        count: The number of rows.
        width: The number of elements in a row.
        itemsize: The bytes of an element.
    """
    step = max(1, SLICE // max(1, width * itemsize))
    for start in range(0, count, step):
        yield start, min(start + step, count)
