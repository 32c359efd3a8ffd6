"""Saves and loads what a run needs to resume exactly: trained weights, optimizer, scheduler, counters.

Each rank writes one safetensors file, `state-RANK-of-RANKS.safetensors`, with the parts of tensors that it holds; where
several ranks hold the same part, the first of them writes it. A part is stored under its parameter's name with its
position, so any number of ranks can read the files. No tensor is pickled; torch's own sharded checkpoints pickle
their index (torch 2.13 `FileSystemReader.read_metadata`).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from finetune.system import distributed
from finetune.system.errors import RunError, reworded
from finetune.system.files import ADAPTER_WEIGHTS

WEIGHT = "weight"
# The entries of a parameter group that the recipe decides. All others are the optimizer's state.
_FROM_RECIPE = ("params", "lr", "initial_lr", "weight_decay", "betas", "eps")


class Counters(TypedDict):
    """The counters of one process. The keys are stored in checkpoints.

    Attributes:
        loss: The summed training loss since the last logged record.
        total: The summed training loss until that record (`_total_loss_scalar` of transformers' Trainer).
        step: The step of that record.
        metrics: trl's values since that record, which it averages when it logs.
        tokens: The input tokens that all processes have seen.
        trained: The trained tokens that this process has seen.
        energy: The energy that this process's GPU has used, in millijoules.
    """

    loss: float
    total: float
    step: int
    metrics: dict[str, Any]
    tokens: int
    trained: int
    energy: float


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: its first index and its length in each dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: Box) -> tuple[slice, ...] | None:
        """The slices of this part that `other` covers, too; None if the two do not overlap."""
        slices = []
        for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True):
            low, high = max(a, b), min(a + n, b + m)
            if low >= high:
                return None
            slices.append(slice(low - a, high - a))
        return tuple(slices)


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name, without what torch.compile and activation checkpointing add to names."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward pass without gradients torch 2.13 leaves the root module's weights gathered, and the next
            # forward pass would overwrite values written to them.
            module.reshard()
    return {_unwrapped_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter and buffer that a saved model holds, once, by its name as in `trained_parameters`."""
    saved = set(model.state_dict())  # which also frees what FSDP 2 has gathered
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if (plain := _unwrapped_name(name)) in saved:
            yield plain, tensor


def _unwrapped_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor gathered from all ranks; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Box]:
    """The part of a tensor that this rank holds, and its position in the tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, Box((0,) * tensor.dim(), tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), Box(tuple(start), tuple(shape))


def _writes_part(tensor: torch.Tensor, main: bool) -> bool:
    """True if this rank is the first of those that hold this part of the tensor, so that it writes it."""
    if not isinstance(tensor, DTensor):
        return main
    mesh, placements = tensor.device_mesh, tensor.placements
    return all(not p.is_replicate() or mesh.get_local_rank(i) == 0 for i, p in enumerate(placements))


# ---------------------------------------------------------------------------------------------------------------
# Writing


def save_state(folder: Path, model: Any, optimizer: Any, scheduler: Any, counters: Counters) -> None:
    """Writes this rank's state file, and on the first rank the scheduler's.

    Args:
        folder: The checkpoint. Weights that its model or adapter files hold already are not written again.
        model: The model, which FSDP or DDP may have wrapped.
        optimizer: The model's optimizer.
        scheduler: The learning rate scheduler.
        counters: The counters of this rank.
    """
    parameters = trained_parameters(model)
    rank = distributed.rank()
    # The first rank has written the model's files; another machine may not see them yet.
    in_model_files = distributed.broadcast_from_first(_weights_in(folder) if not rank else None)
    tensors: dict[str, torch.Tensor] = {}
    pieces: dict[str, Any] = {}
    values: dict[str, dict[str, Any]] = {}

    def keep(key: str, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
        part, box = _local_part(tensor)
        # Moments have the parameter's shape and are sharded like it; a step count or a quantisation map is not.
        like_parameter = tensor.shape == parameter.shape
        written_here = _writes_part(tensor if like_parameter else parameter, rank == 0)
        if not written_here or (like_parameter and not part.numel()):
            return
        if like_parameter:
            pieces[f"{key}/{name}"] = [list(box.start), list(tensor.shape)]
        part = part.detach().cpu().contiguous()
        # 8-bit optimizer states share one quantisation map, and safetensors refuses tensors that share memory.
        tensors[f"{key}/{name}"] = part if like_parameter else part.clone()

    for name, parameter in parameters.items():
        if in_model_files.get(_name_in_model_file(name)) != (list(parameter.shape), parameter.dtype):
            keep(WEIGHT, name, parameter, parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                keep(key, name, value, parameter)
            else:
                values.setdefault(name, {})[key] = value
    groups = [
        {name: value for name, value in group.items() if name not in _FROM_RECIPE} for group in optimizer.param_groups
    ]
    metadata = {"pieces": pieces, "values": values, "groups": groups, "logged": counters}
    text = {name: json.dumps(value) for name, value in metadata.items()}
    save_file(tensors, folder / f"state-{rank + 1:05}-of-{distributed.world_size():05}.safetensors", text)
    if rank == 0:
        torch.save(scheduler.state_dict(), folder / "scheduler.pt")


def _weights_in(folder: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """The shape and type of each tensor in the folder's model or adapter files."""
    weights = {}
    for file in _model_files(folder):
        stored: Any
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no dict)
                weights[name] = (list(stored.get_slice(name).get_shape()), _stored_dtype(stored, name))
    return weights


