"""`finetune export` to GGUF and Ollama, from the command line: what is written, what is measured, what is caught."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import finetune.export.gguf.make
import finetune.export.gguf.ollama.modelfile
import finetune.export.gguf.write
import finetune.export.run
from finetune.cli.commands import main
from finetune.export import verify
from finetune.export.gguf.imatrix import files
from finetune.export.gguf.llama_cpp.measure import Measurement
from finetune.export.gguf.make import GgufPlan, gguf_faults, imatrix_source, make_files, read_writable_tokenizer
from finetune.export.gguf.ollama.system_text import common_system_text
from finetune.export.gguf.tensors import gguf_names
from finetune.export.gguf.tokenizer.vocabulary import TokenizerMetadata
from finetune.model.locate import locate
from finetune.recipe.schema import ExportSection, ImatrixDataSection
from finetune.system import fresh_process
from finetune.system.extras import install_command

Options = dict[str, Any]
FILES = ["gguf:Q3_K_M", "gguf:F32", "ollama"]


def export(model: Path | str, output: Path, *formats: str) -> int:
    chosen = [word for name in formats for word in ("--format", name)]
    return main(["export", str(model), "--output", str(output), *chosen])


def report(output: Path) -> dict[str, Options]:
    found = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {item["name"]: item for item in found["models"]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 as GGUF and for Ollama."""
    folder = tmp_path_factory.mktemp("gguf")
    shutil.copytree(locate("random:gemma3"), folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "ANSWER_TOKENS", 16)
        patch.setattr(fresh_process, "_start", in_process.start)
        assert export(folder / "tiny", folder / "out", *FILES) == 0
    return folder / "out"


@pytest.mark.slow
def test_the_folders_hold_all_that_is_needed(exported: Path) -> None:
    names = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert names == {
        "gguf/README.md",
        "gguf/imatrix.dat",
        "gguf/imatrix.gguf",
        "gguf/test.log",
        "gguf/tiny-F32.gguf",
        "gguf/tiny-Q3_K_M.gguf",
        "ollama/Modelfile",
        "ollama/README.md",
        "ollama/tiny-Q3_K_M.gguf",
        "report.json",
        "report.md",
    }
    for folder in ("gguf", "ollama"):
        assert "\n# out\n" in (exported / folder / "README.md").read_text(encoding="utf-8")
    ours, theirs = (exported / folder / "tiny-Q3_K_M.gguf" for folder in ("gguf", "ollama"))
    assert os.path.samefile(ours, theirs)
    assert (exported / "ollama/Modelfile").read_text().startswith("FROM ./tiny-Q3_K_M.gguf\n")
    log = (exported / "gguf/test.log").read_text()
    assert log.count("What is a Large Language Model?") == 2
    assert log.startswith("== tiny-Q3_K_M.gguf\n")
    matrix = files.read_imatrix(exported / "gguf/imatrix.gguf")
    assert set(matrix.counts.values()) == {(sum(map(len, _rows(exported))),)}


def _rows(exported: Path) -> list[list[int]]:
    """The rows that the matrix must be of: the project's own but those that are compared."""
    from finetune.export.gguf.imatrix.calibration import calibration_rows
    from finetune.export.rows import held_out

    model = exported.parent / "tiny"
    return calibration_rows(model, apart_from=held_out(model)[0])[0]


def test_what_llama_cpp_makes_of_each_file_is_in_the_report(exported: Path) -> None:
    found = report(exported)
    assert [name for name in found if name.startswith("gguf:")] == [
        "gguf:Q3_K_M, with matrix",
        "gguf:Q3_K_M",
        "gguf:F32",
    ]
    for item in (item for name, item in found.items() if name.startswith("gguf:")):
        assert item["same_texts"]["equal"] == item["same_texts"]["count"] > 190
        assert item["same_prompts"]["equal"] == item["same_prompts"]["count"] == 10
        assert item["conversations_equal"] == 10
        assert item["compared"] > 100
        assert set(item["groups"]) == {"English", "Japanese"}
        assert all(group["compared"] > 20 for group in item["groups"].values())
    exact = found["gguf:F32"]
    assert exact["top1"] > 0.99  # of random weights two tokens can be as likely as each other
    assert exact["largest"] < 0.005
    assert exact["kl"] < 1e-6 < found["gguf:Q3_K_M"]["kl"]
    # The better one is kept.
    pair = [found["gguf:Q3_K_M, with matrix"], found["gguf:Q3_K_M"]]
    best = min(pair, key=lambda item: item["kl"])
    assert [item["kept"] for item in pair] == [item is best for item in pair]
    kept = exported / "gguf/tiny-Q3_K_M.gguf"
    assert kept.stat().st_size == best["bytes"]
    assert (b"quantize.imatrix.entries_count" in kept.read_bytes()) == best["matrix"]
    text = (exported / "report.md").read_text()
    assert "| GGUF | size | perplexity | KL mean | KL 99% | top-1 | KL English | KL Japanese | they stop |" in text
    assert text.count("(Q3_K_M") == 1
    assert f"top-1: on the first {exact['compared']:,}, against" in text
    assert "\nBy language: English: 8 sample rows of this project; Japanese: 8 sample rows of this project.\n" in text


