"""Checks of a recipe's `method`, and of the values that the methods which train on preferences refuse."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from finetune.recipe.schema import CONFIGS
from finetune.recipe.upstream_tables import tables
from finetune.recipe.yaml_tree import RecipeTree, Section, Sections

# The formats of rows that each of these methods reads.
FORMATS_BY_METHOD = {"dpo": ("preference",), "orpo": ("preference",), "kto": ("preference", "rated")}
FORMATS_OF_PREFERENCES = {name for names in FORMATS_BY_METHOD.values() for name in names}
# From `DPOTrainer` of trl 1.16: the losses that take an f-divergence, and the losses that read a key.
_DIFFERENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
_READ_BY = {"label_smoothing": {"exo_pair", "robust", "aot", "aot_unpaired"}, "discopop_tau": {"discopop"}}


def check_method(tree: RecipeTree) -> None:
    """Sets the tree's method from the recipe; adds a fault for one that there is not, or that trl does not have."""
    node = tree.root.child("method")
    if node is None or "method" in tree.broken:
        return
    if not isinstance(node.value, str) or node.value not in CONFIGS:
        tree.fault("method", f"is {node.shown()}; write sft, dpo, kto or orpo")
        return
    if node.value not in tables()["training"]:
        module = CONFIGS[node.value].rpartition(".")[0]
        problem = f"is {node.value}, which needs {module}, and trl {importlib.metadata.version('trl')} does not have it"
        tree.fault("method", f"{problem}; write dpo, or install a release that has it")
        return
    tree.method = node.value


def check_preferences(tree: RecipeTree, sections: Sections) -> None:
    """Adds faults for values of `data` and `training` that the recipe's method refuses; sets `data.on_overflow`.

    Args:
        tree: The recipe, to which the faults are added.
        sections: The valid keys and values of each section.
    """
    data, training = sections["data"], sections["training"]
    _check_formats(tree, data)
    if tree.method == "sft":
        return
    _check_rows(tree, data)
    data.setdefault("on_overflow", "drop")
    if tree.method == "dpo":
        _check_losses(tree, training)


def _check_formats(tree: RecipeTree, data: Section) -> None:
    """Adds faults for sources whose format the method does not read."""
    for name in ("train", "eval"):
        for i, source in enumerate(data.get(name, [])):
            form, key = source.get("format"), f"data.{name}.{i}.format"
            read = FORMATS_BY_METHOD.get(tree.method)
            if form is not None and read and form not in read:
                tree.fault(key, f"is {form}, but method {tree.method} needs pairs; write {' or '.join(read)}")
            elif form in FORMATS_OF_PREFERENCES and not read:
                readers = [method for method, names in FORMATS_BY_METHOD.items() if form in names]
                tree.fault(key, f"is {form}, but method is sft; write method: {' or '.join(readers)}")


def _check_rows(tree: RecipeTree, data: Section) -> None:
    """Adds faults for values of `data` with which the two answers of a row would not stay whole."""
    because = f"but method is {tree.method}"
    overflow = data.get("on_overflow", "drop")
    if overflow not in ("drop", "error"):
        message = f"is {overflow}, {because}, and both answers of a row stay whole; write drop or error"
        tree.fault("data.on_overflow", message)
    if data.get("train_on") not in (None, "assistant", "completion"):
        message = f"is {tree.shown('data.train_on')}, {because}, which trains on the answers; remove it"
        tree.fault("data.train_on", message)
    if data.get("train_on_thinking") is False:
        tree.fault("data.train_on_thinking", f"is false, {because}, and thinking is a part of an answer; remove it")
    for name in ("train", "eval"):
        for i, source in enumerate(data.get(name, [])):
            if source.get("streaming"):
                message = f"is true, {because}, and the reference needs all rows before training; remove it"
                tree.fault(f"data.{name}.{i}.streaming", message)


def _check_losses(tree: RecipeTree, training: Section) -> None:
    """Adds faults for options that `DPOTrainer` refuses with these losses, or that none of them reads."""
    losses: Any = training.get("loss_type", ["sigmoid"])
    losses = {losses} if isinstance(losses, str) else set(losses)
    shown = f"loss_type {', '.join(sorted(losses))}"
    divergence = training.get("f_divergence_type", "reverse_kl")
    if divergence != "reverse_kl" and (others := sorted(losses - _DIFFERENCE)):
        message = f"is {divergence}, which loss_type {', '.join(others)} does not have; write reverse_kl"
        tree.fault("training.f_divergence_type", message)
    if "f_alpha_divergence_coef" in training and divergence != "alpha_divergence":
        message = "has no effect without f_divergence_type: alpha_divergence; remove it"
        tree.fault("training.f_alpha_divergence_coef", message)
    if training.get("use_weighting") and losses & {"aot", "aot_unpaired"}:
        tree.fault("training.use_weighting", f"is true, but {shown} sorts the rows of a batch; remove it")
    smoothing = training.get("label_smoothing", 0)
    if "exo_pair" in losses and not smoothing:
        tree.fault("training.loss_type", "has exo_pair, which needs smoothing; write label_smoothing: 0.001")
    if "robust" in losses and smoothing >= 0.5:
        tree.fault("training.label_smoothing", f"is {smoothing}, but loss_type robust needs less than 0.5; write 0.1")
    for name, readers in _READ_BY.items():
        if training.get(name) and not losses & readers:
            message = f"has no effect with {shown}; remove it, or write loss_type: {' or '.join(sorted(readers))}"
            tree.fault(f"training.{name}", message)
