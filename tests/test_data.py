"""Rows to tokens and labels, and the account of what became of each."""

import gzip
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.ledger import Ledger, PieceCounts
from finetune.data.mixture import Prepared, build_datasets
from finetune.data.readers import read_rows
from finetune.model.load import load_tokenizer
from finetune.recipe.schema import DataSection, DataSource, ModelSection
from finetune.system.errors import DataError, TemplateError

REAL = os.environ.get("FINETUNE_REAL_DATA")


@cache
def chat(template: str | None = "gemma3") -> Chat:
    tokenizer = load_tokenizer(ModelSection(name_or_path="random:gemma3", chat_template=template))
    if template is None:
        tokenizer.chat_template = None
    return Chat(tokenizer)


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(*rows: Any, name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def raw(data: bytes, name: str = "rows.jsonl") -> str:
    Path(name).write_bytes(data)
    return name


def section(path: str = "rows.jsonl", *, source: dict[str, Any] | None = None, **keys: Any) -> DataSection:
    return DataSection(train=[DataSource(path=path, **(source or {}))], **keys)


def prepare(
    path: str = "rows.jsonl", *, template: str | None = "gemma3", max_length: int | None = None, **keys: Any
) -> Prepared:
    return build_datasets(section(path, **keys), chat(template), max_length)[0]


def fault(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def texts(prepared: Prepared, own: Chat | None = None) -> list[str]:
    decode = (own or chat()).tokenizer.decode
    return [] if prepared.dataset is None else [decode(ids) for ids in prepared.dataset["input_ids"]]


def trained(prepared: Prepared, own: Chat | None = None) -> list[list[str]]:
    """For each row the text of each run of tokens that have a label."""
    rows = []
    for row in prepared.dataset or ():
        runs: list[list[int]] = [[]]
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, IGNORE)
            if label != IGNORE:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        rows.append([(own or chat()).tokenizer.decode(run) for run in runs if run])
    return rows


def talk(*said: str, system: str | None = None) -> dict[str, Any]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": first + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(said)]}


def gemma(*said: str) -> str:
    turns = (f"<start_of_turn>{('user', 'model')[i % 2]}\n{t}<end_of_turn>\n" for i, t in enumerate(said))
    return "<bos>" + "".join(turns)


# ---------------------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("form", "row", "text", "labelled"),
    [
        ("messages", talk("Hi", "Yo"), gemma("Hi", "Yo"), ["Yo<end_of_turn>"]),
        ("messages", talk("Hi", "Yo", system="S"), gemma("S\n\nHi", "Yo"), ["Yo<end_of_turn>"]),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "value": "B"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "C"}], "loss_weight": 0.0},
                    {"role": "user", "content": "D", "loss_weight": 1.0, "train": False},
                    {"role": "assistant", "content": "E", "loss_weight": 1},
                ]
            },
            gemma("AB", "C", "D", "E"),
            ["E<end_of_turn>"],
        ),
        (
            "sharegpt",
            {
                "system": "S",
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yo"},
                    {"from": "user", "value": "Oh"},
                    {"from": "model", "value": "はい", "train": True},
                ],
            },
            gemma("S\n\nHi", "Yo", "Oh", "はい"),
            ["Yo<end_of_turn>", "はい<end_of_turn>"],
        ),
        ("alpaca", {"instruction": "Add", "input": "", "output": "2"}, gemma("Add", "2"), ["2<end_of_turn>"]),
        (
            "alpaca",
            {"instruction": "Add", "input": "1+1", "output": "2", "system": "S"},
            gemma("S\n\nAdd\n\n1+1", "2"),
            ["2<end_of_turn>"],
        ),
        ("prompt_completion", {"prompt": "Hi", "completion": "Yo"}, gemma("Hi", "Yo"), ["Yo<end_of_turn>"]),
        (
            "prompt_completion",
            {"prompt": talk("Hi", "Yo", "Oh")["messages"], "completion": [{"role": "assistant", "content": "No"}]},
            gemma("Hi", "Yo", "Oh", "No"),
            ["No<end_of_turn>"],
        ),
        ("text", {"text": "昔々 {{ 7*7 }}"}, "<bos>昔々 {{ 7*7 }}<eos>", ["昔々 {{ 7*7 }}<eos>"]),
    ],
)
def test_formats(form: str, row: dict[str, Any], text: str, labelled: list[str], named: bool) -> None:
    got = prepare(jsonl(row), source={"format": form} if named else {})
    assert texts(got) == [text]
    assert trained(got) == [labelled]
    assert got.dataset is not None
    assert got.dataset["row"][:] == ["rows.jsonl:1"]


def test_raw_prompt_completion() -> None:
    jsonl({"prompt": "2+2=", "completion": " 4"})
    source = {"format": "prompt_completion", "raw": True}
    got = prepare(source=source)
    assert (texts(got), trained(got)) == (["<bos>2+2= 4<eos>"], [[" 4<eos>"]])
    assert trained(prepare(source=source, train_on="all")) == [["2+2= 4<eos>"]]
    # Without a chat template there is no other way.
    assert texts(prepare(template=None)) == ["<bos>2+2= 4<eos>"]


def test_train_on() -> None:
    jsonl(talk("a", "one", "b", "two"))
    assert trained(prepare()) == [["one<end_of_turn>", "two<end_of_turn>"]]
    assert trained(prepare(train_on="assistant")) == [["one<end_of_turn>", "two<end_of_turn>"]]
    assert trained(prepare(train_on="last_assistant")) == [["two<end_of_turn>"]]
    assert trained(prepare(train_on="all")) == [[gemma("a", "one", "b", "two").removeprefix("<bos>")]]
    assert fault(lambda: prepare(train_on="completion")) == (
        "rows.jsonl: data.train_on: completion needs prompt_completion rows, these are messages; "
        "write assistant or last_assistant"
    )


