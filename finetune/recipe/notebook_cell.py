"""Reads the arguments of unsloth's and trl's calls in a notebook or in Python text, which is parsed and never run."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from finetune.system.errors import RecipeError

# The functions whose arguments are read, by the end of their names.
_CALLS = (
    *("from_pretrained", "get_peft_model", "get_chat_template", "load_dataset", "train_on_responses_only"),
    "EarlyStoppingCallback",
)
_CONFIGS = ("Config", "Arguments", "Trainer")
# Arguments that are objects of the program.
_OBJECTS = (
    "model",
    "tokenizer",
    "processing_class",
    "args",
    "train_dataset",
    "eval_dataset",
    "data_collator",
    "trainer",
    "callbacks",
)


class Unread(str):
    """The text of an expression whose value is not plain."""

    __slots__ = ()


def read_cell(text: str, path: Path) -> dict[str, Any]:
    """The arguments of the calls by their names; empty for a text that calls `from_pretrained` nowhere.

    Args:
        text: Python, or the JSON of a notebook.
        path: Its file, for messages.

    Raises:
        RecipeError: It is a notebook that cannot be read, or Python with a mistake.
    """
    if path.suffix == ".ipynb":
        try:
            cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
            text = "\n".join("".join(cell["source"]) for cell in cells)
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError([f"{path}: is not a notebook"]) from error
    # Lines for the shell and for the notebook are no Python.
    lines = [re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in text.splitlines()]
    try:
        tree = ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError) as error:
        if "from_pretrained" not in text:
            return {}
        raise RecipeError([f"{path}:{getattr(error, 'lineno', 1)}: is not Python: {error}"]) from error
    reader = _Reader()
    reader.visit(tree)
    return reader.found if "model_name" in reader.found else {}


class _Reader(ast.NodeVisitor):
    """Collects the arguments of calls; names stand for the plain values that were assigned to them."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.found: dict[str, Any] = {}

    def visit_If(self, node: ast.If) -> None:
        # Notebooks keep what is not to be run behind `if False:`.
        for part in node.orelse if isinstance(node.test, ast.Constant) and not node.test.value else node.body:
            self.visit(part)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        target = node.targets[0]
        if isinstance(target, ast.Name):
            plain, value = self._value(node.value)
            if plain:
                self.names[target.id] = value

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in _CALLS or called.endswith(_CONFIGS):
            self._read(called, node)
        self.generic_visit(node)

    def _read(self, called: str, node: ast.Call) -> None:
        if called == "from_pretrained" and "model_name" in self.found:
            return  # the trained model, loaded again
        given = {word.arg: word.value for word in node.keywords if word.arg}
        if called == "from_pretrained" and node.args:
            given.setdefault("model_name", node.args[0])
        if called == "load_dataset":
            names = ("dataset", "dataset_config")
            given = {
                {"path": "dataset", "name": "dataset_config"}.get(name, name): value for name, value in given.items()
            }
            given |= dict(zip(names, node.args, strict=False))
        if called.endswith("Trainer"):
            self.found["trainer"] = called
        if called == "train_on_responses_only":
            self.found[called] = True
        for name, value in given.items():
            plain, read = self._value(value)
            if name in _OBJECTS:
                continue
            if plain and read is None:
                self.found.setdefault(name, None)
            else:
                self.found[name] = read if plain else Unread(ast.unparse(value))

    def _value(self, node: ast.expr) -> tuple[bool, Any]:
        """True and the value of a literal or of a name that one was assigned to; else False."""
        if isinstance(node, ast.Name) and node.id in self.names:
            return True, self.names[node.id]
        try:
            value = ast.literal_eval(node)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return False, None
        return True, list(value) if isinstance(value, tuple) else value
