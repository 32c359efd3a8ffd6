"""Several ranks are one run: one result, one voice, and a fault of one ends all. Real gloo ranks, FSDP 2 and DDP."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from processes import ROOT, Processes, environment
from safetensors.torch import load_file

from finetune.cli.commands import main
from finetune.model.precision import decide_precision
from finetune.recipe.load import load_recipe
from finetune.system.errors import RunError
from finetune.train import checkpoint
from finetune.train.arguments import check_launch
from finetune.train.run import _comparable as comparable

Write = Callable[..., Path]
FILE = "the file given to accelerate launch"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float32"}


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes()


def records(run: str, key: str) -> list[float]:
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


def weights(run: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in Path(run).glob("*.safetensors"):
        found |= load_file(file)
    return found


def uneven_rows(count: int) -> None:
    """Rows with 1 to some 60 trained tokens, so that a mean of means is not the mean."""
    rows = []
    for n in range(count):
        answer = "yes" if n % 3 else "one two three four five six seven eight nine ten " * (1 + n % 2)
        turns = [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}))
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"model": {"name_or_path": "random:gemma2"}},
    "full": {"lora": None},
    "trained output layer": {
        "model": {"name_or_path": "random:llama"},
        "lora": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    },
    "token rows, tied": {"lora": {"trainable_token_indices": [4, 5]}},
    "token rows, untied": {
        "model": {"name_or_path": "random:llama"},
        "lora": {"trainable_token_indices": {"embed_tokens": [6, 7], "lm_head": [6, 7]}},
    },
    "packed": {"model": {"name_or_path": "random:gemma"}, "training": {"packing": True, "max_length": 64}},
    "QLoRA": {"model": {"name_or_path": "random:gemma2"}, "quantization": NF4},
    "PiSSA": {"lora": {"init_lora_weights": "pissa"}},
    "MiCA": {"lora": {"init_lora_weights": "mica"}},
}
SPREAD = {
    "8 rows": ("training.per_device_train_batch_size=8", {}),
    "1 row, 8 times": ("training.per_device_train_batch_size=1 training.gradient_accumulation_steps=8", {}),
    "FSDP, 2 x 4": ("training.per_device_train_batch_size=4", {"ranks": 2}),
    "DDP, 2 x 4": ("training.per_device_train_batch_size=4", {"ranks": 2, "config": "ddp.yaml"}),
}


@pytest.mark.parametrize(
    ("kind", "spread"),
    [
        pytest.param("LoRA", tuple(SPREAD), marks=pytest.mark.slow, id="LoRA"),
        *(
            pytest.param(kind, ("8 rows", "FSDP, 2 x 4"), marks=pytest.mark.slow, id=f"{kind}, FSDP")
            for kind in ("full", "QLoRA")
        ),
        *(pytest.param(kind, tuple(SPREAD), marks=pytest.mark.soak, id=kind) for kind in KINDS if kind != "LoRA"),
    ],
)
@pytest.mark.slow
def test_one_result_however_the_batch_is_spread(
    write_recipe: Write, processes: Processes, kind: str, spread: tuple[str, ...]
) -> None:
    """Over an epoch's end, where 21 rows do not fill three steps of eight."""
    path = write_recipe(**KINDS[kind])
    uneven_rows(24)
    data = ["data.train=[{path: rows.jsonl}]", "data.eval_fraction=0.125"]
    for name in spread:
        overrides, where = SPREAD[name]
        run = f"training.output_dir={name}"
        steps = ["training.max_steps=5", "training.per_device_eval_batch_size=1"]
        processes.run("train", str(path), run, *overrides.split(), *data, *steps, **where)
    first, *others = spread
    assert len(records(first, "loss")) == 5
    one = weights(first)
    for other in others:
        # Sums of float32 in another order: 8 rows' losses near 7, and what five steps of Adam make of them.
        assert records(other, "loss") == pytest.approx(records(first, "loss"), abs=5e-6), other
        assert records(other, "grad_norm") == pytest.approx(records(first, "grad_norm"), rel=2e-5), other
        assert records(other, "eval_loss") == pytest.approx(records(first, "eval_loss"), abs=5e-6), other
        if kind != "packed":
            assert records(other, "epoch")[2] == 1.0
        two = weights(other)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert torch.allclose(two[name], tensor, rtol=0, atol=1e-4), (other, name)
            assert two[name].dtype == tensor.dtype


