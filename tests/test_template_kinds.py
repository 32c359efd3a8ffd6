"""Templates of kinds that people really have: what is trained on, and what is refused by name."""

import copy
import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from test_chat import chat, prove, refusal, said, talk, tokenizer, trained

from finetune.data.chat import Chat
from finetune.data.mixture import Prepared, build_datasets
from finetune.data.samples import encoded_sample_rows, sample_rows
from finetune.data.template import load_template
from finetune.export.verify import _token_ids
from finetune.hub.card import _example_prompt
from finetune.recipe.schema import DataSection, DataSource
from finetune.system.errors import LabelError, TemplateError
from finetune.train.rows import TrainingRows

BODY = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
HEADER = "{{ '<|im_start|>assistant\n' }}"
ASKED = "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
PLAIN = BODY + ASKED
BREAD = talk("Which bread keeps longest?", "Rye, kept dry.", "And in a tin?", "A week or so.")
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "Tide at a port", "parameters": {}}}]


def with_tokens(template: str, *tokens: str, eos: str | None = None) -> Chat:
    own = copy.deepcopy(chat(template).tokenizer)
    own.add_special_tokens({"additional_special_tokens": list(tokens)})
    if eos:
        own.eos_token = eos
    return Chat(own)


# ---------------------------------------------------------------------------------------------------------------
# The next answer's header is written, asked for or not

# Llama 3's first template.
LLAMA = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
# As Command A: a turn has two tokens in front and two behind; a system text of its own names more tokens.
COMMAND = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|START|><|SYSTEM|>Begin with <|BEGIN|>.<|STOP|>{% endif %}"
    "{% for m in messages %}<|START|>{{ '<|BOT|>' if m.role == 'assistant' else '<|USER|>' }}"
    "{{ '<|BEGIN|>' + m.content + '<|END|>' if m.role == 'assistant' else m.content }}<|STOP|>{% endfor %}"
    "<|START|><|BOT|>{% if add_generation_prompt %}<|BEGIN|>{% endif %}"
)
# As Phi: each role has a token of its own.
ROLES = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "<|assistant|>{{ '\n' }}"
)
# A prefix as GLM's, and a default system turn that opens with a token of its own.
PREFIX = "[gMASK]<sop>" + BODY.replace("{{ bos_token }}", "") + HEADER
SYSTEM = BODY.replace("{% for", "<|sys|>Be kind.<|im_end|>\n{% for", 1) + HEADER


@pytest.mark.parametrize(
    ("own", "end"),
    [
        (chat(BODY + HEADER), "<|im_end|>"),
        (chat(BODY.replace("' }}{% endfor", "' }}{{ '' }}{% endfor") + HEADER), "<|im_end|>"),
        (with_tokens(LLAMA, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
        (
            with_tokens(COMMAND, *(f"<|{t}|>" for t in ["START", "SYSTEM", "USER", "BOT", "BEGIN", "END", "STOP"])),
            "<|END|><|STOP|>",
        ),
        (with_tokens(ROLES, "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
        (with_tokens(PREFIX.replace("[gMASK]", "{{ bos_token }}[gMASK]"), "[gMASK]", "<sop>"), "<|im_end|>"),
        (with_tokens(SYSTEM, "<|sys|>"), "<|im_end|>"),
        (with_tokens(BODY + HEADER, eos="<|im_end|>"), "<|im_end|>"),
        (
            chat(
                "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}assistant:"
            ),
            "<|im_end|>",
        ),
    ],
)
@pytest.mark.parametrize("texts", [("Hi", "Rye."), ("a", "b", "user", "assistant"), ("Hi", "", "Oh", "x")])
def test_a_header_that_is_always_written(own: Chat, end: str, texts: tuple[str, ...]) -> None:
    lead = " " if "{{ m.role }}: " in own.tokenizer.chat_template else ""
    for train_on in ("assistant", "last_assistant"):
        row = own.encode(talk(*texts), train_on)
        prove(own, talk(*texts), row)
        wanted = [f"{lead}{text}{end}" for text in texts[1::2]]
        assert trained(own, row) == (wanted if train_on == "assistant" else wanted[-1:])
    assert own.tokenizer.decode([own.end_of_turn_id]) in end
    assert end.endswith(own.tokenizer.decode([own.end_of_turn_id]))


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (
            chat(BODY.replace("<|im_end|>", "") + HEADER),
            "message 2: the chat template ends the turn with the header of the next one, which ends no turn",
        ),
        (
            with_tokens(ROLES.replace("<|end|>", ""), "<|user|>", "<|assistant|>"),
            "message 2: the template ends the turn with '\\n<|', in which this tokenizer has no special token, "
            "so the model could not learn to stop",
        ),
    ],
)
def test_a_header_that_is_always_written_ends_no_turn(own: Chat, reason: str) -> None:
    assert refusal(own, talk("Hi", "Rye.")) == reason
    with pytest.raises(TemplateError):
        _ = own.end_of_turn_id


# ---------------------------------------------------------------------------------------------------------------
# Templates that take no plain conversation

THINK_FED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '[t]' ~ ('\n' + m.reasoning_content + '\n' if m.reasoning_content else '') ~ '[/t]\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n[t]\n' }}{% endif %}"
)
TOOLS_ONLY = PLAIN.replace(
    "{% for m", "{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% for m", 1
)
PREFILLED = BODY + ASKED.replace("assistant\n", "assistant\n{")
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system text is needed') }}{% endif %}" + PLAIN
)


