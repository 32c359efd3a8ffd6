"""`finetune init`: the recipe that it writes, what it prints, and that the recipe trains as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli import init as init_module
from finetune.cli.commands import main
from finetune.data import hub_rows
from finetune.model import locate
from finetune.plan import run
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import DataSource
from finetune.system.devices import Hardware, gpu_of_size
from finetune.system.errors import ModelError

ROOT = Path(__file__).parents[1]
HERE = ["--model", "random:gemma3"]


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(*rows: Any, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def written(name: str = "recipe.yaml") -> Any:
    return yaml.safe_load(Path(name).read_text(encoding="utf-8"))


def test_a_csv_trains_at_the_first_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    Path("faq.csv").write_text("Question,Answer\nWhy is the sky blue?,It scatters.\nWhat is 2 + 2?,4\n")
    assert main(["init", "faq.csv", *HERE]) == 0
    said = capsys.readouterr()
    assert said.out == (
        "faq.csv: 2 rows (prompt_completion, Question as prompt, Answer as completion); English 2; 24 to 35 tokens, "
        "half of them up to 35\n"
    )
    assert said.err == (
        "reading faq.csv\nwritten: recipe.yaml; next:\n  finetune inspect recipe.yaml  # which tokens are trained on\n"
        "  finetune train recipe.yaml\n  finetune generate runs/recipe  # talk to it\n"
    )
    assert written()["data"]["train"] == [
        {"path": "faq.csv", "format": "prompt_completion", "columns": {"prompt": "Question", "completion": "Answer"}}
    ]
    assert main(["train", "recipe.yaml", "training.max_steps=1"]) == 0
    assert "data: 2 of 2 rows" in capsys.readouterr().err
    # The recipe of the day before is not overwritten.
    assert main(["init", "faq.csv", *HERE]) == 2
    assert capsys.readouterr().err == (
        "error: --output: recipe.yaml exists; write another --output, such as faq.yaml\n"
    )


def test_a_run_is_no_base(capsys: pytest.CaptureFixture[str]) -> None:
    jsonl(talk("Hi", "Hello"))
    Path("runs/faq").mkdir(parents=True)
    Path("runs/faq/adapter_config.json").write_text('{"base_model_name_or_path": "random:gemma3"}')
    assert main(["init", "rows.jsonl", "--model", "runs/faq"]) == 2
    assert capsys.readouterr().err == (
        "error: --model: runs/faq is a run; write its base, --model random:gemma3, and go on from the run with "
        "finetune train recipe.yaml model.adapter=runs/faq\n"
    )
    assert not Path("recipe.yaml").exists()
    Path("own.yaml").write_text("model: {name_or_path: runs/faq}\ndata: {train: [{path: rows.jsonl}]}\n")
    assert main(["check", "own.yaml"]) == 2
    assert "a run; write its base here, and go on from the run with model.adapter: runs/faq" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "fraction"), [(19, None), (20, 0.1)])
def test_of_a_few_rows_none_are_held_out(count: int, fraction: float | None) -> None:
    jsonl(*[talk(f"Say {n}", f"{n}") for n in range(count)])
    assert main(["init", "rows.jsonl", *HERE]) == 0
    assert load_recipe("recipe.yaml").data.eval_fraction == fraction
    assert ("none are held out" in Path("recipe.yaml").read_text()) is (fraction is None)


def test_values_by_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    japanese = talk("日本で一番高い山はどこですか。", "富士山です。")
    rows = [*[talk(f"Say {n}, please", f"You said {n}") for n in range(70)], *[japanese] * 30, {"messages": []}]
    Path("recipes").mkdir()
    jsonl(*rows)
    assert main(["init", "rows.jsonl", *HERE, "--output", "recipes/own.yaml"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rows.jsonl: 101 rows (messages); English 70, Japanese 30; 28 to 44 tokens, half of them up to 30",
        "rows that cannot be used: 1; the first is rows.jsonl:101: it has no messages",
    ]
    recipe = load_recipe("recipes/own.yaml")  # whose path is relative to itself
    assert [source.path for source in recipe.data.train] == ["rows.jsonl"]
    assert (recipe.data.eval_fraction, recipe.data.on_bad_row) == (0.1, "skip")
    assert recipe.lora
    assert (recipe.lora["r"], recipe.lora["lora_alpha"]) == (8, 8)
    wanted = {"max_length": 64, "num_train_epochs": 3, "learning_rate": 2e-4, "eval_strategy": "epoch"}
    assert wanted.items() <= recipe.training.items()
    assert "longest row has 44" in Path("recipes/own.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("row", "method", "form", "rate"),
    [
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "dpo", "preference", 5e-6),
        ({"prompt": "Why?", "completion": "So.", "label": True}, "kto", "rated", 5e-6),
        ({"text": "Once upon a time"}, "sft", "text", 2e-4),
    ],
)
def test_the_method_is_that_of_the_rows(row: dict[str, Any], method: str, form: str, rate: float) -> None:
    jsonl(row)
    assert main(["init", "rows.jsonl", *HERE]) == 0
    recipe = load_recipe("recipe.yaml")
    assert (recipe.method, recipe.data.train[0].format, recipe.training["learning_rate"]) == (method, form, rate)


@pytest.mark.parametrize(
    ("rows", "longest", "expected"),
    [
        (900, 100, {"rank": 8, "epochs": 3, "effective": 8, "batch": 4, "max_length": 128, "held_out": 0.1}),
        (9_000, 2000, {"rank": 16, "epochs": 2, "effective": 16, "batch": 2, "max_length": 2048, "held_out": 0.022}),
        (
            500_000,
            30_000,
            {"rank": 32, "epochs": 1, "effective": 32, "batch": 1, "max_length": 4096, "held_out": 0.001},
        ),
        (19, 10, {"held_out": 0.0, "max_length": 64, "steps": 9}),
    ],
)
def test_values_by_the_number_of_rows(rows: int, longest: int, expected: dict[str, Any]) -> None:
    source = init_module.DataSource(path="rows.jsonl")
    seen = init_module.SeenRows(source, "messages", "sft", rows, lengths=sorted([9] * 50 + [longest] * 50))
    settings = init_module.Settings.of(seen, "owner/model", gpu=True)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_base_that_is_converted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    find, said = locate.locate, list[str]()

    def converting(name: str, say: Callable[[str], None]) -> str:
        say("converting to safetensors, once")
        return find(name, say)

    monkeypatch.setattr(locate, "locate", converting)
    init_module.look(DataSource(path=jsonl({"prompt": "Who?", "completion": "Me."})), "random:gemma3", said.append)
    assert "converting to safetensors, once" in said


def test_a_base_without_a_template_gets_that_of_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    load = init_module.load_tokenizer

    def without_template(section: Any, base: Any = None) -> Any:
        tokenizer = load(section, base)
        tokenizer.chat_template = tokenizer.chat_template if section.chat_template else None
        return tokenizer

    monkeypatch.setattr(init_module, "load_tokenizer", without_template)
    jsonl(talk("a", "b"))
    assert main(["init", "rows.jsonl", *HERE]) == 0
    assert written()["model"] == {"name_or_path": "random:gemma3", "chat_template": "gemma"}


def test_on_a_gpu_the_base_is_quantised_where_it_must_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_tokenizer(section: Any, base: Any) -> Any:
        raise ModelError("the Hub cannot be reached")

    monkeypatch.setattr(init_module, "load_tokenizer", no_tokenizer)
    jsonl(*[talk("a" * 300, "b" * 300)] * 60)
    sizes: dict[str, Any] = {}

    def gpu() -> Hardware:
        return gpu_of_size("a card", sizes["gib"], (8, 9))

    def fits(recipe: Recipe, hardware: Hardware) -> bool:
        return hardware.memory > (5 if recipe.quantization else 10) * 2**30

    monkeypatch.setattr(init_module, "this_machine", gpu)
    monkeypatch.setattr(run, "fits", fits)
    for name, gib in (("large", 40), ("small", 9), ("tiny", 4)):
        sizes["gib"] = gib
        assert main(["init", "rows.jsonl", "--output", f"{name}.yaml"]) == 0
    said = capsys.readouterr().err
    assert "the tokenizer of google/gemma-4-E2B-it is not at hand" in said
    assert said.count("does not fit this GPU; finetune plan tiny.yaml says what would") == 1
    assert written("large.yaml").keys() == {"model", "lora", "data", "training"}
    assert written("large.yaml")["training"]["max_length"] == 256  # from bytes
    assert written("small.yaml")["quantization"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    assert written("tiny.yaml")["training"]["per_device_train_batch_size"] == 1
    assert load_recipe("small.yaml").model.name_or_path == "google/gemma-4-E2B-it"


def test_a_dataset_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_list([talk("a", "b")] * 2)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["default", "other"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config: ["test_sft", "train_sft"])
    monkeypatch.setattr(hub_rows, "_load_hub", lambda path, config, split, *rest: (rows, "commit"))
    assert main(["init", "owner/rows", *HERE]) == 0
    assert written()["data"]["train"] == [
        {"path": "owner/rows", "config": "default", "split": "train_sft", "format": "messages"}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows.jsonl: the file is empty"),
        (b'{"messages": []}\n', "rows.jsonl:1: it has no messages; no row can be used"),
        (
            b'{"quote": "a", "author": "b"}\n',
            "rows.jsonl: its format is not known from its columns (quote, author); write in the source, for example, "
            "columns: {prompt: quote, completion: author}; the known formats are messages, sharegpt, alpaca, "
            "prompt_completion, text",
        ),
    ],
)
def test_rows_that_cannot_be_used(content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_bytes(content)
    assert main(["init", "rows.jsonl", "--quiet", *HERE]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not Path("recipe.yaml").exists()
