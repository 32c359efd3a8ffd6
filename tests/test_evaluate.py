"""Evaluation: loss by group of rows, answers in batches, prompts, reports, errors."""

import copy
import html
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from judge_server import Answer, Request, error, grades, says, serve
from markdown_it import MarkdownIt

from finetune.cli.commands import main
from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.samples import LabelledRow
from finetune.evaluate import report as report_module
from finetune.evaluate.answers import answer_prompts, repetition
from finetune.evaluate.perplexity import LossSum, row_losses, score
from finetune.evaluate.prompts import Prompt, read_prompts, read_reference, reference_answers, spread_evenly
from finetune.evaluate.trained_rows import trained_sources
from finetune.model.generate import Generator, Sampling
from finetune.model.load import load_tokenizer
from finetune.model.load_generator import LoadOptions, load_generator
from finetune.model.locate import locate
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import ModelSection
from finetune.system.errors import EvaluateError
from finetune.system.files import locked_folder

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return load_generator("random:gemma3", LoadOptions(device="cpu"))


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


# ---------------------------------------------------------------------------------------------------------------
# Loss


def test_a_tally_is_what_the_logits_say(generator: Generator) -> None:
    rows = [LabelledRow([2, 9, 8, 7, 30], [IGNORE, IGNORE, 8, 7, 30]), LabelledRow([2, 40, 41], [IGNORE, 40, 41])]
    with torch.no_grad():
        logs = [generator.model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1) for row in rows]
    wanted = [(0, [(1, 8), (2, 7), (3, 30)]), (1, [(0, 40), (1, 41)])]
    for part, (i, places) in zip(row_losses(generator.model, rows), wanted, strict=True):
        assert part.tokens == len(places)
        assert part.nats == pytest.approx(-sum(float(logs[i][at, token]) for at, token in places), rel=1e-5)
        assert part.correct == sum(int(logs[i][at].argmax()) == token for at, token in places)
    whole = sum(row_losses(generator.model, rows), LossSum())
    assert whole.perplexity == pytest.approx(score(generator.model, rows).perplexity, rel=1e-6)


def test_the_likeliest_token_is_right(generator: Generator) -> None:
    ids = [2, 9, 8]
    with torch.no_grad():
        best = int(generator.model(torch.tensor([ids])).logits[0, -1].argmax())
    [part] = row_losses(generator.model, [LabelledRow([*ids, best], [IGNORE] * 3 + [best])])
    assert (part.correct, part.accuracy) == (1, 1.0)
    other = (best + 1) % 1024
    [part] = row_losses(generator.model, [LabelledRow([*ids, other], [IGNORE] * 3 + [other])])
    assert (part.correct, part.accuracy) == (0, 0.0)


def test_a_tally_of_nothing_and_of_too_much() -> None:
    assert math.isnan(LossSum().perplexity)
    assert math.isnan(LossSum().accuracy)
    assert LossSum(1, 10_000.0).perplexity == math.inf


# ---------------------------------------------------------------------------------------------------------------
# Answers


def test_answers_in_a_batch_are_those_given_one_by_one(generator: Generator) -> None:
    """And in the order of the prompts, though the longest goes first."""
    texts = ["Hi", "What is a fox, and what does it eat in winter?", "日本で一番高い山は？", "Yes", "Why?"]
    prompts = [Prompt(str(i), user(text)) for i, text in enumerate(texts)]
    counted: list[int] = []
    found = answer_prompts(generator, prompts, 12, counted.append)
    assert sum(counted) == len(found) == 5
    assert [a.prompt.name for a in found] == ["0", "1", "2", "3", "4"]
    for text, one in zip(texts, found, strict=True):
        alone = generator.answer_ids(list(user(text)), Sampling(12))
        assert one.tokens == len(alone)
        assert one.text == generator.text(alone).strip()


def test_the_next_question_follows_the_models_own_answer(generator: Generator) -> None:
    prompts = [Prompt("a", user("One?"), ("Two?", "Three?")), Prompt("b", user("Only?"))]
    found = answer_prompts(generator, prompts, 6)
    assert [(a.prompt.name, len(a.messages)) for a in found] == [("a", 1), ("a", 3), ("a", 5), ("b", 1)]
    last = found[2].messages
    assert [m["content"] for m in last] == ["One?", found[0].text, "Two?", found[1].text, "Three?"]
    assert [m["role"] for m in last] == ["user", "assistant", "user", "assistant", "user"]