def test_train_on_all_keeps_what_a_message_says() -> None:
    row = talk("a", "one", "b", "two")
    row["messages"][1]["train"] = False
    jsonl(row)
    text = gemma("a", "one", "b", "two").removeprefix("<bos>")
    before, _, behind = text.partition("one<end_of_turn>")
    assert trained(prepare(train_on="all")) == [[before, behind]]
    # The prompt of a prompt_completion row is left out by its format, not by its messages.
    jsonl({"prompt": talk("a", "one", "b")["messages"], "completion": "two"})
    assert trained(prepare(train_on="all")) == [[text]]
    assert trained(prepare(train_on="completion")) == [["two<end_of_turn>"]]
    row = talk("a", "one", "b")
    row["messages"][1]["train"] = True
    jsonl({"prompt": row["messages"], "completion": "two"})
    assert trained(prepare(train_on="completion")) == [["one<end_of_turn>", "two<end_of_turn>"]]


def test_columns() -> None:
    jsonl({"quote": "{author} {{author}} \\1", "author": "某", "n": 3})
    columns = {"prompt": "{n}. Who wrote: {quote}?", "completion": "author"}
    got = prepare(source={"columns": columns})
    assert texts(got) == [gemma("3. Who wrote: {author} {{author}} \\1?", "某")]
    assert trained(got) == [["某<end_of_turn>"]]
    assert texts(prepare(source={"columns": {"text": "quote"}})) == ["<bos>{author} {{author}} \\1<eos>"]


def test_columns_that_are_not_there() -> None:
    jsonl(
        {"quote": "q", "author": "a"}, {"quote": "q"}, {"quote": None, "author": "a"}, {"quote": ["q"], "author": "a"}
    )
    columns = {"prompt": "Who: {quot}", "completion": "author"}
    for on_bad_row in ("error", "skip"):
        assert fault(lambda on=on_bad_row: prepare(source={"columns": columns}, on_bad_row=on)) == (
            "rows.jsonl: columns: prompt: there is no column 'quot'; there are quote, author"
        )
    columns = {"prompt": "Who: {quote}", "completion": "author"}
    assert fault(lambda: prepare(source={"columns": columns})) == (
        "rows.jsonl:2: columns: completion: there is no column 'author'; there are quote\n"
        "rows.jsonl:3: columns: prompt: the column 'quote' holds NoneType, not text\n"
        "rows.jsonl:4: columns: prompt: the column 'quote' holds list, not text\n"
        "rows.jsonl: 3 of 4 rows cannot be used; mend them, or write data.on_bad_row: skip"
    )
    assert prepare(source={"columns": columns}, on_bad_row="skip").ledger.bad == {
        "columns: completion: there is no column 'author'": 1,
        "columns: prompt: the column 'quote' holds NoneType, not text": 1,
        "columns: prompt: the column 'quote' holds list, not text": 1,
    }


def test_bad_rows_are_reported_together() -> None:
    faulty = [{"messages": [{"role": f"role {number}", "content": "a"}]} for number in range(12)]
    jsonl({"messages": [USER, {"role": "assistant", "content": "b"}]}, *[{"messages": []}] * 6, *faulty)
    report = fault(prepare).split("\n")
    assert report[0] == "rows.jsonl:2: it has no messages; also rows.jsonl:3, rows.jsonl:4, rows.jsonl:5 and 2 more"
    assert report[1].startswith("rows.jsonl:8: message 1: unknown role 'role 0'")
    assert report[-2:] == [
        "rows.jsonl: rows with 3 other faults",
        "rows.jsonl: 18 of 19 rows cannot be used; mend them, or write data.on_bad_row: skip",
    ]
    assert len(report) == 12


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"question": "Why?", "answer": "So."}, ["Why?", "So.", "question and answer", "prompt and completion"]),
        ({"Input": "Why?", "Output": "So."}, ["Why?", "So.", "Input and Output", "prompt and completion"]),
        (
            {"instruction": "Sum up.", "context": "It was.", "response": "So."},
            ["Sum up.\n\nIt was.", "So.", "instruction and context and response", "instruction and input and output"],
        ),
    ],
)
def test_the_commonest_pairs_of_columns_are_read(row: dict[str, str], read: list[str]) -> None:
    jsonl(row)
    prepared = prepare()
    asked, answer, columns, targets = read
    assert texts(prepared) == [
        f"<bos><start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>\n"
    ]
    assert trained(prepared) == [[f"{answer}<end_of_turn>"]]
    assert prepared.ledger.mended == {f"rows whose {columns} are read as {targets}": 1}
    assert prepared.ledger.unread == {}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "answer": 1},
        {"question": "a", "answer": "b", "passage": "c"},
        {"query": "a", "reply text": "b"},
    ],
)
def test_other_columns_are_not_guessed(row: dict[str, Any]) -> None:
    jsonl(row)
    assert "its format is not known from its columns" in fault(prepare)


