"""A run that was stopped, killed or out of disk goes on to the very result that it would have had, to the bit."""

import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from safetensors import SafetensorError
from safetensors.torch import load_file

from finetune.cli.commands import main
from finetune.recipe import upstream_tables
from finetune.system.errors import RunError
from finetune.train import checkpoint
from finetune.train.state import damage_reported
from finetune.train.trainer import RunTrainer

Write = Callable[..., Path]
RESUME = "training.resume_from_checkpoint=true"


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes()


def rows(count: int) -> None:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Question {n}?"},
                    {"role": "assistant", "content": "some words in answer " * (1 + n % 4)},
                ]
            }
        )
        for n in range(count)
    ]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n")


def tensors(folder: str | Path, pattern: str) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(Path(folder).glob(pattern)):
        found |= {f"{file.name} {name}": tensor for name, tensor in load_file(file).items()}
    return found


def curve(run: str) -> list[dict[str, float]]:
    """All that was logged but for what a clock and the memory of the process decide."""
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    clock = ("second", "runtime", "peak_memory", "mfu", "energy")
    return [
        {key: value for key, value in json.loads(line).items() if not any(word in key for word in clock)}
        for line in lines
    ]


def assert_same(one: str, other: str, steps: int) -> None:
    """Weights, what the optimizer holds after the last step, and the curve, all to the bit."""
    state = f"checkpoint-{steps}/state-*"
    for pattern in ("*.safetensors", state):
        a, b = tensors(one, pattern), tensors(other, pattern)
        assert a.keys() == b.keys()
        assert a
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert curve(one) == curve(other)
    schedulers = [
        torch.load(Path(run, f"checkpoint-{steps}", "scheduler.pt"), weights_only=True) for run in (one, other)
    ]
    assert schedulers[0] == schedulers[1]


# ---------------------------------------------------------------------------------------------------------------
# Stopped at step k

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"model": {"name_or_path": "random:gemma2"}, "lora": {"lora_dropout": 0.1}},
    "full": {"model": {"name_or_path": "random:gemma3"}, "lora": None},
    "QLoRA": {
        "model": {"name_or_path": "random:gemma2"},
        "lora": {"lora_dropout": 0.1, "trainable_token_indices": [4, 5]},
        "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float32"},
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "each step logged": {},
    "accumulated, seldom logged": {"gradient_accumulation_steps": 2, "logging_steps": 4},
    "the best at its end": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        # The worst is the best: so it is not the last.
        "greater_is_better": True,
    },
}
MATRIX = list(itertools.product((1, 2), KINDS, (False, True), WAYS))
# The steps after which a run is stopped: in the first epoch, at its end, and in the second.
STOPS = (1, 3, 5)
# Each number of ranks, kind, way and stop once or more; all in tier `soak`.
QUICK = [
    (1, "LoRA", True, "the best at its end", 3),
    (1, "full", True, "accumulated, seldom logged", 1),
    (2, "full", False, "the best at its end", 5),
    (2, "QLoRA", False, "each step logged", 3),
]


