"""The data of a run in trackers, read back from the files that they write themselves."""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.commands import main
from finetune.train.callbacks import trackers

Write = Callable[..., Path]
TWICE = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Variables that a run sets for its trackers end with the test; nothing leaves this machine."""
    # The mapping stays the same object: rich keeps the one that it found at its import.
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TENSORBOARD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: protobuf in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def train_in_two(path: Path, *overrides: str) -> None:
    """Four steps, of which the last two come after a stop that nobody planned."""
    assert main(["train", str(path), *overrides, "training.max_steps=4"]) == 0
    for file in Path("run").glob("adapter_model.safetensors"):
        file.unlink()
    shutil.rmtree("run/checkpoint-4")
    again = ["training.resume_from_checkpoint=true", "training.max_steps=4"]
    assert main(["train", str(path), *overrides, *again]) == 0


def test_an_id_that_a_sweep_chose_is_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_IDS_SET_HERE", set())
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    trackers.set_run_identity(tmp_path / "first", None, "finetune", resumed=False)
    assert os.environ["WANDB_RUN_ID"] == "chosen"
    # The next run of this process is another one; the first one, gone on with, is itself.
    trackers.set_run_identity(tmp_path / "second", None, "finetune", resumed=False)
    assert os.environ["WANDB_RUN_ID"] not in ("", "chosen")
    trackers.set_run_identity(tmp_path / "first", None, "finetune", resumed=True)
    assert os.environ["WANDB_RUN_ID"] == "chosen"


@pytest.mark.slow
def test_wandb_has_one_run_with_all_that_it_is(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    path = write_recipe(training={"report_to": "wandb", **TWICE})
    train_in_two(path, "data.eval_fraction=0.1")
    files = sorted(Path("run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    first, second = (list(wandb_records(file)) for file in files)
    known = json.loads(Path("run/tracking.json").read_text())
    for records in (first, second):
        [run] = [record.run for record in records if record.HasField("run")][:1]
        assert (run.run_id, run.display_name, run.project) == (known["id"], f"run-{known['id']}", "finetune")
    config = {
        (item.key or item.nested_key[0]): json.loads(item.value_json)
        for record in second
        if record.HasField("config")
        for item in record.config.update
    }
    for name in ("recipe.yaml", "ledger.json", "environment.json"):
        assert config[name] == Path("run", name).read_text()

    def history(records: list[Any]) -> list[dict[str, Any]]:
        rows = [record.history.item for record in records if record.HasField("history")]
        return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]

    logged = [row for row in history(second) if "train/loss" in row]
    assert [row["train/global_step"] for row in logged] == [3, 4]
    for name in ("tokens_per_second", "trained_tokens", "peak_memory_gib", "grad_norm", "learning_rate"):
        assert logged[-1][f"train/{name}"] > 0, name
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in logged] == [m["loss"] for m in metrics if "loss" in m][2:]
    tables = [row for row in history(second) if "samples/nrows" in row]
    assert [row["train/global_step"] for row in tables] == [4]
    assert tables[0]["samples/nrows"] == len(Path("run/samples.jsonl").read_text().splitlines()) == 8
    [artifact] = [
        record.request.log_artifact.artifact if record.request.HasField("log_artifact") else record.artifact
        for record in second
        if record.HasField("artifact") or record.request.HasField("log_artifact")
        if (record.artifact.type or record.request.log_artifact.artifact.type) == "model"
    ]
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "README.md"} <= names
    assert not any("optimizer" in name or "checkpoint" in name or "training_args" in name for name in names)


@pytest.mark.slow
def test_tensorboard_draws_one_curve(write_recipe: Write) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = write_recipe(training={"report_to": "tensorboard", **TWICE})
    train_in_two(path, "data.eval_fraction=0.1")
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    drawn = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert drawn == [(step, pytest.approx(loss)) for step, loss in losses]
    assert len(losses) == 4
    assert {"train/trained_tokens", "train/peak_memory_gib", "eval/loss"} <= set(events.Tags()["scalars"])
    texts = events.Tags()["tensors"]
    assert {"recipe.yaml/text_summary", "samples/0/text_summary"} <= set(texts)
    said = events.Tensors("recipe.yaml/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "name_or_path: " in said


@pytest.mark.slow
def test_mlflow_goes_on_with_its_run(write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what its small package can do
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    path = write_recipe(training={"report_to": "mlflow", **TWICE})
    train_in_two(path, "data.eval_fraction=0.1")
    mlflow.set_tracking_uri(str(tmp_path / "mlruns"))
    runs = mlflow.search_runs(experiment_names=["finetune"], output_format="list")
    assert [run.info.run_id for run in runs] == [json.loads(Path("run/tracking.json").read_text())["mlflow"]]


@pytest.mark.slow
def test_trackio_goes_on_with_its_run(write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    assert "trackio" not in sys.modules
    import trackio

    path = write_recipe(training={"report_to": "trackio", **TWICE})
    train_in_two(path, "data.eval_fraction=0.1")
    [run] = trackio.Api().runs("finetune")
    assert run.name == json.loads(Path("run/tracking.json").read_text())["name"]


@pytest.mark.slow
def test_samples_are_answers_to_the_same_prompts_as_it_learns(write_recipe: Write) -> None:
    """And asking for them changes nothing of what is learned."""
    path = write_recipe(training={**TWICE, "max_steps": 4})
    assert main(["train", str(path), "data.eval_fraction=0.1"]) == 0
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2] * 4 + [4] * 4
    assert [s["prompt"] for s in samples[:4]] == [s["prompt"] for s in samples[4:]]
    assert all(sample["prompt"].endswith("<start_of_turn>model\n") for sample in samples)
    weights = Path("run/adapter_model.safetensors").read_bytes()
    quiet = ["training.eval_strategy=no", "training.output_dir=quiet"]
    assert main(["train", str(path), "data.eval_fraction=0.1", *quiet]) == 0
    assert Path("quiet/adapter_model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_the_count_of_trained_tokens_is_the_ledgers(write_recipe: Write) -> None:
    path = write_recipe(training={"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 4})
    assert main(["train", str(path)]) == 0
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    counted = [m["trained_tokens"] for m in metrics if "trained_tokens" in m][-1]
    assert counted == json.loads(Path("run/ledger.json").read_text())["train"]["trained_tokens"]


def test_a_tracker_that_cannot_be_reported_to_is_refused(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    path = write_recipe(training={"report_to": ["tensorboard"]})
    assert main(["train", str(path)]) == 2
    said = "training.report_to: is tensorboard, which is not installed; run pip install tensorboard"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(path.parent))
    assert main(["train", str(path), "training.report_to=wandb"]) == 2
    assert "is wandb, and nobody is logged in; run wandb login, or set WANDB_MODE=offline" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    assert main(["train", str(path), "training.report_to=wandb"]) == 2
    assert "WANDB_LOG_MODEL: is checkpoint; write end" in capsys.readouterr().err