def said(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("messages", {}, "it has no messages"),
        ("messages", {"messages": []}, "it has no messages"),
        ("messages", {"messages": None}, "it has no messages"),
        ("messages", {"messages": "Hi"}, "it has no messages; it is a text, not a list"),
        ("messages", said("Hi"), "its messages are not a list of maps"),
        ("messages", said([USER]), "its messages are not a list of maps"),
        ("messages", said({}), "message 1: unknown role None; known are system, developer, user, assistant, tool"),
        ("messages", said({"role": "user", "content": 7}), "message 1: its content is int, not text"),
        ("messages", said({"role": "user", "content": {"a": 1}}), "message 1: its content is dict, not text"),
        ("messages", said({"role": "user", "content": [["a"]]}), "a message has parts that are not text"),
        (
            "messages",
            said({"role": "user", "content": [{"type": "image", "url": "x"}]}),
            "a message has parts that are not text; the type of one is 'image'",
        ),
        ("messages", said({"role": "user", "content": [{"type": "text"}]}), "a message has a text part without text"),
        (
            "messages",
            said({"role": "user", "content": [{"type": "text", "text": 7}]}),
            "a message has a text part without text",
        ),
        (
            "messages",
            said(USER, {"role": "assistant", "content": "b", "train": "false"}),
            "a message's train is 'false'; write true or false",
        ),
        (
            "messages",
            said(USER, {"role": "assistant", "content": "b", "loss_weight": "0"}),
            "a message's loss_weight is '0'; write 0 or 1",
        ),
        (
            "messages",
            said(USER | {"train": True}, {"role": "assistant", "content": "b"}),
            "message 1: `train` on a user message; only an assistant's can be chosen or left out",
        ),
        ("sharegpt", {"conversations": 1}, "it has no conversations"),
        ("sharegpt", {"conversations": [1]}, "its messages are not a list of maps"),
        (
            "sharegpt",
            {"conversations": [{"from": ["human"], "value": "a"}]},
            "message 1: unknown role ['human']; known are system, developer, user, assistant, tool",
        ),
        (
            "sharegpt",
            {"system": ["S"], "conversations": [{"from": "human", "value": "a"}]},
            "message 1: its content is list, not text",
        ),
        ("alpaca", {"instruction": 1, "output": "x"}, "its instruction or input is not text"),
        ("alpaca", {"instruction": "a", "input": ["b"], "output": "x"}, "its instruction or input is not text"),
        ("alpaca", {"instruction": "a"}, "message 2: its content is NoneType, not text"),
        ("prompt_completion", {"prompt": "a"}, "it has no prompt and completion"),
        ("prompt_completion", {"prompt": 1, "completion": "b"}, "its messages are not a list of maps"),
        ("text", {"text": 7}, "it has no text"),
        ("text", {"text": ""}, "the text to train on is empty"),
        ("text", {"text": "a\ud800"}, "the text: its text holds a lone surrogate ('\\ud800'), which is no character"),
        ("text", {"text": "a<bos>"}, "the text: its text holds <bos>, which is a special token of this tokenizer"),
    ],
)
def test_bad_rows(form: str, row: dict[str, Any], reason: str) -> None:
    raw(json.dumps(row).encode())
    source = {"format": form}
    assert fault(lambda: prepare(source=source)) == (
        f"rows.jsonl:1: {reason}; mend the row, or write data.on_bad_row: skip"
    )
    short = reason.removeprefix("message 1: ").removeprefix("message 2: ").partition(";")[0]
    assert fault(lambda: prepare(source=source, on_bad_row="skip")) == (
        f"no row is left to train on: 0 of 1 rows, 0 tokens, 0 trained on (0%), longest 0; 1 {short}"
    )


@pytest.mark.parametrize(
    "row", [{"prompt": None, "completion": "b"}, {"prompt": "a"}, {"prompt": ["a"], "completion": "b"}]
)
def test_bad_raw_rows(row: dict[str, Any]) -> None:
    jsonl(row)
    assert fault(lambda: prepare(source={"format": "prompt_completion", "raw": True})) == (
        "rows.jsonl:1: its prompt or completion is not text; mend the row, or write data.on_bad_row: skip"
    )


# ---------------------------------------------------------------------------------------------------------------
# Bad rows and the ledger


def test_every_source_must_hold_rows() -> None:
    jsonl({"text": "a"})
    raw(b"\n", "none.jsonl")
    sources = [DataSource(path="rows.jsonl"), DataSource(path="none.jsonl")]
    assert fault(lambda: build_datasets(DataSection(train=sources), chat(), None)) == "none.jsonl: it holds no rows"


def test_skip_counts_each_reason() -> None:
    lines = [talk("Hi", "Yo"), talk("Hi", ""), talk("Hi", "a", "b", " "), {"messages": []}, {"other": 1}, talk("Hi")]
    jsonl(*lines, [1], talk("Hi", "Ho"))
    got = prepare(on_bad_row="skip")
    assert texts(got) == [gemma("Hi", "Yo"), gemma("Hi", "Ho")]
    assert got.dataset is not None
    assert got.dataset["row"][:] == ["rows.jsonl:1", "rows.jsonl:8"]
    assert got.ledger.bad == {
        "the assistant's text is empty": 2,
        "it has no messages": 2,
        "there is no assistant message": 1,
        "a list where a row (a map) belongs": 1,
    }
    assert (got.ledger.read, got.ledger.kept) == (8, 2)


def test_reasons_are_counted_together() -> None:
    twice = [{"messages": [{"role": "user", "content": "a"}] * n + talk("a", "b")["messages"][1:]} for n in (2, 3)]
    jsonl(talk("a", "b", system="S"), *twice, talk("a", "b", system="T"), talk("a", "b"))
    got = prepare(template="gemma", on_bad_row="skip")
    assert got.ledger.bad == {
        "the chat template refuses it: the gemma template has no system role": 2,
        "the chat template refuses it: roles must alternate user, assistant, user, ...": 2,
    }


