"""Rows of other programs: all that a message holds is read, counted by its key, or makes the row a bad one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.formats import COLUMNS_READ, FORMATS
from finetune.data.mixture import Prepared, build_datasets
from finetune.model.load import load_tokenizer
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Column, DataSection, DataSource, ModelSection
from finetune.system.errors import DataError, LabelError, RecipeError

ASKED = {"role": "user", "content": "Tide at Brest?"}
SAID = {"role": "assistant", "content": "Four metres."}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FUNCTION = {"name": "tide", "description": "Tide at a port", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


def messages(*turns: Any, **row: Any) -> Any:
    """The messages that a row's messages become, with `unread` behind them where there are such keys."""
    got = FORMATS["messages"]({"messages": [*turns], **row})
    return (got["messages"], got["unread"]) if "unread" in got else got["messages"]


def fault(call: Callable[[], object]) -> str:
    with pytest.raises((LabelError, DataError)) as caught:
        call()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------
# System texts


SYSTEM = {"role": "system", "content": "In Latin."}
PAIR = [ASKED, SAID]
SHAREGPT = [{"from": "human", "value": "Tide at Brest?"}, {"from": "gpt", "value": "Four metres."}]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("messages", {"messages": PAIR}),
        ("messages", {"messages": [SYSTEM, *PAIR]}),
        ("sharegpt", {"conversations": SHAREGPT}),
        ("sharegpt", {"conversations": [{"from": "system", "value": "In Latin."}, *SHAREGPT]}),
        ("alpaca", {"instruction": "Tide at Brest?", "output": "Four metres."}),
        ("prompt_completion", {"prompt": "Tide at Brest?", "completion": "Four metres."}),
        ("prompt_completion", {"prompt": [ASKED], "completion": [SAID]}),
        ("prompt_completion", {"prompt": [SYSTEM, ASKED], "completion": "Four metres."}),
    ],
)
def test_a_column_with_the_system_text(form: str, row: dict[str, Any], key: str) -> None:
    got = FORMATS[form]({**row, key: "In Latin."})
    assert got["messages"] == [SYSTEM, *PAIR]
    assert got.get("prompt_messages", 2) == 2
    assert all("system" not in m.values() for m in FORMATS[form](row | {key: ""})["messages"][1:])


def test_two_system_texts_that_differ() -> None:
    reason = "its column system and its first message differ; keep one"
    assert fault(lambda: messages(SYSTEM, ASKED, SAID, system="In Greek.")) == reason
    columns = "its columns system and system_prompt differ; keep one"
    assert fault(lambda: messages(ASKED, SAID, system="a", system_prompt="b")) == columns


# ---------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize(
    ("keys", "train"),
    [
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"loss": 0}, False),
        ({"loss": 1.0}, True),
        ({"loss": None}, None),
        ({"loss_scale": 0}, False),
        ({"loss_scale": 1.0}, True),
        ({"masked": True}, False),
        ({"masked": False}, True),
        ({"masked": True, "train": False}, False),
        ({"masked": True, "loss": False, "loss_scale": 0, "weight": 0}, False),
    ],
)
def test_masks(keys: dict[str, Any], train: bool | None) -> None:
    assert messages(ASKED, SAID | keys) == [ASKED, SAID | ({} if train is None else {"train": train})]
    # What is not to be trained on may say so whoever speaks.
    if train is False and not keys.keys() & {"loss_scale", "weight"}:
        assert messages(ASKED | keys, SAID) == [ASKED | {"train": False}, SAID]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"loss": 2.31}, "a message's loss is 2.31; write true or false"),
        ({"masked": "yes"}, "a message's masked is 'yes'; write true or false"),
        ({"loss_scale": 0.5}, "a message's loss_scale is 0.5; write 0 or 1"),
        ({"loss_scale": [1, 0]}, "a message's loss_scale is [1, 0]; write 0 or 1"),
        ({"train": True, "masked": True}, "a message's train and masked differ; keep one"),
        ({"loss": False, "loss_scale": 1}, "a message's loss and loss_scale differ; keep one"),
        ({"weight": 1, "loss": False}, "a message's weight and loss differ; keep one"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
            "a message's train_detail cannot be obeyed; write train: true or false",
        ),
        ({"mask": 1}, "a message's mask cannot be obeyed; write train: true or false"),
        ({"train_on_turn": False}, "a message's train_on_turn cannot be obeyed; write train: true or false"),
    ],
)
def test_masks_that_cannot_be_obeyed(keys: dict[str, Any], reason: str) -> None:
    assert fault(lambda: messages(ASKED, SAID | keys)) == reason