def test_thinking_that_is_fed() -> None:
    own, row = chat(THINK_FED), talk("Which?", "Rye.")
    row[1]["reasoning_content"] = "It is dense."
    encoded = own.encode(row)
    prove(own, row, encoded)
    assert trained(own, encoded) == ["It is dense.\n[/t]\nRye.<|im_end|>"]
    assert own.tokenizer.convert_ids_to_tokens([own.end_of_turn_id]) == ["<|im_end|>"]
    assert own.turn_token_ids
    assert "the prompt that inference would feed" in refusal(own, talk("Which?", "Rye."))


def test_tools_that_are_needed() -> None:
    own, row = chat(TOOLS_ONLY), talk("Tide?", "I cannot tell.")
    assert trained(own, own.encode(row, tools=TOOLS)) == ["I cannot tell.<|im_end|>"]
    assert own.tokenizer.convert_ids_to_tokens([own.end_of_turn_id]) == ["<|im_end|>"]


def test_an_answer_that_is_begun() -> None:
    own = chat(PREFILLED)
    assert trained(own, own.encode(talk("Which?", '{"bread": "rye"}'))) == ['"bread": "rye"}<|im_end|>']
    assert own.tokenizer.convert_ids_to_tokens([own.end_of_turn_id]) == ["<|im_end|>"]
    assert "the prompt that inference would feed" in refusal(own, talk("Which?", "rye"))


def test_a_template_whose_rows_alone_are_taken() -> None:
    own, row = chat(NEEDS_SYSTEM), talk("Which?", "Rye.", system="Be brief.")
    assert trained(own, own.encode(row)) == ["Rye.<|im_end|>"]
    assert own.turn_token_ids == [] or own.turn_token_ids
    with pytest.raises(TemplateError, match="chat template: the chat template refuses it: a system text is needed"):
        _ = own.end_of_turn_id
    assert not own.finds_end_of_turn


# ---------------------------------------------------------------------------------------------------------------
# An empty thought that is fed and that no finished turn has