def test_a_reason_is_whole_whatever_the_row_holds() -> None:
    jsonl(talk("a", "b"), {"messages": [{"role": "x; message 1: y", "content": "a"}]})
    ledger = prepare(on_bad_row="skip").ledger
    assert ledger.bad == {"unknown role 'x; message 1: y'": 1}
    assert ledger.first == {
        "unknown role 'x; message 1: y'": "rows.jsonl:2; known are system, developer, user, assistant, tool"
    }


def test_ledger_exactly() -> None:
    silent = talk("a", "b")
    silent["messages"][1]["train"] = False
    twice = talk("Hi", "Yo", "Hi", "Yo", "Thanks")
    jsonl(talk("Hi", "Yo"), talk("Hi", ""), silent, twice, {"messages": None}, talk("Hi", "Yo"))
    raw(json.dumps({"text": "Yo"}).encode(), "more.jsonl")
    own = chat()
    data = DataSection(train=[DataSource(path="rows.jsonl"), DataSource(path="more.jsonl")], on_bad_row="skip")
    got, evaluation = build_datasets(data, own, None)
    lengths = [len(own.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts(got)]
    assert texts(got) == [gemma("Hi", "Yo"), gemma("Hi", "Yo", "Hi", "Yo"), "<bos>Yo<eos>"]
    yo = len(own.tokenizer("Yo", add_special_tokens=False)["input_ids"]) + 1
    short, middle, long = sorted(lengths)
    trained = 4 * yo
    counted = [sum(low <= n <= low + 3 for n in lengths) for low in range(1, long + 1, 4)]
    assert 30 < long <= 40
    assert got.ledger.as_dict() == {
        "rows": {"read": 7, "kept": 3, "repeated": 0, "cut": 0, "split": 0},
        "mended": {"rows whose messages after the last assistant turn were removed": 1},
        "dropped": {"with nothing to train on": 1, "exact duplicates": 1},
        "bad": {"the assistant's text is empty": 1, "it has no messages": 1},
        "unread": {},
        "first": {
            "the assistant's text is empty": "rows.jsonl:2",
            "with nothing to train on": "rows.jsonl:3",
            "it has no messages": "rows.jsonl:5",
        },
        "turns_trained": 4,
        "end_of_turns_trained": 4,
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "trained_share": round(trained / sum(lengths), 4),
        "lost_trained_tokens": 0,
        "thinking_tokens": 0,
        "trained_thinking_tokens": 0,
        "length": {"p5": short, "p25": short, "p50": middle, "p75": long, "p95": long, "p100": long},
        "histogram": [{"from": 1 + 4 * i, "to": 4 + 4 * i, "rows": n} for i, n in enumerate(counted)],
        "sources": {
            "rows.jsonl": {"rows": 2, "tokens": middle + long, "trained_tokens": 3 * yo},
            "more.jsonl": {"rows": 1, "tokens": short, "trained_tokens": yo},
        },
        "languages": {
            "English": {
                "rows": 3,
                "tokens": sum(lengths),
                "characters": len("".join(texts(got)[:2])) + 2,
                "tokens_per_character": round(sum(lengths) / (len("".join(texts(got)[:2])) + 2), 4),
            }
        },
        "answers": {},
    }
    assert got.ledger.summary() == (
        f"3 of 7 rows, {sum(lengths)} tokens, {trained} trained on ({trained / sum(lengths):.0%}), longest {long}; "
        "1 rows whose messages after the last assistant turn were removed; 1 with nothing to train on; "
        "1 exact duplicates; 1 the assistant's text is empty; 1 it has no messages"
    )
    assert evaluation == Prepared(None, Ledger())


def test_summary_line() -> None:
    ledger = Ledger(read=12_345, cut=2, split=1)
    for length in range(1, 6):
        ledger.keep("a", PieceCounts(length * 1000, length * 250, turns=1))
    ledger.dropped["longer than training.max_length 9"] = 4
    ledger.bad["it has no messages"] = 1000
    assert ledger.summary() == (
        "5 of 12,345 rows, 15,000 tokens, 3,750 trained on (25%), longest 5,000; 2 cut at a turn's end; 1 split; "
        "4 longer than training.max_length 9; 1,000 it has no messages"
    )
    assert Ledger().summary() == "0 of 0 rows, 0 tokens, 0 trained on (0%), longest 0"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 10, 13, 70])
def test_percentile(count: int) -> None:
    ledger = Ledger()
    for length in range(1, count + 1):
        ledger.keep("a", PieceCounts(length, 1, turns=1))
    for share in (0.5, 0.9, 1.0):
        length = ledger.percentile(share)
        assert length >= share * count - 1e-9
        assert length - 1 < share * count
    assert Ledger().percentile(0.5) == 0


# ---------------------------------------------------------------------------------------------------------------
# Rows that are too long


def size(text: str) -> int:
    return len(chat().tokenizer(text, add_special_tokens=False)["input_ids"])


LONG = ("Hi", "one", "Oh", "two two", "Ah", "three")


