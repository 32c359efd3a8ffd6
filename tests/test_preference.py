"""Pairs and rated answers: read from the columns of real data sets, labelled as for SFT, proved, counted."""

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from datasets import Dataset
from test_referee import chat as referee_chat
from trl import DPOTrainer

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.formats import FORMATS, detect_format
from finetune.data.language import language
from finetune.data.mixture import Prepared, build_datasets
from finetune.data.preference import balance
from finetune.model.load import load_tokenizer
from finetune.recipe.schema import DataSection, DataSource, ModelSection
from finetune.system.errors import DataError, LabelError

Row = dict[str, Any]
ASKED, SHORT, LONG = "Why is the sky blue?", "Air scatters blue light most.", "That is a long story. Light is a wave."


@cache
def chat(template: str = "gemma3") -> Chat:
    if template in ("gemma4_v5", "llama3"):
        return referee_chat(template)  # whose tokenizer has the tokens of the template
    model = {"name_or_path": "random:gemma3", "chat_template": template}
    return Chat(load_tokenizer(ModelSection.model_validate(model)))


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def said(*texts: str, first: str = "user") -> list[Row]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def pair(prompt: str = ASKED, chosen: str = SHORT, rejected: str = LONG, **keys: Any) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **keys}


def jsonl(rows: list[Row], name: str = "pairs.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def prepared(rows: list[Row], method: str = "dpo", own: Chat | None = None, **keys: Any) -> tuple[Prepared, Prepared]:
    max_length = keys.pop("max_length", None)
    section = {"on_overflow": "drop", "train": [{"path": jsonl(rows), **keys.pop("source", {})}], **keys}
    return build_datasets(DataSection.model_validate(section), own or chat(), max_length, method=method)


def rows_of(data: Prepared) -> list[Row]:
    return [] if data.dataset is None else list(data.dataset)


def fault(call: Callable[[], object], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# Rows as data sets have them

WHOLE = {"chosen": said(ASKED, SHORT), "rejected": said(ASKED, LONG)}
EXPECTED = (said(ASKED), said(SHORT, first="assistant"), said(LONG, first="assistant"))
SHAPES: dict[str, Row] = {
    "texts": pair(),
    "an answer in messages": pair() | {name: said(WHOLE[name][1]["content"], first="assistant") for name in WHOLE},
    "a prompt in messages": pair() | {"prompt": said(ASKED)},
    "JSON in texts": {name: json.dumps(turns) for name, turns in WHOLE.items()},
    "whole conversations": WHOLE,
    "trl, with the prompt twice": {"prompt": said(ASKED)} | WHOLE,
    "UltraFeedback-binarized": {
        "prompt": ASKED,
        "prompt_id": "0" * 64,
        **WHOLE,
        "messages": said(ASKED, SHORT),
        "score_chosen": 8.0,
        "score_rejected": 4.5,
    },
    "HH-RLHF": {
        "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {SHORT}",
        "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {LONG}",
    },
    "HH-RLHF with a prompt": pair(f"\n\nHuman: {ASKED}\n\nAssistant:", f" {SHORT}".strip()),
    "orca_dpo_pairs": {"system": "", "question": ASKED, "chosen": SHORT, "rejected": LONG},
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_a_pair_is_the_same_pair(name: str) -> None:
    row = SHAPES[name]
    assert detect_format(DataSource(path="x"), row, "dpo") == "preference"
    got = FORMATS["preference"](row)
    count = got["prompt_messages"]
    assert (got["messages"][:count], got["messages"][count:], got["rejected"]) == EXPECTED
    assert got.get("unread", []) == []
    [trained] = rows_of(prepared([row])[0])
    assert trained == rows_of(prepared([pair()])[0])[0]


def test_columns_that_are_not_read_are_counted() -> None:
    train, _ = prepared([SHAPES["UltraFeedback-binarized"], pair("Other?", question="Third?")])
    assert train.ledger.unread == {"prompt_id": 1, "messages": 1, "score_chosen": 1, "score_rejected": 1, "question": 1}
    # A prompt that the conversations do not hold.
    assert FORMATS["preference"](WHOLE | {"prompt": "Another?"})["unread"] == ["prompt"]


def test_a_system_text_and_earlier_turns() -> None:
    row = {"system": "Be brief.", "question": ASKED, "chosen": SHORT, "rejected": LONG}
    assert FORMATS["preference"](row)["messages"][0] == {"role": "system", "content": "Be brief."}
    talk = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Say more.\n\nSlowly.\n\nAssistant:"
    got = FORMATS["preference"]({"chosen": f"{talk} One.\n\nTwo.", "rejected": f"{talk} No."})
    assert got["messages"] == said("Hi", "Hello!", "Say more.\n\nSlowly.", "One.\n\nTwo.")
    assert (got["prompt_messages"], got["rejected"]) == (3, said("No.", first="assistant"))
    # The answers begin where the conversations part, earlier answers are a part of the prompt.
    row = {"chosen": said("a", "b", "c", "d"), "rejected": said("a", "b", "c", "e")}
    assert FORMATS["preference"](row)["prompt_messages"] == 3
    row["rejected"] = said("a", "x", "c", "e")
    assert FORMATS["preference"](row)["prompt_messages"] == 1


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}], "content": ""}
RESULT = {"role": "tool", "content": "3"}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}


