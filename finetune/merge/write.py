"""Merged weights written as safetensors, one tensor at a time."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.merge.adapter import Adapter, Update, check_combination
from finetune.merge.changes import Change
from finetune.merge.plan import MergePlan, fetch_error, fused_converters
from finetune.merge.tensor_map import FusedTensors, OutputTensor
from finetune.model.quantization import dequantised, quantise
from finetune.model.shard_writer import ShardWriter
from finetune.model.shards import StoredTensor, all_finite, read_header, read_tensor, row_ranges
from finetune.system.errors import MergeError, ModelError
from finetune.system.files import check_space
from finetune.system.terminal import progress_bar


def write_weights(
    plan: MergePlan,
    into: Path,
    max_bytes: int,
    dequantise: bool = False,
    quantised: bool = False,
    progress: bool = False,
    importance: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes the planned tensors as shards.

    Args:
        plan: The tensors.
        into: The folder to write to.
        max_bytes: The size in bytes at which a new shard begins.
        dequantise: Merges into the rounded weights that a run on a quantised base trained on.
        quantised: Writes the weights that bitsandbytes quantises in 4 or 8 bit.
        progress: Shows a progress bar on a terminal.
        importance: The mean squared input of each column of a quantised weight, (I,), by the name that is written.

    Raises:
        MergeError: An adapter holds NaN or infinity, adapters cannot be combined, a merged weight is not finite or does
            not fit float16, or the disk lacks room.
        ModelError: A file of the base is damaged or cannot be fetched.
    """
    names = [(item.name, item.source, item.written) for item in plan.tensors]
    names += [(name, name, group.written) for group in plan.fused for name in _sources(group)]
    total = sum(plan.stored[source].count * written.itemsize for _, source, written in names)
    _check_room(into, total, plan)
    # bitsandbytes keeps up to five more tensors for a weight, whose names begin with its name.
    header_bytes = sum((len(json.dumps(name)) + 200) * (6 if quantised else 1) for name, _, _ in names) + 1000
    # In the order of the base's files, so that each file of a streamed base can be removed early.
    place = {name: number for number, name in enumerate(plan.stored)}
    work: list[tuple[int, OutputTensor | FusedTensors]] = [(place[item.source], item) for item in plan.tensors]
    work += [(max(place[name] for name in _sources(group)), group) for group in plan.fused]
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(_BaseFiles(plan, into))
        adapters = [stack.enter_context(Adapter(Path(path), weight)) for path, weight in plan.adapters]
        for tensor in plan.tensors:
            check_combination(tensor.name, tensor.changes, adapters)
        for group in plan.fused:
            for name, changes in group.changes.items():
                check_combination(name, changes, adapters)
        shards = ShardWriter(into, max_bytes, header_bytes)
        stack.callback(shards.abort)
        writer = _Writer(plan, base, adapters, shards, dequantise, quantised, importance or {})
        advance, shown = stack.enter_context(progress_bar("weights", total, progress, "bytes")), 0
        for _, item in sorted(work, key=lambda pair: pair[0]):
            (writer.write if isinstance(item, OutputTensor) else writer.write_fused)(item)  # type: ignore[arg-type]
            advance(shards.total - shown)
            shown = shards.total
        shards.close()


def _sources(group: FusedTensors) -> list[str]:
    """The names on disk of a group of fused tensors."""
    return [name for names in group.sources.values() for name in names]


def _check_room(into: Path, total: int, plan: MergePlan) -> None:
    """Refuses to start if the disk lacks room for `total` bytes and the fetched files of a streamed base."""
    needed = total
    if plan.folder is None:
        per_file = Counter[str]()
        for stored in plan.stored.values():
            per_file[stored.file] += stored.end - stored.begin
        # Stacked experts may lie in two files.
        needed += sum(sorted(per_file.values())[-2 if plan.fused else -1 :])
    check_space(into.parent, needed, "make room, or write to another disk with --output")