def test_a_weight_on_a_user_is_counted() -> None:
    assert messages(ASKED | {"weight": 0}, SAID) == PAIR
    assert messages(ASKED | {"weight": 1, "loss_scale": 0.5}, SAID) == (
        PAIR,
        ["messages.loss_scale", "messages.weight"],
    )


# ---------------------------------------------------------------------------------------------------------------
# Calls


ARGUMENTS = json.dumps({"port": "Brest"})


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": ARGUMENTS}},
        {"role": "assistant", "function_call": json.dumps({"name": "tide", "arguments": ARGUMENTS})},
        {"role": "assistant", "tool_calls": [], "function_call": {"name": "tide", "arguments": {"port": "Brest"}}},
        {"role": "assistant", "tool_calls": [CALL], "function_call": {"name": "tide", "arguments": ARGUMENTS}},
        {"role": "assistant", "tool_calls": [{"name": "tide", "parameters": {"port": "Brest"}}]},
        {"role": "assistant", "tool_calls": [{"name": "tide", "input": ARGUMENTS}]},
        {"role": "tool_call", "content": json.dumps({"name": "tide", "arguments": {"port": "Brest"}})},
        {"role": "tool_call", "content": json.dumps([{"name": "tide", "parameters": {"port": "Brest"}}])},
        {"from": "function_call", "value": {"name": "tide", "arguments": {"port": "Brest"}}},
        *(
            {"role": "assistant", "content": [part]}
            for part in (
                {"type": "tool_call", "value": json.dumps({"name": "tide", "arguments": {"port": "Brest"}})},
                {"type": "tool_call", "value": {"name": "tide", "arguments": ARGUMENTS}},
                {"type": "tool_call", "tool_call": {"name": "tide", "arguments": ARGUMENTS}},
                {"type": "tool_call", "function": {"name": "tide", "arguments": ARGUMENTS}},
                {"type": "tool_call", "name": "tide", "arguments": {"port": "Brest"}},
                {"type": "tool_use", "name": "tide", "input": {"port": "Brest"}},
                {"type": "function_call", "name": "tide", "arguments": ARGUMENTS},
            )
        ),
    ],
)
def test_calls(turn: dict[str, Any]) -> None:
    assert messages(ASKED, turn) == [ASKED, CALLED]


def test_calls_beside_text_and_identities() -> None:
    called = {"name": "tide", "arguments": ARGUMENTS}
    assert messages(ASKED, SAID | {"function_call": called}) == [ASKED, SAID | {"tool_calls": [CALL]}]
    parts = [
        {"type": "thinking", "thinking": "I look it up.", "signature": "x"},
        {"type": "text", "text": "Let me look.", "cache_control": {"type": "ephemeral"}},
        {"type": "tool_use", "id": "7", "name": "tide", "input": {"port": "Brest"}},
    ]
    assert messages(ASKED, {"role": "assistant", "content": parts}) == (
        [
            ASKED,
            {
                "role": "assistant",
                "content": "Let me look.",
                "reasoning_content": "I look it up.",
                "tool_calls": [{"id": "7", **CALL}],
            },
        ],
        ["messages.content.cache_control", "messages.content.signature"],
    )
    calls = [{"index": 0, "call_id": "c", "id": "f", **CALL, "strict": True}]
    assert messages(ASKED, CALLED | {"tool_calls": calls}) == (
        [ASKED, CALLED | {"tool_calls": [{"id": "c", **CALL}]}],
        ["messages.tool_calls.id", "messages.tool_calls.index", "messages.tool_calls.strict"],
    )