def test_functions_and_their_calls_are_part_of_the_prompt(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of what people and the judge read; a call has no language."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Nara"}}}
    asked = [
        *user("How warm is Nara?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "12"},
    ]
    row = {"messages": [*asked, {"role": "assistant", "content": "12 degrees."}], "tools": tools}
    [prompt] = read_prompts(lines(tmp_path / "p.jsonl", row))
    assert [m["role"] for m in prompt.messages] == ["user", "assistant", "tool"]
    tokenizer = copy.deepcopy(generator.chat.tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}"
        "{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.function.arguments.place }}){% endfor %};{% endfor %}"
    )
    calling = Generator(generator.model, Chat(tokenizer), generator.stop_ids)
    shown = tokenizer.decode(calling.prompt_ids(prompt.messages, prompt.variables, prompt.tools))
    assert shown == "<bos>[weather]How warm is Nara?;(Nara);12;"
    fed: list[list[int]] = []
    answers = Generator.answers
    monkeypatch.setattr(Generator, "answers", lambda self, ids, limit: fed.extend(ids) or answers(self, ids, limit))
    [answer] = answer_prompts(calling, [prompt], 2)
    assert [tokenizer.decode(ids) for ids in fed] == [shown]
    call_text = '{"name": "weather", "arguments": {"place": "Nara"}}'
    assert [(m["role"], m["content"]) for m in answer.asked] == [
        ("tools", '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'),
        ("user", "How warm is Nara?"),
        ("assistant", f"[{call_text}]"),
        ("tool", "12"),
    ]
    assert answer.question == "How warm is Nara?"
    assert (answer.calls, replace(answer, text="call:weather{}").calls) == ([], ["weather"])