@pytest.mark.parametrize(
    ("ranks", "kind", "packed", "way", "stops"),
    [
        *(pytest.param(*row, (stop,), marks=pytest.mark.slow) for *row, stop in QUICK),
        *(pytest.param(*row, STOPS, marks=pytest.mark.soak) for row in MATRIX),
    ],
)
def test_resumed_at_step_k_it_is_the_run_that_was_not_stopped(
    write_recipe: Write, processes: Processes, ranks: int, kind: str, packed: bool, way: str, stops: tuple[int, ...]
) -> None:
    steps = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    # Three steps an epoch, the last of them not filled.
    size = {"per_device_train_batch_size": 2 // ranks, "packing": packed, "max_length": 128}
    path = write_recipe(**KINDS[kind] | {"training": steps | size | WAYS[way]})
    rows((10 if WAYS[way].get("gradient_accumulation_steps") else 5) * (3 if packed else 1) + 2)
    command = ["train", str(path), "data.train=[{path: rows.jsonl}]", "data.eval_fraction=0.1"]
    processes.run(*command, ranks=ranks)
    Path("run").rename("whole")
    epochs = [record["epoch"] for record in curve("whole") if "epoch" in record]
    assert epochs[-1] > 1.4, "it is to go into its second epoch"
    for k in stops:
        Path("run").mkdir()
        for name in ("recipe.yaml", "metrics.jsonl"):
            shutil.copy(f"whole/{name}", "run")
        for step in range(1, k + 1):
            shutil.copytree(f"whole/checkpoint-{step}", f"run/checkpoint-{step}")
        processes.run(*command, RESUME, ranks=ranks)
        assert_same("run", "whole", 7)
        shutil.rmtree("run")


@pytest.mark.slow
@pytest.mark.parametrize("saves", [pytest.param("steps", marks=pytest.mark.soak), "best"])
def test_the_best_weights_are_those_of_the_best_step(write_recipe: Write, processes: Processes, saves: str) -> None:
    best = WAYS["the best at its end"] | {"save_strategy": saves, "save_steps": 1, "save_total_limit": 2}
    # In full fine-tuning some weights belong to no layer, which FSDP 2 leaves gathered after an evaluation.
    path = write_recipe(training=best | {"max_steps": 4}, **({"lora": None} if saves == "best" else {}))
    rows(20)
    for ranks in (1, 2):
        run = f"run{ranks}"
        processes.run(
            "train",
            str(path),
            "data.train=[{path: rows.jsonl}]",
            "data.eval_fraction=0.2",
            f"training.output_dir={run}",
            ranks=ranks,
        )
        losses = {r["step"]: r["eval_loss"] for r in curve(run) if "eval_loss" in r}
        step = max(losses, key=lambda step: losses[step])
        assert step < 4
        last = {"checkpoint-4"} if saves == "steps" else set()
        assert last | {f"checkpoint-{step}"} <= {p.name for p in Path(run).glob("checkpoint-*")}
        final, saved = (tensors(Path(run, where), "*model.safetensors") for where in ("", f"checkpoint-{step}"))
        assert final.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(final[name], saved[name])] == []