@pytest.mark.slow
def test_a_checkpoint_of_an_adapter_holds_the_adapter_alone(write_recipe: Write, processes: Processes) -> None:
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2})
    processes.run("train", str(path), "training.output_dir=two", "training.gradient_accumulation_steps=1", ranks=2)
    processes.run("train", str(path), "training.output_dir=one")
    one, two = Path("one/checkpoint-4"), Path("two/checkpoint-4")
    assert checkpoint.is_whole(two)
    own = {"rng_state.pth", "state-00001-of-00001.safetensors"}
    ranks = {f"rng_state_{n}.pth" for n in (0, 1)} | {f"state-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert {p.name for p in two.iterdir()} - ranks == {p.name for p in one.iterdir()} - own
    assert {p.name for p in two.iterdir()} >= ranks
    # Two moments, a half on each rank, and no weight again; the base has 230,000 numbers more.
    numbers = sum(tensor.numel() for tensor in load_file(two / "adapter_model.safetensors").values())
    for path in two.glob("state-*"):
        state = load_file(path)
        assert {name.split("/")[0] for name in state} <= {"exp_avg", "exp_avg_sq", "step"}
        assert sum(tensor.numel() for tensor in state.values() if tensor.dim()) == numbers
    with (two / "complete.json").open() as file:
        assert json.load(file)["processes"] == 2
    assert main(["merge", "two", "--output", "merged"]) == 0
    assert main(["generate", "two/checkpoint-4", "--prompt", "Hi", "--max-new-tokens", "2"]) == 0


@pytest.mark.slow
def test_a_rank_that_tells_a_fault_is_not_interrupted() -> None:
    """Others end when they have seen it, whereupon a launcher terminates who is still there."""
    code = (
        "import signal; from finetune.cli import commands; from finetune.system import distributed\n"
        "signal.signal(signal.SIGTERM, commands._on_sigterm)\n"
        "distributed.end_all_ranks(['error: it does not fit'], 2)"
    )
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) as rank:
        assert rank.stderr
        assert rank.stderr.readline() == "error: it does not fit\n"
        rank.terminate()
        assert (rank.stderr.read(), rank.wait()) == ("", 2)


