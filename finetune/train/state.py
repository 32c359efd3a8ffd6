"""What a run needs to go on exactly: trained weights, optimizer, scheduler, what was logged; on any number of ranks.

Each rank writes one safetensors file with the pieces that it holds; where ranks hold copies, the first one writes them.
Pieces are known by the parameter's name and their place in it, so another number of ranks reads them as well. No pickle
is read: torch's own sharded checkpoints keep their index in one (torch 2.13 `FileSystemReader.read_metadata`).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from finetune.system import distributed
from finetune.system.errors import RunError
from finetune.system.files import ADAPTER_WEIGHTS

WEIGHT = "weight"
# What the recipe says of a group of weights, and what says which they are; all else in it is the optimizer's memory.
_RECIPES = ("params", "lr", "initial_lr", "weight_decay", "betas", "eps")


@dataclass(frozen=True)
class Box:
    """Where a piece lies in its tensor: the first index of each dimension, and how many."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def within(self, other: Box) -> tuple[slice, ...] | None:
        """What both have in common, as slices into this one; None where there is nothing."""
        slices = []
        for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True):
            low, high = max(a, b), min(a + n, b + m)
            if low >= high:
                return None
            slices.append(slice(low - a, high - a))
        return tuple(slices)


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, under the names that they had before they were wrapped."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a pass without gradients torch 2.13 leaves the outermost weights gathered: what is written there is
            # lost with the next pass.
            module.reshard()
    return {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that are saved with a model, each once, under the names that it had before."""
    kept = set(model.state_dict())  # which also lets go of what FSDP 2 has gathered
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        if plain in kept:
            yield plain, tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the parts of all ranks; every rank must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: torch.Tensor) -> tuple[torch.Tensor, Box]:
    """The part of a tensor that this rank holds, and where it lies."""
    if not isinstance(tensor, DTensor):
        return tensor, Box((0,) * tensor.dim(), tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), Box(tuple(start), tuple(shape))


def _is_first_copy(tensor: torch.Tensor, main: bool) -> bool:
    """Whether this rank writes its part: of a part that several hold, the first of them does."""
    if not isinstance(tensor, DTensor):
        return main
    # How many ranks a part is copied to, and the place of this one among them.
    mesh, placements = tensor.device_mesh, tensor.placements
    return all(not p.is_replicate() or mesh.get_local_rank(i) == 0 for i, p in enumerate(placements))


def _file(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"state-{rank + 1:05}-of-{ranks:05}.safetensors"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*-of-*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------
# Writing


def save(folder: Path, model: Any, optimizer: Any, scheduler: Any, logged: dict[str, Any]) -> None:
    """Writes this rank's file, and on the first rank the scheduler's.

    Args:
        logged: What this rank has counted since it last logged, as JSON.
    """
    parameters = trained(model)
    rank = distributed.rank()
    # The first rank has written the model's files; another machine may not see them yet.
    there = distributed.broadcast_from_first(_weights(folder) if not rank else None)
    tensors: dict[str, torch.Tensor] = {}
    pieces: dict[str, Any] = {}
    values: dict[str, dict[str, Any]] = {}

    def keep(key: str, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
        part, box = _local(tensor)
        shared = tensor.shape == parameter.shape
        if not _is_first_copy(tensor if shared else parameter, rank == 0) or (shared and not part.numel()):
            return
        if shared:
            pieces[f"{key}/{name}"] = [list(box.start), list(tensor.shape)]
        part = part.detach().cpu().contiguous()
        # All tensors' maps from 8 bits to numbers are one, which safetensors refuses.
        tensors[f"{key}/{name}"] = part if shared else part.clone()

    for name, parameter in parameters.items():
        if there.get(_saved_as(name)) != (list(parameter.shape), parameter.dtype):
            keep(WEIGHT, name, parameter, parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                keep(key, name, value, parameter)
            else:
                values.setdefault(name, {})[key] = value
    groups = [
        {name: value for name, value in group.items() if name not in _RECIPES}
        for group in optimizer.param_groups
    ]
    metadata = {"pieces": pieces, "values": values, "groups": groups, "logged": logged}
    text = {name: json.dumps(value) for name, value in metadata.items()}
    save_file(tensors, _file(folder, rank, distributed.world_size()), text)
    if rank == 0:
        torch.save(scheduler.state_dict(), folder / "scheduler.pt")


def _weights(folder: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """The tensors of the model or adapter in this folder: shape and type."""
    found = {}
    for file in _models(folder):
        stored: Any
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no dict)
                found[name] = (list(stored.get_slice(name).get_shape()), _dtype(stored, name))
    return found


def _models(folder: Path) -> list[Path]:
    return [*folder.glob("model*.safetensors"), *folder.glob(ADAPTER_WEIGHTS)]


def _saved_as(name: str) -> str:
    """What a trained weight is called in the model's or adapter's own file, if it is there as it is."""
    return name.replace(".default.", ".")


def _dtype(file: Any, key: str) -> torch.dtype:
    part = file.get_slice(key)
    nothing: torch.Tensor = part[:0] if part.get_shape() else file.get_tensor(key)
    return nothing.dtype


# ---------------------------------------------------------------------------------------------------------------
# Reading


class _Stored:
    """The files of all ranks that wrote a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = _files(folder)
        if not paths:
            raise RunError(f"{folder} holds no state to go on from")
        self.files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self.metadata = [
            {name: json.loads(text) for name, text in file.metadata().items()} for file in self.files
        ]
        self.keys = [set(file.keys()) for file in self.files]
        self.models: list[Any] = [safe_open(path, framework="pt") for path in _models(folder)]

    def boxes(self, key: str) -> Iterator[tuple[Any, Box, list[int]]]:
        """The stored pieces of a tensor: the file, where the piece lies, the shape of the whole."""
        for file, metadata in zip(self.files, self.metadata, strict=True):
            if key in metadata["pieces"]:
                start, shape = metadata["pieces"][key]
                yield file, Box(tuple(start), tuple(file.get_slice(key).get_shape())), shape

    def fill(self, key: str, into: torch.Tensor) -> bool:
        """Writes what is stored under `key` into the part of a tensor that this rank holds; False if nothing is."""
        mine, box = _local(into)
        found = 0
        for file, there, shape in self.boxes(key):
            if shape != list(into.shape):
                raise RunError(
                    f"{self.folder}: {key} is of shape {shape} where the run has {list(into.shape)}"
                )
            source, target = there.within(box), box.within(there)
            if source is not None and target is not None:
                values = _read(file, key, source)
                mine[target] = values.to(mine.device)
                found += values.numel()
        if found != mine.numel() and found:
            raise RunError(f"{self.folder}: a part of {key} is missing")
        return bool(found) or (mine.numel() == 0 and any(True for _ in self.boxes(key)))

    def own(self, key: str, rank: int) -> torch.Tensor | None:
        """What is stored under `key` without a place: the rank's own, or what is one for all."""
        for i in (rank, *range(len(self.files))):
            if i < len(self.files) and key in self.keys[i]:
                tensor: torch.Tensor = self.files[i].get_tensor(key)
                return tensor
        return None


@contextmanager
def damage(folder: Path) -> Iterator[None]:
    """What torch refuses to read of a checkpoint, in one line: it is damaged, or would run code."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(f"{folder} cannot be gone on from, a file in it is damaged: {reason}") from error


def _read(file: Any, key: str, region: tuple[slice, ...]) -> torch.Tensor:
    tensor: torch.Tensor = file.get_slice(key)[region] if region else file.get_tensor(key)
    return tensor


def load_weights(folder: Path, model: Any) -> None:
    """Puts the trained weights of a checkpoint into the model, on each rank its part.

    Raises:
        RunError: A weight is missing, or of another shape.
    """
    stored = _Stored(folder)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if stored.fill(f"{WEIGHT}/{name}", parameter.data):
                continue
            mine, box = _local(parameter.data)
            for file in stored.models:
                if _saved_as(name) in file.keys():  # noqa: SIM118 (it is no dict)
                    region = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
                    mine.copy_(_read(file, _saved_as(name), region))
                    break
            else:
                raise RunError(f"{folder} does not hold {name}, which is trained")


def load_optimizer(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Puts optimizer and scheduler where the checkpoint had them; learning rates are the recipe's.

    Returns:
        What this rank had counted since it last logged; where another number of ranks had, its part of that.

    Raises:
        RunError: A part is missing, of another shape, or can only be read by as many ranks as wrote it.
    """
    stored = _Stored(folder)
    names = {id(parameter): name for name, parameter in trained(model).items()}
    kinds = _kinds(stored)
    state: dict[int, dict[str, Any]] = {}
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for i, parameter in enumerate(parameters):
        name = names[id(parameter)]
        found: dict[str, Any] = {}
        for key in kinds.get(name, ()):
            whole_key = f"{key}/{name}"
            if any(whole_key in metadata["pieces"] for metadata in stored.metadata):
                file = next(file for file, _, _ in stored.boxes(whole_key))
                found[key] = torch.zeros_like(parameter, dtype=_dtype(file, whole_key))
                if not stored.fill(whole_key, found[key]):
                    raise RunError(f"{folder}: a part of {whole_key} is missing")
                continue
            value = stored.own(whole_key, distributed.rank())
            assert value is not None
            if (
                value.dim()
                and isinstance(parameter, DTensor)
                and len(stored.files) != distributed.world_size()
            ):
                raise RunError(
                    f"{folder}: the optimizer's {key} was cut for {len(stored.files)} processes and there are "
                    f"{distributed.world_size()}; start as many"
                )
            found[key] = value
        for metadata in stored.metadata:
            found |= metadata["values"].get(name, {})
        if found:
            state[i] = found
    groups = inner.state_dict()["param_groups"]
    for group, before in zip(groups, stored.metadata[0]["groups"], strict=True):
        group |= before
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _load_scheduler(folder, scheduler, inner)
    of_all: list[dict[str, Any]] = [metadata["logged"] for metadata in stored.metadata]
    if len(of_all) == distributed.world_size():
        return of_all[distributed.rank()]
    means = {key: sum(logged[key] for logged in of_all) / len(of_all) for key in ("loss", "total")}
    # What is added up over the ranks: each takes its part, the first what is over.
    sums = {key: sum(round(logged.get(key, 0)) for logged in of_all) for key in ("trained", "energy")}
    parts = {
        key: n // distributed.world_size() + n % distributed.world_size() * (not distributed.rank())
        for key, n in sums.items()
    }
    return of_all[0] | means | parts


def _kinds(stored: _Stored) -> dict[str, list[str]]:
    """What the optimizer keeps of each parameter, in one order on all ranks."""
    kinds: dict[str, list[str]] = {}
    for key in sorted(set().union(*stored.keys)):
        kind, _, name = key.partition("/")
        if kind != WEIGHT:
            kinds.setdefault(name, []).append(kind)
    return kinds


def _load_scheduler(folder: Path, scheduler: Any, optimizer: Any) -> None:
    base = list(getattr(scheduler, "base_lrs", []))
    with damage(folder):
        scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
    rates = list(scheduler._last_lr)
    if lambdas := getattr(scheduler, "lr_lambdas", None):
        # The recipe's learning rate, also where it has changed since; upstream would go on with the old one.
        scheduler.base_lrs = base
        rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base, lambdas, strict=True)]
        scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