def test_an_answer_that_ends_says_so(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = generator.stop_ids[-1]
    said = generator.chat.tokenizer("fine", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(Generator, "answers", lambda self, ids, limit: [[*said, stop], said])
    ended, cut = answer_prompts(generator, [Prompt("0", user("Hello there")), Prompt("1", user("Hi"))], 5)
    assert (ended.stopped, ended.text, ended.tokens) == (True, "fine", len(said) + 1)
    assert (cut.stopped, cut.text, cut.tokens) == (False, "fine", len(said))


def test_where_memory_runs_out_fewer_are_answered_at_once(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the longest come first, so that it shows at once."""
    sizes = []
    lengths = []

    def answers(self: Generator, ids: list[list[int]], limit: int) -> list[list[int]]:
        sizes.append(len(ids))
        lengths.append([len(one) for one in ids])
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[7] for _ in ids]

    monkeypatch.setattr(Generator, "answers", answers)
    prompts = [Prompt(str(i), user("Hi " * (i % 4))) for i in range(1, 11)]
    assert len(answer_prompts(generator, prompts, 5)) == 10
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    assert lengths[0] == sorted(lengths[0], reverse=True) == [n for some in lengths[2:] for n in some]
    assert lengths[0][0] > lengths[0][-1]


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([1] * 13, 0.9), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repetition(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share)


# ---------------------------------------------------------------------------------------------------------------
# Prompts and references


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_prompts_are_read_in_each_form(tmp_path: Path) -> None:
    turns = [*user("a"), {"role": "assistant", "content": "b"}, *user("c"), {"role": "assistant", "content": "d"}]
    path = lines(
        tmp_path / "p.jsonl",
        {"prompt": "Hi"},
        {"question_id": 7, "turns": ["One?", "Two?"]},
        {"id": "x", "messages": turns},
        {"messages": [{"role": "system", "content": "Be brief"}, *user("c")]},
    )
    assert read_prompts(path) == [
        Prompt(f"{path}:1", user("Hi")),
        Prompt("7", user("One?"), ("Two?",)),
        Prompt("x", tuple(turns[:3])),
        Prompt(f"{path}:4", ({"role": "system", "content": "Be brief"}, *user("c"))),
    ]
    assert len(read_prompts(path, 2)) == 2


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": ""},
        {"prompt": 5},
        {"turns": []},
        {"turns": ["a", 1]},
        {"messages": []},
        {"text": "x"},
        {"messages": [{"role": "assistant", "content": "x"}]},
    ],
)
def test_a_row_that_asks_nothing_is_named(tmp_path: Path, row: Any) -> None:
    path = lines(tmp_path / "p.jsonl", {"prompt": "Hi"}, row)
    with pytest.raises(EvaluateError) as error:
        read_prompts(path)
    assert str(error.value) == (
        f"evaluate.prompts: {path}:2: it has no prompt; write prompt (text), turns (a list of texts) or messages"
    )


def test_damaged_and_empty_files_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": \n')
    with pytest.raises(EvaluateError, match=r"evaluate\.prompts: .*p\.jsonl:1: "):
        read_prompts(str(path))
    path.write_text("\n")
    with pytest.raises(EvaluateError, match="holds no prompt"):
        read_prompts(str(path))


def test_a_reference_has_answers_by_prompt(tmp_path: Path) -> None:
    path = lines(tmp_path / "r.jsonl", {"id": 1, "answer": "a"}, {"question_id": "q", "answers": ["b", "c"]})
    assert read_reference(path) == {"1": ["a"], "q": ["b", "c"]}
    for row in ({"id": 2}, {"id": 2, "answers": "not a list"}):
        with pytest.raises(EvaluateError, match="2: it has no answer; write answer"):
            read_reference(lines(tmp_path / "r.jsonl", {"id": 1, "answer": "a"}, row))
    with pytest.raises(EvaluateError, match="2: 1 is answered above already; remove one"):
        read_reference(lines(tmp_path / "r.jsonl", {"id": 1, "answer": "a"}, {"id": "1", "answer": "b"}))


def test_a_reference_answers_each_prompt_under_its_name(tmp_path: Path) -> None:
    one, other = Prompt("a", user("One?"), ("Two?",)), Prompt("b", user("Three?"))
    path = lines(tmp_path / "r.jsonl", {"id": "b", "answer": "3"}, {"id": "a", "answers": ["1", "2"]})
    assert reference_answers(path, [one, other]) == ["1", "2", "3"]
    with pytest.raises(EvaluateError, match=r"evaluate\.prompts: 2 prompts are named b; give each its own id"):
        reference_answers(path, [other, other])


# ---------------------------------------------------------------------------------------------------------------
# Through the command line


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a folder with a run is kept once it is made."""
    return tmp_path_factory.mktemp("evaluate") / "kept"


@pytest.fixture
def run(write_recipe: Write, kept: Path) -> Path:
    """A run that held rows out of two sources."""
    if kept.exists():
        shutil.copytree(kept, Path.cwd(), dirs_exist_ok=True)
        return Path("run")
    one = {"role": "assistant", "content": "これは日本語の答えです。"}
    lines(Path("ja.jsonl"), *({"messages": [*user(f"{n}は？"), one]} for n in range(6)))
    one = {"role": "assistant", "content": "A short answer in English."}
    lines(Path("en.jsonl"), *({"messages": [*user(f"What is {n}?"), one]} for n in range(6)))
    path = write_recipe(
        data={"train": [{"path": "en.jsonl"}], "eval": [{"path": "ja.jsonl"}, {"path": "en2.jsonl"}]},
        evaluate={"max_new_tokens": 8},
    )
    lines(Path("en2.jsonl"), *({"messages": [*user(f"Who is {n}?"), one]} for n in range(3)))
    assert main([str(path), "--quiet"]) == 0
    shutil.copytree(Path.cwd(), kept)
    return Path("run")


def test_a_run_beside_its_base(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--compare", "base", "--json"]) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert report == json.loads((run / "evaluation" / "report.json").read_text())
    *said, done = out.err.splitlines()
    assert said == ["run: loading", "run: loading", "written: run/evaluation"]
    assert re.fullmatch(r"done in 0:\d\d; answers side by side: run/evaluation/answers\.html", done)
    before, after = report["models"]
    assert [before["name"], after["name"]] == ["base of run", "run"]
    for model in (before, after):
        loss = model["loss"]
        assert loss["source"].keys() == {"ja.jsonl", "en2.jsonl"}
        assert loss["language"].keys() == {"Japanese", "English"}
        assert sum(part["tokens"] for part in loss["source"].values()) == loss["all"]["all"]["tokens"]
    # It was trained on English rows of this kind, and predicts them better than before.
    assert after["loss"]["source"]["en2.jsonl"]["perplexity"] < before["loss"]["source"]["en2.jsonl"]["perplexity"]
    assert after["answers"]["count"] == len(report["answers"]) == 9
    assert [item["prompt"] for item in report["answers"]] == [f"ja.jsonl:{n}" for n in range(1, 7)] + [
        f"en2.jsonl:{n}" for n in (1, 2, 3)
    ]
    # The reported answer is the one that the adapter gives outside of a batch.
    alone = load_generator("run").answer_ids(list(user("0は？")), Sampling(8))
    assert report["answers"][0]["models"][1]["tokens"] == len(alone)
    page = (run / "evaluation" / "answers.html").read_text()
    assert page.count("<article>") == 9
    text = (run / "evaluation" / "report.md").read_text()
    assert "| source ja.jsonl |" in text
    assert "| in the language of the prompt |" in text


def test_one_evaluation_at_a_time_writes_into_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with locked_folder(Path("run/evaluation"), "--output", "evaluating"):
        assert main(["evaluate", "run", "--limit", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: --output: another process is evaluating into run/evaluation; wait for its end, or write another "
        "directory\n"
    )
    assert not Path("run/evaluation").exists()


def test_prompts_a_limit_and_an_output_of_ones_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(Path("p.jsonl"), *({"prompt": f"Question {n}?"} for n in range(5)))
    saved = (
        Path("recipe.yaml")
        .read_text()
        .replace("max_new_tokens: 8", f"max_new_tokens: 3\n  prompts: {path}\n  limit: 4")
    )
    Path("other.yaml").write_text(saved)
    capsys.readouterr()
    arguments = ["evaluate", "random:gemma3", "--recipe", "other.yaml", "--limit", "2", "--output", "out", "--json"]
    assert main(arguments) == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert "earlier evaluation" not in out.err
    assert [item["prompt"] for item in report["answers"]] == ["p.jsonl:1", "p.jsonl:2"]
    assert report["models"][0]["answers"]["tokens"] <= 3
    assert {path.name for path in Path("out").iterdir()} == {"report.json", "report.md", "answers.html"}
    assert main([*(a for a in arguments if a not in ("--limit", "2")), "evaluate.limit=3"]) == 0
    out = capsys.readouterr()
    assert len(json.loads(out.out)["answers"]) == 3
    assert "out: the earlier evaluation there will be replaced (--output DIR keeps both)" in out.err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["random:gemma3"], "random:gemma3 has no recipe.yaml; write --recipe with one that holds rows out or names"),
        (
            ["random:gemma3", "--compare", "base", "--recipe", "recipe.yaml"],
            "--compare base: random:gemma3 is not a run; write the name of a model",
        ),
        (["random:gemma3", "--recipe", "recipe.yaml"], "recipe.yaml: it holds no rows out and names no prompts; write"),
        (["nowhere", "--recipe", "recipe.yaml"], "model.name_or_path: nowhere"),
    ],
)
def test_what_cannot_be_evaluated(
    write_recipe: Write, capsys: pytest.CaptureFixture[str], arguments: list[str], fault: str
) -> None:
    write_recipe()
    assert main(["evaluate", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {fault}")
    assert not Path("evaluation").exists()


@pytest.fixture
def bare(write_recipe: Write) -> Path:
    """A base without a chat template."""
    shutil.copytree(locate("random:gemma3"), "bare")
    Path("bare", "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads(Path("bare", "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    Path("bare", "tokenizer_config.json").write_text(json.dumps(config))
    return Path("bare")


@pytest.mark.parametrize("lora", [{"r": 2}, None], ids=["adapter", "full"])
@pytest.mark.slow
def test_a_recipes_base_is_asked_as_the_recipe_loads_it(
    bare: Path, lora: Any, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its template, by its own name as by the word base, whether an adapter was trained or all of it."""
    one = {"role": "assistant", "content": "A short answer in English."}
    rows = lines(Path("e.jsonl"), *({"messages": [*user(f"Who is {n}?"), one]} for n in range(3)))
    path = write_recipe(
        model={"name_or_path": "bare", "chat_template": "chatml"},
        lora=lora,
        data={"train": [{"path": lines(Path("t.jsonl"), {"messages": [*user("Hi"), one]})}], "eval": [{"path": rows}]},
        evaluate={"max_new_tokens": 4},
    )
    assert main([str(path), "--quiet"]) == 0
    found = []
    for arguments in (["bare", "--recipe", str(path)], ["run", "--compare", "base"], ["run", "--compare", "bare"]):
        capsys.readouterr()
        assert main(["evaluate", *arguments, "--json"]) == 0, capsys.readouterr().err
        report = json.loads(capsys.readouterr().out)
        assert report["same_tokens"] is True
        found.append(report["models"][0])
    assert [one["name"] for one in found] == ["bare", "base of run", "bare"]
    assert found[0]["loss"] == found[1]["loss"] == found[2]["loss"]
    assert found[0]["answers"] == found[1]["answers"] == found[2]["answers"]
    # The loss computed by hand, with the template's tokens.
    chat = Chat(load_tokenizer(ModelSection(name_or_path="bare", chat_template="chatml")))
    model, nats = load_generator("bare").model, []
    for n in range(3):
        row = chat.encode([*user(f"Who is {n}?"), one])
        assert "<|im_start|>assistant" in chat.tokenizer.decode(row.input_ids)
        with torch.no_grad():
            logs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        nats += [-float(logs[i - 1, label]) for i, label in enumerate(row.labels) if label != IGNORE]
    told = found[0]["loss"]["all"]["all"]
    assert told["tokens"] == len(nats)
    assert told["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)


@pytest.mark.slow
def test_models_to_which_rows_are_other_tokens_are_not_compared_by_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "The models split the rows into different tokens, so perplexity and accuracy cannot be compared."
    for other, same in (("random:gemma3", True), ("random:llama", False)):
        capsys.readouterr()
        assert main(["evaluate", str(run), "--compare", other, "--limit", "2"]) == 0
        assert (said not in capsys.readouterr().out) is same
        assert json.loads((run / "evaluation/report.json").read_text())["same_tokens"] is same


def test_a_model_without_a_template_is_named(bare: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--compare", "bare"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: bare has no chat template; write --recipe with a recipe that has model.name_or_path: bare and "
        "model.chat_template"
    )


def test_rows_to_train_on_are_not_read_where_others_are_held_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("en.jsonl").write_text("{damaged")
    assert main(["evaluate", str(run), "--limit", "1"]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_judge_compares_with_the_base_or_a_reference(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge prefers the longer answer; the key goes there from the environment and nowhere else."""

    def longer(request: Request) -> Answer:
        first, second = map(len, request.answers)
        return grades("AboutTheSame" if first == second else "BetterThan" if first > second else "WorseThan")

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-a-test")
    path = lines(Path("p.jsonl"), {"id": "a", "turns": ["One?", "Two?"]}, {"id": "b", "prompt": "Three?"})
    with serve(longer) as server:
        saved = Path("recipe.yaml").read_text()
        judge = f"  judge: {{base_url: '{server.url}', model: tiny, prices: {{input: 1, output: 2}}}}\n"
        judged = saved.replace("evaluate:\n", f"evaluate:\n  prompts: {path}\n{judge}")
        Path("judged.yaml").write_text(judged)
        capsys.readouterr()
        assert main(["evaluate", "run", "--recipe", "judged.yaml", "--compare", "base", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        lengths = [[len(m["text"]) for m in item["models"]] for item in report["answers"]]
        scores = [(ours > theirs) - (ours < theirs) for theirs, ours in lengths]
        assert report["judge"]["mean"] == pytest.approx(sum(scores) / 3)
        assert report["judge"]["against"] == "base of run"
        assert len(server.requests) == 6
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer sk-secret-of-a-test"}
        kept = [path.read_bytes() for path in Path("run/evaluation").rglob("*") if path.is_file()]
        assert len(kept) >= 9
        assert not any(b"sk-secret" in content for content in kept)
        # A second evaluation sends no requests.
        assert main(["evaluate", "run", "--recipe", "judged.yaml", "--compare", "base"]) == 0
        assert "| from -1.5 (much worse) to 1.5 (much better) |" in capsys.readouterr().out
        assert len(server.requests) == 6
        # Against a reference file, whose answers are longer than any of eight tokens.
        far = "so " * 60
        rows = ({"id": "a", "answers": [far, far]}, {"id": "b", "answer": far})
        reference = lines(Path("r.jsonl"), *rows)
        Path("judged.yaml").write_text(judged.replace("model: tiny", f"model: tiny, reference: {reference}"))
        assert main(["evaluate", "run", "--recipe", "judged.yaml", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["judge"]["mean"] == -1.0
        # As many answers as questions, but not of the same prompts.
        lines(Path("r.jsonl"), {"id": "a", "answer": far}, {"id": "b", "answers": [far, far]})
        assert main(["evaluate", "run", "--recipe", "judged.yaml"]) == 2
        # The error comes before a model is loaded.
        assert capsys.readouterr().err == (
            "error: evaluate.judge.reference: r.jsonl holds 1 answers to prompt a, which asks 2 questions; write one "
            "for each, under the prompt's id\n"
        )
        Path("judged.yaml").write_text(judged)
        assert main(["evaluate", "run", "--recipe", "judged.yaml"]) == 2
        assert capsys.readouterr().err == (
            "error: evaluate.judge has nothing to compare with; write --compare, or evaluate.judge.reference\n"
        )


@pytest.mark.slow
def test_a_server_answers_beside_the_run_and_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = load_generator("run")
    path = lines(Path("p.jsonl"), {"id": "a", "turns": ["One?", "Two?"]}, {"id": "b", "prompt": "Three?"})
    saved = Path("recipe.yaml").read_text()
    Path("asked.yaml").write_text(saved.replace("evaluate:\n", f"evaluate:\n  prompts: {path}\n"))

    def as_the_run(request: Request) -> Answer:
        messages = request.body["messages"]
        if messages[-1]["content"] == "Three?":
            return says("Something else.", tokens=None, finish="length")
        ids = generator.answer_ids(messages, Sampling(request.body["max_tokens"]))
        return says(generator.text(ids), tokens=(9, len(ids)))

    with serve(as_the_run, models=[{"id": "tiny"}, {"id": "run"}]) as server:
        capsys.readouterr()
        arguments = ["evaluate", "run", "--recipe", "asked.yaml", "--server-model", "tiny"]
        assert main(arguments) == 2
        fault = "error: --server-model tiny: write --server with the server's address, too\n"
        assert capsys.readouterr().err == fault
        assert main([*arguments, "--server", server.url, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        here, ours = report["models"]
        assert [here["name"], ours["name"]] == [f"tiny at {server.url}", "run"]
        assert (here["equal"]["right"], here["equal"]["judged"]) == (2, 3)
        assert (here["loss"], here["answers"]["count"]) == ({"all": {}, "source": {}, "language": {}}, 3)
        assert ours["loss"]["all"]["all"]["tokens"] > 0
        assert report["same_tokens"]
        text = (run / "evaluation" / "report.md").read_text()
        assert "| equal to the answer of run | 66.7% (2 of 3; 95%: " in text
        assert "| rows | run: tokens | perplexity | accuracy |" in text
        assert len(server.requests) == 3
        # Alone, and with a judge's key at hand, which is not for this server.
        assert main(["evaluate", server.url, *arguments[2:], "--output", "alone", "--json"]) == 0
        (alone,) = json.loads(capsys.readouterr().out)["models"]
        assert alone["answers"] == here["answers"]
        assert "equal" not in alone
        assert not any("authorization" in request.headers for request in server.requests)


def test_rows_that_the_run_was_trained_on_are_not_called_held_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = yaml.safe_load(Path("recipe.yaml").read_text())
    told = "run was trained on rows that this evaluation takes for held-out ones: en.jsonl"
    for data, found in (
        ({"train": [{"path": "ja.jsonl"}], "eval": [{"path": "en.jsonl"}, {"path": "en2.jsonl"}]}, True),
        ({"train": [{"path": "en.jsonl"}], "eval_fraction": 0.4}, True),
        ({"train": [{"path": "ja.jsonl"}], "eval_fraction": 0.4}, False),
        ({"train": [{"path": "ja.jsonl"}], "eval": [{"path": "en.jsonl", "filter": {"id": "1"}}]}, False),
    ):
        Path("other.yaml").write_text(yaml.safe_dump(saved | {"data": data}))
        assert (trained_sources("run", load_recipe(Path("other.yaml"))) == ["en.jsonl"]) is found, data
    Path("other.yaml").write_text(
        yaml.safe_dump(saved | {"data": {"train": [{"path": "en.jsonl"}], "eval_fraction": 0.4}})
    )
    capsys.readouterr()
    assert main(["evaluate", "run", "--recipe", "other.yaml", "--limit", "1"]) == 0
    out = capsys.readouterr()
    assert out.err.splitlines()[0] == told
    assert " run was trained on rows of en.jsonl: they are not held out for it." in out.out
    assert trained_sources("random:gemma3", load_recipe(Path("other.yaml"))) == []


@pytest.mark.slow
def test_a_split_is_held_out_where_the_run_held_it_out(write_recipe: Write) -> None:
    lines(Path("rows.jsonl"), *({"prompt": f"{n}?", "completion": f"{n}."} for n in range(20)))
    path = write_recipe(data={"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.2})
    assert main([str(path), "--quiet"]) == 0
    assert trained_sources("run", load_recipe(path)) == []
    for override in ("data.seed=7", "data.eval_fraction=0.3"):
        assert trained_sources("run", load_recipe(path, [override])) == ["rows.jsonl"]


def test_a_runs_own_recipe_sends_nothing_anywhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = (run / "recipe.yaml").read_text()
    with serve(lambda request: grades("AboutTheSame")) as server:
        for name in ("judge", "server"):
            section = f"  {name}:\n    base_url: {server.url}\n    model: m\n"
            (run / "recipe.yaml").write_text(re.sub(rf"  {name}: null.*\n", section, saved))
            capsys.readouterr()
            assert main(["evaluate", "run", "--compare", "base"]) == 2
            assert capsys.readouterr().err == (
                f"error: evaluate.{name}: run/recipe.yaml names {server.url}, to which answers and your key would be "
                "sent; write --recipe run/recipe.yaml if they may\n"
            )
        assert not server.requests


def test_what_was_answered_is_kept_where_the_judge_fails(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(Path("p.jsonl"), {"id": "a", "prompt": "One?"})
    with serve(lambda request: error(401)) as server:
        judge = f"  judge: {{base_url: '{server.url}', model: tiny}}\n"
        saved = Path("recipe.yaml").read_text()
        Path("judged.yaml").write_text(saved.replace("evaluate:\n", f"evaluate:\n  prompts: {path}\n{judge}"))
        capsys.readouterr()
        assert main(["evaluate", "run", "--recipe", "judged.yaml", "--compare", "base"]) == 2
    assert "needs a key (HTTP 401)" in capsys.readouterr().err
    report = json.loads((run / "evaluation" / "report.json").read_text())
    assert len(report["answers"]) == 1
    assert "judge" not in report


@pytest.mark.parametrize(
    ("evaluate", "fault"),
    [
        (
            {"judge": {"base_url": "http://localhost/v1/chat/completions", "model": "m"}},
            "evaluate.judge.base_url: 'http://localhost/v1/chat/completions' is not the base URL of an API",
        ),
        ({"lm_eval": {"tasks": ["nosuch.yaml"]}}, "evaluate.lm_eval.tasks: nosuch.yaml: No such file"),
    ],
)
def test_what_is_wrong_with_judge_or_tasks_is_told_before_a_model_is_loaded(
    run: Path, capsys: pytest.CaptureFixture[str], evaluate: dict[str, Any], fault: str
) -> None:
    recipe = json.loads(json.dumps(yaml.safe_load(Path("recipe.yaml").read_text())))
    Path("other.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": evaluate}))
    capsys.readouterr()
    assert main(["evaluate", "run", "--recipe", "other.yaml", "--compare", "base"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {fault}")


@pytest.mark.parametrize(
    "text",
    [
        "- one\n+ two\n* three\n1. four\n 2) five",
        "Big\n===\nSmaller\n---",
        "    four spaces\n\ta tab",
        "&lt;b&gt; &amp;lt; *a* _b_ `c` ~~d~~ <i>e</i> [f](g) ![h](i)",
        "a | b\n---|---\n1 | 2",
        "# h\n> q\n***\n```\ncode\n```",
    ],
)
def test_a_quotation_is_read_as_the_text_that_was_quoted(text: str) -> None:
    """By another program's eyes: one quotation of one paragraph, with these very lines."""
    page = MarkdownIt("gfm-like", {"linkify": False}).render("\n".join(report_module._quoted(text)))
    shown = re.fullmatch(r"<blockquote>\n<p>(.*)</p>\n</blockquote>\n", page, re.DOTALL)
    assert shown, page
    assert "<" not in shown[1].replace("<br />", "")
    lines = html.unescape(shown[1].replace("<br />\n", "\n")).replace("\u00a0", " ").split("\n")
    # Parsers strip spaces at the start of a paragraph, non-breaking ones too.
    assert [line.strip() for line in lines] == [line.strip() for line in text.split("\n")]


@pytest.mark.slow
def test_tasks_of_the_harness(write_recipe: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """The likelier of two continuations, which the model's own log-probabilities tell as well."""
    rows = [{"question": f"Number {n}", "choices": ["a", "b"], "label": n % 2} for n in range(4)]
    path = lines(Path("choice.jsonl"), *rows)
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path(path).absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}],
    }
    Path("tiny.yaml").write_text(json.dumps(task))
    prompts = lines(Path("p.jsonl"), {"prompt": "Hi"})
    recipe = write_recipe(
        evaluate={"prompts": prompts, "max_new_tokens": 2, "lm_eval": {"tasks": [str(Path("tiny.yaml").absolute())]}}
    )
    capfd.readouterr()
    assert main(["evaluate", "random:gemma3", "--recipe", str(recipe), "--json"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)["models"][0]["tasks"]
    assert "git" not in said.err  # the folder is no repository
    generator = load_generator("random:gemma3")
    right, squares = 0, []
    for row in rows:
        ids = generator.prompt_ids(list(user(row["question"])))
        nats = []
        for choice in row["choices"]:
            said = generator.chat.tokenizer(choice, add_special_tokens=False)["input_ids"]
            [part] = row_losses(generator.model, [LabelledRow([*ids, *said], [IGNORE] * len(ids) + said)])
            nats.append(part.nats)
        right += int(nats.index(min(nats)) == row["label"])
        likely = torch.tensor(nats).neg().softmax(0)
        squares += [float((likely - torch.eye(2)[row["label"]]).square().sum())]
    # Without the template the second one would be another number, as both choices are single tokens.
    assert found == {
        "tiny_choice, acc": right / 4,
        "tiny_choice, brier_score": pytest.approx(sum(squares) / 4, rel=1e-4),
    }
    recipe = write_recipe(evaluate={"prompts": prompts, "lm_eval": {"tasks": ["arc_easy", "nosuch"]}})
    assert main(["evaluate", "random:gemma3", "--recipe", str(recipe)]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: evaluate.lm_eval.tasks: there is no task nosuch; `lm-eval ls tasks` lists them"
    )


# ---------------------------------------------------------------------------------------------------------------
# The report


def test_a_report_shows_texts_as_they_are() -> None:
    """No answer becomes a heading, a picture, a tag or a cell of a table."""
    text = "# Big\n![x](http://a)\n<script>alert(1)</script> | `code` *bold*"
    language = {"right": False, "wanted": "ja", "found": "en", "why": ""}
    report = {
        "recipe": "r|x.yaml",
        "prompts": "p.jsonl",
        "max_new_tokens": 5,
        "limit": None,
        "same_tokens": True,
        "models": [{"name": "a|b", "loss": {}, "answers": {}, "tasks": {"t": 0.5}}],
        "answers": [
            {
                "prompt": "1",
                "asked": [{"role": "user", "content": text}],
                "models": [{"text": text, "tokens": 3, "stopped": False, "language": language}],
            }
        ],
    }
    shown = report_module.as_markdown(report)
    assert "> \\# Big  \n> !\\[x\\](http://a)  \n> \\<script\\>alert(1)\\</script\\> \\| \\`code\\` \\*bold\\*" in shown
    assert "**a|b** (3 tokens, cut off, in en and not in ja)" in shown
    assert "| task | a\\|b |" in shown
    language["found"] = "ja"
    assert "(3 tokens, cut off, not all in ja)" in report_module.as_markdown(report)
    page = report_module.as_html(report)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_turns_of_a_conversation_are_told_apart() -> None:
    def said(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]

    language = {"right": True, "wanted": "en", "found": "en", "why": ""}
    answer = {"text": "Fine.", "tokens": 3, "stopped": True, "language": language}
    report = {
        "recipe": "recipe.yaml",
        "prompts": "p.jsonl",
        "max_new_tokens": 5,
        "limit": None,
        "same_tokens": True,
        "models": [{"name": "run", "loss": {}, "answers": {}, "tasks": {}}],
        "answers": [
            {"prompt": "p:1", "asked": said("One?"), "models": [answer]},
            {"prompt": "p:1", "asked": said("One?", "1.", "Two?"), "models": [answer]},
        ],
    }
    _, first, second = report_module.as_html(report).split("<h3>p:1")
    assert first.startswith("</h3>")
    assert "earlier messages" not in first
    assert second.startswith(", turn 2</h3>")
    earlier, asked = second.split("</details>")
    assert "2 earlier messages" in earlier
    assert [text in earlier for text in ("One?", "1.", "Two?")] == [True, True, False]
    assert [text in asked for text in ("One?", "Two?")] == [False, True]
    assert re.findall("^### .*", report_module.as_markdown(report), re.MULTILINE) == ["### p:1", "### p:1, turn 2"]


def test_of_several_processes_none_evaluates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "and only train shares its work; write python -m finetune evaluate run\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main(["evaluate", "run"]) == 2
        assert capsys.readouterr().err.endswith(said)


def test_a_limit_takes_of_each_source_as_many_as_there_are() -> None:
    items = ["a1", "a2", "a3", "a4", "b1", "c1", "c2"]
    assert spread_evenly(items, lambda item: item[0], 5) == ["a1", "a2", "b1", "c1", "c2"]
    assert spread_evenly(items, lambda item: item[0], 2) == ["a1", "b1"]
    assert spread_evenly(items, lambda item: item[0], None) == items


def test_a_limit_reaches_every_source(write_recipe: Write, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"role": "assistant", "content": "yes"}
    one, two = (
        lines(Path(f"{name}.jsonl"), *({"messages": [*user(f"{name} {i}"), said]} for i in range(4)))
        for name in ("first", "second")
    )
    rows = {"train": [{"path": lines(Path("t.jsonl"), {"messages": [*user("Hi"), said]})}]}
    rows["eval"] = [{"path": one}, {"path": two}]
    recipe = write_recipe(data=rows, evaluate={"max_new_tokens": 2})
    capsys.readouterr()
    command = ["evaluate", "random:gemma3", "--recipe", str(recipe), "--limit", "2", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert [answer["prompt"] for answer in report["answers"]] == ["first.jsonl:1", "second.jsonl:1"]