def test_tools() -> None:
    asked, end = said("1+2?"), said("Three.", first="assistant")
    same = {"chosen": [*asked, CALL, RESULT, *end], "rejected": [*asked, CALL, RESULT, *said("4", first="assistant")]}
    assert FORMATS["preference"](same | {"tools": [TOOL]})["prompt_messages"] == 3
    other = same | {"rejected": [*asked, CALL, {"role": "tool", "content": "4"}, *end]}
    got = FORMATS["preference"](other | {"tools": [TOOL]})
    assert got["prompt_messages"] == 1
    assert [tool["function"]["name"] for tool in got["tools"]] == ["add"]
    # Of an answer of several turns each has labels, and no result of a tool.
    train, _ = prepared([other | {"tools": [TOOL]}], own=chat("gemma4_v5"))
    [row] = rows_of(train)
    labels = [i for i in row["labels"] if i != IGNORE]
    text = chat("gemma4_v5").tokenizer.decode(labels)
    assert "call:add" in text
    assert "Three." in text
    assert "response" not in text.replace("<|tool_response>", "")


RATED = [
    ({"label": label}, want) for label, want in [(True, True), (0, False), (1.0, True), ("False", False), ("1", True)]
]


@pytest.mark.parametrize(("label", "want"), RATED)
def test_rated_answers(label: Row, want: bool) -> None:
    row = {"prompt": ASKED, "completion": SHORT, **label}
    assert detect_format(DataSource(path="x"), row, "kto") == "rated"
    assert detect_format(DataSource(path="x"), row, "sft") == "prompt_completion"
    assert FORMATS["rated"](row) == FORMATS["prompt_completion"](row) | {"desirable": want}


