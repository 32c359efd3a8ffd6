"""The shipped templates `gemma4` and `functiongemma`: what they render, and the labels of their conversations."""

import copy
import random
from functools import cache
from typing import Any

import pytest
from test_referee import over_conversations, template, tokenizer
from transformers.utils import chat_template_utils

from finetune.data.adapt import adapt
from finetune.data.chat import Chat
from finetune.data.messages import read_messages
from finetune.data.template import load_template
from finetune.system.errors import LabelError

Row = dict[str, Any]
compiled = cache(chat_template_utils._compile_jinja_template)


def outcome(text: str, row: Row) -> str:
    """The text that a template renders of a row, or the kind of its error."""
    try:
        return str(compiled(text).render(bos_token="<bos>", documents=None, **row))
    except Exception as error:
        return type(error).__name__


# ---------------------------------------------------------------------------------------------------------------
# Gemma 4, beside the template that trl stores of google/gemma-4-E2B-it

TEXTS = ("Hi", " two\n", "", "東京の天気は？", "<|channel>thought\nx\n<channel|>yes", "a<channel|>b<channel|>c", "{x}")
PARTS = ("image", "audio", "video", "image_url", "input_audio", "text", "text", "text")
KEYS = ("b", "A", "c", "type")


class Draw(random.Random):
    """Draws conversations of every kind that a chat template may get."""

    def chance(self, share: float) -> bool:
        return self.random() < share

    def some(self, names: tuple[str, ...], most: int) -> list[str]:
        return self.sample(names, self.randrange(most + 1))

    def value(self, depth: int = 0) -> Any:
        kinds = [None, True, False, self.randrange(-5, 99), 2.5, self.choice(TEXTS)]
        if depth < 3 and self.chance(0.4):
            inner = {key: self.value(depth + 1) for key in self.some(KEYS, 3)}
            return self.choice([inner, [*inner.values()]])
        return self.choice(kinds)

    def schema(self, depth: int = 0) -> Row:
        kind = self.choice(["string", "array", "object", "number", "boolean", "STRING", ["string", "null"], None])
        schema: Row = {"type": kind} if kind else {}
        for key, values in {
            "description": ["what", "", " d "],
            "enum": [["a", "b"], [1, 2], []],
            "nullable": [True, False],
            "required": [["x"], ["x", "y"], []],
        }.items():
            if self.chance(0.4):
                schema[key] = self.choice(values)
        if depth < 3 and (kind == "object" or self.chance(0.1)):
            inner = {name: self.schema(depth + 1) for name in self.some(("y", "Z", "x", "description"), 3)}
            schema |= {"properties": inner} if self.chance(0.7) else inner
        if depth < 3 and kind == "array":
            items = self.schema(depth + 1) | self.choice([{}, {"default": None}, {"default": 1}])
            schema["items"] = self.choice([items, items, {}, None])
        return schema

    def tool(self, name: str) -> Row:
        properties = {key: self.schema() for key in self.some(("y", "Z", "x", "type"), 3)}
        parameters: Row = {"type": "object", "properties": properties}
        if self.chance(0.5):
            parameters["required"] = self.choice([["x"], ["x", "y"], []])
        function: Row = {"name": name, "description": self.choice(["does", ""]), "parameters": parameters}
        if self.chance(0.2):
            del function[self.choice(["description", "parameters"])]
        if self.chance(0.1):
            del parameters["type"]
        if self.chance(0.2):
            answers = [{"type": "object", "description": "r"}, {"type": "string"}, {"description": "z"}]
            function["response"] = self.choice(answers)
        return {"type": "function", "function": function}

    def content(self) -> Any:
        parts = [{"type": self.choice(PARTS), "text": self.choice(TEXTS)} for _ in range(self.randrange(3))]
        return self.choice([*[self.choice(TEXTS)] * 7, None, parts, parts])

    def message(self) -> Row:
        role = self.choice(["user", "user", "assistant", "assistant", "tool", "tool", "system", "developer", "critic"])
        message = {"role": role, "content": self.content()}
        if role != "user" and self.chance(0.3):
            message[self.choice(["reasoning", "reasoning_content"])] = self.choice([*TEXTS, None])
        if role == "assistant" and self.chance(0.5):
            calls = []
            for _ in range(self.randrange(3)):
                arguments = {key: self.value() for key in self.some(KEYS, 3)}
                given = self.choice([arguments] * 9 + [None, '{"a": 1}', [1]])
                call: Row = {"type": "function", "function": {"name": self.choice("fgh"), "arguments": given}}
                calls.append(call | ({"id": self.choice("12")} if self.chance(0.6) else {}))
            message["tool_calls"] = self.choice([calls, calls, calls, None])
        if role == "assistant" and self.chance(0.1):
            message["tool_responses"] = [{"name": self.choice(["f", None]), "response": self.value()}]
        if role == "tool":
            message |= {"name": self.choice("fgh")} if self.chance(0.5) else {}
            message |= {"tool_call_id": self.choice("12")} if self.chance(0.5) else {}
            message["content"] = self.choice([message["content"]] * 4 + [5, True, 2.5])
        return message

    def row(self) -> Row:
        """The variables of a rendering: messages, tools, thinking, and whether an answer is asked for."""
        messages = [self.message() for _ in range(self.randrange(7))]
        if self.chance(0.4):
            parts = [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]
            text = self.choice(["Be kind.", " x ", parts, None])
            messages.insert(0, {"role": self.choice(["system", "developer"]), "content": text})
        names = [name for name in ("enable_thinking", "preserve_thinking") if self.chance(0.5)]
        return {
            "messages": messages,
            "tools": [self.tool(name) for name in "fgh"[: self.randrange(1, 3)]] if self.chance(0.5) else None,
            "add_generation_prompt": self.chance(0.5),
        } | {name: self.choice([True, False, None]) for name in names}