@pytest.mark.parametrize(
    "thought",
    [
        "[t][/t]",
        "<think>\n\n</think>\n\n",
        "<|channel>thought\n<channel|>",
        "<|START_THINKING|><|END_THINKING|>",
        "[THINK][/THINK]",
        "<seed:think></seed:think>\n",
    ],
)
def test_an_empty_thought_that_is_fed(thought: str) -> None:
    own = chat(BODY + ASKED.replace("assistant\n", f"assistant\n{thought}"))
    row = own.encode(BREAD, "last_assistant")
    fed = own.render(BREAD[:-1], add_generation_prompt=True)
    assert own.tokenizer.decode(row.input_ids) == f"{fed}A week or so.<|im_end|>\n"
    assert own.tokenizer.decode(row.input_ids[: row.turns[0].start]) == fed
    assert trained(own, row) == ["A week or so.<|im_end|>"]
    assert own.tokenizer.convert_ids_to_tokens([own.end_of_turn_id]) == ["<|im_end|>"]
    thinking = [*talk("Hi"), said("assistant", "Yes.", reasoning_content="Hm.")]
    assert refusal(own, thinking).startswith("message 2: inference feeds a closed thought before this turn")
    # The text has a thought of its own behind the empty one.
    opening = thought.strip().partition(">")[0] + ">" if thought[0] == "<" else thought.partition("]")[0] + "]"
    assert "the prompt that inference would feed" in refusal(own, talk("Hi", f"{opening} hm, yes"))


@pytest.mark.parametrize("fed", ["<think>\n", "[t]", "[t][/u]", "<answer>", "Sure: ", "<think>Fine, so</think>"])
def test_what_is_fed_but_is_no_empty_thought(fed: str) -> None:
    own = chat(BODY + ASKED.replace("assistant\n", f"assistant\n{fed}"))
    reason = (
        "inference feeds the beginning of a thought" if fed == "<think>\n" else "the prompt that inference would feed"
    )
    assert reason in refusal(own, BREAD, "last_assistant")


# ---------------------------------------------------------------------------------------------------------------
# Fixed texts with tags

FIXED = (
    "Put the result between <result> and </result>.",
    "End with <done>.",
    "<rules>\nBe brief.\n</rules>",
    "Write a list in <ol>, an item in <li>.",
)


@pytest.mark.parametrize("text", FIXED)
def test_tags_in_the_fixed_text_of_a_template(text: str) -> None:
    system = f"<|im_start|>system\n{text}<|im_end|>\n"
    suffix = "{{ '\n\n" + text.replace("\n", "\\n") + "' if m.role == 'user' }}"
    for own in (
        chat(PLAIN.replace("{% for", system + "{% for", 1)),
        chat(PLAIN.replace("+ m.content +", "+ m.content }}" + suffix + "{{ ''")),
    ):
        assert trained(own, own.encode(talk("6 x 7?", "<result>42</result>"))) == ["<result>42</result><|im_end|>"]
        own.check_tokens()
        assert own.tokenizer.convert_ids_to_tokens([own.end_of_turn_id]) == ["<|im_end|>"]


@pytest.mark.parametrize("token", ["<|turn|>", "<begin_of_turn>", "<|begin|>"])
def test_a_token_that_the_tokenizer_lacks(token: str) -> None:
    own = chat(PLAIN.replace("<|im_start|>", token))
    with pytest.raises(TemplateError, match="a token that this tokenizer lacks"):
        own.check_tokens()


# ---------------------------------------------------------------------------------------------------------------
# Tool calls

CALLS = "{% for c in m.tool_calls or [] %}CALL{% endfor %}"


def calling(call: str) -> Chat:
    body = "{{ '<|im_start|>' + m.role + '\n' }}" + CALLS.replace("CALL", call) + "{{ m.content + '<|im_end|>\n' }}"
    return chat("{{ bos_token }}{% for m in messages %}" + body + "{% endfor %}" + ASKED)