def test_truncate_turns() -> None:
    jsonl(talk(*LONG), talk("Hi", "Yo"))
    whole = gemma(*LONG[:4])[:-1]
    for room in (size(whole), size(whole) + 3):
        got = prepare(max_length=room)
        assert texts(got) == [whole, gemma("Hi", "Yo")]
        assert trained(got)[0] == ["one<end_of_turn>", "two two<end_of_turn>"]
        assert (got.ledger.cut, got.ledger.kept, got.ledger.turns) == (1, 2, 3)
    got = prepare(max_length=size(whole) - 1)
    assert texts(got)[0] == gemma(*LONG[:2])[:-1]
    # Nothing of the first row fits: it is dropped, and the account says so.
    jsonl(talk("Hi " * 40, "Yo"), talk("Hi", "Yo"))
    got = prepare(max_length=20)
    assert texts(got) == [gemma("Hi", "Yo")]
    assert got.ledger.dropped == {"with no trained turn that ends within training.max_length 20": 1}
    assert got.ledger.cut == 0
    jsonl(talk(*LONG))
    got = prepare(max_length=size(gemma(*LONG)))
    assert (texts(got), got.ledger.cut) == ([gemma(*LONG)], 0)


def test_split() -> None:
    jsonl(talk(*LONG, system="Sys"))
    two = gemma("Sys\n\nHi", *LONG[1:4])
    got = prepare(on_overflow="split", max_length=size(two))
    assert texts(got) == [two, gemma("Sys\n\nAh", "three")]
    assert trained(got) == [["one<end_of_turn>", "two two<end_of_turn>"], ["three<end_of_turn>"]]
    assert all(len(ids) <= size(two) for ids in got.dataset["input_ids"])  # type: ignore[index]
    ledger = got.ledger
    assert (ledger.read, ledger.kept, ledger.split, ledger.cut, ledger.turns) == (1, 2, 1, 0, 3)
    got = prepare(on_overflow="split", max_length=size(two) - 1)
    assert (
        texts(got)
        == [gemma("Sys\n\nHi", "one"), gemma("Sys\n\nOh", "two two"), gemma("Sys\n\nAh", "three")][: len(texts(got))]
    )
    got = prepare(on_overflow="split", train_on="last_assistant", max_length=size(two))
    assert (texts(got), trained(got)) == ([gemma("Sys\n\nAh", "three")], [["three<end_of_turn>"]])


def test_split_leaves_out_only_what_cannot_fit() -> None:
    jsonl(talk("Hi", "one", "Oh " * 50, "two", "Ah", "three"))
    got = prepare(on_overflow="split", max_length=30)
    assert texts(got) == [gemma("Hi", "one"), gemma("Ah", "three")]
    assert (got.ledger.split, got.ledger.cut) == (1, 1)
    jsonl(talk("Hi", "one", "Oh " * 50, "two"))
    got = prepare(on_overflow="split", max_length=30)
    assert texts(got) == [gemma("Hi", "one")]
    assert (got.ledger.split, got.ledger.cut) == (0, 1)
    jsonl(talk("Hi " * 50, "one"), talk("Hi", "one"))
    got = prepare(on_overflow="split", max_length=30)
    assert texts(got) == [gemma("Hi", "one")]
    assert got.ledger.dropped == {"with no exchange that fits into training.max_length 30": 1}


def test_a_greeting() -> None:
    greeting = {"role": "assistant", "content": "Welcome"}
    jsonl({"messages": [greeting, *talk("a", "one", "b", "two")["messages"]]})
    own = chat("chatml")
    turns = [
        f"<|im_start|>user\n{a}<|im_end|>\n<|im_start|>assistant\n{b}<|im_end|>\n"
        for a, b in (("a", "one"), ("b", "two"))
    ]
    room = len(own.tokenizer("<bos>" + turns[1], add_special_tokens=False)["input_ids"])
    got = prepare(template="chatml", on_overflow="split", max_length=room)
    assert texts(got, own) == ["<bos>" + turn for turn in turns]
    assert got.ledger.mended == {"rows whose opening assistant message was removed": 1}


def test_text_that_is_too_long() -> None:
    words = "one two three four five six seven eight nine ten"
    jsonl({"text": words})
    ids = chat().encode_text("", words).input_ids
    assert 10 < len(ids) < 20
    got = prepare(max_length=10)
    assert got.dataset is not None
    assert got.dataset["input_ids"][:] == [ids[:10].tolist()]
    assert (got.ledger.cut, got.ledger.split) == (1, 0)
    got = prepare(max_length=10, on_overflow="split")
    assert got.dataset is not None
    pieces = got.dataset["input_ids"][:]
    assert all(piece[0] == ids[0] for piece in pieces)
    labels = [label for row in got.dataset for label in row["labels"] if label != IGNORE]
    assert labels == ids[1:].tolist()
    assert pieces[1][1] == pieces[0][-1]
    assert (got.ledger.cut, got.ledger.split) == (0, 1)