@pytest.mark.parametrize("count", [600, pytest.param(30_000, marks=pytest.mark.soak)])
@pytest.mark.slow
def test_gemma4_renders_as_the_model_s_own_template(count: int) -> None:
    ours, theirs, draw = load_template("gemma4"), template("gemma4_v5"), Draw(count)
    refused = 0
    for _ in range(count):
        row = draw.row()
        assert outcome(ours, row) == outcome(theirs, row), row
        refused += outcome(theirs, row) == "TemplateError"
    assert count // 100 < refused < count // 5


def test_gemma4_writes_a_map_that_a_tool_answers_with() -> None:
    """The model's own template fails on it."""
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tide", "arguments": {}}}]}
    row = {"messages": [{"role": "user", "content": "Hi"}, called, {"role": "tool", "content": {"m": 4, "at": "noon"}}]}
    assert outcome(load_template("gemma4"), row).endswith('response:tide{at:<|"|>noon<|"|>,m:4}<tool_response|>')
    assert outcome(template("gemma4_v5"), row) == "UndefinedError"


@cache
def chat(name: str, referee: str = "") -> Chat:
    own = copy.deepcopy(tokenizer(referee or name))
    own.chat_template = load_template(name)
    return Chat(own)


@pytest.mark.slow
def test_gemma4_has_the_labels_of_the_model_s_own_template() -> None:
    ours, theirs = chat("gemma4", "gemma4_v5"), Chat(tokenizer("gemma4_v5"))
    trained = 0

    def labels(own: Chat, *arguments: Any) -> Any:
        try:
            row = own.encode(*arguments)
        except LabelError as error:
            return str(error).partition(";")[0]
        return list(row.input_ids), list(row.labels), row.thinking

    def check(messages: list[Row], train_on: str, tools: Any) -> None:
        nonlocal trained
        found = labels(ours, messages, train_on, tools)
        assert found == labels(theirs, messages, train_on, tools)
        trained += isinstance(found, tuple)

    over_conversations("gemma4_v5", 25, check)
    assert trained > 5


