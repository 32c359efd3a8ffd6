"""Each script of `benchmarks/` runs on tiny models, in one round, so that a published figure can be made again."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import forks
import pytest
import torch

from finetune.model.locate import locate
from finetune.recipe.schema import ModelSection
from finetune.system.errors import RunError

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
def test_waiting(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    waiting = script("waiting")
    # Forked, all processes wait in one way.
    monkeypatch.setattr(waiting.subprocess, "run", lambda command, text, **options: forks.run(command, **options))
    waiting.main(1, 0.05)
    [[_, *figures]] = rows_of(capsys.readouterr().out)
    assert len(figures) == 6
    assert float(figures[0]) > 0


@pytest.fixture
def gpu(script: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`gpu.py` with four rows; the process of a row runs the code that the row has in place of a method."""
    gpu = script("gpu")
    found: dict[str, dict[str, float]] = {
        "bare trl": {"rate": 100, "peak": 2**31, "card": 3 * 2**30},
        "ours": {"rate": 150.4, "peak": 2**30, "card": 2**31, "plan_peak": 1.1 * 2**30, "plan_card": 1.6 * 2**30},
    }
    rows = {kind: f"open(sys.argv[1], 'w').write({json.dumps(values)!r})" for kind, values in found.items()}
    rows |= {"killed": "os.kill(os.getpid(), 9)", "late": "time.sleep(60)"}
    monkeypatch.setattr(gpu, "ROWS", [("tiny", "LoRA", kind) for kind in rows])

    def command(row: tuple[str, str, str], work: Path, dry: bool) -> list[str]:
        return [sys.executable, "-S", "-c", f"import os, sys, time; {rows[row[2]]}", str(work / "row" / "result.json")]

    monkeypatch.setattr(gpu, "command", command)
    return gpu


def gpu_settings(output: Path, **other: Any) -> argparse.Namespace:
    settings = {"output": output, "minutes": 1.0, "work": output.parent, "only": "", "dry_run": True}
    return argparse.Namespace(**settings | other)


def test_gpu_rows_are_written_one_by_one(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_a_row, seen = gpu.measured, []

    def measured(row: Any, *arguments: Any) -> Any:
        seen.append(len(rows_of((tmp_path / "gpu.md").read_text())) - 1)  # beside the head
        if row[2] == "late":
            raise KeyboardInterrupt
        return run_a_row(row, *arguments)

    monkeypatch.setattr(gpu, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(gpu_settings(tmp_path / "gpu.md"))
    assert seen == [0, 1, 2, 3]
    text = (tmp_path / "gpu.md").read_text()
    assert [row[:-1] for row in rows_of(text)[1:]] == [
        ["tiny LoRA", "bare trl", "100", "", "2.00", "", "", "3.00", "", "", "", ""],
        ["tiny LoRA", "ours", "150", "1.50", "1.00", "0.50", "", "2.00", "1.10", "1.10", "1.60", "0.80"],
        ["tiny LoRA", "killed", "ended by -9: out of the machine's memory?", *[""] * 9],
    ]
    assert text.endswith("\n\nNot run: tiny, LoRA, late\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.md", "gpu.md.log"]


def test_gpu_rows_end_with_the_time(gpu: ModuleType, tmp_path: Path) -> None:
    gpu.ROWS.reverse()
    gpu.main(gpu_settings(tmp_path / "gpu.md", minutes=0.5 / 60, only="late|ours"))
    text = (tmp_path / "gpu.md").read_text()
    assert [row[1:3] for row in rows_of(text)[1:]] == [["late", "stopped: the time is up"]]
    assert text.endswith("\n\nNot run: tiny, LoRA, ours\n")


@pytest.mark.slow
def test_a_gpu_row_that_fails(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    (tmp_path / "row").mkdir()

    def result(error: Exception, kind: str) -> dict[str, Any]:
        def train(recipe: Path) -> list[float]:
            raise error

        monkeypatch.setattr(gpu, "rates_of_bare_trl" if kind == "bare trl" else "rates_of_ours", train)
        gpu.run_row("gemma-2b", "LoRA", kind, tmp_path, True)
        found: dict[str, Any] = json.loads((tmp_path / "row" / "result.json").read_text())
        return found

    lack = "the longest batch (4 rows, 2,048 tokens) does not fit into memory: torch asked for 2.0 GiB"
    assert result(RunError(lack), "ours, compiled") == {"outcome": "out of memory"}
    assert result(ValueError("no\nsuch"), "bare trl") == {"outcome": "failed: ValueError: no"}
    # The plan is made all the same: it is what the failure is held against.
    found = result(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "ours")
    assert (found.pop("outcome"), sorted(found)) == ("out of memory", ["plan_card", "plan_peak"])


@pytest.mark.slow
def test_a_gpu_dry_run_that_is_stopped(tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    options = ["--only", "gemma-4.*(trl|ours|packed)$", "--output", str(output)]
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), *options]
    environment = os.environ | {"DRY": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("| gemma-4-E2B QLoRA | ours |"):
                process.terminate()
        assert process.wait() == 143
    text = output.read_text()
    rows = rows_of(text)[1:]
    assert [row[:2] for row in rows] == [["gemma-4-E2B QLoRA", kind] for kind in ("bare trl", "ours")]
    assert [float(row[i]) > 0 for row in rows for i in (2, 4)] == [True] * 4
    assert [float(rows[1][i]) > 0 for i in (3, 5, 8, 9)] == [True] * 4
    assert text.endswith("\n\nNot run: gemma-4-E2B, QLoRA, ours, packed\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_rows_of_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    only = ["--only", "gemma-2b, Q?LoRA, (bare trl|ours)$"]
    subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh"), *only, "--output", str(output)], check=True)
    rows = rows_of(output.read_text())[1:]
    print(output.read_text())
    assert [float(cell) > 0 for row in rows for cell in row[2:] if cell] == [True] * 28


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
