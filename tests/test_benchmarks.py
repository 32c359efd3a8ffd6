"""Each script of `benchmarks/` runs on tiny models, in one round, so that a published figure can be made again."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import forks
import pytest

from finetune.model.locate import locate
from finetune.recipe.schema import ModelSection

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of `benchmarks/` under a name that hides no module of that name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def rows_of(text: str) -> list[list[str]]:
    """The cells of the table rows in a text, headers and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_train(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    script("train").main(2, "recipes/cpu_smoke.yaml")
    [row] = rows_of(capsys.readouterr().out)
    assert [float(row[i]) > 0 for i in (2, 3, 4, 5, 6)] == [True] * 5


@pytest.mark.slow
def test_data(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    data = script("data")
    monkeypatch.setattr(data, "MODEL", ModelSection(name_or_path="random:gemma3", chat_template="gemma3"))
    monkeypatch.setattr(data, "ROWS", 12)
    monkeypatch.setattr(data, "MANY_ROWS", 24)
    monkeypatch.setattr(data, "peak", lambda path: (1.0, float(len(path.read_text().splitlines()))))
    data.main(1)
    rows = rows_of(capsys.readouterr().out)
    assert [float(cell) > 0 for cell in rows[1][2:]] == [True] * 6
    assert rows[3] == ["1", "12", "1", "24"]


@pytest.mark.slow
def test_merge(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    merge = script("merge")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(merge, "SHAPE", shape)
    monkeypatch.setattr(merge, "BASES", {"tiny Llama": 2})

    def here(part: Any, *arguments: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(part(*map(str, arguments))))
        return found | {"whole": 1.0}

    monkeypatch.setattr(merge, "apart", here)
    merge.main(1, tmp_path)
    rows = rows_of(capsys.readouterr().out)
    # Every tensor of both outputs is equal, and the seven linear layers of both decoder layers were changed.
    assert rows[-1][-2:] == ["21 of 21", "14"]


@pytest.mark.slow
def test_language(script: Any, capsys: Any) -> None:
    script("language").main(1)
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows if row[0].startswith("own cases")] == ["own cases"]
    assert float(rows[-1][3]) > 0


def test_quantise(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("llama_cpp")

    quantise = script("quantise")
    model = locate("random:llama")
    monkeypatch.setattr(sys, "argv", ["quantise.py", "--rounds", "1", "--model", str(model)])
    quantise.main()
    assert [row[-1] for row in rows_of(capsys.readouterr().out)[1:-1]] == ["True"] * 8


@pytest.mark.slow
def test_preferences(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    preferences = script("preferences")
    monkeypatch.setattr(preferences, "apart", preferences.run)
    rows = ROOT / "data" / "preference_sample.jsonl"
    preferences.main(argparse.Namespace(kind=None, folder=None, pairs=6, prompt=0, base="random:llama", rows=rows))
    [row] = rows_of(capsys.readouterr().out)
    assert row[1:3] == ["6", "0"]
    assert [float(row[i]) > 0 for i in (3, 4, 5, 6, 7)] == [True] * 5
    assert float(row[8]) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_commands(script: Any, capsys: Any) -> None:
    script("commands").main("HEAD", 1, ["check", "recipes/quickstart.yaml"])
    [[_, command, before, *figures]] = rows_of(capsys.readouterr().out)
    assert (command, before) == ("`check recipes/quickstart.yaml`", "HEAD")
    assert all(float(figure) > 0 for figure in figures)


@pytest.mark.slow
def test_waiting(script: Any, capsys: Any) -> None:
    script("waiting").main(1, 0.05)
    [[_, *figures]] = rows_of(capsys.readouterr().out)
    assert len(figures) == 6
    assert float(figures[0]) > 0


@pytest.mark.soak
def test_run(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = script("run")
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(run, "SHAPE", small)
    monkeypatch.setattr(run, "TRAINING", run.TRAINING | {"max_steps": 5, "max_length": 64})
    monkeypatch.setattr(subprocess, "Popen", forks.Popen)  # `accelerate launch` itself; the scripts start cold
    monkeypatch.setattr(sys, "argv", ["run.py", "--work", str(tmp_path), "--rounds", "1", "--processes", "1"])
    run.main()
    [row] = rows_of(capsys.readouterr().out)
    assert row[1] == "1"
    assert [float(cell) > 0 for cell in row[2:]] == [True] * 8
