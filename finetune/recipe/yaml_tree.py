"""Reads YAML into a tree of values with the line of each, and collects the faults found in it."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe.yaml_scalars import SCALAR_TYPES, TAG, Loader, type_of
from finetune.system.files import read_text
from finetune.system.secret_scan import SECRET_NAME_PATTERN, SECRET_PATTERN

# A section's keys and values as plain data, and all sections by name.
Section = dict[str, Any]
Sections = dict[str, Section]
COMMAND_LINE = "command line"
# The limits of a recipe: bytes of a file; values, with those of an alias or a merge counted at each use; maps and lists
# inside one another; files that extend one another.
MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
MAX_DEPTH = 50
MAX_FILES = 20
# The largest whole number; larger ones overflow in torch, and are not exact in JSON.
MAX_INTEGER = 10**15 - 1

# The characters from which on a value from the environment is looked for in faults.
_LONG_VALUE = 8
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")


@dataclass
class Node:
    """A scalar, a `dict[str, Node]` or a `list[Node]`, and where it was written.

    Values keep their place through `extends` and overrides, so that every fault can name a line.
    """

    value: Any
    origin: str
    # The text as it is written, such as `${NAME}`, which is saved and shown in place of a value from the environment.
    template: str | None = None
    # True if the template is a secret's: its value is compared nowhere.
    secret: bool = False
    # True if the template is written without quotes: its value may be a number.
    unquoted: bool = False

    def plain(self) -> Any:
        """The value as plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def child(self, name: str) -> "Node | None":
        """The child of a map by its name, or of a list by its index; None if there is none."""
        children = self.value
        if isinstance(children, list):
            children = {str(i): item for i, item in enumerate(children)}
        node: Node | None = children.get(name) if isinstance(children, dict) else None
        return node

    def shown(self) -> str:
        """The value for a message: short, on one line, without secrets."""
        return self.template or _shown(self.plain())

    def leaves(self, key: str = "") -> Iterator[tuple[str, "Node"]]:
        """Each scalar and each empty map or list, with its dotted key."""
        if not isinstance(self.value, dict | list) or not self.value:
            yield key, self
            return
        for name, child in self.value.items() if isinstance(self.value, dict) else enumerate(self.value):
            yield from child.leaves(f"{key}.{name}".lstrip("."))


