"""Paths in a recipe: relative to the folder of the file in which they are written, or else to the working directory."""

from __future__ import annotations

import difflib
import os
from glob import has_magic, iglob
from pathlib import Path

from finetune.recipe.yaml_tree import COMMAND_LINE, Node, RecipeTree

# The keys that hold the path of something to read; `*` stands for each entry of a list.
_KEYS = (
    "model.name_or_path",
    "model.chat_template",
    "model.adapter",
    "data.train.*.path",
    "data.eval.*.path",
    "evaluate.prompts",
    "evaluate.judge.reference",
    "export.imatrix_data.path",
)
# Folders that are no owners on the Hub.
_FOLDERS = ("runs", "data", "datasets", "models", "checkpoints", "outputs", "output", "saves")


def resolve_paths(tree: RecipeTree) -> None:
    """Replaces each relative path by that of the file beside the recipe that it names, where there is one.

    Other values stay as they are: a path from the working directory, or an id on the Hub. Paths on the command line
    are relative to the working directory. `training.output_dir` is written to, so it is relative to that, too.
    """
    for key in _KEYS:
        for node in _nodes(tree.root, key.split(".")):
            folder = os.path.dirname(node.origin.rpartition(":")[0])
            if node.origin == COMMAND_LINE or not folder or not isinstance(node.value, str):
                continue
            beside = os.path.normpath(os.path.join(folder, node.value))
            # The rows' names are as short whether the recipe is named by a relative path or by an absolute one.
            if os.path.isabs(beside) and not (shorter := os.path.relpath(beside)).startswith(os.pardir):
                beside = shorter
            if key == "model.chat_template" and not node.value.endswith(".jinja"):
                continue
            if node.value and not os.path.isabs(node.value) and node.value[0] != "~" and _exists(beside):
                node.value = beside


def _nodes(node: Node | None, names: list[str]) -> list[Node]:
    if node is None or not names:
        return [node] if node else []
    if names[0] == "*":
        return [found for item in node.value for found in _nodes(item, names[1:])] if type(node.value) is list else []
    return _nodes(node.child(names[0]), names[1:])


def _exists(path: str) -> bool:
    return os.path.exists(path) or (has_magic(path) and any(iglob(path, recursive=True)))


def near_path(path: str) -> str | None:
    """The path of a file or folder whose name is nearly that of `path`, which does not exist; None if there is none.

    A name alone is also looked for in `runs`.
    """
    folders = [os.path.dirname(path)] if os.path.dirname(path) else ["", "runs"]
    for folder in folders:
        try:
            names = sorted(os.listdir(os.path.expanduser(folder) or "."))
        except OSError:
            continue
        name = os.path.basename(path.rstrip("/"))
        wanted = difflib.get_close_matches(name, names, n=1, cutoff=0.8 if folder else 0.9)
        stems = [other for other in names if name and Path(other).stem == name] if folder else []
        if found := [*wanted, *stems]:
            return os.path.join(folder, found[0])
    return None


def is_local(path: str) -> bool:
    """True for a path, which does not exist, that is hardly an id on the Hub: its folder is on this machine.

    A folder may also have the name of an owner on the Hub; then something in it must have nearly that name.
    """
    folder = os.path.dirname(path.rstrip("/"))
    if not folder or not os.path.isdir(os.path.expanduser(folder)):
        return False
    return folder.split("/")[0] in _FOLDERS or near_path(path) is not None