@pytest.mark.slow
def test_weights_in_parts_are_saved_as_they_are_kept(write_recipe: Write, processes: Processes) -> None:
    """In float32, and not as they are computed in, as FSDP 2 has some of them after an evaluation."""
    rows(20)
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    path = write_recipe(lora=None, training=every | {"bf16": True})
    command = ["train", str(path), "data.train=[{path: rows.jsonl}]", "data.eval_fraction=0.2"]
    processes.run(*command, ranks=2)
    shutil.copytree("run", "whole")
    Path("run/model.safetensors").unlink()
    for step in (3, 4):
        shutil.rmtree(f"run/checkpoint-{step}")
    processes.run(*command, RESUME, ranks=2)
    assert_same("run", "whole", 4)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(write_recipe: Write, processes: Processes) -> None:
    """With as many rows a step; numbers are summed in another order, so not to the bit."""
    path = write_recipe(training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    size = {n: f"training.per_device_train_batch_size={4 // n}" for n in (1, 2)}
    for ranks in (1, 2):
        processes.run("train", str(path), size[ranks], ranks=ranks)
        Path("run").rename(f"whole-{ranks}")
    for before, after in ((1, 2), (2, 1)):
        shutil.copytree(f"whole-{before}", "run")
        shutil.rmtree("run/checkpoint-4")
        Path("run/adapter_model.safetensors").unlink()
        said = processes.run("train", str(path), size[after], RESUME, ranks=after)
        change = f"{4 // before} -> {4 // after}; processes {before} -> {after}"
        assert f"resuming with changes: training.per_device_train_batch_size {change}" in said
        one, other = tensors("run", "*.safetensors"), tensors(f"whole-{after}", "*.safetensors")
        assert all(torch.allclose(one[name], other[name], rtol=0, atol=1e-5) for name in other)
        trained = [[r.get("trained_tokens") for r in curve(run)] for run in ("run", f"whole-{after}")]
        assert trained[0] == trained[1]
        shutil.rmtree("run")
    earlier = f"{RESUME[:-4]}whole-2/checkpoint-2"
    assert "a step was " in processes.run("train", str(path), earlier, code=2)


# ---------------------------------------------------------------------------------------------------------------
# Killed, terminated, out of disk


def _killed_and_resumed(processes: Processes, command: list[str], seed: int, seconds: float, ranks: int) -> str:
    """One run killed once, at a random moment or, every third, while it saves; then brought to its end."""
    rng, saves = random.Random(seed), seed % 3 == 0
    shutil.rmtree("run", ignore_errors=True)
    while True:
        started = processes.start(*command, RESUME, ranks=ranks)
        if saves:
            wanted = rng.randrange(1, 8)
            while not started.poll():
                folder = Path(f"run/checkpoint-{wanted}")
                if folder.exists():
                    break
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, seconds))
        unfinished = [p.name for p in Path("run").glob("checkpoint-*") if not (p / "complete.json").exists()]
        started.kill(signal.SIGKILL)
        # A kill between the last file and the end of the process hits nothing.
        if -signal.SIGKILL in started.wait() and not Path("run/adapter_model.safetensors").exists():
            break
        shutil.rmtree("run")  # it was through before
    said = processes.run(*command, RESUME, ranks=ranks)
    assert_same("run", "whole", 9)
    where = "saving " + unfinished[0] if unfinished else "elsewhere"
    return f"{ranks} rank(s), {where}, {'resumed' if 'has no complete' not in said else 'from the start'}"