def _shown(value: Any) -> str:
    text = SECRET_PATTERN.sub("(secret)", json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass
class RecipeTree:
    """A recipe while it is read and checked: its root node, and the faults so far as `(origin, message)`."""

    root: Node
    # The recipe's `method`, which decides the keys of `training`.
    method: str = "sft"
    # True with `lora: null`.
    trains_all_weights: bool = False
    faults: list[tuple[str, str]] = field(default_factory=list)
    # Keys whose value could not be read; they get no second fault.
    broken: set[str] = field(default_factory=set)
    # The number of values read so far.
    values: int = 0
    # Values from the environment, and what faults show in their place.
    secrets: dict[str, str] = field(default_factory=dict)

    def at(self, key: str) -> Node:
        """The node of a dotted key, or the nearest one above it."""
        node = self.root
        for name in key.split("."):
            node = node.child(name) or node
        return node

    def shown(self, key: str) -> str:
        """The value at a key for a message, as `Node.shown`."""
        return self.at(key).shown()

    def fault(self, key: str, message: str) -> None:
        """Adds a fault about the value at a dotted key."""
        self.faults.append((self.at(key).origin, f"{key}: {message}"))

    def unreadable(self, key: str, origin: str, message: str) -> Node:
        """Adds a fault about a value that cannot be read; returns an empty node in its place."""
        self.faults.append((origin, f"{key}: {message}" if key else message))
        self.broken.add(key)
        return Node(None, origin)

    def report(self) -> list[str]:
        """The faults in reading order, without secrets, each on one line that any terminal can print."""

        def position(fault: tuple[str, str]) -> tuple[bool, str, int]:
            file, _, line = fault[0].rpartition(":")
            numbered = line.isdecimal()
            return fault[0] == COMMAND_LINE, file if numbered else fault[0], int(line) if numbered else 0

        report = []
        for origin, message in dict.fromkeys(sorted(self.faults, key=position)):
            line = f"{origin}: {message}"
            for secret, template in self.secrets.items():
                line = line.replace(secret, template)
            line = " ".join(SECRET_PATTERN.sub("(secret)", line).split())
            report.append(line.encode("utf-8", "backslashreplace").decode())
        return report


class _BadYaml(ValueError):
    """PyYAML's message, and the line that it is about."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


def read_file(path: Path, tree: RecipeTree, chain: tuple[Path, ...] = (), origin: str = "") -> Node | None:
    """The nodes of a file, merged over those of the file it extends; None, and a fault, where one cannot be read.

    Args:
        path: The file.
        tree: The recipe, to which faults are added.
        chain: The resolved paths of the files that led here by `extends`.
        origin: The line that says `extends`.
    """
    where, who = (origin, f"extends: {path} ") if origin else (str(path), "")
    try:
        node = _parse(read_text(path, MAX_BYTES), str(path), "", tree)
    except _BadYaml as error:
        tree.faults.append((f"{path}:{error.line}", f"is not YAML: {error}"))
        return None
    except UnicodeDecodeError as error:
        tree.faults.append((where, f"{who}is not UTF-8 (byte {error.start}); save it as UTF-8"))
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        tree.faults.append((where, f"{who}can't be read ({reason}); write the path of a recipe"))
        return None
    if not node or not isinstance(node.value, dict):
        there = node.shown() if node else "empty"
        tree.faults.append((where, f"{who}is {there}; write at least the sections model and data"))
        return None

    extends = node.value.pop("extends", Node(None, str(path)))
    if extends.value is None:
        return None if "extends" in tree.broken else node
    if not isinstance(extends.value, str):
        tree.faults.append((extends.origin, f"extends: is {extends.shown()}; write the path of one recipe"))
        return None
    parent = Path(os.path.normpath(path.parent / extends.value))
    chain = (*chain, path.resolve())
    if parent.resolve() in chain:
        tree.faults.append((extends.origin, f"extends: {parent} extends itself; remove one extends"))
        return None
    if len(chain) == MAX_FILES:
        message = f"extends: {parent} comes after {MAX_FILES} files that extend one another; write fewer"
        tree.faults.append((extends.origin, message))
        return None
    base = read_file(parent, tree, chain, extends.origin)
    return base and _merged(base, node)


def _parse(text: str, file: str, key: str, tree: RecipeTree) -> Node | None:
    """The nodes of a text, None if it is empty; `key` is its place in the recipe."""
    try:
        root = yaml.compose(text, Loader=Loader)
        return _convert(root, file, file, key, tree) if root else None
    except RecursionError:
        raise _BadYaml("nested too deeply", 1) from None
    except yaml.reader.ReaderError as error:
        raise _BadYaml(error.reason, text.count("\n", 0, error.position) + 1) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = str(error.problem)
        if "'\\t'" in problem:
            problem = "a tab stands where YAML takes spaces alone; write spaces"
        raise _BadYaml(problem, mark.line + 1 if mark else 1) from None


def _merged(base: Node, node: Node) -> Node:
    """`node` over `base`: maps are merged, everything else is replaced."""
    if not (isinstance(base.value, dict) and isinstance(node.value, dict)):
        return node
    under = base.value
    over = {name: _merged(under[name], child) if name in under else child for name, child in node.value.items()}
    return Node(under | over, node.origin)


def _convert(
    node: yaml.Node, file: str, origin: str, key: str, tree: RecipeTree, above: tuple[yaml.Node, ...] = ()
) -> Node:
    """PyYAML's node as ours; `above` are the nodes that contain it."""

    def place(mark: yaml.Mark) -> str:
        return file if file == COMMAND_LINE else f"{file}:{mark.line + 1}"

    def convert(child: yaml.Node, name: str | int, mark: yaml.Mark) -> Node:
        return _convert(child, file, place(mark), f"{key}.{name}".lstrip("."), tree, (*above, node))

    tree.values += 1
    if tree.values > MAX_VALUES:
        raise _BadYaml(f"more than {MAX_VALUES:,} values, where each use of an alias counts", node.start_mark.line + 1)
    if len(above) > MAX_DEPTH:
        raise _BadYaml("nested too deeply", node.start_mark.line + 1)
    if any(node is ancestor for ancestor in above):
        return tree.unreadable(key, origin, "contains itself; write the value out")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, origin, key, tree)
    if node.tag not in (f"{TAG}map", f"{TAG}seq"):
        return tree.unreadable(key, origin, f"has the tag {node.tag.replace(TAG, '!!')}; remove the tag")
    if isinstance(node, yaml.SequenceNode):
        return Node([convert(item, i, item.start_mark) for i, item in enumerate(node.value)], origin)

    inherited: dict[str, Node] = {}
    own: dict[str, Node] = {}
    seen: dict[str, int] = {}

    def fault(mark: yaml.Mark, message: str) -> None:
        tree.faults.append((place(mark), f"{key}: {message}" if key else message))

    for key_node, value_node in node.value:
        mark, name = key_node.start_mark, key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            fault(mark, "a list or map stands as a key; write a name")
            continue
        if name in seen:
            fault(mark, f"{name} is written twice, first on line {seen[name]}; keep one")
        seen[name] = mark.line + 1
        if key_node.tag != f"{TAG}merge":
            own[name] = convert(value_node, name, mark)
            continue
        for merged in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
            if isinstance(merged, yaml.MappingNode):
                extra = _convert(merged, file, origin, key, tree, (*above, node))
                inherited = (extra.value or {}) | inherited
            else:
                fault(mark, "<< merges something else than a map; write a map")
    return Node(inherited | own, origin)