# ---------------------------------------------------------------------------------------------------------------
# FunctionGemma. Its own template cannot be had without an account; Google's guides to the model show what it renders.

TIDE = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Tide at a port",
        "parameters": {
            "type": "object",
            "properties": {
                "port": {"type": "string", "description": "Name of the port"},
                "Day": {"type": "string", "enum": ["today", "tomorrow"]},
                "at": {"type": "array", "description": "Hours", "items": {"type": "integer"}},
                "type": {"type": "string", "description": "left out, as the template takes it for a key"},
                "unit": {
                    "type": "object",
                    "description": "Units",
                    "properties": {"length": {"type": "string"}},
                    "required": ["length"],
                },
                "deep": {"type": "number", "enum": [1, 2], "description": "Depth"},
            },
            "required": ["port", "Day"],
        },
    },
}
DECLARED = (
    "<start_function_declaration>declaration:tide{description:<escape>Tide at a port<escape>,parameters:{properties:{"
    "at:{description:<escape>Hours<escape>,items:{type:<escape>INTEGER<escape>},type:<escape>ARRAY<escape>},"
    "Day:{description:<escape><escape>,enum:[<escape>today<escape>,<escape>tomorrow<escape>],"
    "type:<escape>STRING<escape>},"
    "deep:{description:<escape>Depth<escape>,type:<escape>NUMBER<escape>},"
    "port:{description:<escape>Name of the port<escape>,type:<escape>STRING<escape>},"
    "unit:{description:<escape>Units<escape>,properties:{length:{description:<escape><escape>,"
    "type:<escape>STRING<escape>}},required:[<escape>length<escape>],type:<escape>OBJECT<escape>}},"
    "required:[<escape>port<escape>,<escape>Day<escape>],type:<escape>OBJECT<escape>}}<end_function_declaration>"
)
SWITCH = {"role": "developer", "content": "You can call functions."}
ASKED = {"role": "user", "content": " Tide at Brest? "}
CALLS = [
    {"id": i, "type": "function", "function": {"name": "tide", "arguments": {"port": port, "at": [6], "dry": True}}}
    for i, port in (("a", "Brest"), ("b", "Calais"))
]
CALLED = [
    f"<start_function_call>call:tide{{at:[6],dry:true,port:<escape>{port}<escape>}}<end_function_call>"
    for port in ("Brest", "Calais")
]
STOP = "<start_function_response>"
FOUR, FIVE = (f"<start_function_response>response:tide{{m:{m}}}<end_function_response>" for m in (4, 5))
SAID = {"role": "assistant", "content": "Four metres."}
HEAD = "<bos><start_of_turn>developer\nYou can call functions.<end_of_turn>\n"
USER = "<start_of_turn>user\nTide at Brest?<end_of_turn>\n"
MODEL = "<start_of_turn>model\n"
END = "<end_of_turn>"


def calling(*calls: Row, text: str = "") -> Row:
    return {"role": "assistant", "content": text, "tool_calls": list(calls)}


def result(content: Any, **more: Any) -> Row:
    return {"role": "tool", "content": content, **more}


