"""Recipes trained through the command line, on tiny models; what a run leaves; what stops it, what it keeps."""

import copy
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from gguf_tiny import make_model, make_tokenizer, write_gguf
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode

import finetune.train.run
from finetune.cli.commands import main
from finetune.model import locate, precision, shards
from finetune.model.load_generator import LoadOptions, load_generator
from finetune.model.trainable import load_trainable
from finetune.plan.fake_model import build_fake
from finetune.recipe.load import load_recipe
from finetune.system.files import locked_folder
from finetune.train import checkpoint
from finetune.train.callbacks.metrics import MetricsLog

Write = Callable[..., Path]
SAMPLE_ROWS = Path(__file__).parents[1] / "data" / "chat_sample.jsonl"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

# An adapter with token rows, which are named: `auto` depends on the base's weights.
ROWS = {"r": 4, "lora_alpha": 8, "trainable_token_indices": [4, 5]}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in metrics(run) if "loss" in record]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_a_base_is_located_read_and_hashed_once_a_start(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    write_gguf(make_model(len(tokenizer)), tokenizer, Path("tiny.gguf"))
    path = write_recipe(
        model={"name_or_path": "tiny.gguf"}, training={"max_steps": 1}, evaluate={"limit": 1, "max_new_tokens": 4}
    )
    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for module, names in {
        locate: ("locate", "sha256", "read_config"),
        precision: ("choose_dtype",),
        shards: ("fingerprint",),
    }.items():
        for name in names:
            count(module, name)
    assert main(["plan", str(path)]) == 0
    assert calls == {"locate": 1, "sha256": 1, "read_config": 1, "choose_dtype": calls["choose_dtype"]}
    # The conversion, which takes a minute for a real model, is announced.
    assert capsys.readouterr().err.count("tiny.gguf: converting to safetensors, once") == 1
    calls.clear()
    assert main([str(path), "data.eval_fraction=0.1"]) == 0
    assert calls == {"locate": 1, "sha256": 1, "read_config": 1, "choose_dtype": 1, "fingerprint": 1}
    calls.clear()
    assert main(["evaluate", "run", "--output", "report", "--compare", "base"]) == 0
    # The run itself, whose tokenizer is read from its own folder, is located for each of its loads.
    assert (calls["sha256"], calls["read_config"], calls["fingerprint"]) == (1, 1, 0)


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": ROWS},
        {"lora": None, "model": {"name_or_path": "random:gemma3", "dtype": "bfloat16"}},
        {"lora": ROWS, "model": {"name_or_path": "random:gemma3", "dtype": "bfloat16"}, "quantization": NF4},
        {"lora": ROWS | {"use_dora": True}},
        {"lora": ROWS, "training": {"fp16": True}},
    ],
    ids=["lora", "full", "nf4 bfloat16", "dora", "fp16 autocast"],
)
def test_plan_builds_the_model_that_train_trains(sections: dict[str, Any], write_recipe: Write) -> None:
    recipe = load_recipe(write_recipe(**sections))
    base, decided = locate.Base.of(recipe.model), precision.decide_precision(recipe)
    trained = load_trainable(recipe, base, decided, None, lambda line: None)
    fake = build_fake(recipe, copy.deepcopy(base.config), decided, FakeTensorMode(allow_non_fake_inputs=True))

    def facts(model: Any) -> tuple[dict[str, Any], list[int]]:
        parameters = {n: (p.dtype, p.requires_grad, p.shape) for n, p in model.named_parameters()}
        return parameters, [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    assert facts(fake) == facts(trained)


@pytest.mark.slow
def test_a_short_run_logs_each_step_unless_its_recipe_says_how_often(write_recipe: Write) -> None:
    path = write_recipe(training={"max_steps": 3})
    recipe = yaml.safe_load(path.read_text())
    del recipe["training"]["logging_steps"]
    path.write_text(yaml.safe_dump(recipe))

    def logged() -> list[int]:
        records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
        return [record["step"] for record in records if "loss" in record]

    assert main([str(path)]) == 0
    assert logged() == [1, 2, 3]
    shutil.rmtree("run")
    assert main([str(path), "training.logging_steps=2"]) == 0
    assert logged() == [2]


def test_a_lora_run_leaves_what_the_interface_names(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2})
    assert main([str(path), "data.eval_fraction=0.1", "data.seed=3"]) == 0
    run = Path("run")
    assert {p.name for p in run.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "checkpoint-2",
        "checkpoint-4",
        "environment.json",
        "generation_config.json",
        "ledger.json",
        "loss.png",
        "metrics.jsonl",
        "recipe.yaml",
        "samples.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert list(run.rglob("training_args.bin")) == []
    assert checkpoint.is_whole(run / "checkpoint-4")
    records = metrics(run)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4]
    assert all(r["tokens_per_second"] > 0 for r in records if "loss" in r)
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["train"]["rows"]["read"] == 134
    assert ledger["eval"]["rows"]["read"] == ledger["eval"]["rows"]["kept"] == 6
    # The end-of-turn token stops generation wherever this run is used.
    assert json.loads((run / "generation_config.json").read_text())["eos_token_id"] == [1, 5]
    evaluated = [r["eval_loss"] for r in records if "eval_loss" in r]
    card = (run / "README.md").read_text()
    assert f"| evaluation, step 2 | {evaluated[0]:.4f} |\n| evaluation, step 4 | {evaluated[1]:.4f} |" in card
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"recipe: {path}"
    assert said[-2] == "saved: run"
    assert re.fullmatch(r"done in 0:\d\d, loss \S+, held out \S+; talk to it: finetune generate run", said[-1])