@pytest.mark.parametrize("row", [talk(*LONG), {"text": "one two three four five six seven"}])
def test_drop_and_error(row: dict[str, Any]) -> None:
    jsonl(row, row)
    [length] = prepare().ledger.lengths
    assert fault(lambda: prepare(on_overflow="error", max_length=9)) == (
        f"rows.jsonl:1: {length} tokens, longer than training.max_length 9 (data.on_overflow: error)"
    )
    assert fault(lambda: prepare(on_overflow="drop", max_length=9)) == (
        "no row is left to train on: 0 of 2 rows, 0 tokens, 0 trained on (0%), longest 0; "
        "2 longer than training.max_length 9; 100% of the tokens to train on are lost to training.max_length "
        "(raise it, or see data.on_overflow)"
    )
    ledger = prepare(on_overflow="drop", max_length=500).ledger
    assert (ledger.kept, ledger.dropped) == (1, {"exact duplicates": 1})
    assert prepare(on_overflow="drop", max_length=500, deduplicate=False).ledger.kept == 2


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.lists(st.text("ab 日\n", min_size=1, max_size=30), min_size=2, max_size=8), min_size=1, max_size=4
    ),
    room=st.integers(8, 60),
    overflow=st.sampled_from(["truncate_turns", "split", "drop"]),
    train_on=st.sampled_from(["assistant", "last_assistant", "all"]),
)
def test_every_row_is_accounted_for(rows: list[list[str]], room: int, overflow: str, train_on: str) -> None:
    jsonl(*(talk(*said) for said in rows))
    try:
        got = prepare(on_overflow=overflow, train_on=train_on, on_bad_row="skip", max_length=room)
    except DataError as error:
        assert str(error).startswith("no row is left to train on: ")  # noqa: PT017
        return
    ledger, dataset = got.ledger, got.dataset
    assert dataset is not None
    kept = set(dataset["row"])
    assert ledger.read == len(rows) == len(kept) + ledger.bad.total() + ledger.dropped.total()
    assert ledger.kept == len(dataset) == ledger.lengths.total()
    assert all(len(ids) <= room for ids in dataset["input_ids"])
    assert ledger.trained_tokens == sum(label != IGNORE for labels in dataset["labels"] for label in labels)
    assert ledger.tokens == sum(map(len, dataset["input_ids"]))
    assert ledger.split == sum(list(dataset["row"]).count(name) > 1 for name in kept)
    assert all(any(label != IGNORE for label in labels) for labels in dataset["labels"])


# ---------------------------------------------------------------------------------------------------------------
# Training and evaluation


def test_eval_fraction() -> None:
    jsonl(*(talk(f"q{i}", f"a{i}") for i in range(10)))

    def halves(seed: int) -> tuple[list[str], list[str]]:
        train, held = build_datasets(section(eval_fraction=0.3, seed=seed), chat(), None)
        assert (train.ledger.read, train.ledger.kept) == (7, 7)
        assert (held.ledger.read, held.ledger.kept) == (3, 3)
        return texts(train), texts(held)

    train, held = halves(1)
    everything = [gemma(f"q{i}", f"a{i}") for i in range(10)]
    assert sorted(train + held) == everything
    assert (train, held) == ([t for t in everything if t not in held], [t for t in everything if t in held])
    assert halves(1) == (train, held)
    assert len({tuple(halves(seed)[1]) for seed in range(5)}) > 1


def test_eval_fraction_keeps_rows_whole_and_their_account() -> None:
    jsonl(*(talk("Hi", f"one {i}", "Oh", f"two {i}") for i in range(4)))
    room = size(gemma("Hi", "one 0")) + 2
    train, held = build_datasets(section(eval_fraction=0.25, on_overflow="split"), chat(), room)
    assert train.dataset is not None
    assert held.dataset is not None
    assert not set(train.dataset["row"]) & set(held.dataset["row"])
    assert (train.ledger.read, train.ledger.kept, train.ledger.split) == (3, 6, 3)
    assert (held.ledger.read, held.ledger.kept, held.ledger.split) == (1, 2, 1)
    train, held = build_datasets(section(eval_fraction=0.25), chat(), room)
    assert (train.ledger.cut, held.ledger.cut) == (3, 1)


def test_eval_fraction_of_too_little() -> None:
    jsonl(talk("a", "b"))
    assert fault(lambda: prepare(eval_fraction=0.5)) == ("data.eval_fraction: 0.5 of 1 rows leaves none to train on")
    jsonl(talk("a"))
    assert fault(lambda: prepare(eval_fraction=0.5, on_bad_row="skip")) == (
        "no row is left to train on: 0 of 1 rows, 0 tokens, 0 trained on (0%), longest 0; "
        "1 there is no assistant message"
    )


def test_eval_rows() -> None:
    jsonl(talk("a", "b"))
    jsonl(talk("c", "d"), talk("e"), name="eval.jsonl")
    train, held = build_datasets(section(eval=[DataSource(path="eval.jsonl")], on_bad_row="skip"), chat(), None)
    assert (texts(train), texts(held)) == ([gemma("a", "b")], [gemma("c", "d")])
    assert (train.ledger.read, held.ledger.read, held.ledger.bad.total()) == (1, 2, 1)
    jsonl(talk("e"), name="eval.jsonl")
    assert fault(
        lambda: build_datasets(section(eval=[DataSource(path="eval.jsonl")], on_bad_row="skip"), chat(), None)
    ) == (
        "data.eval: no row is left to evaluate on: 0 of 1 rows, 0 tokens, 0 trained on (0%), longest 0; "
        "1 there is no assistant message"
    )


def test_nothing_left_to_train_on() -> None:
    row = talk("a", "b")
    row["messages"][1]["train"] = False
    jsonl(row)
    assert fault(prepare) == (
        "no row is left to train on: 0 of 1 rows, 0 tokens, 0 trained on (0%), longest 0; 1 with nothing to train on"
    )


def test_no_chat_template() -> None:
    jsonl(talk("a", "b"))
    with pytest.raises(TemplateError, match=r"^model\.chat_template: "):
        prepare(template=None)


# ---------------------------------------------------------------------------------------------------------------
# Anything at all in a file

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        [
            "",
            "a",
            "user",
            "assistant",
            "system",
            "human",
            "gpt",
            "text",
            "\x00",
            "\ud800",
            "\ufeff",
            "<bos>",
            "{{ x }}",
            "1" * 300,
        ]
    )
)
KEYS = st.sampled_from(
    [
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "text",
        "system",
        "role",
        "content",
        "from",
        "value",
        "type",
        "train",
        "loss_weight",
        "",
    ]
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)