@pytest.mark.slow
def test_a_file_that_is_not_rightly_written_is_told(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Norms without their one, a shifted special token, another template: each shows by itself."""
    read = finetune.export.gguf.tokenizer.vocabulary.read_tokenizer

    def shifted(model: Path) -> Any:
        vocabulary, differences = read(model)
        tokens = vocabulary["tokenizer.ggml.tokens"]
        at = tokens.index("<start_of_turn>")
        tokens[at], tokens[at + 1] = tokens[at + 1], tokens[at]
        vocabulary["tokenizer.chat_template"] = vocabulary["tokenizer.chat_template"].replace("model", "bot")
        return TokenizerMetadata(vocabulary, differences)

    monkeypatch.setattr(finetune.export.gguf.make, "read_tokenizer", shifted)
    monkeypatch.setattr(finetune.export.gguf.write, "converted_values", lambda name, rows, config: rows)
    assert export(exported.parent / "tiny", tmp_path / "out", "gguf:F32") == 3
    said = capsys.readouterr().err
    assert "gate: gguf:F32: does not compute what the model computes: it predicts the same token in" in said
    assert "gate: gguf:F32: 10 of 10 conversations give other token ids than in training" in said
    assert "gate: gguf:F32: 10 of 10 prompts are rendered unlike the trained tokenizer's" in said
    assert "texts give other token ids than the trained tokenizer's, the first is " in said


@pytest.mark.slow
def test_a_matrix_of_ones_own(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(exported.parent / "tiny", tmp_path / "tiny")
    given = exported / "gguf/imatrix.dat"
    section = {"formats": ["gguf:Q2_K"], "imatrix": "always", "imatrix_data": {"path": str(given)}}
    recipe = {"model": {"name_or_path": "random:gemma3"}, "export": section}
    (tmp_path / "tiny/recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert export(tmp_path / "tiny", tmp_path / "out") == 0
    assert [name for name in report(tmp_path / "out") if name.startswith("gguf:")] == ["gguf:Q2_K"]
    again = files.read_imatrix(tmp_path / "out/gguf/imatrix.gguf")
    first = files.read_imatrix(given)
    assert again.sums.keys() == first.sums.keys()
    assert all((again.matrix[name] == first.matrix[name]).all() for name in again.sums)
    given.with_name("cut.dat").write_bytes(given.read_bytes()[:-100])
    section["imatrix_data"] = {"path": str(given.with_name("cut.dat"))}
    (tmp_path / "tiny/recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert export(tmp_path / "tiny", tmp_path / "other") == 2
    assert not (tmp_path / "other").exists()
    given.with_name("cut.dat").unlink()


def cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def other_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another family": (other_family, "gpt2"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer"),
    "cut off": (cut, "model.safetensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written_is_refused_before_anything_is(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(locate("random:gemma3"), tmp_path / "tiny")
    ruin, said = REFUSED[what]
    ruin(tmp_path / "tiny")
    assert export(tmp_path / "tiny", tmp_path / "out", "gguf:F16") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_template_that_go_cannot_write_is_refused_before_hours_are_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(locate("random:gemma3"), tmp_path / "tiny")
    one = "{{ loop.index }}{{ m.role }}:{{ m.content }}<end_of_turn>"
    template = "{{ bos_token }}{% for m in messages %}" + one + "{% endfor %}"
    (tmp_path / "tiny/chat_template.jinja").write_text(template)
    assert export(tmp_path / "tiny", tmp_path / "out", "ollama") == 2
    assert "measuring" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.txt", "gone.gguf", "other.dat"])
def test_what_no_matrix_can_be_made_of_is_refused_before_hours_are_spent(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(locate("random:gemma3"), tmp_path / "tiny")
    other = files.Importance({"blk.0.attn_q.weight": np.ones(3)}, {"blk.0.attn_q.weight": (1,)})
    files.write_imatrix(other, tmp_path)
    (tmp_path / "imatrix.dat").rename(tmp_path / "other.dat")
    section = {"formats": ["gguf:Q2_K"], "imatrix_data": {"path": str(tmp_path / name)}}
    (tmp_path / "tiny/recipe.yaml").write_text(yaml.safe_dump({"export": section}))
    assert export(tmp_path / "tiny", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert name in said
    assert "measuring" not in said
    assert not (tmp_path / "out").exists()


def test_a_matrix_of_ones_own_does_not_tell_where_its_text_lay(tmp_path: Path) -> None:
    model = locate("random:gemma3")
    called = gguf_names(json.loads((Path(model) / "config.json").read_text()))
    weights = load_file(Path(model) / "model.safetensors").items()
    sums = {
        str(called(name)): np.ones(weight.shape[1])
        for name, weight in weights
        if weight.ndim == 2 and str(called(name)).startswith("blk.")
    }
    given = files.Importance(sums, dict.fromkeys(sums, (512,)), ("/home/me/mine.txt", "C:\\me\\b.txt", "c d"))
    files.write_imatrix(given, tmp_path)
    options = ExportSection(imatrix_data=ImatrixDataSection(path=str(tmp_path / "imatrix.gguf")))
    found = imatrix_source(Path(model), ["Q2_K"], [], options, Path(model), print)
    assert isinstance(found, files.Importance)
    assert found.datasets == ("mine.txt", "b.txt", "c d")
    assert imatrix_source(Path(model), ["Q8_0", "F16"], [], options, Path(model), print) is None


def test_a_file_that_llama_cpp_does_not_take_is_told_by_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(file: Path, name: str, *_: Any) -> Options:
        return {"name": name, "dtype": "gguf", "bytes": 1, "error": f"{file}: llama.cpp does not take it: why"}

    monkeypatch.setattr(finetune.export.gguf.make, "measure", measure)
    model = Path(locate("random:gemma3"))
    on = Measurement([], against="merged")
    folders = [tmp_path / "gguf", tmp_path / "work"]
    for folder in folders:
        folder.mkdir()
    plan = GgufPlan(model, ["F16"], "tiny", read_writable_tokenizer(model), None, False, on)
    found, _ = make_files(plan, *folders, print, False)
    assert found[0]["error"] == "tiny-F16.gguf: llama.cpp does not take it: why"
    assert str(tmp_path) not in (folders[0] / "test.log").read_text()


def test_where_float32_does_not_fit_files_are_held_against_the_model_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(locate("random:gemma3"), tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    (tmp_path / "tiny/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    asked: list[tuple[str, bool]] = []
    ons: list[Measurement] = []

    def measure(job: Any, rows: Any) -> Options:
        asked.append((job.name, bool(job.groups)))
        found = {"name": job.name, "against": job.against, "dtype": job.dtype, "bytes": 1}
        if job.dtype == "float32":
            return found | {"error": "it was killed"}
        numbers = {"loss": 1.0, "perplexity": 2.0, "load_seconds": 1.0, "stopped": 0}
        return found | numbers | {"answers": [], "conversations": []}

    def make(plan: GgufPlan, *_: Any) -> tuple[list[Options], list[str]]:
        ons.append(plan.measurement)
        return [], []

    monkeypatch.setattr("finetune.export.run.measure", measure)
    monkeypatch.setattr(finetune.export.gguf.run, "make_files", make)
    assert export(tmp_path / "tiny", tmp_path / "out", "gguf:F16") == 0
    assert asked == [("as trained", False), ("as trained, in float32", True), ("as trained", True)]
    assert [(on.against, on.reference and on.reference.name) for on in ons] == [("as trained", "merged.bin")]
    assert "as trained, in float32: it was killed; GGUF files are compared with as trained\n" in capsys.readouterr().err


def with_rows(model: Path, *sources: Options, **section: Any) -> Path:
    recipe = {"model": {"name_or_path": str(model)}, "data": {"train": list(sources)}, "export": section}
    (model / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return model


def rows_file(file: Path, *systems: str | None) -> Options:
    rows: list[list[Options]] = []
    for system in systems:
        first = [] if system is None else [{"role": "system", "content": system}]
        rows.append([*first, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in rows))
    return {"path": str(file)}


@pytest.mark.slow
def test_the_system_text_of_all_conversations_is_in_the_modelfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.export.run.measure", stop)
    written: list[str] = []
    write = finetune.export.gguf.ollama.modelfile.write_modelfile

    def kept(model: Path, output: Path, *given: Any) -> None:
        write(model, output, *given)
        written.append((output / "Modelfile").read_text())

    monkeypatch.setattr(finetune.export.gguf.run, "write_modelfile", kept)
    shutil.copytree(locate("random:gemma3"), tmp_path / "tiny")
    source = rows_file(tmp_path / "rows.jsonl", "Be brief.", "Be brief.")
    model = with_rows(tmp_path / "tiny", source, formats=["ollama"])
    assert export(model, tmp_path / "out") == 130
    assert '\nSYSTEM "Be brief."\n' in written[0]


def test_a_system_text_is_only_what_all_conversations_begin_with(tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert common_system_text(model) == ""
    one, other, bare = (
        rows_file(tmp_path / f"{i}.jsonl", *systems)
        for i, systems in enumerate([("Be brief.", "Be brief."), ("Be kind.",), ("Be brief.", None)])
    )
    assert common_system_text(with_rows(model, one)) == "Be brief."
    assert common_system_text(with_rows(model, one, other)) == ""
    assert common_system_text(with_rows(model, bare)) == ""
    alpaca = tmp_path / "alpaca.jsonl"
    row = {"instruction": "Hi", "output": "Hello", "system": "Be brief."}
    rows = (row, row | {"instruction": None}, row | {"system": "x"})
    alpaca.write_text("\n".join(map(json.dumps, rows)))
    assert (
        common_system_text(with_rows(model, one, {"path": str(alpaca), "filter": {"system": "Be brief."}}))
        == "Be brief."
    )
    assert common_system_text(with_rows(model, one, {"path": str(alpaca)})) == ""
    (tmp_path / "0.jsonl").unlink()
    assert common_system_text(model) == ""


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    found = "finetune.export.checks.importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name, package=None: None if name == "gguf" else find(name, package))
    assert export(locate("random:gemma3"), Path("out"), "gguf:Q4_K_M") == 2
    assert f"gguf is not installed; run {install_command('gguf')}\n" in capsys.readouterr().err


def test_a_family_that_is_not_written_is_refused_before_it_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.export.run.merge", lambda *_, **__: pytest.fail("it was merged"))
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "base/model.safetensors").touch()
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    save_file({"x": torch.zeros(1)}, run / "adapter_model.safetensors")
    assert export(run, tmp_path / "out", "gguf:Q4_K_M") == 2
    assert "GGUF: a model of type gpt2 is not written; known are gemma, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_a_checkpoint_are_called_by_its_run(tmp_path: Path) -> None:
    assert finetune.export.gguf.run._file_stem(tmp_path / "first") == "first"
    assert finetune.export.gguf.run._file_stem(tmp_path / "first/checkpoint-40") == "first-checkpoint-40"


def test_what_counts_as_broken() -> None:
    whole = {"count": 3, "equal": 3, "differences": []}
    found: Options = {"name": "x", "kind": "Q2_K", "top1": 0.5, "largest": 9.0, "same_texts": whole}
    assert gguf_faults(found) == []
    assert "the file is broken" in gguf_faults(found | {"top1": 0.1})[0]
    assert "does not compute" in gguf_faults(found | {"kind": "F32", "top1": 1.0, "largest": 0.3})[0]
    assert gguf_faults(found | {"kind": "F32", "top1": 1.0, "largest": 0.1}) == []
    other = {"count": 3, "equal": 2, "differences": [{"text": "あ"}]}
    assert gguf_faults(found | {"same_prompts": other}) == [
        'x: 1 of 3 prompts are rendered unlike the trained tokenizer\'s, the first is "あ"'
    ]