def _model_files(folder: Path) -> list[Path]:
    return [*folder.glob("model*.safetensors"), *folder.glob(ADAPTER_WEIGHTS)]


def _name_in_model_file(name: str) -> str:
    """The name of a trained weight in the model's or adapter's own file."""
    return name.replace(".default.", ".")


def _stored_dtype(file: Any, key: str) -> torch.dtype:
    part = file.get_slice(key)
    empty: torch.Tensor = part[:0] if part.get_shape() else file.get_tensor(key)
    return empty.dtype


# ---------------------------------------------------------------------------------------------------------------
# Reading


class _SavedState:
    """The state files of all ranks that wrote a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("state-*-of-*.safetensors"))
        if not paths:
            raise RunError(f"{folder} holds no state to resume from (state-*.safetensors)")
        self.files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        self.metadata = [{name: json.loads(text) for name, text in file.metadata().items()} for file in self.files]
        self.keys = [set(file.keys()) for file in self.files]
        self.models: list[Any] = [safe_open(path, framework="pt") for path in _model_files(folder)]

    def parts(self, key: str) -> Iterator[tuple[Any, Box, list[int]]]:
        """Yields each stored part of a tensor: its file, its position, the shape of the whole tensor."""
        for file, metadata in zip(self.files, self.metadata, strict=True):
            if key in metadata["pieces"]:
                start, shape = metadata["pieces"][key]
                yield file, Box(tuple(start), tuple(file.get_slice(key).get_shape())), shape

    def fill(self, key: str, into: torch.Tensor) -> bool:
        """Copies what is stored under `key` into the part of a tensor that this rank holds; False if nothing is stored.

        Raises:
            RunError: The shape differs, or a part is missing.
        """
        local, box = _local_part(into)
        count = 0
        for file, piece, shape in self.parts(key):
            if shape != list(into.shape):
                raise RunError(f"{self.folder}: {key} has shape {shape}, and in this run {list(into.shape)}")
            source, target = piece.overlap(box), box.overlap(piece)
            if source is not None and target is not None:
                values = _read(file, key, source)
                local[target] = values.to(local.device)
                count += values.numel()
        if count != local.numel() and count:
            raise RunError(f"{self.folder}: a part of {key} is missing")
        return bool(count) or (local.numel() == 0 and any(True for _ in self.parts(key)))

    def unsharded(self, key: str, rank: int) -> torch.Tensor | None:
        """The tensor stored under `key` without a position: from the rank's own file, or the first that has it."""
        for i in (rank, *range(len(self.files))):
            if i < len(self.files) and key in self.keys[i]:
                tensor: torch.Tensor = self.files[i].get_tensor(key)
                return tensor
        return None


@contextmanager
def damage_reported(folder: Path) -> Iterator[None]:
    """Turns torch's errors at reading a checkpoint into one line.

    Raises:
        RunError: A file is damaged, or a pickle that would run code; torch 2.13's advice to turn its check off is left
            out.
    """
    types = (SafetensorError, EOFError, LookupError, RuntimeError, ValueError, TypeError, AttributeError)
    try:
        with reworded(RunError, f"{folder} cannot be resumed from, a file in it is damaged", *types):
            yield
    except RunError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise error.__cause__ from None
        raise
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{folder} cannot be resumed from, a file in it is damaged, or a pickle that could run code, which is not "
            "read; resume from another checkpoint"
        ) from error