def launched(config: str, *script: str, popen: type[subprocess.Popen[str]] = subprocess.Popen) -> Any:
    """`accelerate launch` of a script on two ranks."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / config), "--num_processes", "2", "--main_process_port", "0"]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return popen([*command, *script], env=env, text=True, **pipes)


ON_CPU = str(ROOT / "tests" / "on_cpu.py")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp.yaml", "fsdp_qlora.yaml", "ddp.yaml"])
def test_the_ranks_of_these_tests_have_what_a_launcher_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    script = tmp_path / "show.py"
    script.write_text("import json, os; json.dump(dict(os.environ), open(f\"rank {os.environ['RANK']}\", 'w'))")
    monkeypatch.chdir(tmp_path)
    _, error = launched(config, str(script), popen=forks.Popen).communicate(timeout=100)
    ranks = [json.loads(file.read_text()) for file in tmp_path.glob("rank *")]
    assert len(ranks) == 2, error
    wanted = environment(config, 2)
    for rank in ranks:
        names = {name for name in rank if name.startswith(("ACCELERATE_", "FSDP_"))}
        assert {name: rank[name] for name in names - set(os.environ)} == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "fsdp.yaml",
        pytest.param("fsdp_qlora.yaml", marks=pytest.mark.soak),
        pytest.param("ddp.yaml", marks=pytest.mark.soak),
    ],
)
def test_launched_as_a_user_would(write_recipe: Write, processes: Processes, config: str) -> None:
    """Through `accelerate launch` itself: the same weights as from the ranks that these tests fork."""
    quantised = {"quantization": NF4} if "qlora" in config else {}
    path = write_recipe(model={"name_or_path": "random:gemma2"}, **quantised)
    done = launched(config, ON_CPU, "train", str(path))
    _, said = done.communicate(timeout=200)
    assert done.returncode == 0, said
    assert said.count("saved: run") == 1
    assert said.count("recipe: ") == 1
    processes.run("train", str(path), "training.output_dir=forked", ranks=2, config=config)
    one, two = weights("run"), weights("forked")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert main(["merge", "run", "--output", "merged"]) == 0


# ---------------------------------------------------------------------------------------------------------------
# Faults and signals


def told(said: str) -> list[str]:
    return [line for line in said.splitlines() if "error" in line]


@pytest.mark.slow
def test_a_fault_that_all_ranks_meet_is_told_once(write_recipe: Write, processes: Processes) -> None:
    said = processes.run("train", str(write_recipe()), "training.lr=1", ranks=2, code=2)
    assert told(said) == ["error: command line: training.lr: is not a recipe's key; write learning_rate"]


@pytest.mark.slow
def test_a_fault_of_one_rank_is_told_by_it_and_ends_all(write_recipe: Write, processes: Processes) -> None:
    """A file is missing on the second machine; the first waits for it inside a collective."""
    path = write_recipe(data={"train": [{"path": "${ROWS}"}]})
    uneven_rows(8)
    began = time.monotonic()
    rows = [{"ROWS": "rows.jsonl"}, {"ROWS": "missing.jsonl"}]
    command = processes.start("train", str(path), ranks=2, env=rows)
    assert command.wait() == [2, 2]
    assert time.monotonic() - began < 40
    (line,) = told(command.said())
    assert line.startswith("rank 1 (")
    assert "data.train.0.path: is ${ROWS}, and there is no such file" in line
    assert not Path("run").exists()


@pytest.mark.parametrize("what", ["recipe", "rows"])
@pytest.mark.slow
def test_ranks_that_differ_are_refused(write_recipe: Write, processes: Processes, what: str) -> None:
    path = write_recipe(data={"train": [{"path": "${ROWS}"}]}, training={"run_name": "${NAME}"})
    uneven_rows(8)
    Path("other").mkdir()
    shutil.copy("rows.jsonl", "other")
    uneven_rows(9 if what == "rows" else 8)
    # Each machine may have the file in another folder.
    env = [{"NAME": "a", "ROWS": "rows.jsonl"}, {"NAME": "a" if what == "rows" else "b", "ROWS": "other/rows.jsonl"}]
    command = processes.start("train", str(path), ranks=2, env=env)
    assert command.wait() == [2, 2]
    (line,) = told(command.said())
    name = "a row of data.train" if what == "rows" else "the recipe"
    assert f"{name} of rank 1 (" in line
    assert line.endswith("start all machines with the same recipe, files and packages")


def test_ranks_may_have_secrets_of_their_own(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(training={"project": "${TRACKER_TOKEN}", "run_name": "${RUN_NAME}"})

    def compared(**variables: str) -> Any:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return comparable(load_recipe(path))

    first = compared(TRACKER_TOKEN="of rank 0", RUN_NAME="one")
    assert compared(TRACKER_TOKEN="of rank 1") == first
    assert "of rank" not in str(first)
    assert compared(RUN_NAME="two") != first


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_ends_both(write_recipe: Write, processes: Processes) -> None:
    path = write_recipe(training={"learning_rate": 1e30, "max_steps": 5, "lr_scheduler_type": "constant"})
    said = processes.run("train", str(path), ranks=2, code=2)
    (line,) = told(said)
    assert "the loss is nan at step 2, on the rows " in line


def _started(processes: Processes, write_recipe: Write, steps: int = 400, **kwargs: Any) -> Any:
    path = write_recipe(training={"max_steps": steps, "logging_steps": 2})
    command = processes.start("train", str(path), ranks=2, **kwargs)
    deadline = time.monotonic() + 60
    while "step 4/" not in command.said():
        assert time.monotonic() < deadline, command.said()
        time.sleep(0.01)
    return command


@pytest.mark.parametrize(
    ("number", "code", "rank"), [(signal.SIGTERM, 143, 1), pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.soak)]
)
@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_at_one_step(
    write_recipe: Write, processes: Processes, number: int, code: int, rank: int
) -> None:
    command = _started(processes, write_recipe)
    os.kill(command.pids[rank], number)
    os.kill(command.pids[rank], number)  # a launcher hands it on
    assert command.wait(30) == [code, code]
    (saved,) = Path("run").glob("checkpoint-*")
    assert checkpoint.is_whole(saved)
    assert command.said().count(f"{saved} is saved. Go on with") == 1
    step = int(saved.name.removeprefix("checkpoint-"))
    processes.run(
        "train", "recipe.yaml", "training.resume_from_checkpoint=true", f"training.max_steps={step + 1}", ranks=2
    )


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
@pytest.mark.slow
def test_a_killed_rank_ends_the_other(write_recipe: Write, processes: Processes, rank: int) -> None:
    command = _started(processes, write_recipe)
    os.kill(command.pids[rank], signal.SIGKILL)
    codes = command.wait(20)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    (line,) = told(command.said())
    assert (
        "error: another process of this run has ended (killed, or out of memory?). Its checkpoints are kept; resume "
        "with training.resume_from_checkpoint=true (" in line
    )


@pytest.mark.slow
def test_processes_whose_launcher_is_gone_end(write_recipe: Write, processes: Processes) -> None:
    """As when the first of two machines dies, whose launcher holds what the processes tell each other by."""
    short = {"FINETUNE_TEST_SILENCE": "1"}
    command = _started(processes, write_recipe, steps=4000, env=[short, short])
    command.store = None
    assert command.wait(40) == [1, 1]
    assert command.said().count("(the launcher of the first machine does not answer)") == 2


@pytest.mark.slow
@pytest.mark.soak
def test_the_others_end_with_one_that_shows_its_traceback(write_recipe: Write, processes: Processes) -> None:
    path = write_recipe(data={"train": [{"path": "${ROWS}"}]})
    uneven_rows(8)
    rows = [{"ROWS": "rows.jsonl"}, {"ROWS": "missing.jsonl"}]
    command = processes.start("train", str(path), "--traceback", ranks=2, env=rows)
    assert command.wait(30) == [2, 2]
    assert command.said().count("Traceback (most recent call last)") == 1


@pytest.mark.slow
def test_an_output_that_is_not_shared_is_refused(write_recipe: Write, processes: Processes) -> None:
    Path("other").mkdir()
    env = {"FINETUNE_TEST_SILENCE": "1"}
    apart = env | {"FINETUNE_TEST_CWD": str(Path("other").absolute())}
    command = processes.start("train", str(write_recipe()), ranks=2, env=[env, apart])
    assert command.wait() == [2, 2]
    (line,) = told(command.said())
    assert line == (
        "error: training.output_dir: rank 1 does not see run/recipe.yaml, which rank 0 has written; all machines need "
        "one shared filesystem there"
    )


@pytest.mark.slow
def test_a_launcher_that_is_terminated_lets_the_step_and_its_workers_finish(write_recipe: Write) -> None:
    """The launcher signals whole process groups, with whatever works for them."""
    path = write_recipe(training={"max_steps": 4000, "logging_steps": 2, "dataloader_num_workers": 1})
    started = launched("ddp.yaml", ON_CPU, "train", str(path), popen=forks.Popen)
    said = ""
    assert started.stderr
    while "step 4/" not in said:
        line = started.stderr.readline()
        assert line, said
        said += line
    started.terminate()
    _, rest = started.communicate(timeout=60)
    assert started.returncode == 1
    (saved,) = Path("run").glob("checkpoint-*")
    assert f"{saved} is saved. Go on with" in rest
    assert "error: " not in rest
    assert checkpoint.is_whole(saved)


@pytest.mark.parametrize(
    ("overrides", "env", "fault"),
    [
        (
            {"training": {"optim": "adafactor"}},
            {},
            "training.optim: is adafactor, which cannot step on sharded weights",
        ),
        ({"training": {"save_only_model": True}}, {}, "training.save_only_model: is true, but a sharded run"),
        ({"quantization": {"load_in_8bit": True}}, {}, "quantization.load_in_8bit: is true, but such weights"),
        (
            {"quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
            {},
            "quantization.bnb_4bit_quant_storage: is uint8, but sharded weights are stored in model.dtype; write "
            "bnb_4bit_quant_storage: float32",
        ),
        ({}, {"FSDP_VERSION": "1"}, f"{FILE}: fsdp_config.fsdp_version is not 2; write 2"),
        ({}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, f"{FILE}: fsdp_activation_checkpointing is true, which"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, f'{FILE}: mixed_precision is bf16; write "no"'),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, f"{FILE}: DeepSpeed is not used here"),
        (
            {"training": {"auto_find_batch_size": True}},
            {},
            "training.auto_find_batch_size: is true, but there are 2 processes, each of which would find its own",
        ),
        ({"training": {"save_on_each_node": True}}, {}, "training.save_on_each_node: is true, but there are 2"),
        (
            {},
            {"PARALLELISM_CONFIG_TP_SIZE": "2"},
            f"{FILE}: parallelism_config_tp_size is above 1, which is not supported",
        ),
    ],
    ids=[
        "optimizer",
        "only weights",
        "8 bit",
        "4 bit",
        "FSDP 1",
        "recomputing",
        "precision",
        "DeepSpeed",
        "batch size",
        "each machine",
        "tensors",
    ],
)
@pytest.mark.slow
def test_what_cannot_be_done_in_parts_is_refused(
    write_recipe: Write,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, Any],
    env: dict[str, str],
    fault: str,
) -> None:
    path = write_recipe(**overrides)
    if "optim" in overrides.get("training", {}) or "ACCELERATE_USE_DEEPSPEED" in env:
        (line,) = told(processes.run("train", str(path), ranks=2, env=[env, env], code=2))
        assert line.startswith(f"error: {fault}")
        return
    # In this process, with what a launcher sets.
    for name, value in (environment("fsdp.yaml", 2) | {"WORLD_SIZE": "2"} | env).items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(path)
    with pytest.raises(RunError) as caught:
        check_launch(recipe, decide_precision(recipe))
    assert str(caught.value).startswith(fault)


def test_a_tpu_needs_its_package(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_recipe()), "training.fsdp_config={xla: true, xla_fsdp_v2: true}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: training.fsdp_config: xla needs torch_xla, which is not installed; remove it, or run on a TPU"
    )


# ---------------------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.slow
def test_a_stream_on_two_ranks_is_that_on_one(write_recipe: Write, processes: Processes) -> None:
    """And, stopped in its second round, goes on where it was."""
    uneven_rows(12)
    path = write_recipe(
        data={"train": [{"path": "rows.jsonl", "streaming": True}]},
        training={"max_steps": 6, "save_strategy": "steps", "save_steps": 5},
    )
    processes.run("train", str(path), "training.output_dir=one", "training.per_device_train_batch_size=4")
    processes.run("train", str(path), "training.output_dir=two", ranks=2)
    assert records("two", "loss") == pytest.approx(records("one", "loss"), abs=5e-6)
    one, two = (json.loads(Path(run, "ledger.json").read_text())["train"] for run in ("one", "two"))
    assert one["rows"]["kept"] >= 24
    assert abs(one["rows"]["kept"] - two["rows"]["kept"]) <= 4  # what was read ahead
    shutil.copytree("one", "rest", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree("one/checkpoint-5", "rest/checkpoint-5", dirs_exist_ok=True)
    shutil.rmtree("rest/checkpoint-6", ignore_errors=True)
    resume = "training.resume_from_checkpoint=true"
    processes.run("train", str(path), "training.output_dir=rest", "training.per_device_train_batch_size=4", resume)
    assert records("rest", "loss") == records("one", "loss")
