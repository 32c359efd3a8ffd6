"""Builds what upstream makes from `training` without a model, so that what it refuses is a fault of the recipe.

Otherwise such a value would end a run only after its rows are prepared and its weights are loaded.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from finetune.recipe.upstream import checked_config
from finetune.recipe.upstream_tables import unless_known_good
from finetune.recipe.yaml_tree import RecipeTree, Section
from finetune.system.errors import first_line

# The steps of a run whose length is not known before its rows are counted.
_STEPS = 1000


def check_objects(tree: RecipeTree, training: Section) -> None:
    """Adds faults for values of which upstream cannot build an optimizer, a schedule, a data loader or a checkpoint.

    Args:
        tree: The recipe; takes the faults.
        training: The section, whose keys and types are valid.
    """
    unless_known_good(tree, "objects", training, lambda: _build_objects(tree, training))


def _build_objects(tree: RecipeTree, training: Section) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_optimizer(tree, training)
        _check_loader(tree, training)
        _check_checkpointing(tree, training)
    _check_packages(tree, training)


@contextmanager
def _refusals(tree: RecipeTree, training: Section, names: Sequence[str], owner: str) -> Iterator[None]:
    """Turns any error into a fault about that one of the recipe's keys `names` which its text mentions first."""
    try:
        yield
    except Exception as error:  # of any type; it is about these values
        text = first_line(error)
        given = [name for name in names if name in training] or list(names[:1])
        mentioned = [name for name in given if name.split("_", 1)[-1] in text or name in text]
        key = f"training.{(mentioned or given)[0]}"
        tree.fault(key, f"is {tree.shown(key)}; {owner} says: {text}")


def _check_optimizer(tree: RecipeTree, training: Section) -> None:
    """Builds the optimizer of one layer, and its schedule, as `Trainer.create_optimizer_and_scheduler` does."""
    from torch.nn import Linear
    from transformers import Trainer

    if str(training.get("optim", "")).startswith(("galore", "apollo")):
        problem = f"is {training['optim']}, whose state cannot be saved; write adamw_torch_fused, or adamw_8bit"
        tree.fault("training.optim", problem)
        return
    trainer = SimpleNamespace(
        args=checked_config(training, tree.method),
        model=Linear(1, 1),
        optimizer=None,
        lr_scheduler=None,
        optimizer_cls_and_kwargs=None,
        get_decay_parameter_names=lambda model: ["weight"],
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
    )
    names = ("optim_args", "optim", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    with _refusals(tree, training, names, "transformers"):
        _check_optim_args(tree, trainer)
        Trainer.create_optimizer(trainer)
    if trainer.optimizer is None or _has_unknown_names(tree, trainer.args):
        return
    steps = trainer.args.max_steps if trainer.args.max_steps > 0 else _STEPS
    with _refusals(tree, training, ("lr_scheduler_kwargs", "lr_scheduler_type", "warmup_steps"), "transformers"):
        Trainer.create_scheduler(trainer, steps)
        for step, rate in _learning_rates(trainer.lr_scheduler, trainer.args.learning_rate, steps):
            if isinstance(rate, complex) or not math.isfinite(rate) or rate < 0:
                key = "training.lr_scheduler_kwargs"
                problem = f"is {tree.shown(key)}, which gives the learning rate {rate} at step {step}"
                tree.fault(key, f"{problem}; write numbers with which it stays above 0")
                break


def _check_optim_args(tree: RecipeTree, trainer: Any) -> None:
    """Adds a fault for each name in `optim_args` that the optimizer does not read, which upstream says nothing of."""

    def arguments(optim_args: str) -> Any:
        args = SimpleNamespace(**vars(trainer.args) | {"optim_args": optim_args})
        try:
            return repr(trainer.get_optimizer_cls_and_kwargs(args, trainer.model))
        except (ValueError, TypeError, AttributeError) as error:
            return error

    written = trainer.args.optim_args
    without = arguments("")
    for name in [part.split("=")[0] for part in written.split(",")] if written else []:
        # A value that no argument can have: whoever reads it fails, or passes it on.
        if not isinstance(without, Exception) and arguments(f"{name}=?") == without:
            key = "training.optim_args"
            tree.fault(key, f"is {tree.shown(key)}, but {trainer.args.optim.value} reads no {name}; remove it")


def _has_unknown_names(tree: RecipeTree, args: Any) -> bool:
    """Adds a fault for each name in `lr_scheduler_kwargs` that the schedule does not take; true if there are any."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    taken = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return False  # the class that gets them all refuses them itself
    own = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    # transformers 5.23 passes these two schedules none of them.
    names = [] if args.lr_scheduler_type in ("constant", "constant_with_warmup") else sorted(taken.keys() - own)
    unknown = [name for name in args.lr_scheduler_kwargs or {} if name not in names]
    for name in unknown:
        instead = f"write {' or '.join(names)}" if names else "remove it"
        problem = f"is unknown to the schedule {args.lr_scheduler_type.value}; {instead}"
        tree.fault(f"training.lr_scheduler_kwargs.{name}", problem)
    return bool(unknown)


def _learning_rates(scheduler: Any, first: float, steps: int) -> Iterator[tuple[int, Any]]:
    """The learning rates at some steps of a run: its first ones, and 40 of all."""
    if lambdas := getattr(scheduler, "lr_lambdas", None):
        for step in sorted({*range(min(steps, 5)), *range(0, steps, -(-steps // 40)), steps - 1}):
            yield step, lambdas[0](step) * first
        return
    # The others are told the loss of each evaluation.
    for step in range(3):
        scheduler.step(1.0)
        yield step, scheduler.optimizer.param_groups[0]["lr"]


def _check_loader(tree: RecipeTree, training: Section) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    names = ("num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context")
    given = {name: training[f"dataloader_{name}"] for name in names if f"dataloader_{name}" in training}
    keys = [f"dataloader_{name}" for name in ("persistent_workers", "multiprocessing_context", *names)]
    with _refusals(tree, training, keys, "torch"):
        DataLoader(TensorDataset(), **given)


def _check_checkpointing(tree: RecipeTree, training: Section) -> None:
    """Runs torch's `checkpoint` with the recipe's arguments on one number."""
    import torch
    from torch.utils.checkpoint import checkpoint

    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    options = next((dict(training[name]) for name in names if training.get(name)), {})
    with _refusals(tree, training, names, "torch"):
        options.pop("selective", None)
        checkpoint(torch.abs, torch.ones(1, requires_grad=True), **{"use_reentrant": False} | options)


def _check_packages(tree: RecipeTree, training: Section) -> None:
    """Adds faults for packages that the recipe needs and that are not installed."""
    from transformers.utils import is_liger_kernel_available

    if training.get("use_liger_kernel") and not is_liger_kernel_available():
        message = "is true, which needs the package liger-kernel; remove it, or run pip install liger-kernel"
        tree.fault("training.use_liger_kernel", message)