def asked_tide(*arguments: dict[str, Any]) -> list[dict[str, Any]]:
    calls = [{"id": "1", "type": "function", "function": {"name": "tide", "arguments": a}} for a in arguments]
    answer = {"role": "tool", "tool_call_id": "1", "name": "tide", "content": "4 m"}
    return [*talk("Tide at Brest?"), said("assistant", "", tool_calls=calls), answer, said("assistant", "4.")]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ("call {{ c.function.name + ' ' + c.function.arguments }} end", 'call tide {"port": "Brest"} end'),
        ("call {{ c.function.name }} {{ c.function.arguments }} end", 'call tide {"port": "Brest"} end'),
        ("call {{ c.function.name ~ ' ' ~ c.function.arguments | trim }} end", 'call tide {"port": "Brest"} end'),
        (
            "{{ c.function.name }}{% if c.function.arguments is string %} {{ c.function.arguments }}{% endif %}",
            'tide {"port": "Brest"}',
        ),
        ("{{ c.function.arguments | tojson }} for {{ c.function.name }}", '{"port": "Brest"} for tide'),
        ("{{ c.function | tojson }}", '{"name": "tide", "arguments": {"port": "Brest"}}'),
        (
            "{{ {'arguments': c.function.arguments, 'name': c.function.name} | tojson }}",
            '{"arguments": {"port": "Brest"}, "name": "tide"}',
        ),
        (
            "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
            " {{ c.function.name }}",
            '{"port": "Brest"} tide',
        ),
    ],
)
def test_the_form_of_arguments(call: str, wanted: str) -> None:
    own, row = calling(call), asked_tide({"port": "Brest"})
    assert trained(own, own.encode(row)) == [f"{wanted}<|im_end|>", "4.<|im_end|>"]
    number = own.encode(asked_tide({"days": 2, "at": [{"place": "Brest"}]}))
    inside = json.dumps({"days": 2, "at": [{"place": "Brest"}]})
    assert trained(own, number)[0] == wanted.replace('{"port": "Brest"}', inside) + "<|im_end|>"
    assert trained(own, own.encode(asked_tide({"days": 2})))[0] == (
        wanted.replace('{"port": "Brest"}', '{"days": 2}') + "<|im_end|>"
    )


@pytest.mark.parametrize("arguments", [{"port": "Brest"}, {"days": 2}])
def test_arguments_that_are_left_out(arguments: dict[str, Any]) -> None:
    own = calling("{{ c.function.name }}")
    assert refusal(own, asked_tide(arguments)) == "message 2: the chat template leaves out its tool call"
    assert trained(own, own.encode(asked_tide({})))[0] == "tide<|im_end|>"


def test_arguments_that_are_written_as_python() -> None:
    own = calling(
        "{{ c.function.name }} {{ c.function.arguments }}{% for k in c.function.arguments.items() %}{% endfor %}"
    )
    assert refusal(own, asked_tide({"port": "Brest"})) == (
        "message 2: the chat template writes a tool call's arguments as Python, not as JSON"
    )


# ---------------------------------------------------------------------------------------------------------------
# A text that the template drops, although its words stand elsewhere

DROPS_SYSTEM = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
DROPS_TOOL = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")


@pytest.mark.parametrize(
    ("system", "texts"),
    [
        ("Be kind.", ("Be kind. Hi", "Yes.")),
        ("Yes.", ("Hi", "Yes.")),
        ("user", ("Hi", "Yes.")),
        ("a", ("Hi", "Yes.")),
        ("Answer in Latin only, please.", ("Answer in Latin only, please.", "Ita.")),
        ("Answer in Latin only, please.", ("Hi", "Answer in Latin only, please.")),
    ],
)
def test_a_system_text_that_is_left_out(system: str, texts: tuple[str, ...]) -> None:
    row = talk(*texts, system=system)
    assert refusal(chat(DROPS_SYSTEM), row) == "message 1: the chat template leaves out or changes the system's text"
    for template in (PLAIN, "gemma3", "chatml"):
        assert chat(template).encode(row).trained_tokens


def test_a_tool_answer_that_is_left_out() -> None:
    row = [*talk("Tide?"), said("assistant", "I look."), said("tool", "4 m"), said("assistant", "It is 4 m.")]
    assert refusal(chat(DROPS_TOOL), row) == "message 3: the chat template leaves out or changes the tool's text"
    assert chat(PLAIN).encode(row).trained_tokens


def test_a_text_that_the_template_itself_says() -> None:
    own = chat(DROPS_SYSTEM.replace("{% for", "You are a helpful assistant.{% for", 1))
    row = talk("Hi", "Yes.", system="You are a helpful assistant.")
    assert refusal(own, row) == "message 1: the chat template leaves out or changes the system's text"