def _read(file: Any, key: str, region: tuple[slice, ...]) -> torch.Tensor:
    tensor: torch.Tensor = file.get_slice(key)[region] if region else file.get_tensor(key)
    return tensor


def load_weights(folder: Path, model: Any) -> None:
    """Loads the trained weights of a checkpoint into the model; each rank loads the parts that it holds.

    Raises:
        RunError: A weight is missing or has another shape.
    """
    stored = _SavedState(folder)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if stored.fill(f"{WEIGHT}/{name}", parameter.data):
                continue
            local, box = _local_part(parameter.data)
            for file in stored.models:
                if _name_in_model_file(name) in file.keys():  # noqa: SIM118 (it is no dict)
                    region = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
                    local.copy_(_read(file, _name_in_model_file(name), region))
                    break
            else:
                raise RunError(f"{folder} does not hold {name}, which is trained")


def load_optimizer(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> Counters:
    """Restores optimizer and scheduler from a checkpoint; learning rates stay the recipe's.

    Args:
        folder: The checkpoint.
        model: The model, which FSDP or DDP may have wrapped.
        optimizer: The model's optimizer, or accelerate's wrapper of it.
        scheduler: The learning rate scheduler.

    Returns:
        The counters of this rank. If another number of ranks wrote the checkpoint, the counters are divided anew.

    Raises:
        RunError: A part is missing, has another shape, or can only be read by as many ranks as wrote it.
    """
    stored = _SavedState(folder)
    names = {id(parameter): name for name, parameter in trained_parameters(model).items()}
    keys = _optimizer_keys(stored)
    state: dict[int, dict[str, Any]] = {}
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for i, parameter in enumerate(parameters):
        name = names[id(parameter)]
        found: dict[str, Any] = {}
        for key in keys.get(name, ()):
            whole_key = f"{key}/{name}"
            if any(whole_key in metadata["pieces"] for metadata in stored.metadata):
                file = next(file for file, _, _ in stored.parts(whole_key))
                found[key] = torch.zeros_like(parameter, dtype=_stored_dtype(file, whole_key))
                if not stored.fill(whole_key, found[key]):
                    raise RunError(f"{folder}: a part of {whole_key} is missing")
                continue
            value = stored.unsharded(whole_key, distributed.rank())
            assert value is not None
            if value.dim() and isinstance(parameter, DTensor) and len(stored.files) != distributed.world_size():
                raise RunError(
                    f"{folder}: the optimizer's {key} was sharded over {len(stored.files)} processes and there are "
                    f"{distributed.world_size()}; start {len(stored.files)}"
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
    return _counters_of_this_rank([metadata["logged"] for metadata in stored.metadata])


def _counters_of_this_rank(saved: list[Counters]) -> Counters:
    """The counters of this rank, from those that each rank of the checkpoint saved."""
    rank, count = distributed.rank(), distributed.world_size()
    if len(saved) == count:
        return saved[rank]

    def total(key: Literal["trained", "energy"]) -> int:
        return sum(round(counters.get(key, 0)) for counters in saved)

    def share(number: int) -> int:
        return number // count + (number % count if rank == 0 else 0)

    return {
        **saved[0],
        "loss": sum(counters["loss"] for counters in saved) / len(saved),
        "total": sum(counters["total"] for counters in saved) / len(saved),
        # These are summed over the ranks when they are logged.
        "trained": share(total("trained")),
        "energy": share(total("energy")),
    }


def _optimizer_keys(stored: _SavedState) -> dict[str, list[str]]:
    """The names of the optimizer's tensors for each parameter, in the same order on all ranks."""
    keys: dict[str, list[str]] = {}
    for stored_key in sorted(set().union(*stored.keys)):
        key, _, name = stored_key.partition("/")
        if key != WEIGHT:
            keys.setdefault(name, []).append(key)
    return keys


def _load_scheduler(folder: Path, scheduler: Any, optimizer: Any) -> None:
    base = list(getattr(scheduler, "base_lrs", []))
    with damage_reported(folder):
        scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
    rates = list(scheduler._last_lr)
    if lambdas := getattr(scheduler, "lr_lambdas", None):
        # The recipe's learning rate, which may have changed since; torch would restore the old one.
        scheduler.base_lrs = base
        rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base, lambdas, strict=True)]
        scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