def test_tools_under_their_earlier_name() -> None:
    for row in (
        {"functions": [FUNCTION]},
        {"functions": json.dumps([FUNCTION])},
        {"functions": [FUNCTION], "tools": [TOOL]},
        {"functions": [], "tools": [TOOL]},
    ):
        assert FORMATS["messages"]({"messages": PAIR} | row)["tools"] == [TOOL]
    other = FUNCTION | {"name": "wind"}
    assert fault(lambda: messages(*PAIR, functions=[other], tools=[TOOL])) == (
        "its tools and functions differ; keep one"
    )


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "tool_call", "content": "tide()"}, "a tool_call message holds no call"),
        (CALLED | {"function_call": {"name": "wind", "arguments": "{}"}}, "a message's tool_calls and function_call"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "tool_calls on a user message"),
        ({"role": "user", "content": "a", "function_call": CALL["function"]}, "tool_calls on a user message"),
        ({"role": "tool", "content": "a", "thinking": "b"}, "reasoning_content on a tool message"),
        (
            CALLED | {"tool_calls": [{"name": "tide", "arguments": {"a": 1}, "parameters": {"b": 1}}]},
            "a tool call's arguments and parameters differ",
        ),
        (
            CALLED | {"tool_calls": [{"name": "tide", "function": {"name": "wind"}}]},
            "a tool call has a name or arguments inside and outside `function`",
        ),
        (SAID | {"content": "", "tool_plan": ["a"]}, "a message's tool_plan is list, not text"),
    ],
)
def test_calls_that_cannot_be_read(turn: dict[str, Any], reason: str) -> None:
    assert fault(lambda: messages(ASKED, turn)).startswith(reason)


# ---------------------------------------------------------------------------------------------------------------
# Parts and the answers of tools


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (
            [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}],
            {"content": "ab"},
        ),
        (
            [{"type": "reasoning", "value": "t"}, {"type": "text", "value": "a"}],
            {"content": "a", "reasoning_content": "t"},
        ),
        (
            [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}],
            {"content": "a", "reasoning_content": "t"},
        ),
        ({"type": "text", "text": "a"}, {"content": "a"}),
        ([], {"content": ""}),
    ],
)
def test_parts(content: Any, keys: dict[str, Any]) -> None:
    assert messages(ASKED, {"role": "assistant", "content": content}) == [ASKED, {"role": "assistant", **keys}]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([{"type": "text", "text": "a"}, {"type": "reasoning", "text": "b"}], "a message's reasoning comes after"),
        (
            [{"type": "tool_call", "value": CALL["function"]}, {"type": "text", "text": "a"}],
            "a message's text comes after",
        ),
        ([{"type": "image_url", "image_url": "x"}], "a message has parts that are not text; the type of one is"),
        ([{"type": "refusal", "refusal": "No."}], "a message has parts that are not text; the type of one is"),
        ([{"type": "redacted_thinking", "data": "x"}], "a message has parts that are not text; the type of one is"),
        ([{"type": "reasoning", "summary": [{"text": "a"}]}], "a message has a reasoning part without text"),
        ([{"type": "text", "text": "a", "value": "b"}], "a part's text and value differ"),
        ([{"type": "tool_result", "content": "a"}], "a assistant message holds the result of a tool"),
        (["a"], "a message has parts that are not text"),
    ],
)
def test_parts_that_cannot_be_read(parts: Any, reason: str) -> None:
    assert fault(lambda: messages(ASKED, {"role": "assistant", "content": parts})).startswith(reason)


def test_results_of_tools_as_parts() -> None:
    result = {"type": "tool_result", "tool_use_id": "7", "content": [{"type": "text", "text": "4 m"}]}
    answer = {"role": "tool", "content": "4 m", "tool_call_id": "7"}
    asked = [result, {"type": "text", "text": "So?"}]
    assert messages(ASKED, CALLED, {"role": "user", "content": asked}, SAID) == [
        *(ASKED, CALLED, answer),
        *({"role": "user", "content": "So?"}, SAID),
    ]
    for role in ("user", "tool"):
        assert messages(ASKED, CALLED, {"role": role, "content": [result]}, SAID) == [ASKED, CALLED, answer, SAID]
    got, unread = messages(ASKED, CALLED, {"role": "user", "content": [result | {"is_error": True}]}, SAID)
    assert (got[2], unread) == (answer, ["messages.content.is_error"])
    late = [{"type": "text", "text": "So?"}, result]
    assert fault(lambda: messages(ASKED, CALLED, {"role": "user", "content": late})).startswith(
        "a tool's result comes after a text"
    )


# ---------------------------------------------------------------------------------------------------------------
# Lists of messages


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("messages", {"messages": json.dumps(PAIR)}),
        ("messages", {"messages": json.dumps(SHAREGPT)}),
        ("messages", {"messages": SHAREGPT}),
        ("messages", {"messages": [ASKED, SHAREGPT[1]]}),
        ("messages", {"messages": [ASKED | {"from": "human", "value": "Tide at Brest?"}, SAID]}),
        ("sharegpt", {"conversations": json.dumps(SHAREGPT)}),
        ("sharegpt", {"conversations": json.dumps(PAIR)}),
        ("sharegpt", {"conversations": PAIR}),
        ("sharegpt", {"conversations": [{"role": "human", "value": "Tide at Brest?"}, SAID]}),
        ("prompt_completion", {"prompt": SHAREGPT[:1], "completion": SHAREGPT[1:]}),
    ],
)
def test_lists_of_messages(form: str, row: dict[str, Any]) -> None:
    assert FORMATS[form](row)["messages"] == PAIR