# ---------------------------------------------------------------------------------------------------------------
# A date in the template

DATED = PLAIN.replace("{% for", "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n{% for", 1)


def test_the_day_of_a_run() -> None:
    live = chat(DATED)
    tools = TOOLS
    fixed, other = (Chat(live.tokenizer, date(2025, 2, day)) for day in (3, 4))
    for given in (None, tools):
        assert "Today: 03 Feb 2025<" in fixed.render(BREAD, tools=given)
        assert "Today: 04 Feb 2025<" in other.render(BREAD, tools=given)
        # Rendering elsewhere is not touched.
        assert f"Today: {date.today():%d %b %Y}<" in live.render(BREAD, tools=given)
    assert fixed.fingerprint == Chat(live.tokenizer, date(2025, 2, 3)).fingerprint
    assert len({fixed.fingerprint, other.fingerprint, live.fingerprint}) == 3
    plain = tokenizer()
    assert Chat(plain, date(2025, 2, 3)).fingerprint == Chat(plain, date(2025, 2, 4)).fingerprint


# ---------------------------------------------------------------------------------------------------------------
# Raw text with special tokens


@pytest.mark.parametrize(
    ("prompt", "completion", "text", "wanted"),
    [
        (
            "<|im_start|>def area(r):\n    return <|im_end|>",
            "3.14 * r * r",
            "<bos><|im_start|>def area(r):\n    return <|im_end|>3.14 * r * r<eos>",
            "3.14 * r * r<eos>",
        ),
        ("<bos><|im_start|>Hi", "<|im_end|>", "<bos><|im_start|>Hi<|im_end|><eos>", "<|im_end|><eos>"),
        ("", "<bos>Hi<|im_end|>Yes<eos>", "<bos>Hi<|im_end|>Yes<eos>", "Hi<|im_end|>Yes<eos>"),
        ("", "one<eos><bos>two", "<bos>one<eos><bos>two<eos>", "one<eos><bos>two<eos>"),
    ],
)
def test_special_tokens_in_raw_text(prompt: str, completion: str, text: str, wanted: str) -> None:
    own = chat("gemma3")
    row = own.encode_text(prompt, completion, special_tokens=True)
    assert own.tokenizer.decode(row.input_ids) == text
    assert trained(own, row) == [wanted]
    with pytest.raises(LabelError, match="which is a special token of this tokenizer"):
        own.encode_text(prompt, completion)


def test_a_bos_in_the_middle_of_raw_text() -> None:
    with pytest.raises(LabelError, match="the tokenizer writes 2 BOS tokens"):
        chat("gemma3").encode_text("one<bos>", "two", special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------
# Texts as lists of parts


@pytest.mark.parametrize("name", ["chatml", "gemma", "gemma2_system", "gemma3", "llama3", "functiongemma"])
def test_shipped_templates_join_parts(name: str) -> None:
    own, template = tokenizer(), load_template(name)
    for system in (None,) if name == "gemma" else (None, " Be kind. ", ""):
        messages = talk(" Hi there", "Yo!", "", "はい \n", system=system)
        parts = [
            m | {"content": [{"type": "text", "text": t} for t in (m["content"][:2], m["content"][2:])]}
            for m in messages
        ]
        for asked in (False, True):
            joined, plain = (
                own.apply_chat_template(m, tokenize=False, add_generation_prompt=asked, chat_template=template)
                for m in (parts, messages)
            )
            assert joined == plain
            assert "[{" not in joined


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("chatml", "<|im_start|>tool\n{}<|im_end|>\n"),
        ("llama3", "<|start_header_id|>tool<|end_header_id|>\n\n{}<|eot_id|>"),
    ],
)
@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"height": 4, "by": ["é", "<b>"]}, '{"height": 4, "by": ["é", "<b>"]}'),
        ([{"height": 4}, 5, "x"], '[{"height": 4}, 5, "x"]'),
        ([{"type": "text", "text": "4"}, {"type": "text", "text": " m"}], "4 m"),
        ({}, "{}"),
        ([], ""),
        (None, ""),
        ("4 m", "4 m"),
    ],
)
def test_shipped_templates_write_the_answer_of_a_tool_as_json(name: str, turn: str, answer: Any, shown: str) -> None:
    own, template = tokenizer(), load_template(name)
    messages = [*talk("Tide?", "I look."), {"role": "tool", "content": answer}]
    text = own.apply_chat_template(messages, tokenize=False, chat_template=template)
    assert text.endswith(turn.replace("{}", shown))


