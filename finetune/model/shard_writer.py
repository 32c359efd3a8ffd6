"""Writes tensors to safetensors files one after another, so that a model is never whole in memory."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from finetune.model.shards import DTYPES, StoredTensor, read_tensor, row_ranges
from finetune.system.errors import ModelError
from finetune.system.files import MODEL_WEIGHTS, WEIGHTS_INDEX

# The bytes after which written data are synced to the disk.
_SYNC = 2**28
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writes tensors to shards one after another; the header of a shard is written last, into room reserved for it.

    Args:
        folder: An empty folder.
        max_bytes: The size in bytes at which a new shard begins; a larger tensor gets a shard of its own.
        header_bytes: The room for a header, which must suffice for the names of all tensors.
    """

    def __init__(self, folder: Path, max_bytes: int, header_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.room = (header_bytes + 8 + 7) // 8 * 8
        self.shards: list[dict[str, Any]] = []
        self.total = 0
        self._file: Any = None
        self._header: dict[str, Any] = {}
        self._offset = 0
        self._small: list[tuple[str, torch.Tensor]] = []
        self._small_bytes = 0
        self._names: set[str] = set()
        # Syncs to the disk while further tensors are computed.
        self._syncing = ThreadPoolExecutor(1)
        self._synced: list[Future[None]] = []
        self._unsynced = 0

    def add(self, name: str, dtype: torch.dtype, shape: Iterable[int], pieces: Iterable[torch.Tensor]) -> None:
        """Writes a tensor.

        Args:
            name: Its name.
            dtype: Its type.
            shape: Its shape.
            pieces: Its consecutive parts; each is written before the next one is requested.
        """
        shape = tuple(shape)
        size = dtype.itemsize * math.prod(shape)
        self._begin(name, size)
        # Tensors after which the next one would be misaligned are written at the shard's end.
        if size % 8:
            parts = [piece.reshape(-1).clone() for piece in pieces]
            self._small.append((name, torch.cat(parts).view(shape) if parts else torch.empty(shape, dtype=dtype)))
            self._small_bytes += size
            return
        begin = self._offset
        for piece in pieces:
            self._write(piece)
        self._enter(name, dtype, shape, begin, size)

    def copy(self, name: str, descriptor: int, stored: StoredTensor) -> None:
        """Copies a tensor byte for byte, on Linux without reading it into memory.

        Args:
            name: The name to write.
            descriptor: The open file to copy from.
            stored: The tensor's place in it.

        Raises:
            ModelError: The file ends within the tensor.
        """
        size = stored.end - stored.begin
        if size % 8 or sys.platform != "linux":
            ranges = row_ranges(stored.count, itemsize=stored.dtype.itemsize)
            pieces = (read_tensor(descriptor, stored, *part) for part in ranges)
            self.add(name, stored.dtype, stored.shape, pieces)
            return
        self._begin(name, size)
        begin, done = self._offset, 0
        while done < size:
            sent = os.sendfile(self._file.fileno(), descriptor, stored.begin + done, min(size - done, 2**30))
            if not sent:
                raise ModelError(f"{stored.file} is damaged: it ends within a tensor")
            done += sent
        self._enter(name, stored.dtype, stored.shape, begin, size)

    def close(self) -> None:
        """Finishes the last shard, renames all shards and writes the index if there are several."""
        self._finish()
        if not self.shards:
            self._begin("", 0)
            self._finish()
        for future in self._synced:
            future.result()
        self._syncing.shutdown()
        if len(self.shards) == 1:
            self._part(0).rename(self.folder / MODEL_WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, header in enumerate(self.shards):
            name = f"model-{number + 1:05}-of-{len(self.shards):05}.safetensors"
            self._part(number).rename(self.folder / name)
            weight_map |= dict.fromkeys(header, name)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def abort(self) -> None:
        """Closes the open file; the caller removes the folder."""
        if self._file:
            self._file.close()
        self._syncing.shutdown(cancel_futures=True)

    def _part(self, number: int) -> Path:
        return self.folder / f".{number}.part"

    def _begin(self, name: str, size: int) -> None:
        assert name not in self._names, f"{name} is written twice"
        self._names.add(name)
        full = self._offset + self._small_bytes + size > self.max_bytes
        if self._file and full and (self._header or self._small):
            self._finish()
        if not self._file:
            self._file = self._part(len(self.shards)).open("wb", buffering=0)
            self._file.seek(self.room)
            self._header, self._offset = {}, 0

    def _write(self, tensor: torch.Tensor) -> None:
        self._write_all(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    def _write_all(self, data: Any) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def _enter(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], begin: int, size: int) -> None:
        self._header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, begin + size]}
        self._offset = begin + size
        self.total += size
        self._unsynced += size
        if self._unsynced > _SYNC:
            self._unsynced = 0
            self._synced.append(self._syncing.submit(os.fsync, self._file.fileno()))

    def _finish(self) -> None:
        if not self._file:
            return
        for name, tensor in sorted(self._small, key=lambda item: -item[1].dtype.itemsize):
            self._write(tensor)
            self._enter(name, tensor.dtype, tuple(tensor.shape), self._offset, tensor.nbytes)
        self._small, self._small_bytes = [], 0
        text = json.dumps({"__metadata__": {"format": "pt"}} | self._header, separators=(",", ":")).encode()
        assert len(text) <= self.room - 8, "more tensors than there was room for"
        self._file.seek(0)
        self._write_all((self.room - 8).to_bytes(8, "little") + text.ljust(self.room - 8))
        file, self._file = self._file, None
        self.shards.append(self._header)

        def sync() -> None:
            os.fsync(file.fileno())
            file.close()

        self._synced.append(self._syncing.submit(sync))