def test_history_as_a_text() -> None:
    row = {"instruction": "c", "output": "d", "history": '[["a", "b"]]'}
    assert [m["content"] for m in FORMATS["alpaca"](row)["messages"]] == ["a", "b", "c", "d"]


def test_two_names_that_differ() -> None:
    assert fault(lambda: messages(ASKED | {"from": "gpt"})) == "a message's role and from differ; keep one"
    assert fault(lambda: messages(ASKED | {"value": "b"})) == "a message's content and value differ; keep one"
    # Other things may have these names.
    assert messages(ASKED | {"from": "Ann", "value": 0.5}, SAID) == (PAIR, ["messages.from", "messages.value"])


def test_keys_that_hold_something_are_counted() -> None:
    said = SAID | {"refusal": None, "annotations": [], "audio": {}, "id": "m1", "score": 0}
    assert messages(ASKED, said) == (PAIR, ["messages.id", "messages.score"])


def test_a_key_twice_in_a_text_of_json() -> None:
    twice = '[{"role": "user", "content": "a", "content": "b"}]'
    reason = "the key 'content' is written twice in one object"
    assert fault(lambda: FORMATS["messages"]({"messages": twice})) == reason
    assert fault(lambda: FORMATS["sharegpt"]({"conversations": twice})) == reason
    call = {"name": "tide", "arguments": '{"port": "Brest", "port": "Le Havre"}'}
    reason = "the key 'port' is written twice in one object"
    assert fault(lambda: messages(ASKED, CALLED | {"tool_calls": [call]})) == reason
    assert fault(lambda: messages(*PAIR, tools='[{"name": "f", "name": "g"}]')) == (
        "the key 'name' is written twice in one object"
    )


# ---------------------------------------------------------------------------------------------------------------
# To tokens