@settings(max_examples=examples(250), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.dictionaries(KEYS, VALUES, min_size=1, max_size=5) | VALUES, min_size=1, max_size=3),
    form=st.sampled_from([None, "messages", "sharegpt", "alpaca", "prompt_completion", "text"]),
    columns=st.sampled_from([{}, {"text": "content"}, {"prompt": "Q {content} {role}", "completion": "value"}]),
    template=st.sampled_from(["gemma", "gemma3", "chatml"]),
    skip=st.sampled_from(["skip", "error"]),
    room=st.sampled_from([None, 12]),
    overflow=st.sampled_from(["truncate_turns", "split"]),
)
@pytest.mark.slow
def test_odd_rows_are_told(
    rows: list[Any], form: Any, columns: Any, template: str, skip: str, room: int | None, overflow: str
) -> None:
    raw("".join(json.dumps(row) + "\n" for row in rows).encode())
    source = {"format": form, "columns": columns, "raw": form == "prompt_completion" and room is None}
    try:
        prepare(template=template, source=source, on_bad_row=skip, on_overflow=overflow, max_length=room)
    except DataError:
        return


@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.binary(min_size=1, max_size=60) | st.text('{}[]",:\n\rtex0\\u "', min_size=1, max_size=40).map(str.encode),
    name=st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz", "rows.csv.gz"]),
)
def test_odd_bytes_are_told(data: bytes, name: str) -> None:
    raw(gzip.compress(data) if name.startswith("rows.csv.gz") else data, name)
    try:
        prepare(name, source={"format": "text"}, on_bad_row="skip")
    except DataError:
        return


# ---------------------------------------------------------------------------------------------------------------
# Rows that other people published


def quotes(row: dict[str, Any]) -> list[str]:
    return [row["author"].strip()]


def said_by_assistant(row: dict[str, Any]) -> list[str]:
    return [plain(m["content"]).strip() for m in row["messages"] if m["role"] == "assistant"]


def plain(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["value"] for part in content)


REFUSED = "the chat template refuses it: roles must alternate user, assistant, user, ... after the system message"


@pytest.mark.skipif(REAL is None, reason="FINETUNE_REAL_DATA is not set")
@pytest.mark.parametrize(
    ("file", "form", "columns", "answers", "rows", "turns", "bad"),
    [
        ("ultrachat_200k_first4.jsonl", "messages", {}, said_by_assistant, 4, 16, {}),
        (
            "english_quotes.jsonl",
            "prompt_completion",
            {"prompt": "Who wrote: {quote}", "completion": "author"},
            quotes,
            2508,
            2508,
            {},
        ),
        ("japanese_dialogues.jsonl", "messages", {}, said_by_assistant, 450, 450, {}),
        ("alpaca_en_demo.json", "alpaca", {}, lambda row: [row["output"].strip()], 999, 999, {}),
        (
            "sharegpt_dummy.json",
            "sharegpt",
            {},
            lambda row: [turn["value"].strip() for turn in row["conversations"] if turn["from"] == "gpt"],
            500,
            1000,
            {},
        ),
        # Gemma's template has no place for a tool's answer.
        ("sharegpt_toolcall_demo.json", "sharegpt", {}, None, 300, 435, {REFUSED: 153}),
        ("content_parts_demo.jsonl", "messages", {}, said_by_assistant, 500, 500, {}),
        ("identity_placeholders.json", "alpaca", {}, lambda row: [row["output"].strip()], 91, 91, {}),
        (
            "gemma_japanese_answers.jsonl",
            "prompt_completion",
            {"completion": "answer"},
            lambda row: [row["answer"].strip()],
            120,
            120,
            {},
        ),
    ],
)
@pytest.mark.slow
def test_real_rows(
    file: str,
    form: Any,
    columns: dict[str, str],
    answers: Callable[[dict[str, Any]], list[str]] | None,
    rows: int,
    turns: int,
    bad: dict[str, int],
) -> None:
    path = str(Path(str(REAL)) / file)
    for source in ({"format": form, "columns": columns}, {"columns": columns}):
        got = prepare(path, source=source, on_bad_row="skip" if bad else "error", deduplicate=False)
        ledger = got.ledger
        assert (ledger.read, ledger.kept, ledger.turns) == (rows, rows - sum(bad.values()), turns)
        assert (ledger.bad, ledger.dropped, ledger.cut, ledger.split) == (bad, {}, 0, 0)
    if answers:
        read = [row for _, row in read_rows(DataSource(path=path)) if isinstance(row, dict)]
        assert trained(got) == [[text + "<end_of_turn>" for text in answers(row)] for row in read]


@pytest.mark.skipif(REAL is None, reason="FINETUNE_REAL_DATA is not set")
@pytest.mark.slow
def test_real_tool_calls() -> None:
    path = str(Path(str(REAL)) / "sharegpt_toolcall_demo.json")
    got = prepare(path, template="chatml", deduplicate=False)
    assert (got.ledger.read, got.ledger.kept, got.ledger.bad) == (300, 300, {})
    read = [row for _, row in read_rows(DataSource(path=path)) if isinstance(row, dict)]
    calls = [sum(turn["from"] == "function_call" for turn in row["conversations"]) for row in read]
    assert sum(calls) > 100
    assert [sum(t.startswith("<tool_call>\n") for t in row) for row in trained(got, chat("chatml"))] == calls


