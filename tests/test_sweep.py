"""`finetune sweep`: which runs it makes, what it refuses, how it goes on, and how it compares."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from safetensors.torch import load_file

from finetune.cli import sweep
from finetune.cli.commands import main
from finetune.cli.sweep import TrainJob
from finetune.cli.sweep_plan import run_names
from finetune.cli.sweep_report import RunRow, as_text, best_of
from finetune.recipe.load import load_recipe
from finetune.recipe.yaml_scalars import list_items
from finetune.system.errors import RunError
from finetune.system.fresh_process import ProcessFailed

Write = Callable[..., Path]
Jobs = list[TrainJob]
ROWS = [{"path": str(Path(__file__).parents[1] / "data" / "chat_sample.jsonl")}]
HELD_OUT = {"train": ROWS, "eval_fraction": 0.1}
GRID = ["training.learning_rate=[1e-4,2e-4]", "lora.r=[4,8]"]
NAMES = [f"learning_rate-{rate}_r-{rank}" for rate in ("1e-4", "2e-4") for rank in (4, 8)]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[1e-4, 2e-4]", ["1e-4", "2e-4"]),
        ("[[q_proj],[q_proj, v_proj]]", ["[q_proj]", "[q_proj, v_proj]"]),
        ("[{r: 8}, null, 'a, b']", ["{r: 8}", "null", "'a, b'"]),
        ("[]", []),
        ("- 1\n- 2", ["1", "2"]),
        ("1e-4", None),
        ("{a: [1]}", None),
        ("[1", None),
        ("", None),
    ],
)
def test_the_items_of_a_list(text: str, items: list[str] | None) -> None:
    assert list_items(text) == items


def test_the_names_of_runs() -> None:
    values = [{"lora.r": "8", "lora.target_modules": "[q_proj, v_proj]"}, {"lora.r": "-1", "lora.target_modules": "x"}]
    assert run_names(values) == ["r-8_target_modules-q_proj-v_proj", "r--1_target_modules-x"]
    # Keys with one last word are written whole; what a folder cannot be called leaves a hash.
    assert run_names([{"data.seed": "1", "training.seed": "2"}]) == ["data-seed-1_training-seed-2"]
    [odd, even] = run_names([{"data.train": "[{path: ../a b.jsonl}]"}, {"data.train": "[{path: ..\x2fa$b.jsonl}]"}])
    assert odd.startswith("train-")
    assert set(odd) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._")
    assert odd != even
    names = run_names([{"a.b": "x"}, {"a.b": "X"}])  # one name where case is ignored
    assert len({name.casefold() for name in names}) == 2
    assert all(len(name) <= 90 for name in run_names([{f"a.k{i}": "v" * 50 for i in range(9)}]))


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ([*GRID[:1], "lora.r=[0,8]"], ["command line: lora.r: is 0; write a number greater than 0"]),
        (
            ["lora.r=8"],
            [
                "command line: no key has several values to try; write them as a list: "
                "training.learning_rate=[1e-4,2e-4]"
            ],
        ),
        (["lora.r=[]"], ["command line: lora.r: is an empty list; write the values to try, such as lora.r=[1, 2]"]),
        (
            ["lora.r=[1,2]", "lora.r=[3]"],
            ["command line: lora.r: is given 2 times; write it once, with a list of its values"],
        ),
        (
            ["training.learning_rate=[1e-4,0.0001]"],
            [
                "command line: training.learning_rate=1e-4 and training.learning_rate=0.0001 are one and the same run; "
                "leave one of them out"
            ],
        ),
        (
            ["training.output_dir=[a,b]"],
            ["command line: training.output_dir: is the sweep's own for each run; write one value, or leave it out"],
        ),
        (
            ["training=[{output_dir: a},{output_dir: b}]"],
            ["command line: training.output_dir: differs between runs; write one folder, which will hold them all"],
        ),
        (
            ["lora.r=[1,2]", "training.resume_from_checkpoint=true"],
            ["command line: training.resume_from_checkpoint: a sweep resumes its runs by itself; leave it out"],
        ),
        (
            ["training.seed=[1,2,3,4,5]", "lora.r=[1,2,3,4,5,6,7,8,9,10,11,12,13]"],
            ["command line: 65 combinations are more than 64; write fewer values, or --max-runs 65"],
        ),
        (["lora.r=[1,2]", "lora.bias"], ['command line: "lora.bias" is not an override; write section.key=value']),
    ],
)
def test_refused_before_anything_runs(
    write_recipe: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    lines: list[str],
) -> None:
    monkeypatch.setattr(sweep, "run_sweep", lambda *arguments: pytest.fail("it runs"))
    path = write_recipe()
    assert main(["sweep", str(path), *words]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in lines]
    assert not Path("run").exists()


# ---------------------------------------------------------------------------------------------------------------
# Runs that only pretend to train


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """The runs that were started; each leaves what a finished run leaves, with a loss that its rank decides."""
    started: Jobs = []

    def call(function: Any, job: TrainJob, on_line: Callable[[str], None], environment: dict[str, str]) -> str:
        started.append(job)
        on_line("1")
        recipe = load_recipe(job.recipe, job.overrides)
        fake_run(Path(recipe.training["output_dir"]), recipe.to_yaml(), 1 / recipe.lora["r"], recipe.data.eval_fraction)
        return ""

    monkeypatch.setattr(sweep.fresh_process, "call", call)
    return started


def fake_run(folder: Path, recipe: str, loss: float, held_out: float | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe)
    records: list[dict[str, Any]] = [
        {"step": 1, "loss": loss + 1, "num_tokens": 100, "tokens_per_second": 50.0, "peak_memory_gib": 0.5},
        {"step": 2, "loss": loss, "num_tokens": 300, "tokens_per_second": 100.0, "peak_memory_gib": 0.75},
        {"step": 2, "train_loss": loss, "max_steps": 2},
    ]
    if held_out:
        records.insert(2, {"step": 2, "eval_loss": loss + 2})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    account = {"rows": {"kept": 6, "read": 6}, "tokens": 60, "trained_tokens": 30}
    (folder / "ledger.json").write_text(json.dumps({"eval": account}))
    (folder / "adapter_model.safetensors").touch()


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pages of single runs are test_report.py's."""
    monkeypatch.setattr(sweep.report, "as_html", lambda run: f"the page of {run.name}")
    for name in ("WANDB_RUN_GROUP", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return iter([None])


def saved() -> dict[str, Any]:
    return dict(json.loads(Path("run/sweep.json").read_text()))


def test_all_combinations_are_trained_and_compared(
    write_recipe: Write, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(
        data=HELD_OUT, training={"run_name": "tries"}, hub={"repo_id": "you/tries", "base_model": "a/b"}
    )
    assert main(["sweep", str(path), *GRID, "lora.target_modules=[[q_proj, v_proj]]"]) == 0
    said = capsys.readouterr()
    assert [job.overrides for job in jobs] == [
        [
            *(f"training.learning_rate={rate}", f"lora.r={rank}", "lora.target_modules=[q_proj, v_proj]"),
            *(f'training.output_dir="run/{name}"', f'training.run_name="tries-{name}"', "hub=null"),
        ]
        for (rate, rank), name in zip([("1e-4", 4), ("1e-4", 8), ("2e-4", 4), ("2e-4", 8)], NAMES, strict=True)
    ]
    table = said.out.splitlines()
    assert table[0].split() == ["run", "learning_rate", "r", "held", "out", "loss", "time", "tokens/s", "GiB", "state"]
    assert table[2].split() == ["*", NAMES[1], "1e-4", "8", "2.1250", "0.1250", "0:04", "75", "0.75", "finished"]
    assert [line[:2] for line in table] == ["  ", "  ", "* ", "  ", "  "]
    lines = said.err.splitlines()
    assert "hub.repo_id: the runs of a sweep are not pushed; finetune push RUN --repo-id ... pushes one" in lines
    assert lines[-1].endswith(
        f"; best: {NAMES[1]} (held out 2.12); talk to it: finetune generate run/{NAMES[1]}; finetune merge "
        f"run/{NAMES[1]} --output DIR"
    )
    made = saved()
    assert (made["best"], made["keys"]) == (NAMES[1], ["training.learning_rate", "lora.r"])
    assert [run["name"] for run in made["runs"]] == NAMES
    assert made["runs"][1] == {
        "name": NAMES[1],
        "values": {"training.learning_rate": "1e-4", "lora.r": "8"},
        **{"state": "finished", "step": 2, "eval_loss": 2.125, "loss": 0.125, "seconds": 4.0},
        **{"tokens_per_second": 75.0, "peak_memory_gib": 0.75, "note": None, "error": None},
    }
    page = Path("run/sweep.html").read_text()
    assert f'<tr class="best"><th scope="row"><a href="{NAMES[1]}/report.html">{NAMES[1]}</a> (best)</th>' in page
    assert "4 runs: 4 finished." in page
    assert Path("run", NAMES[1], "report.html").read_text() == f"the page of {NAMES[1]}"
    # Where a run is asked for, the sweep's folder is answered with the best one.
    assert main(["report", "run"]) == 2
    assert capsys.readouterr().err == (
        "error: run is the folder of a sweep (its page: run/sweep.html); write one of its runs, such as "
        f"run/{NAMES[1]}\n"
    )
    # As JSON, and a second time nothing is trained.
    assert main(["sweep", str(path), *GRID, "lora.target_modules=[[q_proj, v_proj]]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == NAMES[1]
    assert len(jobs) == 4


def test_without_held_out_rows_the_training_loss_decides(
    write_recipe: Write, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write_recipe()), "lora.r=[4,8]"]) == 0
    said = capsys.readouterr()
    assert "no rows are held out, so that the runs are compared by their training loss" in said.err
    assert "best: r-8 (loss 0.125); talk to it" in said.err
    assert "no rows are held out" in Path("run/sweep.html").read_text()


def test_a_failed_run_is_told_and_tried_again(
    write_recipe: Write, jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, call = write_recipe(data=HELD_OUT), sweep.fresh_process.call
    failures = {"r-4": RunError("<b>the loss</b> is nan at step 2"), "r-8": ProcessFailed("it was killed", -9, "")}

    def fails(function: Any, job: TrainJob, *rest: Any) -> str:
        for name, error in failures.items():
            if any(name in word for word in job.overrides):
                Path("run", name).mkdir(parents=True, exist_ok=True)
                Path("run", name, "recipe.yaml").write_text(load_recipe(job.recipe, job.overrides).to_yaml())
                raise error
        return str(call(function, job, *rest))

    monkeypatch.setattr(sweep.fresh_process, "call", fails)
    assert main(["sweep", str(path), "lora.r=[4,8,16]"]) == 2
    said = capsys.readouterr()
    assert [line.rpartition("  ")[2] for line in said.out.splitlines()[1:]] == [
        "failed: <b>the loss</b> is nan at step 2",
        "failed: it was killed",
        "finished",
    ]
    assert "[1/3] failed: <b>the loss</b> is nan at step 2" in said.err.splitlines()
    assert "best, of the 1 finished of 3: r-16 (held out 2.06)" in said.err
    assert "&lt;b&gt;the loss&lt;/b&gt; is nan" in Path("run/sweep.html").read_text()
    failures.clear()
    jobs.clear()
    assert main(["sweep", str(path), "lora.r=[4,8,16]"]) == 0
    # What a failed run has left is gone on with.
    assert [job.overrides[-1] for job in jobs] == ["training.resume_from_checkpoint=true"] * 2
    assert {run["state"] for run in saved()["runs"]} == {"finished"}


def test_what_changed_is_never_mixed(write_recipe: Write, jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    path = write_recipe(data={"train": [{"path": "rows.jsonl"}]})
    assert main(["sweep", str(path), "lora.r=[4,8]"]) == 0
    group = saved()["group"]
    capsys.readouterr()

    def refused(*words: str) -> str:
        assert main(["sweep", str(path), *words]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert refused("lora.r=[4,8]", "training.max_steps=9", "lora.lora_alpha=32") == (
        "error: run/r-4 was trained with other values: training.max_steps was 4 and is 9; lora.lora_alpha was 8 and is "
        "32; write the old ones, or another training.output_dir, or remove run"
    )
    assert refused(*GRID) == (
        "error: training.output_dir: run holds a sweep over lora.r, and this one is over training.learning_rate, "
        "lora.r; write another training.output_dir, or remove run"
    )
    # Further values are further runs; another tracker changes no number.
    assert main(["sweep", str(path), "lora.r=[8,16]", "training.report_to=tensorboard"]) == 0
    assert "runs of an earlier command that this one does not make: r-4" in capsys.readouterr().err
    assert (len(jobs), saved()["group"]) == (3, group)
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert refused("lora.r=[8,16]") == (
        "error: rows.jsonl: has other rows than the runs in run were trained on; restore them, or write another "
        "training.output_dir, or remove run"
    )
    assert len(jobs) == 3
    Path("run/sweep.json").write_text("{}")
    assert "run/sweep.json is damaged" in refused("lora.r=[8,16]")
    Path("run/sweep.json").unlink()
    wanted = "run is not empty, and holds no sweep; write another, such as training.output_dir=run-sweep"
    assert wanted in refused("lora.r=[8,16]")


def test_wandb_shows_the_runs_as_a_group(write_recipe: Write, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    environments, call = [], sweep.fresh_process.call

    def seen(function: Any, job: TrainJob, on_line: Any, environment: dict[str, str]) -> str:
        environments.append(environment)
        return str(call(function, job, on_line, environment))

    monkeypatch.setattr(sweep.fresh_process, "call", seen)
    path = str(write_recipe())
    assert main(["sweep", path, "lora.r=[4,8]"]) == 0
    group = saved()["group"]
    assert group.startswith("run-")
    assert environments == [{"WANDB_RUN_GROUP": group}] * 2
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "one")  # would be that of all runs
    assert main(["sweep", path, "lora.r=[4,8,16]"]) == 0
    assert environments[2:] == [{"WANDB_RUN_GROUP": "mine", "WANDB_RUN_ID": ""}]


def row(name: str, **changed: Any) -> RunRow:
    values: dict[str, Any] = {"state": "finished", "error": None, "note": "", "held_out": 1.0, "loss": 1.0}
    values |= dict.fromkeys(["seconds", "speed", "memory", "held_out_rows"]) | {"records": []}
    return RunRow(**{"name": name, "values": {"lora.r": "1"}, "folder": Path(name)} | values | changed)


def test_the_best_is_a_finished_run() -> None:
    rows = [row("a"), row("b", held_out=0.5), row("c", held_out=0.1, state="not finished"), row("d", held_out=None)]
    assert best_of(rows) is rows[1]
    assert best_of([rows[2]]) is None
    assert best_of([rows[3]]) is rows[3]
    stopped = row("e", note="stopped early at step 3 of 9; the last weights are saved")
    assert as_text([stopped])[1].endswith("finished, stopped early at step 3 of 9; the last weights are saved")


def test_other_held_out_rows_are_told(write_recipe: Write, jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(data=HELD_OUT)
    assert main(["sweep", str(path), "lora.r=[4,8]"]) == 0
    assert saved()["notes"] == []
    ledger = Path("run/r-4/ledger.json")
    ledger.write_text(ledger.read_text().replace("60", "61"))
    assert main(["sweep", str(path), "lora.r=[4,8]"]) == 0
    assert saved()["notes"] == [
        "the held-out rows or their tokens differ between runs, so that their losses cannot be compared"
    ]
    assert "their losses cannot be compared" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# Runs that train


@pytest.mark.slow
def test_a_half_finished_run_is_resumed(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are those of the run that was not stopped."""
    path = write_recipe(data=HELD_OUT, training={"max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    command = ["sweep", str(path), "training.learning_rate=[1e-3,1e-2]"]
    assert main(command) == 0, capsys.readouterr().err
    whole = load_file("run/learning_rate-1e-2/adapter_model.safetensors")
    Path("run/learning_rate-1e-2/adapter_model.safetensors").unlink()
    shutil.rmtree("run/learning_rate-1e-2/checkpoint-2")
    assert main(command) == 0
    said = capsys.readouterr().err.splitlines()
    assert "[1/2] learning_rate-1e-3 is finished already" in said
    assert not any(
        line.startswith("[2/2] step 1/2") for line in said[said.index("[1/2] learning_rate-1e-3 is finished already") :]
    )
    resumed = load_file("run/learning_rate-1e-2/adapter_model.safetensors")
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.fixture
def processes() -> Processes:
    return Processes()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.soak),
    ],
)
def test_a_signal_in_the_second_run(write_recipe: Write, processes: Processes, number: int) -> None:
    """Passed on to the run, which saves a checkpoint; after SIGKILL the run's process ends, too."""
    path = write_recipe(training={"max_steps": 30, "save_strategy": "steps", "save_steps": 5})
    command = ["sweep", str(path), "training.max_steps=[2,30]"]
    started = processes.start(*command)
    while not started.poll() and not list(Path("run/max_steps-30").glob("checkpoint-*/complete.json")):
        time.sleep(0.02)
    os.kill(started.pids[0], number)
    [code] = started.wait()
    if number == signal.SIGKILL:
        deadline = time.monotonic() + 20
        steps = -1
        while steps != (now := len(Path("run/max_steps-30/metrics.jsonl").read_text())):
            assert time.monotonic() < deadline, "the run goes on"
            steps = now
            time.sleep(1)
    else:
        assert code == 128 + number
        assert "checkpoint-" in started.said()
        assert started.said().splitlines()[-1].endswith("is saved; the same command goes on")
    said = processes.run(*command)
    assert "max_steps-2 is finished already" in said
    assert "[2/2] step 1/30" not in said
    assert [run["state"] for run in saved()["runs"]] == ["finished", "finished"]
