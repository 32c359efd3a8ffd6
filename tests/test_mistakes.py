"""Common mistakes on the command line: one line each, which says what to write, and exit code 2."""

from pathlib import Path

import pytest

from finetune.cli.commands import main
from finetune.plan.configs import gpu_named
from finetune.system.devices import CARDS, GPUS
from finetune.system.errors import PlanError

RECIPE = "model: {name_or_path: random:gemma3}\ndata: {train: [{path: rows.jsonl}]}\n"


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("recipe.yaml").write_text(RECIPE)
    Path("tabs.yaml").write_text("model:\n\tname_or_path: a\n")
    Path("runs/chats").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("rows.jsonl", "rows.jsonl: a file of rows, not a command; write finetune init rows.jsonl"),
        (
            "train rows.jsonl",
            "rows.jsonl: a file of rows, not a recipe; write finetune init rows.jsonl, which makes one",
        ),
        (
            "check --json rows.jsonl",
            "rows.jsonl: a file of rows, not a recipe; write finetune init rows.jsonl, which makes one",
        ),
        ("check recipe", "recipe: there is no such recipe; write finetune check recipe.yaml"),
        ("eval runs/chats", "eval: there is no such command; write finetune evaluate runs/chats"),
        ("chat runs/chats", "chat: there is no such command; write finetune generate runs/chats"),
        ("infer runs/chats", "infer: there is no such command; write finetune generate runs/chats"),
        ("trian recipe.yaml", "trian: there is no such command; perhaps train"),
        ("runs/chats", "runs/chats: a folder, not a command; for a run, write finetune generate runs/chats"),
        (
            "zzz",
            "zzz: there is no such command; write one of init, convert, train, sweep, check, schema, plan, inspect, "
            "generate, merge, export, check-adapter, evaluate, serve, report, doctor, push",
        ),
        (
            "train recipe.yaml --learning_rate 1e-4",
            "--learning_rate: keys of a recipe are not flags; write training.learning_rate=1e-4",
        ),
        (
            "train recipe.yaml --learning-rate=1e-4",
            "--learning-rate=1e-4: keys of a recipe are not flags; write training.learning_rate=1e-4",
        ),
        (
            "train recipe.yaml --micro_batch_size 4",
            "--micro_batch_size: keys of a recipe are not flags; write training.per_device_train_batch_size=4",
        ),
        ("check tabs.yaml", "tabs.yaml:2: is not YAML: a tab stands where YAML takes spaces alone; write spaces"),
    ],
)
def test_one_line_says_what_to_write(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("text", "cure"),
    [("gguf", "write gguf:Q4_K_M, gguf:Q8_0, another gguf:TYPE, or gguf:all"), ("int4", "perhaps int8")],
)
def test_a_format_that_there_is_not(text: str, cure: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "runs/chats", "--output", "out", "--format", text])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: argument --format: is '{text}'; {cure}\n")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *[(name, name) for name in (*GPUS, *CARDS)],
        *[("RTX 4090", "4090"), ("NVIDIA GeForce RTX 3090", "3090"), ("rtx4080", "4080"), ("RTX_5090", "5090")],
        *[("Tesla V100", "v100"), ("V100-32GB", "v100-32"), ("RTX A6000", "a6000"), ("NVIDIA L40S", "l40s")],
        *[("A100 40GB", "a100-40"), ("a100-80gb", "a100-80"), ("B200", "b200"), ("Tesla T4", "t4")],
    ],
)
def test_cards_by_the_names_that_people_use(name: str, known: str) -> None:
    assert gpu_named(name).name == known


def test_sizes_and_unknown_cards() -> None:
    assert gpu_named("24gb").memory == 24 * 2**30
    with pytest.raises(PlanError, match=r"write one of t4, l4, a10, 4090, .*, b200, or a size in GB, such as 24"):
        gpu_named("RTX 9999x")


@pytest.mark.parametrize("verb", ["generate", "merge", "export", "evaluate", "serve", "report", "push"])
def test_a_recipe_in_the_place_of_a_run(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "recipe.yaml", "--quiet"]) == 2
    wanted = f"error: recipe.yaml: a recipe, not a run; write finetune {verb} runs/recipe --quiet\n"
    assert capsys.readouterr().err == wanted


def test_check_prints_what_is_set_and_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "recipe.yaml", "training.max_steps=3"]) == 0
    said = capsys.readouterr()
    assert said.out == (
        "recipe.yaml: ok\nmodel:\n  name_or_path: random:gemma3  # recipe.yaml:1\ndata:\n  train:\n"
        "    - path: rows.jsonl  # recipe.yaml:2\ntraining:\n  max_steps: 3  # command line\n"
        "a LoRA adapter is trained; the recipe has no section lora (lora: null trains all weights)\n"
        "training.learning_rate is not set: trl's default suits the training of all weights; for LoRA 2e-4 is usual\n"
        "next: finetune inspect recipe.yaml shows the tokens that are trained on; --all prints the defaults, too\n"
    )
    assert main(["check", "recipe.yaml", "training.learning_rate=1e-4"]) == 0
    said = capsys.readouterr().out
    assert "is not set" not in said
    assert "training.learning_rate is" not in said
    assert main(["check", "recipe.yaml", "training.learning_rate=2"]) == 0
    assert "training.learning_rate is 2: with Adam 1e-5 to 1e-3 is usual" in capsys.readouterr().out
    assert main(["check", "recipe.yaml", "training.learning_rate=2", "training.optim=sgd"]) == 0
    assert "training.learning_rate is" not in capsys.readouterr().out
    assert main(["check", "recipe.yaml", "--all"]) == 0
    assert "  seed: 42  # default\n" in capsys.readouterr().out
    Path("more.yaml").write_text("extends: recipe.yaml\nlora: null\nexport: {imatrix_data: {rows: 3}, gate: {}}\n")
    assert main(["check", "more.yaml"]) == 0
    said = capsys.readouterr()
    assert "all weights are trained (lora: null)\n" in said.out
    assert "export:\n  imatrix_data:\n    rows: 3  # more.yaml:3\n  gate: {}  # more.yaml:3\n" in said.out


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("google/gemma-3-4b-pt", "gemma3"),
        ("google/gemma-2b", "gemma"),
        ("google/gemma-4-26B-A4B", "gemma4"),
        ("meta-llama/Llama-3.1-8B", "llama3"),
        *[(name, None) for name in ("google/gemma-3-4b-it", "google/gemma-4-E2B-it", "Qwen/Qwen3-4B", "random:gemma3")],
    ],
)
def test_check_names_the_template_that_a_base_lacks(
    name: str, template: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "recipe.yaml", f"model.name_or_path={name}"]) == 0
    line = f"{name} is a base without a chat template; for conversations write model.chat_template: {template}\n"
    assert (line in capsys.readouterr().out) is (template is not None)
    assert (
        main(["check", "recipe.yaml", f"model.name_or_path={name}", "data.train=[{path: rows.jsonl, format: text}]"])
        == 0
    )
    assert "without a chat template" not in capsys.readouterr().out


def test_a_run_ends_with_its_time_its_loss_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", "training.max_steps=1", "training.logging_steps=1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "a LoRA adapter is trained; the recipe has no section lora (lora: null trains all weights)" in lines
    head, _, tail = lines[-1].partition(", loss ")
    assert head.startswith("done in 0:")
    assert tail.endswith("; talk to it: finetune generate runs/recipe")
    assert Path("runs/recipe/adapter_config.json").is_file()


def test_a_command_without_a_recipe_asks_for_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("error: the following arguments are required: RECIPE\n")
