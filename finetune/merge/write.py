"""Merged weights written to safetensors, one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from finetune.merge.adapter import Adapter, Update, check_combination
from finetune.merge.plan import MergePlan
from finetune.merge.tensor_map import FusedTensors, OutputTensor
from finetune.model.quantization import dequantised, quantise
from finetune.model.shards import ShardWriter, StoredTensor, all_finite, read_header, read_tensor, row_ranges
from finetune.system import hub_errors
from finetune.system.errors import MergeError, ModelError
from finetune.system.terminal import progress_bar


def write_weights(
    plan: MergePlan,
    into: Path,
    max_bytes: int,
    dequantise: bool = False,
    quantised: bool = False,
    progress: bool = False,
) -> None:
    """The planned tensors as shards in `into`.

    Args:
        plan: What to write.
        into: The folder.
        max_bytes: Of one shard.
        dequantise: Whether to start from the rounded values of a quantised base.
        quantised: Whether to write what bitsandbytes quantises quantised.
        progress: Whether a terminal shows a bar.
    """
    names = [(item.name, item.source, item.written) for item in plan.tensors]
    for group in plan.fused:
        names += [(name, name, group.written) for many in group.sources.values() for name in many]
    total = sum(plan.stored[source].count * written.itemsize for _, source, written in names)
    _check_room(into, total, plan)
    # What bitsandbytes keeps beside a weight are up to five more tensors of its name.
    header = sum((len(json.dumps(name)) + 200) * (6 if quantised else 1) for name, _, _ in names) + 1000
    # In the order of the base's files, so that one that was fetched is soon used up.
    place = {name: number for number, name in enumerate(plan.stored)}
    work: list[tuple[int, OutputTensor | FusedTensors]] = [
        (place[item.source], item) for item in plan.tensors
    ]
    work += [(max(place[n] for many in group.sources.values() for n in many), group) for group in plan.fused]
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(_Base(plan, into))
        loaded = [stack.enter_context(Adapter(Path(path), weight)) for path, weight in plan.adapters]
        for tensor in plan.tensors:
            check_combination(tensor.name, tensor.changes, loaded)
        for group in plan.fused:
            for name, changes in group.changes.items():
                check_combination(name, changes, loaded)
        writer = ShardWriter(into, max_bytes, header)
        stack.callback(writer.abort)
        advance, shown = stack.enter_context(progress_bar("weights", total, progress, "bytes")), 0
        for _, item in sorted(work, key=lambda pair: pair[0]):
            if isinstance(item, OutputTensor):
                _write(plan, item, base, loaded, writer, dequantise, quantised)
                base.used(item.source)
            else:
                _write_fused(item, base, loaded, writer)
            advance(writer.total - shown)
            shown = writer.total
        writer.close()


def _check_room(into: Path, total: int, plan: MergePlan) -> None:
    free, needed = shutil.disk_usage(into).free, total
    if plan.folder is None:
        per_file = Counter[str]()
        for stored in plan.stored.values():
            per_file[stored.file] += stored.end - stored.begin
        # A stacked expert may need a file's end and the next one's beginning.
        needed += sum(sorted(per_file.values())[-2 if plan.fused else -1 :])
    if needed * 1.01 > free:
        raise MergeError(
            f"{into.parent} has {free / 2**30:,.1f} GiB free, and {needed / 2**30:,.1f} GiB are needed; make room, or "
            "write to another disk with --output"
        )


def _write(
    plan: MergePlan,
    item: OutputTensor,
    base: _Base,
    adapters: list[Adapter],
    writer: ShardWriter,
    dequantise: bool,
    quantised: bool,
) -> None:
    stored, descriptor = base.find(item.source)
    kept = stored.dtype == item.held == item.written
    rounded = dequantise and item.quantised
    if kept and not item.changes and not rounded and not (quantised and item.quantised):
        writer.copy(item.name, descriptor, stored)
        return
    if quantised and item.quantised:
        whole = read_tensor(descriptor, stored).to(item.held).to(item.written)
        for end, tensor in quantise(whole, plan.quantization or {}, item.quantised):
            writer.add(item.name.removesuffix("weight") + end, tensor.dtype, tensor.shape, [tensor])
        return
    rows, width = (stored.shape[0], stored.count // max(1, stored.shape[0])) if stored.shape else (1, 1)
    start_values = None
    if rounded:
        start_values = dequantised(
            read_tensor(descriptor, stored).to(item.held), plan.quantization or {}, item.quantised
        )

    def held(start: int, stop: int) -> torch.Tensor:
        if start_values is not None:
            return start_values[start:stop].reshape(stop - start, width).clone()
        part = read_tensor(descriptor, stored, start * width, stop * width)
        return part.view(stop - start, width).to(item.held)

    update = Update(item.name, item.changes, stored.shape, adapters, held)

    def pieces() -> Iterator[torch.Tensor]:
        for start, stop in row_ranges(rows, width):
            part = update.rows(start, stop)
            yield _written(item.name, part, item.written, bool(item.changes))

    with _one_thread():
        writer.add(item.name, item.written, stored.shape, pieces())


def _written(name: str, part: torch.Tensor, dtype: torch.dtype, changed: bool) -> torch.Tensor:
    """Numbers in the type that they are written in, if they are such."""
    if changed and not all_finite(part):
        raise MergeError(f"{name}: is not finite once it is merged; the adapter, or its weight, is broken")
    out = part.to(dtype)
    if dtype == torch.float16 and part.dtype != torch.float16 and not all_finite(out):
        raise MergeError(
            f"{name}: {part.abs().max():,.0f} does not fit float16 (65,504 at most); write bfloat16"
        )
    return out


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For slices, which wait for memory: threads that wait for each other at each cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_fused(group: FusedTensors, base: _Base, adapters: list[Adapter], writer: ShardWriter) -> None:
    """Tensors stored one by one that are one parameter in memory: put together, changed, taken apart again."""
    converter = deepcopy(group.converter)
    for pattern, names in group.sources.items():
        for name in names:
            stored, descriptor = base.find(name)
            converter.add_tensor(
                group.target, name, pattern, _later(read_tensor(descriptor, stored).to(group.held))
            )
    merged = {}
    for name, tensor in converter.convert(group.target, config=group.config).items():
        whole = tensor[0] if isinstance(tensor, list) else tensor
        flat = whole.reshape(whole.shape[0], -1)
        update = Update(name, group.changes[name], tuple(whole.shape), adapters, _rows_of(flat))
        for start, stop in row_ranges(*flat.shape):
            flat[start:stop] = update.rows(start, stop)
        merged[name] = flat.view(whole.shape)
    back = group.converter.reverse_transform()
    first = None
    for name, tensor in merged.items():
        renamed, pattern = back.rename_source_key(name)
        first = first or renamed
        back.add_tensor(first, name, pattern, tensor)
    apart = back.convert(first, config=group.config)
    if set(apart) != set(group.stored_as):
        raise MergeError(
            f"{group.target} cannot be taken apart again into {', '.join(list(group.stored_as)[:2])}, ..."
        )
    for name, tensor in apart.items():
        whole = tensor[0] if isinstance(tensor, list) else tensor
        disk = group.stored_as[name]
        writer.add(disk, group.written, whole.shape, [_written(disk, whole, group.written, True)])
        base.used(group.stored_as[name])


def _rows_of(flat: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: flat[start:stop].clone()


def _later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


class _Base:
    """The base's files, opened when first needed; one from the Hub is fetched then, and removed when it is used up."""

    def __init__(self, plan: MergePlan, into: Path) -> None:
        self.plan, self.into = plan, into
        self.files: dict[str, tuple[int, dict[str, StoredTensor]]] = {}
        self.left = Counter(plan.stored[item.source].file for item in plan.tensors)
        self.left.update(
            plan.stored[n].file for g in plan.fused for names in g.sources.values() for n in names
        )
        self.fetched: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> _Base:
        return self

    def __exit__(self, *_: Any) -> None:
        for descriptor, _header in self.files.values():
            os.close(descriptor)
        if self.fetched:
            self.fetched.cleanup()

    def find(self, name: str) -> tuple[StoredTensor, int]:
        """A tensor and the open file that it lies in."""
        file = self.plan.stored[name].file
        if file not in self.files:
            path = Path(self.plan.folder, file) if self.plan.folder else self._fetch(file)
            self.files[file] = (os.open(path, os.O_RDONLY), read_header(path))
        descriptor, header = self.files[file]
        if name not in header:
            raise ModelError(f"{file} of the base no longer holds {name}")
        return header[name], descriptor

    def used(self, name: str) -> None:
        """A tensor is done with; so is its file after the last one."""
        file = self.plan.stored[name].file
        self.left[file] -= 1
        if not self.left[file] and file in self.files:
            os.close(self.files.pop(file)[0])
            if self.fetched:
                shutil.rmtree(Path(self.fetched.name, file).parent / ".cache", ignore_errors=True)
                Path(self.fetched.name, file).unlink()

    def _fetch(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        # Beside the output, where there is room, and what a kill leaves is found again.
        self.fetched = self.fetched or tempfile.TemporaryDirectory(dir=self.into, prefix=".base-")
        repo, revision = self.plan.repo
        try:
            return Path(hf_hub_download(repo, file, revision=revision, local_dir=self.fetched.name))
        except OSError as error:
            if words := hub_errors.hub_problem(repo, error):
                raise ModelError(f"{repo} {words}") from error
            raise ModelError(
                f"{repo}: {file} cannot be fetched: {str(error).strip().splitlines()[0]}"
            ) from error