TEMPLATE = """{%- for m in messages -%}
{{- '<|im_start|>' ~ m.role ~ '\n' -}}
{%- if m.tool_plan -%}{{- '[' ~ m.tool_plan ~ ']' -}}{%- endif -%}
{{- m.content if m.content is string else ANSWER -}}
{%- for call in m.tool_calls or [] -%}{{- call.function.name ~ call.function.arguments | tojson -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def chat(answer: str = "m.content | tojson") -> Chat:
    tokenizer = load_tokenizer(ModelSection(name_or_path="random:llama", chat_template="chatml"))
    tokenizer.chat_template = "{{- bos_token -}}" + TEMPLATE.replace("ANSWER", f"({answer})")
    return Chat(tokenizer)


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prepare(row: dict[str, Any], own: Chat, **source: Any) -> Prepared:
    Path("rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return build_datasets(DataSection(train=[DataSource(path="rows.jsonl", **source)]), own, None)[0]


def text_and_trained(got: Prepared, own: Chat) -> tuple[str, str]:
    assert got.dataset is not None
    [row] = got.dataset
    decode = own.tokenizer.decode
    return decode(row["input_ids"]), decode([label for label in row["labels"] if label != IGNORE])


def test_a_map_reaches_the_template() -> None:
    answer = {"name": "tide", "response": {"height": 4, "high": True, "by": ["é"]}}
    row = {"messages": [ASKED, CALLED, {"role": "tool", "content": answer}, SAID]}
    own = chat()
    text, trained = text_and_trained(prepare(row, own), own)
    assert f"<|im_start|>tool\n{json.dumps(answer, ensure_ascii=False)}<|im_end|>\n" in text
    assert trained == 'tide{"port": "Brest"}<|im_end|>Four metres.<|im_end|>'
    mend = "; mend the row, or write data.on_bad_row: skip"
    assert fault(lambda: prepare(row, chat("m.content"))) == (
        "rows.jsonl:1: message 3: the chat template prints a map of a tool's answer as Python, not as JSON; "
        "write the content as a text of JSON" + mend
    )
    assert fault(lambda: prepare(row, chat("m.content.name"))) == (
        "rows.jsonl:1: message 3: the chat template leaves out or changes the tool's answer" + mend
    )
    # The text of a list of a tool may be anything.
    row["messages"][2] = {"role": "tool", "content": [{"height": 4}, "x"]}
    assert '\n[{"height": 4}, "x"]<' in text_and_trained(prepare(row, own), own)[0]
    row["messages"][2] = {"role": "user", "content": answer}
    assert fault(lambda: prepare(row, own)) == "rows.jsonl:1: message 3: its content is dict, not text" + mend


def test_a_tool_plan_reaches_the_template() -> None:
    row = {"messages": [ASKED, CALLED | {"tool_plan": "I look."}, {"role": "tool", "content": "4"}, SAID]}
    own = chat()
    assert text_and_trained(prepare(row, own), own)[1] == (
        '[I look.]tide{"port": "Brest"}<|im_end|>Four metres.<|im_end|>'
    )
    own.tokenizer.chat_template = own.tokenizer.chat_template.replace("if m.tool_plan", "if false")
    assert fault(lambda: prepare(row, Chat(own.tokenizer))).startswith(
        "rows.jsonl:1: message 2: the chat template leaves out its tool plan"
    )


def test_what_nothing_reads_is_in_the_ledger() -> None:
    row = {
        "messages": [ASKED | {"name": "Ann", "id": 7}, SAID],
        "conversations": SHAREGPT,
        "prompt_id": "x",
        "function_call": "auto",
        "note": None,
        "tags": [],
    }
    got = prepare(row, chat())
    assert got.ledger.unread == dict.fromkeys(
        ["conversations", "prompt_id", "function_call", "messages.id", "messages.name"], 1
    )
    assert got.ledger.as_dict()["unread"] == got.ledger.unread
    assert got.ledger.summary().endswith(
        "; keys that are not read: conversations (1), prompt_id (1), function_call (1), messages.id (1), "
        "messages.name (1)"
    )


def test_columns_that_are_read_elsewhere_are_not_counted() -> None:
    row = {"q": "a", "a": "b", "lang": "en", "prompt": "old", "more": 1, "system": "S"}
    source = {"columns": {"prompt": "{q}?", "completion": "a"}, "filter": {"lang": "en"}}
    assert prepare(row, chat(), **source).ledger.unread == {"prompt": 1, "more": 1}
    # Plain text has no place for a system text.
    raw = {"prompt": "2+2=", "completion": " 4", "system": "S", "tools": [TOOL]}
    got = prepare(raw, chat(), format="prompt_completion", raw=True)
    assert got.ledger.unread == {"system": 1, "tools": 1}
    own = chat()
    own.tokenizer.chat_template = None
    assert prepare(raw, own).ledger.unread == {"system": 1, "tools": 1}
    assert prepare({"text": "a", "system": "S"}, chat()).ledger.unread == {"system": 1}


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        (
            {"messages": "m", "history": "s"},
            {"m": PAIR, "s": "S"},
            "columns: history: the format messages does not read it; "
            "it reads messages, system, system_prompt, tools, functions, chat_template_kwargs",
        ),
        (
            {"text": "t", "prompt": "t"},
            {"t": "a", "completion": "b"},
            "columns: text: the format prompt_completion does not read it; "
            "it reads prompt, completion, system, system_prompt, tools, functions, chat_template_kwargs",
        ),
    ],
)
def test_a_column_that_no_format_reads(columns: dict[str, str], row: dict[str, Any], reason: str) -> None:
    assert fault(lambda: prepare(row, chat(), columns=columns)) == f"rows.jsonl: {reason}"


def test_a_recipe_names_only_columns_that_a_format_reads() -> None:
    assert {*get_args(Column)} == {column for columns in COLUMNS_READ.values() for column in columns}
    Path("rows.jsonl").write_text("{}", encoding="utf-8")
    data = "data: {train: [{path: rows.jsonl, columns: {messages: m, KEY: s}}]}"
    training = "training: {max_steps: 1, output_dir: run}"
    recipe = f"model: {{name_or_path: 'random:llama'}}\nlora: {{r: 4}}\n{data}\n{training}\n"
    for key, words in (("sytem", "system"), ("zzz", ", ".join(get_args(Column)))):
        Path("recipe.yaml").write_text(recipe.replace("KEY", key), encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            load_recipe("recipe.yaml")
        assert str(caught.value) == f"recipe.yaml:3: data.train.0.columns.{key}: is unknown; write {words}"