# ---------------------------------------------------------------------------------------------------------------
# Templates that fail on any conversation


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("streaming", [False, True], ids=["read first", "streamed"])
@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            "\n{% for m in messages %}",
            "chat template: line 2: Unexpected end of template. Jinja was looking for the following tags: 'endfor' or "
            "'else'. The innermost block that needs to be closed is 'for'.",
        ),
        ("{{ bos_token | shout }}", "chat template: line 1: No filter named 'shout'."),
        ("{{ shout(messages) }}", "chat template: the chat template refuses it: 'shout' is undefined"),
        ("{{ messages[0].content + 1 }}", None),
    ],
)
def test_a_template_that_fails_on_any_conversation(
    template: str, fault: str | None, on_bad_row: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": talk("Rye?", "Dry.")}, {"messages": talk("Oats?", "Damp.")}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    section = DataSection(train=[DataSource(path="rows.jsonl", streaming=streaming)], on_bad_row=on_bad_row)
    with pytest.raises(TemplateError) as caught:
        build_datasets(section, chat(template), None)
    words = 'chat template: the chat template fails on it: can only concatenate str (not "int") to str'
    assert str(caught.value) == (fault or words)


def test_rows_that_a_template_refuses_beside_one_that_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [talk("Rye?", "Dry."), talk("Oats?", "Damp.", system="Be kind.")]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    template = "{% if messages[0].role != 'system' %}{{ shout(messages) }}{% endif %}" + PLAIN
    train, _ = build_datasets(DataSection(train=[DataSource(path=str(path))], on_bad_row="skip"), chat(template), None)
    assert train.ledger.bad == {"the chat template refuses it: 'shout' is undefined": 1}
    assert train.ledger.kept == 1


# ---------------------------------------------------------------------------------------------------------------
# The EOS of a run


def test_the_end_of_turn_of_templates_that_only_rows_show() -> None:
    """A template that refuses all conversations it is asked with, and writes the next header unasked."""
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('a system text is needed') }}{% endif %}"
    own = chat(needs + BODY + HEADER)
    row = own.encode(talk("Rye?", "Dry.", "Oats?", "Damp.", system="Be kind."))
    rows = Prepared(Dataset.from_dict({"labels": [row.labels.tolist()]}))
    assert not own.finds_end_of_turn
    ends = TrainingRows(own.tokenizer, own, True, rows, Prepared(None), False).ends_of_turns()
    assert own.tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>"]
    # Where the template shows it, it is known without rows.
    own = chat(BODY + HEADER)
    assert own.tokenizer.convert_ids_to_tokens(own.end_of_turn_id) == "<|im_end|>"
    assert TrainingRows(own.tokenizer, own, True, rows, Prepared(None), False).ends_of_turns() == []


# ---------------------------------------------------------------------------------------------------------------
# Templates that take no conversation without tools, in a model card and in an export's figures


def test_sample_conversations_that_a_template_refuses_are_plain_text(tmp_path: Path) -> None:
    template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + PLAIN
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert _example_prompt(tmp_path) == (None, False)
    own = chat(template)
    first = json.loads(sample_rows().read_text(encoding="utf-8").splitlines()[0])["messages"]
    text = "\n".join(message["content"] for message in first)
    assert own.tokenizer.decode(encoded_sample_rows(own)[0].input_ids) == f"<bos>{text}<eos>"
    assert own.tokenizer.decode(_token_ids(SimpleNamespace(chat=own))[0]) == f"<bos>{text}"