@dataclass(frozen=True)
class _Writer:
    """Writes one tensor after another; the attributes are the arguments of `write_weights` and the files it opened."""

    plan: MergePlan
    base: _BaseFiles
    adapters: list[Adapter]
    shards: ShardWriter
    dequantise: bool
    quantised: bool
    importance: Mapping[str, torch.Tensor]

    def write(self, item: OutputTensor) -> None:
        """Writes a tensor: as it is stored, quantised, or merged row by row."""
        stored, descriptor = self.base.find(item.source)
        options = self.plan.quantization or {}
        rounded, packed = self.dequantise and item.quantised, self.quantised and item.quantised
        if not (item.changes or rounded or packed) and stored.dtype == item.held == item.written:
            self.shards.copy(item.name, descriptor, stored)
        elif packed:
            weight = read_tensor(descriptor, stored).to(item.held).to(item.written)
            for suffix, tensor in quantise(weight, options, item.quantised, self.importance.get(item.name)):
                name = item.name.removesuffix("weight") + suffix
                self.shards.add(name, tensor.dtype, tensor.shape, [tensor])
        else:
            self._write_rows(item, stored, descriptor, options if rounded else None)
        self.base.release(item.source)

    def _write_rows(
        self, item: OutputTensor, stored: StoredTensor, descriptor: int, rounded: dict[str, Any] | None
    ) -> None:
        """Writes the merged rows of a tensor; `rounded` quantises the base and brings it back before that."""
        count = stored.shape[0] if stored.shape else 1
        width = stored.count // max(1, count)
        whole = None
        if rounded is not None:
            whole = dequantised(read_tensor(descriptor, stored).to(item.held), rounded, item.quantised)

        def read_base(start: int, stop: int) -> torch.Tensor:
            if whole is not None:
                return whole[start:stop].reshape(stop - start, width).clone()
            part = read_tensor(descriptor, stored, start * width, stop * width)
            return part.view(stop - start, width).to(item.held)

        update = Update(item.name, item.changes, stored.shape, self.adapters, read_base)
        parts = (update.rows(start, stop) for start, stop in row_ranges(count, width))
        converted = (_converted(item.name, part, item.written, bool(item.changes)) for part in parts)
        with _one_thread():
            self.shards.add(item.name, item.written, stored.shape, converted)

    @functools.cached_property
    def _converters(self) -> tuple[dict[str, Any], Any]:
        return fused_converters(self.plan)

    def write_fused(self, group: FusedTensors) -> None:
        """Fuses tensors as transformers does when it loads them, merges, and writes them one by one as before."""
        converters, config = self._converters
        original = converters[next(iter(group.sources))]
        converter = deepcopy(original)
        for pattern, names in group.sources.items():
            for name in names:
                stored, descriptor = self.base.find(name)
                tensor = read_tensor(descriptor, stored).to(group.held)
                converter.add_tensor(group.target, name, pattern, lambda tensor=tensor: tensor)
        reverse, first = original.reverse_transform(), None
        for name, fused in converter.convert(group.target, config=config).items():
            renamed, pattern = reverse.rename_source_key(name)
            first = first or renamed
            reverse.add_tensor(first, name, pattern, self._merge_fused(name, _unpacked(fused), group.changes[name]))
        separate = reverse.convert(first, config=config)
        if set(separate) != set(group.stored_as):
            raise MergeError(
                f"{group.target} cannot be taken apart again into {', '.join(list(group.stored_as)[:2])}, ..."
            )
        for name, part in separate.items():
            disk, tensor = group.stored_as[name], _unpacked(part)
            converted = _converted(disk, tensor, group.written, True)
            self.shards.add(disk, group.written, tensor.shape, [converted])
            self.base.release(disk)

    def _merge_fused(self, name: str, whole: torch.Tensor, changes: list[Change]) -> torch.Tensor:
        """A fused parameter with the adapters' changes."""
        flat_NW = whole.reshape(whole.shape[0], -1)
        shape = tuple(whole.shape)
        update = Update(name, changes, shape, self.adapters, lambda start, stop: flat_NW[start:stop].clone())
        for start, stop in row_ranges(*flat_NW.shape):
            flat_NW[start:stop] = update.rows(start, stop)
        return flat_NW.view(shape)


def _unpacked(tensor: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The tensor in a converter's result, which may be a list of one."""
    return tensor[0] if isinstance(tensor, list) else tensor


def _converted(name: str, part: torch.Tensor, dtype: torch.dtype, changed: bool) -> torch.Tensor:
    """Numbers in the type that they are written in; refuses those that are not finite or do not fit."""
    if changed and not all_finite(part):
        raise MergeError(f"{name}: is not finite once it is merged; the adapter, or its weight, is broken")
    out = part.to(dtype)
    if dtype == torch.float16 and part.dtype != torch.float16 and not all_finite(out):
        raise MergeError(f"{name}: {part.abs().max():,.0f} does not fit float16 (65,504 at most); write bfloat16")
    return out


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch use one thread: work on small slices waits for memory, and more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _BaseFiles:
    """The base's weight files, opened when first needed; a streamed one is fetched then, and removed when used up."""

    def __init__(self, plan: MergePlan, into: Path) -> None:
        self.plan, self.into = plan, into
        self.files: dict[str, tuple[int, dict[str, StoredTensor]]] = {}
        self.left = Counter(plan.stored[item.source].file for item in plan.tensors)
        self.left.update(plan.stored[name].file for group in plan.fused for name in _sources(group))
        self.fetched: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> _BaseFiles:
        return self

    def __exit__(self, *_: Any) -> None:
        for descriptor, _header in self.files.values():
            os.close(descriptor)
        if self.fetched:
            self.fetched.cleanup()

    def find(self, name: str) -> tuple[StoredTensor, int]:
        """A tensor's place, and the descriptor of its open file."""
        file = self.plan.stored[name].file
        if file not in self.files:
            path = Path(self.plan.folder, file) if self.plan.folder else self._fetch(file)
            self.files[file] = (os.open(path, os.O_RDONLY), read_header(path))
        descriptor, header = self.files[file]
        if name not in header:
            raise ModelError(f"{file} of the base no longer holds {name}")
        return header[name], descriptor

    def release(self, name: str) -> None:
        """Counts a tensor as used; closes its file after the last one, and removes it if it was fetched."""
        file = self.plan.stored[name].file
        self.left[file] -= 1
        if not self.left[file] and file in self.files:
            os.close(self.files.pop(file)[0])
            if self.fetched:
                shutil.rmtree(Path(self.fetched.name, file).parent / ".cache", ignore_errors=True)
                Path(self.fetched.name, file).unlink()

    def _fetch(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        # In the output's folder, which is on a disk with room; the next merge removes what a killed one leaves there.
        self.fetched = self.fetched or tempfile.TemporaryDirectory(dir=self.into, prefix=".base-")
        try:
            return Path(hf_hub_download(self.plan.path, file, revision=self.plan.revision, local_dir=self.fetched.name))
        except OSError as error:
            raise fetch_error(self.plan.path, error, file) from error