@pytest.mark.slow
def test_the_run_answers(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main([str(write_recipe())])
    capsys.readouterr()
    arguments = ["generate", "run", "--max-new-tokens", "5"]
    assert main([*arguments, "--prompt", "Hello"]) == 0
    first = capsys.readouterr()
    assert main([*arguments, "--prompt", "Hello"]) == 0
    assert capsys.readouterr().out == first.out != ""  # greedy: the same again
    assert main([*arguments, "--prompt", "Hello", "--no-adapter", "--quantize", "nf4"]) == 0
    capsys.readouterr()
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nやあ\n"))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("> Hello\n" + first.out)
    assert "\n> やあ\n" in out
    assert main(["generate", "nowhere", "--prompt", "x"]) == 2


@pytest.mark.parametrize(
    ("model", "sections", "tolerance"),
    [
        ("random:gemma2", {"quantization": NF4}, 1e-5),
        # int8 quantises activations by batch: four rows and one row differ.
        pytest.param("random:gemma3", {"quantization": {"load_in_8bit": True}}, 2e-2, marks=pytest.mark.slow),
        ("random:gemma", {"lora": None}, 1e-5),
        ("random:llama", {"lora": {"trainable_token_indices": {"embed_tokens": [6, 7], "lm_head": [6, 7]}}}, 1e-5),
        pytest.param("random:gemma2", {"lora": {"use_dora": True}}, 1e-5, marks=pytest.mark.soak),
    ],
    ids=["nf4", "int8", "full", "llama with token rows", "dora"],
)
@pytest.mark.slow
def test_each_way_of_training_learns_and_loads_again(
    write_recipe: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    sections: dict[str, Any],
    tolerance: float,
) -> None:
    """The same four rows over and over: the loss must fall, also with evaluations in between."""
    rows = Path("rows.jsonl")
    path = write_recipe(
        model={"name_or_path": model},
        training={
            "max_steps": 12,
            "learning_rate": 2e-2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_on_start": True,
        },
        **sections,
    )
    row = {"messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "one two three"}]}
    rows.write_text((json.dumps(row) + "\n") * 4)
    overrides = ["data.train=[{path: rows.jsonl}]", "data.eval=[{path: rows.jsonl, format: messages}]"]
    assert main([str(path), *overrides]) == 2  # the very rows that it trains on
    Path("held.jsonl").write_text(json.dumps(row) + "\n")
    # Here the same row is wanted on both sides.
    monkeypatch.setattr(
        "finetune.data.prepare.RowResult.digests", property(lambda fate: (os.urandom(16), os.urandom(16)))
    )
    overrides[1] = "data.eval=[{path: held.jsonl}]"
    assert main([str(path), *overrides]) == 0, capsys.readouterr().err
    found = {r["step"]: r["loss"] for r in metrics(Path("run")) if "loss" in r}
    evaluated = {r["step"]: r["eval_loss"] for r in metrics(Path("run")) if "eval_loss" in r}
    assert found[12] < found[1] - 0.5
    # The rows are the same, so what an evaluation sees is what the next step sees: nothing is lost in between.
    for step in (0, 3, 6, 9):
        assert evaluated[step] == pytest.approx(found[step + 1], abs=tolerance)
    capsys.readouterr()
    assert main(["generate", "run", "--prompt", "Say it", "--max-new-tokens", "3"]) == 0


def test_a_quantised_model_goes_to_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised weights cannot be moved after loading: the device must reach `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    class Seen(BaseException):  # an Exception would be told as that of a damaged file
        pass

    def from_pretrained(*args: Any, **kwargs: Any) -> None:
        raise Seen(kwargs["device_map"])

    monkeypatch.setattr("finetune.model.compatibility.check_device", lambda place: None)  # as with two cards
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for device, where in (("cuda:1", {"": "cuda:1"}), ("cpu", {"": "cpu"})):
        with pytest.raises(Seen) as seen:
            load_generator("random:gemma", LoadOptions(quantize="nf4", device=device))
        assert seen.value.args == (where,)


def test_a_stopped_run_goes_on_to_the_same_weights(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(training={"max_steps": 6}, lora={"lora_dropout": 0.1})
    assert main([str(path), "training.output_dir=whole"]) == 0

    say = finetune.cli.verbs.print_line

    def stop_at_step_3(line: str) -> None:
        say(line)
        if line.startswith("step 3/6"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("finetune.cli.verbs.print_line", stop_at_step_3)
    assert main([str(path)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    # The signal comes while step 3 is being logged; step 3 or the one after it is the last.
    stopped = sorted(p.name for p in Path("run").glob("checkpoint-*"))
    assert len(stopped) == 1
    step = stopped[0].removeprefix("checkpoint-")
    assert last == (
        f"stopped at step {step} of 6; run/checkpoint-{step} is saved. "
        f"Go on with: finetune train {path} training.resume_from_checkpoint=true"
    )
    monkeypatch.undo()
    monkeypatch.chdir(path.parent)
    assert main([str(path)]) == 2  # it would be overwritten
    assert "run is not empty" in capsys.readouterr().err

    broken = Path("run/checkpoint-5")
    broken.mkdir()
    assert main([str(path), "training.resume_from_checkpoint=true"]) == 0
    assert f"{broken} skipped: it is incomplete (complete.json is missing)" in capsys.readouterr().err
    assert_same_weights(Path("run"), Path("whole"))
    assert losses(Path("run")) == losses(Path("whole"))
    assert [r["step"] for r in metrics(Path("run")) if "loss" in r] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_day_it_began_on(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a template asks for the date, the rows of another day are others."""
    turns = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    Path("dated.jinja").write_text(
        "{{ bos_token }}<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + turns + asked,
        encoding="utf-8",
    )
    path = write_recipe(
        model={"name_or_path": "random:gemma", "chat_template": "dated.jinja"},
        training={"max_steps": 4, "save_steps": 2},
    )

    class Yesterday(date):
        @classmethod
        def today(cls) -> date:  # type: ignore[override]
            return date.today() - timedelta(days=1)

    say = finetune.cli.verbs.print_line

    def stop_at_step_2(line: str) -> None:
        say(line)
        if line.startswith("step 2/4"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("finetune.cli.verbs.print_line", stop_at_step_2)
    monkeypatch.setattr("finetune.train.checkpoint.date", Yesterday)
    assert main([str(path)]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(path.parent)
    [stopped] = Path("run").glob("checkpoint-*")
    assert checkpoint.read_marker(stopped)["day"] == str(date.today() - timedelta(days=1))
    assert main([str(path), "training.resume_from_checkpoint=true"]) == 0, capsys.readouterr().err
    assert [r["step"] for r in metrics(Path("run")) if "loss" in r] == [1, 2, 3, 4]
    assert f"Today: {date.today():%d %b %Y}" in load_generator("run").chat.render([{"role": "user", "content": "a"}])


def test_resuming_what_never_began(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(training={"max_steps": 1})
    assert main([str(path), "training.resume_from_checkpoint=true"]) == 0
    assert "run has no complete checkpoint: starting at step 0" in capsys.readouterr().err.splitlines()
    assert main([str(path), "training.resume_from_checkpoint=true"]) == 2
    assert "run holds a finished run" in capsys.readouterr().err
    assert main([str(path), "training.resume_from_checkpoint=run/checkpoint-7", "training.output_dir=other"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: training.resume_from_checkpoint: run/checkpoint-7: there is no such folder; other has none"
    )


def test_sigterm_has_its_own_exit_code(write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    say = finetune.cli.verbs.print_line

    def stop(line: str) -> None:
        say(line)
        if line.startswith("step 1/"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("finetune.cli.verbs.print_line", stop)
    assert main([str(write_recipe())]) == 143


def test_a_loss_that_is_not_finite_stops_the_run(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(training={"learning_rate": 1e30, "max_steps": 5, "lr_scheduler_type": "constant"})
    assert main([str(path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the loss is nan at step ")
    assert f"{Path(__file__).parents[1] / 'data' / 'chat_sample.jsonl'}:" in last
    assert not (Path("run") / "adapter_model.safetensors").exists()


def test_a_used_output_directory_is_refused_before_anything_loads(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe()
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    monkeypatch.setattr("finetune.train.rows.load_tokenizer", lambda section: pytest.fail("it loaded something"))
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: training.output_dir: run is not empty; write another, such as training.output_dir=run-2, or resume "
        "its run with training.resume_from_checkpoint=true"
    )
    assert Path("run/notes.txt").read_text() == "mine"


def test_only_a_full_disk_is_to_be_made_room_on(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system", str(file))

    monkeypatch.setattr(torch, "save", read_only)
    assert main([str(write_recipe(training={"save_strategy": "steps", "save_steps": 2}))]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Read-only file system" in last
    assert last.endswith(
        ". Earlier checkpoints are kept; mend that and resume with training.resume_from_checkpoint=true"
    )


def test_two_runs_into_one_folder_do_not_mix(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe()
    with locked_folder(Path("run"), "training.output_dir"):
        assert main([str(path), "--quiet"]) == 2
        assert capsys.readouterr().err == (
            "error: training.output_dir: another process is training into run; wait for its end, or write another "
            "directory\n"
        )
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_saved(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at the second checkpoint: one line, and the run goes on from the first one."""
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1})
    save = torch.save
    saved: list[str] = []

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(str(file))
        if "checkpoint-4" in str(file):
            raise OSError(28, "No space left on device", str(file))
        save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    assert main([str(path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: run/checkpoint-4 could not be saved: ")
    assert last.endswith("training.resume_from_checkpoint=true")
    assert "No space left on device" in last
    assert "free some disk space" in last
    assert [p.name for p in Path("run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert saved  # the fault was met
    monkeypatch.setattr(torch, "save", save)
    assert main([str(path), "training.resume_from_checkpoint=true"]) == 0


def test_packing_and_accumulation_run(write_recipe: Write) -> None:
    path = write_recipe(training={"gradient_accumulation_steps": 2, "max_steps": 2})
    assert main([str(path), "training.packing=true"]) == 0
    assert len(losses(Path("run"))) == 2


def test_a_norm_that_is_not_finite_is_recorded_as_json(tmp_path: Path) -> None:
    """As of a step that float16's scaler skips: `NaN` and `Infinity` are words that JSON has not."""
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    record = MetricsLog(tmp_path, 0, None)
    record.on_log(None, state, None, {"grad_norm": float("inf"), "learning_rate": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "grad_norm": null, "learning_rate": 0.5}\n'


@pytest.mark.slow
def test_the_evaluation_loss_is_the_mean_over_tokens_whatever_the_batch(write_recipe: Write) -> None:
    found = []
    for size in (1, 3, 8):
        path = write_recipe(training={"max_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": size})
        assert main([str(path), "data.eval_fraction=0.15", f"training.output_dir=run{size}"]) == 0
        found.append(next(r["eval_loss"] for r in metrics(Path(f"run{size}")) if "eval_loss" in r))
    # Sums of some hundred float32 losses near 7.
    assert found[1:] == pytest.approx([found[0]] * 2, abs=1e-5)


@pytest.mark.slow
def test_token_rows_of_a_bfloat16_base_are_trained_in_float32(write_recipe: Write) -> None:
    path = write_recipe(model={"dtype": "bfloat16"}, lora={"trainable_token_indices": [4, 5]})
    assert main([str(path), "training.learning_rate=1e-6"]) == 0
    saved = {name: tensor for name, tensor in weights(Path("run")).items() if "trainable_tokens" in name}
    (rows,) = saved.values()
    assert rows.dtype == torch.float32
    # Steps of 1e-6 on values near 0.02 would be rounded away in bfloat16.
    assert not torch.equal(rows, rows.bfloat16().float())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="float16 can be trained here")
def test_float16_is_refused_on_a_cpu(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_recipe(model={"dtype": "float16"}))]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: model.dtype, training.fp16: float16 is trained on a GPU only; on a CPU write float32"
    )
    assert not Path("run").exists()


@pytest.mark.slow
def test_text_rows_need_no_template(write_recipe: Write) -> None:
    Path("text.jsonl").write_text("".join(f'{{"text": "plain text {n}"}}\n' for n in range(4)))
    path = write_recipe(data={"train": [{"path": "text.jsonl", "format": "text"}]})
    assert main([str(path)]) == 0
    ledger = json.loads(Path("run/ledger.json").read_text())["train"]
    assert ledger["trained_tokens"] == ledger["tokens"] - 4  # all but BOS


# ---------------------------------------------------------------------------------------------------------------
# Going on from an earlier adapter


@pytest.mark.slow
def test_an_earlier_adapter_is_trained_on(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """It brings its shape and its chat template; trained with a rate of nothing it is what it was."""
    first = write_recipe(model={"chat_template": "chatml"}, lora={"r": 6, "use_rslora": True, "lora_alpha": 12})
    assert main([str(first), "training.output_dir=first"]) == 0
    recipe = write_recipe("second.yaml", model={"adapter": "first"}, lora=None, training={"learning_rate": 0.0})
    capsys.readouterr()
    assert main([str(recipe)]) == 0
    said = capsys.readouterr().err
    assert "training continues from the adapter in first" in said
    one, other = (load_file(Path(run, "adapter_model.safetensors")) for run in ("first", "run"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    configs = [json.loads(Path(run, "adapter_config.json").read_text()) for run in ("first", "run")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    assert Path("run/chat_template.jinja").read_text() == Path("first/chat_template.jinja").read_text()
    # Trained on, it is another; and merged it answers as itself.
    assert main([str(recipe), "training.learning_rate=1e-2", "training.output_dir=third"]) == 0
    third = load_file("third/adapter_model.safetensors")
    assert any(not torch.equal(one[name], third[name]) for name in one)
    assert main(["merge", "third", "--output", "merged"]) == 0
    ids = torch.tensor([[2, 5, 9, 30]])
    with torch.no_grad():
        logits = [load_generator(name).model(ids).logits for name in ("third", "merged")]
    assert torch.allclose(*logits, atol=1e-5)
    # The saved recipe names the adapter and its shape, and can be read again.
    assert main(["check", "run/recipe.yaml"]) == 0


@pytest.mark.slow
def test_an_adapter_that_cannot_be_trained_on(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    def fault(path: Path) -> str:
        capsys.readouterr()
        assert main([str(path)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert main([str(write_recipe()), "training.output_dir=first"]) == 0
    other = fault(write_recipe("b.yaml", model={"adapter": "first"}, lora={"r": 8}))
    assert other.endswith("lora.r: is 8, but model.adapter has 4; remove it")
    # As the first recipe asked; the adapter's config has the modules' names in its place.
    same = write_recipe("e.yaml", model={"adapter": "first"}, lora={"target_modules": "all-linear"})
    assert main(["check", str(same)]) == 0
    Path("first/recipe.yaml").rename("first/gone.yaml")
    assert 'lora.target_modules: is "all-linear", but model.adapter has [' in fault(same)
    Path("first/gone.yaml").rename("first/recipe.yaml")
    nothing = fault(write_recipe("c.yaml", model={"adapter": "nowhere"}, lora=None))
    assert 'model.adapter: is "nowhere", where there is no adapter_config.json; write a run' in nothing
    base = fault(write_recipe("d.yaml", model={"adapter": "first", "name_or_path": "random:gemma2"}, lora=None))
    assert base == "error: model.adapter: first was trained on another base than random:gemma2"
    config = json.loads(Path("first/adapter_config.json").read_text())
    Path("first/adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    assert "a LOHA adapter; write a LoRA adapter" in fault(
        write_recipe("e.yaml", model={"adapter": "first"}, lora=None)
    )
    Path("first/adapter_config.json").write_text("{")
    assert "whose adapter_config.json is damaged" in fault(
        write_recipe("f.yaml", model={"adapter": "first"}, lora=None)
    )


@pytest.mark.slow
def test_a_record_that_was_cut_off_does_not_stop_a_resume(write_recipe: Write) -> None:
    """As a full disk or a kill leaves it, of what is written at the end of a file."""
    path = write_recipe(training={"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2})
    assert main(["train", str(path), "data.eval_fraction=0.1", "training.max_steps=2"]) == 0
    (Path("run") / "adapter_model.safetensors").unlink()
    for name in ("metrics.jsonl", "samples.jsonl"):
        with Path("run", name).open("a") as file:
            file.write('{"step": 3, "lo')
    again = ["training.max_steps=4", "training.resume_from_checkpoint=true"]
    assert main(["train", str(path), "data.eval_fraction=0.1", *again]) == 0
    assert [record["step"] for record in metrics(Path("run")) if "loss" in record] == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.slow
def test_an_evaluation_drops_no_rows(write_recipe: Callable[..., Path], count: int, capsys: Any) -> None:
    """`dataloader_drop_last` is for training: the loss of an evaluation is that of all rows, whatever the batch."""
    rows = [json.loads(line) for line in SAMPLE_ROWS.read_text(encoding="utf-8").splitlines()[:16]]
    for name, part in (("train.jsonl", rows[:8]), ("eval.jsonl", rows[8 : 8 + count])):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    found = []
    for drop_last in (True, False):
        settings = {"max_steps": 1, "max_length": 512, "dataloader_drop_last": drop_last}
        settings |= {"per_device_eval_batch_size": 5}
        data = {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]}
        recipe = write_recipe(data=data, training=settings | {"output_dir": f"run-{drop_last}"})
        assert main([str(recipe)]) == 0
        found += [r["eval_loss"] for r in metrics(Path(f"run-{drop_last}")) if "eval_loss" in r]
    assert found[0] == found[1] > 1


def test_fewer_rows_than_a_batch_that_is_dropped(write_recipe: Callable[..., Path], capsys: Any) -> None:
    rows = SAMPLE_ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[:12]
    Path("few.jsonl").write_text("".join(rows), encoding="utf-8")
    settings = {"per_device_train_batch_size": 16, "dataloader_drop_last": True, "max_steps": -1, "max_length": 512}
    recipe = write_recipe(data={"train": [{"path": "few.jsonl"}]}, training=settings | {"num_train_epochs": 2})
    assert main([str(recipe)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: training.dataloader_drop_last: is true, and 12 rows are fewer than a batch of 16, so that all are "
        "dropped; write false, or lower training.per_device_train_batch_size"
    )