# The messages behind the developer's and the user's, what is rendered of them, and what is trained on.
FUNCTIONS: dict[str, tuple[list[Row], str, list[str]]] = {
    "no call": ([SAID], f"Four metres.{END}\n", [f"Four metres.{END}"]),
    "a call alone": ([calling(CALLS[0])], CALLED[0] + STOP, [CALLED[0] + STOP]),
    "a call and its answer": (
        [calling(CALLS[0]), result({"m": 4}, tool_call_id="a"), SAID],
        f"{CALLED[0]}{FOUR}Four metres.{END}\n",
        [CALLED[0] + STOP, f"Four metres.{END}"],
    ),
    "an answer in the form of the guides": (
        [calling(CALLS[0]), result({"name": "tide", "response": {"m": 4}}), SAID],
        f"{CALLED[0]}{FOUR}Four metres.{END}\n",
        [CALLED[0] + STOP, f"Four metres.{END}"],
    ),
    "an answer that is a text": (
        [calling(CALLS[0]), result("4 m", name="tide"), SAID],
        CALLED[0] + "<start_function_response>response:tide{value:<escape>4 m<escape>}<end_function_response>"
        f"Four metres.{END}\n",
        [CALLED[0] + STOP, f"Four metres.{END}"],
    ),
    "two calls at once": (
        [calling(*CALLS), result({"m": 5}, tool_call_id="b"), result({"m": 4}, tool_call_id="a"), SAID],
        f"{''.join(CALLED)}{FIVE}{FOUR}Four metres.{END}\n",
        ["".join(CALLED) + STOP, f"Four metres.{END}"],
    ),
    "two calls at once, in the form of the guides": (
        [calling(*CALLS), result([{"name": "tide", "response": {"m": m}} for m in (4, 5)]), SAID],
        f"{''.join(CALLED)}{FOUR}{FIVE}Four metres.{END}\n",
        ["".join(CALLED) + STOP, f"Four metres.{END}"],
    ),
    "one call after the other": (
        [calling(CALLS[0]), result({"m": 4}, name="tide"), calling(CALLS[1]), result({"m": 5}, name="tide"), SAID],
        f"{CALLED[0]}{FOUR}{CALLED[1]}{FIVE}Four metres.{END}\n",
        [CALLED[0] + STOP, CALLED[1] + STOP, f"Four metres.{END}"],
    ),
    "a text beside a call, and a question after it": (
        [calling(CALLS[0], text="I look."), result({"m": 4}, tool_call_id="a"), SAID, ASKED, SAID],
        f"I look.{CALLED[0]}{FOUR}Four metres.{END}\n{USER}{MODEL}Four metres.{END}\n",
        [f"I look.{CALLED[0]}{STOP}", *[f"Four metres.{END}"] * 2],
    ),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functiongemma_trains_calls_and_their_stop_and_no_answer_of_a_tool(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_referee.template", load_template)
    messages, text, trained = FUNCTIONS[kind]
    own = chat("functiongemma")
    row = own.encode(read_messages([SWITCH, ASKED, *messages], set()), tools=[TIDE])
    decode = own.tokenizer.decode
    assert decode(row.input_ids) == HEAD.replace(END, DECLARED + END) + USER + MODEL + text
    assert [decode(row.input_ids[turn.start : turn.end]) for turn in row.turns] == trained
    assert sum(row.labels >= 0) == sum(turn.end - turn.start for turn in row.turns)
    # As the row gives them, not read into messages of their own.
    assert outcome(load_template("functiongemma"), {"messages": [SWITCH, ASKED, *messages], "tools": [TIDE]}) == (
        HEAD.replace(END, DECLARED + END) + USER + MODEL + text
    )


def test_functiongemma_knows_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_referee.template", load_template)
    for tools in (None, [TIDE]):
        assert adapt(chat("functiongemma").render, [SWITCH, ASKED], tools).changes == []
    for role in ("developer", "system"):
        row = {"messages": [SWITCH | {"role": role}, ASKED], "add_generation_prompt": True}
        assert outcome(load_template("functiongemma"), row) == HEAD + USER + MODEL


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([calling(CALLS[0]), ASKED, SAID], "the answer of a tool must follow its call; message 3 is user"),
        ([SAID, {"role": "critic", "content": "Good."}, SAID], "a message is of the role developer, system, user, "),
        ([calling(CALLS[0]), result("4 m"), SAID], "a tool's answer must name its function; write its name in "),
    ],
)
def test_functiongemma_refuses(messages: list[Row], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        compiled(load_template("functiongemma")).render(messages=[ASKED, *messages], bos_token="<bos>")