BAD: dict[str, tuple[Row, str]] = {
    "no rejected": ({"prompt": "a", "chosen": "b", "rejected": None}, "it has no rejected"),
    "no prompt": (
        {"chosen": "b", "rejected": "c"},
        "it has no prompt; write it, or whole conversations in chosen and rejected",
    ),
    "two prompts": (
        {"chosen": said("a", "b"), "rejected": said("c", "b")},
        "its chosen and rejected do not answer the same prompt",
    ),
    "two systems": (
        {"chosen": [{"role": "system", "content": "x"}, *said("a", "b")], "rejected": said("a", "c")},
        "its chosen and rejected do not answer the same prompt",
    ),
    "two second questions": (
        {"chosen": said("a", "b", "c", "d"), "rejected": said("a", "b", "x", "d")},
        "its chosen and rejected do not answer the same prompt",
    ),
    "a text and a list": (
        {"prompt": "a", "chosen": "b", "rejected": said("c", first="assistant")},
        "one of its chosen and rejected is a text, the other a conversation; write both alike",
    ),
    "an answer and a conversation": (
        {"prompt": "a", "chosen": said("a", "b"), "rejected": said("c", first="assistant")},
        "one of its chosen and rejected begins with the answer, the other with the prompt",
    ),
    "a number": ({"prompt": "a", "chosen": 1, "rejected": "b"}, "its messages are not a list of maps"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_pair_that_cannot_be_read(name: str) -> None:
    row, reason = BAD[name]
    assert fault(lambda: FORMATS["preference"](row), LabelError) == reason


@pytest.mark.parametrize("label", ["good", 2, [1], -1])
def test_a_label_that_is_none(label: Any) -> None:
    row = {"prompt": "a", "completion": "b", "label": label}
    assert fault(lambda: FORMATS["rated"](row), LabelError) == f"its label is {label!r}; write true or false"
    assert fault(lambda: FORMATS["rated"](row | {"label": None}), LabelError) == "it has no label"


def test_a_method_reads_its_own_formats() -> None:
    assert fault(lambda: prepared([pair()], "sft")) == (
        "pairs.jsonl: its rows are pairs (prompt, chosen, rejected); write method: dpo, kto or orpo"
    )
    assert fault(lambda: prepared([{"messages": said("a", "b")}])) == (
        "pairs.jsonl: its format for method dpo is not known from its columns (messages); "
        "write in the source, for example, columns: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}; the known "
        "formats are preference"
    )
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    train, _ = prepared([{"q": "a", "good": "b", "bad": "c"}], source={"columns": columns})
    assert train.ledger.kept == 1
    assert fault(lambda: prepared([pair()], source={"columns": {"output": "chosen"}})).startswith(
        "pairs.jsonl: columns: output: the format preference does not read it; it reads prompt, question, chosen, "
    )


# ---------------------------------------------------------------------------------------------------------------
# Labels

TEMPLATES = ["gemma3", "gemma4_v5", "llama3", "chatml"]


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_those_of_sft_without_what_follows_the_turn(template: str, method: str) -> None:
    own = chat(template)
    earlier = said("Hi", "Hello, what is it?")
    row = {"chosen": [*earlier, *said(ASKED, SHORT)], "rejected": [*earlier, *said(ASKED, "長い話です。 " + LONG)]}
    train, _ = prepared([row], method, own)
    if method == "kto":
        sides = [(got["input_ids"], got["labels"]) for got in rows_of(train)]
        assert [got["desirable"] for got in rows_of(train)] == [True, False]
    else:
        [got] = rows_of(train)
        assert got.keys() == {"row", "input_ids", "labels", "rejected_input_ids", "rejected_labels"}
        sides = [(got["input_ids"], got["labels"]), (got["rejected_input_ids"], got["rejected_labels"])]
    prompt = own.tokenizer.apply_chat_template(row["chosen"][:-1], add_generation_prompt=True, return_dict=False)
    for name, (ids, labels) in zip(("chosen", "rejected"), sides, strict=True):
        sft = own.encode(row[name], train_on="last_assistant")
        end = len(ids)
        assert ids == sft.input_ids[:end].tolist()
        assert labels == sft.labels[:end].tolist()
        # The tail that is left out has no label; the last token is the end of the turn.
        assert set(sft.labels[end:].tolist()) <= {IGNORE}
        assert labels[-1] == ids[-1] == own.end_of_turn_id
        assert ids[: len(prompt)] == prompt
        assert labels == [IGNORE] * len(prompt) + ids[len(prompt) :]


@pytest.mark.parametrize("template", TEMPLATES)
def test_trl_also_trains_what_follows_the_turn(template: str) -> None:
    """trl 1.16 prepares the same prompt and answers, and labels the line break behind them."""
    own = chat(template)
    row = {"prompt": said(ASKED), "chosen": said(SHORT, first="assistant"), "rejected": said(LONG, first="assistant")}
    trainer = SimpleNamespace(_tokenizer=own.tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    [theirs] = DPOTrainer._prepare_dataset(trainer, Dataset.from_list([row]), own.tokenizer, args, "train")
    [ours] = rows_of(prepared([row], own=own)[0])
    prompt = theirs["prompt_ids"]
    for name, ids in (("chosen", "input_ids"), ("rejected", "rejected_input_ids")):
        whole = prompt + theirs[f"{name}_ids"]
        assert whole[: len(ours[ids])] == ours[ids]
        behind = own.tokenizer.decode(whole[len(ours[ids]) :])
        assert behind == ("" if template == "llama3" else "\n")
    assert ours["labels"][: len(prompt)] == [IGNORE] * len(prompt)
    assert ours["labels"][len(prompt)] != IGNORE


def test_both_sides_follow_the_same_tokens() -> None:
    # The first message of one answer is not trained on, and so it would be a part of the prompt.
    chosen = [*said("a"), {"role": "assistant", "content": "b", "train": False}, *said("c", "d")]
    row = {"chosen": chosen, "rejected": said("a", "x", "c", "d")}
    assert fault(lambda: prepared([row])) == (
        "pairs.jsonl:1: the tokens before its two answers differ; mend the row, or write data.on_bad_row: skip"
    )
    train, _ = prepared([row, pair()], on_bad_row="skip")
    assert (train.ledger.kept, train.ledger.read) == (1, 2)
    assert train.ledger.bad == {"the tokens before its two answers differ": 1}
    chosen[1]["train"] = True
    assert prepared([row])[0].ledger.kept == 1
    row = {"chosen": [*said("a"), chosen[1], *said("c", "d")], "rejected": [*said("a"), chosen[1], *said("c", "x")]}
    assert fault(lambda: prepared([row])).startswith(
        "pairs.jsonl:1: `train` on a message of the prompt; only the answer"
    )


def test_a_fault_names_its_side() -> None:
    assert fault(lambda: prepared([pair(rejected="so <end_of_turn> it ends")])) == (
        "pairs.jsonl:1: message 2: its text holds <end_of_turn>, which is a special token of this tokenizer; "
        "on the rejected side; mend the row, or write data.on_bad_row: skip"
    )


def test_an_answer_is_not_divided_where_the_template_renders_earlier_turns_differently() -> None:
    template = Path("forgets.jinja")
    # Thinking is left out of each turn but the last one.
    template.write_text(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n"
        "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    thought = {"role": "assistant", "content": "b", "reasoning_content": "why"}
    row = {"chosen": [*said("a"), thought, *said("c", "d")], "rejected": said("a", "x", "c", "d")}
    assert fault(lambda: prepared([row], own=chat("forgets.jinja"))) == (
        "pairs.jsonl:1: message 2: the chat template leaves out its thinking; an answer is not divided; "
        "on the chosen side; mend the row, or write data.on_bad_row: skip"
    )


# ---------------------------------------------------------------------------------------------------------------
# What becomes of a pair


def test_the_ledger_of_pairs() -> None:
    japanese = "空はなぜ青いのですか。"
    rows = [
        pair(),
        pair("What is a fox?", "A wild animal related to the dog, with a bushy tail.", "An animal."),
        pair(japanese, "空気が青い光をよく散らすからです。", LONG),
        pair("Twice?", "The same.", " The same. "),
        pair("Empty?", "Yes.", "   "),
        pair(),
        pair("Long?", "Yes.", "no " * 200),
    ]
    train, _ = prepared(rows, max_length=100)
    ledger = train.ledger
    assert (ledger.read, ledger.kept, ledger.split, ledger.cut) == (7, 3, 0, 0)
    assert ledger.dropped == {
        "with equal answers": 1,
        "with an empty answer": 1,
        "longer than training.max_length 100": 1,
        "exact duplicates": 1,
    }
    assert ledger.first["with an empty answer"] == "pairs.jsonl:5"
    got = rows_of(train)
    lengths = [(len(row["input_ids"]), len(row["rejected_input_ids"])) for row in got]
    answers = [[sum(i != IGNORE for i in row[name]) for row in got] for name in ("labels", "rejected_labels")]
    assert ledger.tokens == sum(map(sum, lengths))
    assert ledger.trained_tokens == sum(map(sum, answers))
    assert ledger.lengths == Counter(map(max, lengths))
    assert ledger.ends == ledger.turns == 6
    account = ledger.as_dict()
    assert account["answers"] == {
        language: {
            "pairs": len(places),
            "chosen": len(places),
            "chosen_tokens": sum(answers[0][i] for i in places),
            "rejected": len(places),
            "rejected_tokens": sum(answers[1][i] for i in places),
            "chosen_longer": sum(answers[0][i] > answers[1][i] for i in places),
        }
        for language, places in {"English": [0, 1], "Japanese": [2]}.items()
    }
    chosen, rejected = (round(sum(side) / 3, 1) for side in answers)
    assert f"3 of 7 pairs, {ledger.tokens} tokens" in ledger.summary()
    longer = round(100 * sum(a > b for a, b in zip(*answers, strict=True)) / 3)
    told = f"; answers of {chosen} tokens chosen, {rejected} rejected; the chosen one is longer in {longer}%"
    assert told in ledger.summary()
    assert json.loads(json.dumps(account)) == account


def test_a_long_pair_can_stop_the_run() -> None:
    [row] = rows_of(prepared([pair()])[0])
    longer = max(len(row["input_ids"]), len(row["rejected_input_ids"]))
    assert prepared([pair()], max_length=longer, on_overflow="error")[0].ledger.kept == 1
    assert fault(lambda: prepared([pair()], max_length=longer - 1, on_overflow="error")) == (
        f"pairs.jsonl:1: {longer} tokens, longer than training.max_length {longer - 1} (data.on_overflow: error)"
    )
    assert "longer than training.max_length" in fault(lambda: prepared([pair()], max_length=longer - 1))


def test_a_prompt_is_not_trained_and_evaluated_on() -> None:
    jsonl([pair(chosen="Other.", rejected="Words.")], "held.jsonl")
    rows = [pair(), pair("Another?"), pair("Another?", "Three.", "Four.")]
    train, held = prepared(rows, eval=[{"path": "held.jsonl"}])
    assert (train.ledger.kept, held.ledger.kept) == (2, 1)
    assert train.ledger.dropped == {"whose prompt is also in the evaluation rows": 1}
    leak = fault(lambda: prepared(rows, eval=[{"path": "held.jsonl"}], deduplicate=False))
    assert leak.startswith("pairs.jsonl:1: the prompt of this row is also in the evaluation rows; take it out, or")
    # All answers to one prompt are held out together.
    many = [pair(f"{n}?", f"{n} {k}", "no") for n in range(8) for k in range(3)]
    train, held = prepared(many, eval_fraction=0.25)
    assert (train.ledger.kept, held.ledger.kept) == (18, 6)
    assert train.ledger.dropped == {}


def test_rows_of_kto() -> None:
    train, _ = prepared([pair(), pair("Other?", "Yes.", "No.")], "kto")
    [good, bad, *_] = got = rows_of(train)
    assert good.keys() == {"row", "input_ids", "labels", "desirable"}
    assert [row["desirable"] for row in got] == [True, False, True, False]
    assert [row["row"] for row in got] == ["pairs.jsonl:1", "pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:2"]
    assert (train.ledger.read, train.ledger.kept, train.ledger.split) == (2, 4, 0)
    assert train.ledger.mended == {"pairs read as two rated answers": 2}
    assert train.ledger.summary().startswith("4 answers of 2 rows, ")
    rated = [{"prompt": ASKED, "completion": text, "label": good} for text, good in ((SHORT, True), (LONG, False))]
    assert [row | {"row": ""} for row in rows_of(prepared(rated, "kto")[0])] == [good | {"row": ""}, bad | {"row": ""}]
    # Two people may rate one answer differently, and that is no duplicate.
    assert prepared([rated[0], rated[0], rated[0] | {"label": False}], "kto")[0].ledger.kept == 2
    ledger = prepared(rated, "kto")[0].ledger
    assert "2 of 2 rows" in ledger.summary()
    assert ledger.summary().endswith("; 1 desirable and 1 undesirable answers")
    for alike, other in ((True, "undesirable"), (False, "desirable")):
        alone = [row | {"label": alike, "prompt": f"{n}?"} for n, row in enumerate(rated)]
        assert fault(lambda alone=alone: prepared(alone, "kto")) == (
            f"data.train: none of 2 answers is {other}, and kto needs both; add some"
        )


def test_the_weights_that_balance_kto_are_told() -> None:
    line = "kto: 80 desirable and 40 undesirable answers, weighted "
    counts = {"chosen": 80, "rejected": 40}
    assert balance(counts, {}) == (
        f"{line}2.00 : 1; for the recommended 1 to 1.33 write training.desirable_weight: 0.50 to 0.67, "
        "or training.undesirable_weight: 1.50 to 2.00"
    )
    for weights in ({"desirable_weight": 0.5}, {"desirable_weight": 0.66}, {"undesirable_weight": 1.5}):
        assert balance(counts, weights).endswith(" : 1, within the recommended 1 to 1.33")
    assert balance(counts, {"undesirable_weight": 2.1}).startswith(f"{line}0.95 : 1; for the recommended")


def test_weights_repeat_whole_pairs() -> None:
    train, _ = prepared([pair(), pair("Other?")], source={"weight": 1.5})
    assert (train.ledger.kept, train.ledger.repeated) == (3, 1)
    train, _ = prepared([pair(), pair("Other?")], "kto", source={"samples": 1})
    assert sorted(row["desirable"] for row in rows_of(train)) == [False, True]


def test_each_method_has_its_own_cache() -> None:
    by_method = {method: prepared([pair()], method)[0] for method in ("dpo", "kto", "dpo", "orpo")}
    assert by_method["dpo"].digest == by_method["orpo"].digest
    assert [rows_of(data)[0].keys() >= {"desirable"} for data in by_method.values()] == [False, True, False]
    assert prepared([pair(rejected="Other.")])[0].digest != by_method["dpo"].digest
    highest = max(max(row["rejected_input_ids"]) for row in rows_of(prepared([pair("a", "b", "日本語")])[0]))
    assert prepared([pair("a", "b", "日本語")])[0].highest_token_id() == highest


# ---------------------------------------------------------------------------------------------------------------
# The sample pairs


def test_the_sample_pairs_are_as_described() -> None:
    files = {name: ROOT / "data" / f"preference_{name}.jsonl" for name in ("sample", "eval")}
    rows = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}
    assert {name: len(pairs) for name, pairs in rows.items()} == {"sample": 120, "eval": 24}
    texts = [text for pairs in rows.values() for row in pairs for text in row.values()]
    assert len(set(texts)) == len(texts) == 3 * 144
    section = {"train": [{"path": str(files["sample"])}], "eval": [{"path": str(files["eval"])}]}
    own = DataSection.model_validate(section | {"on_overflow": "error"})
    for data, count in zip(build_datasets(own, chat(), 1024, method="dpo"), (60, 12), strict=True):
        assert data.ledger.dropped == {}
        answers = data.ledger.as_dict()["answers"]
        assert {name: counts["pairs"] for name, counts in answers.items()} == {"English": count, "Japanese": count}
    for row in (row for pairs in rows.values() for row in pairs):
        japanese = {name: language(row[name]) == "Japanese" for name in row}
        assert japanese["prompt"] == japanese["chosen"]
        sentences = {name: sum(map(row[name].count, ("。", ". ", ".\n"))) + 1 for name in ("chosen", "rejected")}
        assert sentences["chosen"] <= 4
        if japanese["chosen"] != japanese["rejected"]:
            assert sentences["rejected"] <= 3
        else:
            assert len(row["rejected"]) > len(row["chosen"])
            assert sentences["rejected"] >= 5