@pytest.mark.skipif(REAL is None, reason="FINETUNE_REAL_DATA is not set")
@pytest.mark.parametrize("overflow", ["truncate_turns", "split"])
def test_real_rows_in_little_room(overflow: str) -> None:
    path = str(Path(str(REAL)) / "ultrachat_200k_first4.jsonl")
    got = prepare(path, on_overflow=overflow, max_length=1024)
    assert got.dataset is not None
    assert max(map(len, got.dataset["input_ids"])) <= 1024
    lost = got.ledger.dropped.total()
    assert len(set(got.dataset["row"])) + lost == got.ledger.read == 4
    assert all(text.startswith("<bos><start_of_turn>user\n") for text in texts(got))
    assert all(text.rstrip("\n").endswith("<end_of_turn>") for text in texts(got))


def test_what_cannot_be_obeyed_is_refused() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss_weight": 0.5}]
    raw(json.dumps({"messages": turns}).encode())
    mend = "; mend the row, or write data.on_bad_row: skip"
    half = "rows.jsonl:1: a message's loss_weight is 0.5; write 0 or 1"
    assert fault(prepare) == half + mend
    turns[1] = {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]}
    raw(json.dumps({"messages": turns}).encode())
    assert fault(prepare) == "rows.jsonl:1: message 2: the chat template leaves out its tool call" + mend
    raw(b'{"text": "plain"}')
    assert fault(lambda: prepare(train_on="last_assistant")) == (
        "rows.jsonl: data.train_on: last_assistant needs chats, these rows have no turns; write completion or all"
    )


# ---------------------------------------------------------------------------------------------------------------
# Rows that a template writes in parts, or not at all

FED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n[t][/t]' }}{% endif %}"
)


def test_a_row_for_each_exchange_or_answer_behind_a_fed_thought() -> None:
    Path("fed.jinja").write_text(FED, encoding="utf-8")
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
    calls = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "high"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    jsonl(talk("a", "b", "c", "d"), {"messages": calls})
    own, prepared = chat("fed.jinja"), prepare(template="fed.jinja")
    made = '{"name": "look", "arguments": {"at": "sea"}}<|im_end|>'
    assert trained(prepared, own) == [*(["b<|im_end|>"], ["d<|im_end|>"]), *([made], ["b<|im_end|>"], ["d<|im_end|>"])]
    assert all(text.count("[t][/t]") == 1 for text in texts(prepared, own))
    mended = prepared.ledger.mended
    assert list(mended.values()) == [2]
    assert next(iter(mended)).startswith("rows split into one row per exchange")


def test_special_tokens_where_the_source_allows_them() -> None:
    jsonl({"prompt": "<|im_start|>area(r) = <|im_end|>", "completion": "3.14 * r * r"})
    source = {"format": "prompt_completion", "raw": True}
    assert "its text holds <|im_" in fault(lambda: prepare(source=source))
    prepared = prepare(source=source | {"special_tokens": True})
    assert texts(prepared) == ["<bos><|im_start|>area(r) = <|im_end|>3.14 * r * r<eos>"]
    assert trained(prepared) == [["3.14 * r * r<eos>"]]
    jsonl({"text": "a<|im_end|>b"})
    assert trained(prepare(source={"special_tokens": True})) == [["a<|im_end|>b<eos>"]]
    jsonl(talk("a", "b"))
    assert fault(lambda: prepare(source={"special_tokens": True})) == (
        "rows.jsonl: special_tokens is for text without a chat template, these rows are messages; remove it"
    )


# ---------------------------------------------------------------------------------------------------------------
# Rows that are too long to be tokenised


@pytest.fixture
def few_characters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At most 1000 characters in a row of any length; the number of texts of each call of the tokenizer."""
    monkeypatch.setattr("finetune.data.prepare._MAX_CHARACTERS", 1000)
    tokenize, calls = Chat.tokenize, list[int]()

    def counted(self: Chat, texts: Any) -> Any:
        calls.append(len(texts))
        assert all(len(text) < 2000 for text in texts)
        return tokenize(self, texts)

    monkeypatch.setattr(Chat, "tokenize", counted)
    return calls


def spoken(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}


def test_a_row_of_too_many_characters_is_not_tokenised(few_characters: list[int]) -> None:
    jsonl(spoken("short"), spoken("long " * 300))
    assert fault(prepare) == (
        "rows.jsonl:2: it has too many characters to be tokenised; 1,515, divide it; "
        "mend the row, or write data.on_bad_row: skip"
    )
    assert prepare(on_bad_row="skip").ledger.bad == {"it has too many characters to be tokenised": 1}
    with pytest.raises(DataError, match=r"; 2 longer than training\.max_length 9;"):
        prepare(on_overflow="drop", max_length=9)
    jsonl({"text": "long " * 300}, name="text.jsonl")
    with pytest.raises(DataError, match="too many characters"):
        prepare("text.jsonl", train_on="all", on_overflow="split", max_length=9)


def test_a_row_that_fits_into_max_length_is_kept_however_many_characters_it_has(few_characters: list[int]) -> None:
    text = "the " * 300 + "end"
    jsonl(spoken(text))
    length = len(prepare(max_length=2000).dataset[0]["input_ids"])
    assert len(prepare(max_length=length).dataset) == 1


def test_long_rows_are_tokenised_few_at_a_time(few_characters: list[int]) -> None:
    jsonl(*(spoken(f"{i} " * 300) for i in range(8)))
    assert len(prepare().dataset) == 8
    assert max(few_characters) == 2