@pytest.mark.parametrize(
    "seeds",
    [
        # While two ranks save.
        pytest.param((3,), marks=pytest.mark.slow, id="1"),
        pytest.param((0, *range(6, 31)), marks=pytest.mark.soak, id="26"),
    ],
)
def test_killed_at_any_moment_it_ends_at_the_same_bits(
    write_recipe: Write, processes: Processes, seeds: Sequence[int]
) -> None:
    path = write_recipe(
        model={"name_or_path": "random:gemma2"},
        training={"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3},
        lora={"lora_dropout": 0.1},
    )
    command = ["train", str(path)]
    for ranks in sorted({1 + (seed % 4 == 3) for seed in seeds}):
        for run in ("run", "whole"):
            shutil.rmtree(run, ignore_errors=True)
        began = time.monotonic()
        processes.run(*command, ranks=ranks)
        seconds = time.monotonic() - began
        Path("run").rename("whole")
        for seed in seeds:
            if 1 + (seed % 4 == 3) == ranks:
                print(seed, _killed_and_resumed(processes, command, seed, seconds, ranks))


VERBS = {
    "export": ["export", "run", "--output", "out", "--format", "fp16", "--format", "adapter"],
    "gguf": ["export", "run", "--output", "out", "--format", "gguf:Q8_0"],
    "evaluate": ["evaluate", "run", "--output", "out", "evaluate.limit=4", "evaluate.max_new_tokens=4"],
}


@pytest.mark.parametrize(
    ("verb", "counts"),
    [
        pytest.param("export", [3], marks=pytest.mark.slow),
        *(pytest.param(verb, range(1, 40, 3), marks=pytest.mark.soak) for verb in VERBS),
    ],
)
def test_killed_while_it_writes_the_output_of_a_verb_is_whole_or_absent(
    write_recipe: Write, processes: Processes, verb: str, counts: Sequence[int]
) -> None:
    """Killed when there are so many files, and then done to its end."""
    rows(12)
    path = str(write_recipe(training={"max_steps": 1}))
    assert main(["train", path, "--quiet", "data.train=[{path: rows.jsonl}]", "data.eval_fraction=0.3"]) == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    found, killed = [], 0
    for count in counts:
        started = processes.start(*VERBS[verb])
        while not started.poll() and sum(len(list(Path(name).rglob("*"))) for name in ("out", ".out.partial")) < count:
            time.sleep(0.002)
        started.kill(signal.SIGKILL)
        if started.wait() == [0]:
            break
        killed += 1
        assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
        if Path("out/report.json").exists() or (verb != "evaluate" and Path("out").exists()):
            found.append(written())
            shutil.rmtree("out")
    assert killed
    shutil.rmtree("out", ignore_errors=True)
    processes.run(*VERBS[verb])
    assert all(output == written() for output in found)
    assert not [path.name for path in (*Path().iterdir(), *Path("out").iterdir()) if path.name.startswith(".")]


def written() -> dict[str, bytes]:
    """The files of an output; of those with durations only the names."""
    timed = (".json", ".md", ".html", ".log")
    files = {path: path.name.startswith("report.") or path.suffix in timed for path in Path("out").rglob("*")}
    return {str(path): b"" if named else path.read_bytes() for path, named in files.items() if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_terminated_it_saves_and_goes_on_to_the_same_bits(
    write_recipe: Write, processes: Processes, ranks: int
) -> None:
    path = write_recipe(training={"max_steps": 24}, lora={"lora_dropout": 0.1})
    save = "training.save_strategy=steps", "training.save_steps=24"
    processes.run("train", str(path), *save, "training.output_dir=whole", ranks=ranks)
    started = processes.start("train", str(path), *save, ranks=ranks)
    while "step 4/" not in started.said():
        assert not started.poll(), started.said()
        time.sleep(0.005)
    started.kill(signal.SIGTERM)
    assert started.wait() == [143] * ranks
    processes.run("train", str(path), *save, RESUME, ranks=ranks)
    assert_same("run", "whole", 24)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs that were not stopped, which several tests compare with."""
    return tmp_path_factory.mktemp("wholes")


@pytest.mark.parametrize(
    ("step", "training", "evaluated"),
    [
        (4, {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2}, [2, 4]),
        pytest.param(
            *(3, {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2}, [2]), marks=pytest.mark.soak
        ),
        # Three steps are an epoch.
        pytest.param(3, {"save_strategy": "epoch", "eval_strategy": "epoch"}, [3], marks=pytest.mark.soak),
        pytest.param(4, {"save_strategy": "epoch", "eval_strategy": "epoch"}, [3], marks=pytest.mark.soak),
        pytest.param(
            *(3, {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch"}, [3]), marks=pytest.mark.soak
        ),
    ],
)
@pytest.mark.slow
def test_terminated_at_an_evaluation_or_an_epochs_end(
    write_recipe: Write,
    wholes: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    training: dict[str, Any],
    evaluated: list[int],
) -> None:
    """It is saved once, when all that was due is done, and goes on to the same bits."""
    best = {"metric_for_best_model": "loss", "greater_is_better": True} if "eval_steps" in training else {}
    rows(7)
    path = write_recipe(training={"max_steps": 8, "learning_rate": 0.1} | training | best)
    command = ["train", str(path), "data.train=[{path: rows.jsonl}]", "data.eval_fraction=0.15"]
    whole = wholes / "-".join(map(str, training.values()))
    if not whole.exists():
        assert main([*command, f"training.output_dir={whole}"]) == 0
    saved, step_of = [], RunTrainer.training_step

    def signalled(trainer: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return step_of(trainer, *args, **kwargs)

    write_marker = checkpoint.write_marker
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", signalled)
        patch.setattr("finetune.train.trainer.write_marker", lambda *args: (saved.append(args[1]), write_marker(*args)))
        assert main(command) == 143
    assert saved.count(step) == 1
    assert checkpoint.is_whole(Path(f"run/checkpoint-{step}"))
    known = json.loads(Path(f"run/checkpoint-{step}/trainer_state.json").read_text())["log_history"]
    assert [record["step"] for record in known if "eval_loss" in record] == evaluated
    assert main([*command, RESUME]) == 0
    assert curve("run") == curve(str(whole))
    one, other = tensors("run", "*.safetensors"), tensors(whole, "*.safetensors")
    assert one
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_what_an_optimizer_keeps_in_8_bits_is_kept_so(write_recipe: Write) -> None:
    """For tensors of at least 4096 numbers; bitsandbytes keeps smaller ones in 32 bits."""
    path = write_recipe(lora=None, training={"optim": "adamw_8bit", "save_strategy": "steps", "save_steps": 2})
    assert main([str(path)]) == 0
    kept = tensors("run/checkpoint-4", "state-*")
    assert {tensor.dtype for tensor in kept.values()} == {torch.uint8, torch.float32}
    shutil.copytree("run", "whole")
    shutil.rmtree("run/checkpoint-4")
    Path("run/model.safetensors").unlink()
    assert main([str(path), RESUME]) == 0
    assert_same("run", "whole", 4)


def test_an_optimizer_that_cannot_be_saved_is_refused(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_recipe(training={"optim": "galore_adamw"}))]) == 2
    assert "training.optim: is galore_adamw, whose state cannot be saved; write" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk can be mounted by root alone")
def test_a_disk_that_fills_up_loses_nothing_that_was_saved(write_recipe: Write, processes: Processes) -> None:
    path = write_recipe(training={"max_steps": 6, "save_strategy": "steps", "save_steps": 1})
    command = ["train", str(path), "training.output_dir=disk/run"]
    processes.run(*command)
    shutil.copytree("disk/run", "whole")
    size = sum(file.stat().st_size for file in Path("whole/checkpoint-3").rglob("*"))
    shutil.rmtree("disk/run")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(3.4 * size)}", "tmpfs", "disk"], check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        said = processes.run(*command, code=2)
        fault = said.splitlines()[-1]
        assert fault.startswith("error: disk/run/checkpoint-")
        assert "could not be saved: " in fault
        assert "MiB free). Earlier checkpoints are kept; free some disk space" in fault
        kept = sorted(Path("disk/run").glob("checkpoint-*"))
        assert kept
        assert all(checkpoint.is_whole(folder) for folder in kept)
        subprocess.run(["mount", "-o", "remount,size=64m", "disk"], check=True)
        processes.run(*command, RESUME)
        assert_same("disk/run", "whole", 6)
    finally:
        subprocess.run(["umount", "disk"], check=True)


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    now, step_of, back = time.time, RunTrainer.training_step, [0]

    def step(trainer: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        back[0] = 86400 if trainer.state.global_step else 0
        return step_of(trainer, *args, **kwargs)

    monkeypatch.setattr(time, "time", lambda: now() - back[0])
    monkeypatch.setattr(RunTrainer, "training_step", step)
    rows(8)
    steps = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    command = ["train", str(write_recipe(training=steps)), "data.train=[{path: rows.jsonl}]", "data.eval_fraction=0.2"]
    assert main(command) == 0
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    durations = [value for record in records for key, value in record.items() if key.endswith(("runtime", "_second"))]
    assert len(durations) > 9
    assert min(durations) >= 0
    for path in Path("run/checkpoint-3").iterdir():
        os.utime(path, (now() - 86400, now() - 86400))
    os.utime("run/checkpoint-3", (now() - 86400, now() - 86400))
    assert checkpoint.checkpoint_to_resume(Path("run"), True, print) == Path("run/checkpoint-3")
    Path("run/adapter_model.safetensors").unlink()
    assert main([*command, RESUME, "training.max_steps=4"]) == 0
    assert [record["step"] for record in curve("run") if "loss" in record] == [1, 2, 3, 4]


def test_without_a_cache_that_can_be_written_all_goes_on(
    write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(8)
    path = str(write_recipe(model={"name_or_path": "random:llama"}, training={"max_steps": 1}))
    Path("blocked").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    monkeypatch.setenv("FINETUNE_STAND_IN_CACHE", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    upstream_tables.tables.cache_clear()
    for verb in ("check", "inspect", "train"):
        assert main([verb, path, "data.train=[{path: rows.jsonl}]"]) == 0
    assert capsys.readouterr().err.count(" cannot be written (Not a directory): ") == 1
    assert Path("run/adapter_model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------------------
# Which checkpoint, and whether it may


def finished(write_recipe: Write, **training: Any) -> Path:
    """A recipe whose run has checkpoints 1 to 4 and no end."""
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 1} | training)
    assert main([str(path)]) == 0
    Path("run/adapter_model.safetensors").unlink()
    return path


@pytest.mark.slow
def test_what_is_not_whole_is_passed_over_with_its_reason(
    write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished(write_recipe)
    state = Path("run/checkpoint-4/state-00001-of-00001.safetensors")
    size = state.stat().st_size
    state.write_bytes(state.read_bytes()[:-1])
    Path("run/checkpoint-3/scheduler.pt").unlink()
    Path("run/checkpoint-2/complete.json").write_text("{")
    capsys.readouterr()
    assert main([str(path), RESUME]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "skipped" in line] == [
        f"run/checkpoint-4 skipped: {state.name} has {size - 1:,} bytes, not {size:,}",
        "run/checkpoint-3 skipped: scheduler.pt is missing",
        "run/checkpoint-2 skipped: complete.json is damaged",
    ]
    assert [record["step"] for record in curve("run") if "loss" in record] == [1, 2, 3, 4]
    whole = f"complete ones: {', '.join(f'run/checkpoint-{n}' for n in (1, 2, 3, 4))}"
    state.write_bytes(b"")
    assert main([str(path), "training.resume_from_checkpoint=run/checkpoint-4"]) == 2
    assert whole.removesuffix(", run/checkpoint-4") in capsys.readouterr().err


@pytest.mark.slow
def test_the_last_whole_checkpoint_is_never_removed(write_recipe: Write) -> None:
    """A limit of one: the older goes when the newer is whole, and what a killed run left goes too."""
    path = finished(write_recipe, save_total_limit=1)
    assert [p.name for p in Path("run").glob("checkpoint-*")] == ["checkpoint-4"]
    left = Path("run/checkpoint-9")
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    checkpoint.rotate(Path("run"), None, None)
    assert [p.name for p in Path("run").glob("checkpoint-*")] == ["checkpoint-4"]
    Path("run/checkpoint-4").rename("run/checkpoint-2")
    shutil.copytree("run/checkpoint-2", "run/checkpoint-3")
    shutil.copytree("run/checkpoint-2", "run/checkpoint-10")
    checkpoint.rotate(Path("run"), 2, Path("elsewhere/checkpoint-2"))
    assert {p.name for p in Path("run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-10"}
    assert main([str(path), "training.output_dir=other"]) == 0


@pytest.mark.slow
def test_a_changed_recipe_is_named_or_refused(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rows(12)
    data = {"train": [{"path": "rows.jsonl"}]}
    path = write_recipe(data=data, training={"save_strategy": "steps", "save_steps": 2})
    assert main([str(path)]) == 0
    Path("run/adapter_model.safetensors").unlink()
    shutil.rmtree("run/checkpoint-4")
    saved = Path("run/recipe.yaml").read_bytes()
    assert main([str(path), RESUME, "lora.r=8"]) == 2
    assert "lora.r was 4 and is 8" in capsys.readouterr().err
    rows(13)
    assert main([str(path), RESUME]) == 2
    assert "the rows of data.train are not those that the run was trained on" in capsys.readouterr().err
    assert Path("run/recipe.yaml").read_bytes() == saved
    rows(12)
    capsys.readouterr()
    assert main([str(path), RESUME, "training.learning_rate=1e-4", "training.lr_scheduler_type=constant"]) == 0
    assert "training.learning_rate 0.001 -> 0.0001" in capsys.readouterr().err
    # And it is the new rate that it goes on with.
    rates = {record["step"]: record["learning_rate"] for record in curve("run") if "loss" in record}
    assert rates[2] > 1e-4
    assert rates[3] == rates[4] == 1e-4


@pytest.mark.slow
def test_a_pickle_that_would_run_code_is_not_read(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, ("owned",))

    path = finished(write_recipe)
    for name in ("scheduler.pt", "rng_state.pth"):
        folder = Path("run/checkpoint-4")
        good, marker = (folder / name).read_bytes(), (folder / "complete.json").read_text()
        torch.save(Evil(), folder / name, pickle_module=pickle)
        marks = json.loads(marker)
        marks["files"][name] = (folder / name).stat().st_size
        (folder / "complete.json").write_text(json.dumps(marks))
        capsys.readouterr()
        assert main([str(path), RESUME, "training.max_steps=5"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            "error: run/checkpoint-4 cannot be resumed from, a file in it is damaged, or a pickle that could run code, "
            "which is not read; resume from another checkpoint"
        )
        assert not Path("owned").exists()
        (folder / name).write_bytes(good)
        (folder / "complete.json").write_text(marker)


@pytest.mark.parametrize(
    "schedule",
    [
        "reduce_lr_on_plateau",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("cosine_with_restarts", "polynomial")),
    ],
)
@pytest.mark.slow
def test_every_schedule_goes_on_where_it_was(write_recipe: Write, schedule: str) -> None:
    rows(12)
    plateau = {"lr_scheduler_kwargs": {"patience": 0}, "eval_strategy": "steps", "eval_steps": 1}
    path = write_recipe(
        data={"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.2},
        training={
            "save_strategy": "steps",
            "save_steps": 3,
            "lr_scheduler_type": schedule,
            "learning_rate": 0.5,
            "max_steps": 6,
            **(plateau if "plateau" in schedule else {}),
        },
    )
    assert main([str(path)]) == 0
    shutil.copytree("run", "whole")
    assert len({record["learning_rate"] for record in curve("whole") if "loss" in record}) > 1
    Path("run/adapter_model.safetensors").unlink()
    shutil.rmtree("run/checkpoint-6")
    assert main([str(path), RESUME]) == 0
    assert_same("run", "whole", 6)


def test_damage_of_a_checkpoint_is_told_from_a_lack_of_memory() -> None:
    for error in (SafetensorError("invalid JSON in header"), KeyError("x"), ValueError("x")):
        with (
            pytest.raises(RunError, match=r"^run/checkpoint-4 cannot be resumed from, a file in it is damaged: "),
            damage_reported(Path("run/checkpoint-4")),
        ):
            raise error
    with pytest.raises(torch.OutOfMemoryError), damage_reported(Path("run/checkpoint-4")):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "marker", ["[]", "{", "{}", '{"step": 1}', '{"step": "1", "files": {}}', '{"step": 1, "files": {"a": "3"}}']
)
def test_a_damaged_marker_is_no_whole_checkpoint(marker: str, tmp_path: Path) -> None:
    (tmp_path / "complete.json").write_text(marker)
    (tmp_path / "a").write_text("abc")
    assert not checkpoint.is_whole(tmp_path)
    (tmp_path / "complete.json").write_text('{"step": 1, "files": {"a": 3}, "day": "2026-13-01"}')
    assert not checkpoint.is_whole(tmp_path)
    (tmp_path / "complete.json").write_text('{"step": 1, "files": {"a": 3}, "day": "2026-12-01"}')
    assert checkpoint.is_whole(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"a": "\x1b"}')
    assert not checkpoint.is_whole(tmp_path)
