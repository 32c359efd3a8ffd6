"""The structure of the project: which package may import which, what `--help` imports, that every recipe is sound."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from finetune.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
# The packages that each package may import; every package may import `system`.
ALLOWED: dict[str, set[str]] = {
    "system": set(),
    "recipe": set(),
    "data": {"recipe"},
    "model": {"data", "recipe"},
    "merge": {"model", "recipe"},
    "evaluate": {"data", "model", "recipe"},
    "hub": {"data", "evaluate", "model", "recipe"},
    "train": {"data", "hub", "model", "recipe"},
    "export": {"data", "evaluate", "hub", "merge", "model", "recipe"},
    "plan": {"data", "model", "recipe", "train"},
    "cli": {"data", "evaluate", "export", "hub", "merge", "model", "plan", "recipe", "train"},
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted((ROOT / "finetune").rglob("*.py"))}


def imported(module: str) -> set[str]:
    """The modules of ours that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(FILES) - {module, "finetune"}


def test_the_packages_of_the_house() -> None:
    top = {path.name for path in (ROOT / "finetune").iterdir()} - {"__pycache__"}
    assert top == {*ALLOWED, "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    inside = [module for module in FILES if module.startswith(f"finetune.{package}.")]
    arrows = sorted((module, other) for module in inside for other in imported(module))
    allowed = {package, "system", *ALLOWED[package]}
    assert [arrow for arrow in arrows if arrow[1].split(".")[1] not in allowed] == []
    # The names of a package itself are for users; a module says which file it needs.
    faces = {f"finetune.{name}" for name in ALLOWED}
    assert [arrow for arrow in arrows if arrow[1] in faces] == []


def test_no_module_is_imported_by_one_that_it_imports() -> None:
    graph = {module: imported(module) for module, file in FILES.items() if file.name != "__init__.py"}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_docstring_begins_with_a_riddle() -> None:
    """A docstring says what a function returns or does, in a sentence with a subject and a verb."""
    found = []
    for folder in ("finetune", "tests", "benchmarks", "docs"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                # Attributes of a class have docstrings, too.
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    texts = (n.value for n in node.body if isinstance(n, ast.Expr))
                    texts = (n.value.strip() for n in texts if isinstance(n, ast.Constant) and isinstance(n.value, str))
                    found += [f"{file}: {text}" for text in texts if text.startswith(("What ", "Whether ", "Of "))]
    assert found == []


@pytest.mark.parametrize("command", ["import finetune", "from finetune.cli.commands import main; main(['--help'])"])
def test_help_imports_nothing_heavy(command: str) -> None:
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