def _scalar(node: yaml.ScalarNode, origin: str, key: str, tree: RecipeTree) -> Node:
    """A scalar with `${NAME}` expanded from the environment; adds a fault for a secret that is written out."""
    text, kind = str(node.value), node.tag.removeprefix(TAG)
    variables: list[str] = []
    problems: list[str] = []

    def expand(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name = match[1]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not match[0].endswith("}"):
            shown = _shown(match[0])
            problems.append(f"{shown} names no variable; write ${{NAME}}, or $${{ for the characters")
        elif name not in os.environ:
            problems.append(f"{match[0]} is not set in the environment; export {name}, or write the value")
        variables.append(name)
        return os.environ.get(name, "")

    if kind == "str" and "${" in text:
        text = _VARIABLE.sub(expand, text)
        # An unquoted `${STEPS}` may be a number, like its value; in quotes it is text.
        kind = type_of(text) if node.style is None else kind
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        problems.append("has a character that no text may have (NUL or half a surrogate pair); remove it")
    for problem in problems:
        tree.unreadable(key, origin, problem)
    if problems:
        return Node(None, origin)
    try:
        value = SCALAR_TYPES[kind][1](text)
    except (KeyError, ValueError):
        there = f"{_shown(text)} is not a plain value of type {node.tag.replace(TAG, '!!')}"
        return tree.unreadable(key, origin, f"{there}; write text or a number")
    if kind == "int" and abs(value) > MAX_INTEGER:
        return tree.unreadable(key, origin, f"is {_shown(value)}; write a number of at most 15 digits")

    named = SECRET_NAME_PATTERN.search(key.rpartition(".")[2])
    if SECRET_PATTERN.search(node.value) or (named and not variables and isinstance(value, str) and value):
        instead = "write ${NAME} to read it from the environment, or run `hf auth login`"
        tree.faults.append((origin, f"{key}: a secret is written out; {instead}"))
        template, secret = "(secret)", True
    elif variables:
        template = node.value
        secret = bool(named or SECRET_PATTERN.search(text) or any(map(SECRET_NAME_PATTERN.search, variables)))
    else:
        return Node(value, origin)
    # A fault may quote a value. A short one, such as a number of steps, may stand there for another reason.
    if text and (secret or len(text) >= _LONG_VALUE):
        tree.secrets[text] = template
    return Node(value, origin, template, secret, unquoted=node.style is None and "\n" not in template)


def expanded(value: Any) -> Any:
    """A value of a saved recipe with each `${NAME}` in its texts replaced from the environment, where that has it."""
    if isinstance(value, dict):
        return {name: expanded(child) for name, child in value.items()}
    if isinstance(value, list):
        return [expanded(child) for child in value]
    if not isinstance(value, str):
        return value
    return _VARIABLE.sub(lambda match: "${" if match[0] == "$${" else os.environ.get(match[1], match[0]), value)


def override(tree: RecipeTree, text: str) -> None:
    """Merges `section.key=value`, the value in YAML, over the tree; adds faults where that is not possible."""

    def fault(message: str) -> None:
        tree.faults.append((COMMAND_LINE, message))

    key, equals, value = text.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        return fault(f"{_shown(text)} is not an override; write section.key=value")
    if names[0] == "extends":
        return fault("extends: can't be overridden; write it into a recipe")
    try:
        node = _parse(value, COMMAND_LINE, key, tree) or Node(None, COMMAND_LINE)
    except _BadYaml as error:
        return fault(f"{key}: the value is not YAML: {error}; quote it")
    here = tree.root
    for depth, name in enumerate(names):
        if here.value is None:
            here.value = {}
        if isinstance(here.value, dict):
            here.value.setdefault(name, Node(None, COMMAND_LINE))
        child = here.child(name)
        if child is None:
            above = ".".join(names[:depth])
            value = f"a list of {len(here.value)}" if isinstance(here.value, list) else here.shown()
            return fault(f"{key}: {above} is {value}, with no {name}; write the whole of {above}")
        here = child
    merged = _merged(here, node)
    vars(here).update(vars(merged))
    return None
