"""The house itself: which room may import which, how quick the door opens, that every recipe is sound."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.recipe import load_recipe

ROOT = Path(__file__).parents[1]
# From the ground up: a room imports only rooms above it in this list.
ROOMS = [
    "bar",
    "kinds",
    "page",
    "ranks",
    "hub",
    "reader",
    "upstream",
    "sections",
    "checks",
    "recipe",
    "template",
    "turns",
    "chat",
    "ledger",
    "formats",
    "rows",
    "prepare",
    "base",
    "shards",
    "quantise",
    "store",
    "data",
    "checkpoint",
    "changes",
    "rules",
    "cards",
    "model",
    "loss",
    "packing",
    "generate",
    "adapter",
    "layout",
    "assemble",
    "merge",
    "evaluate",
    "gguf",
    "origin",
    "card",
    "parcel",
    "push",
    "export",
    "inspect",
    "curves",
    "record",
    "snapshot",
    "launch",
    "plain",
    "adapt",
    "trainer",
    "track",
    "rehearse",
    "uploads",
    "train",
    "report",
    "doctor",
    "plan",
    "arguments",
    "cli",
    "__main__",
]


def imported(room: str) -> set[str]:
    """The rooms that a room imports; a room is a file, or a folder of them."""
    place = ROOT / "finetune" / room
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "finetune":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("finetune.")}
    return found - {"__version__", room}


def test_rooms_are_all_listed() -> None:
    folder = ROOT / "finetune"
    there = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    there -= {"__init__"}
    assert there == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    assert imported(room) <= set(ROOMS[: ROOMS.index(room)])


@pytest.mark.parametrize("command", ["import finetune", "from finetune.cli import main; main(['--help'])"])
def test_the_door_opens_without_torch(command: str) -> None:
    code = (
        "import sys, contextlib\n"
        f"with contextlib.suppress(SystemExit):\n    {command}\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_passes_its_check(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    assert recipe.training["output_dir"] == f"runs/{path.stem}"
    # What a recipe must say of itself before its first key.
    head = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert [word for word in ("# Needs:", "# Launch:", "# Expect:") if word not in head] == []
    trained = {(source.path, source.split) for source in recipe.data.train}
    assert trained.isdisjoint((source.path, source.split) for source in recipe.data.eval)
