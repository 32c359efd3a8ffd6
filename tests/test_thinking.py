"""Thinking in each family whose template trl stores: what is fed, what is trained on. The role developer."""

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_chat import chat as own_chat
from test_chat import talk
from test_data import jsonl, section
from test_referee import tokenizer
from transformers import PreTrainedConfig

from finetune.data.adapt import adapt
from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.ledger import Ledger, facts
from finetune.data.mixture import build_datasets
from finetune.data.template_variables import set_default_variables, variables_read
from finetune.evaluate.prompts import read_prompts
from finetune.model.generate import Generator
from finetune.system.errors import DataError, TemplateError

Row = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "Tide at a port", "parameters": {}}}]
# A model whose embedding has a row for every token.
MODEL = SimpleNamespace(config=PreTrainedConfig())
CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@cache
def chat(name: str, thinks: bool, larger: bool = False) -> Chat:
    """A family's chat with thinking on or off.

    `larger` adds to Gemma 4's template what that of the larger models has, which trl does not store: an empty thought
    behind the generation prompt when thinking is off.
    """
    own = copy.deepcopy(tokenizer(name))
    if larger:
        head, header, rest = own.chat_template.rpartition("{{- '<|turn>model\\n' -}}")
        assert header
        thought = "{%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}"
        own.chat_template = head + header + thought + rest
    if "enable_thinking" in variables_read(own):
        set_default_variables(own, {"enable_thinking": thinks})
    return Chat(own)


def answer(text: str, thinking: str = "", **more: Any) -> Row:
    return {"role": "assistant", "content": text} | ({"reasoning_content": thinking} if thinking else {}) | more


def prepared(own: Chat, *rows: Any, **keys: Any) -> tuple[list[tuple[str, str]], Ledger]:
    """Each row for the trainer as its text and the trained part of it, and the ledger."""
    jsonl(*({"messages": row} if isinstance(row, list) else row for row in rows))
    train, _ = build_datasets(section(**keys), own, None)
    decode = own.tokenizer.decode
    assert train.dataset is not None
    return [
        (decode(row["input_ids"]), decode([i for i in row["labels"] if i != IGNORE])) for row in train.dataset
    ], train.ledger


def refused(own: Chat, row: Any, **keys: Any) -> str:
    with pytest.raises((DataError, TemplateError)) as caught:
        prepared(own, row, **keys)
    said = str(caught.value).removeprefix("rows.jsonl:1: ").removeprefix("chat template: ")
    return said.removesuffix("; mend the row, or write data.on_bad_row: skip")


def fed(own: Chat, messages: list[Row], tools: Any = None) -> str:
    """The text of what `generate` feeds."""
    ids = own.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    if tools is None:
        assert Generator(MODEL, own, ()).prompt_ids(messages) == ids
    return str(own.tokenizer.decode(ids))


# ---------------------------------------------------------------------------------------------------------------
# Families

CLOSED = (
    "message 2: inference feeds a closed thought before this turn, which has thinking; remove its reasoning_content, "
    "or switch thinking on by chat_template_kwargs"
)
BEGUN = (
    "message 2: inference feeds the beginning of a thought before this turn, which has none; add reasoning_content, or "
    "switch thinking off by chat_template_kwargs"
)
LEFT_OUT = "message 2: the chat template leaves out its thinking"
NO_END = (
    "message 2: the template ends the turn with '', in which this tokenizer has no special token, so the model could "
    "not learn to stop"
)
NOT_FED = (
    "message 2: the prompt that inference would feed before this turn (add_generation_prompt=True) is not the "
    "beginning of the rendered conversation"
)
# For thinking switched off and on: what is trained on of a turn without thinking and of one with it, or the refusal.
QWEN = {
    False: ("Rye.<|im_end|>", CLOSED),
    True: ("<think>\n\n</think>\n\nRye.<|im_end|>", "<think>\nDense.\n</think>\n\nRye.<|im_end|>"),
}
FED = QWEN | {True: (BEGUN, "Dense.\n</think>\n\nRye.<|im_end|>")}
NEMOTRON = QWEN | {True: (BEGUN, "Dense.\n</think>\nRye.<|im_end|>")}
CLOSE = QWEN | {True: (BEGUN, "Dense.</think>Rye.<|im_end|>")}
GEMMA = dict.fromkeys([False, True], ("Rye.<turn|>", LEFT_OUT))
ALWAYS = "<|channel|>analysis<|message|>Dense.<|end|><|start|>assistant<|channel|>final<|message|>Rye.<|return|>"
FAMILIES = {
    "gemma4": GEMMA,
    "gemma4_v2": GEMMA,
    "gemma4_v3": GEMMA,
    "gemma4_v4": GEMMA,
    "gemma4_v5": dict.fromkeys([False, True], ("Rye.<turn|>", "<|channel>thought\nDense.\n<channel|>Rye.<turn|>")),
    "qwen3": QWEN,
    "qwen3_5_nothink": FED,
    "qwen3_5_think": FED,
    "qwen3_6": FED,
    "qwen3_8": FED,
    "nemotron_3_5_lightning": CLOSE,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": CLOSE,
    "gptoss": dict.fromkeys([False, True], ("<|channel|>final<|message|>Rye.<|return|>", ALWAYS)),
    "glm4moe": {False: (NO_END, CLOSED), True: (NO_END, NO_END)},
    "deepseek_r1_distill": dict.fromkeys([False, True], (BEGUN, NOT_FED)),
    "deepseekv3": dict.fromkeys([False, True], (BEGUN, NOT_FED)),
    "lfm2_2_5": dict.fromkeys([False, True], ("Rye.<|im_end|>", "<think>Dense.</think>Rye.<|im_end|>")),
}
LARGER = {
    f"{name} larger": {False: (modes[False][0], CLOSED), True: modes[True]}
    for name, modes in FAMILIES.items()
    if name.startswith("gemma4")
}


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *LARGER])
def test_what_is_fed_and_trained_in_each_mode(family: str, thinks: bool) -> None:
    own = chat(family.partition(" ")[0], thinks, family.endswith("larger"))
    for thinking, wanted in zip(("", "Dense."), (FAMILIES | LARGER)[family][thinks], strict=True):
        row = [*talk("Which bread keeps longest?"), answer("Rye.", thinking)]
        if wanted.startswith("message 2"):
            assert refused(own, row) == wanted
            continue
        [(text, part)], ledger = prepared(own, row)
        assert part == wanted
        # The tokens before the answer are those that generate feeds.
        assert text.partition(wanted)[0] == fed(own, row[:1])
        inside = len(own.tokenizer.tokenize("Dense.")) if thinking else 0
        assert ledger.thinking_tokens == ledger.trained_thinking_tokens
        assert (ledger.thinking_tokens >= inside) if thinking else not ledger.thinking_tokens
        # Without the labels of the thinking, its tags and the answer keep theirs.
        [(same, rest)], ledger = prepared(own, row, train_on_thinking=False)
        assert same == text
        assert "Dense" not in rest
        assert rest.endswith(wanted.rpartition("Dense.")[2].lstrip("\n") if thinking else wanted)
        assert ledger.trained_thinking_tokens == 0
        assert (ledger.thinking_tokens > 0) == bool(thinking)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("gemma4")])
def test_conversations_with_the_larger_gemma_s_template(name: str) -> None:
    """Each exchange is a row that is rendered as inference feeds it; earlier turns have no empty thought."""
    own, talked = chat(name, False, True), talk("Which bread?", "Rye.", "And in a tin?", "A week.")
    rows, ledger = prepared(own, [{"role": "system", "content": "Be brief."}, *talked])
    assert [part for _, part in rows] == ["Rye.<turn|>", "A week.<turn|>"]
    for (text, part), end in zip(rows, (2, 4), strict=True):
        asked = fed(own, [{"role": "system", "content": "Be brief."}, *talked[: end - 1]])
        assert text.removesuffix("\n") == asked + part
        assert asked.endswith("<|turn>model\n<|channel>thought\n<channel|>")
        assert text.count("<|channel>") == 1
    assert len(ledger.mended) == 1
    # With thinking on nothing is fed in front of the answer, and the conversation is one row.
    [(text, part)], ledger = prepared(chat(name, True, True), talked)
    assert part == "Rye.<turn|>A week.<turn|>"
    assert "<|channel>" not in text
    assert not ledger.mended
    assert prepared(own, talked, train_on="last_assistant")[0][0][1] == "A week.<turn|>"
    assert [part for _, part in prepared(own, talked, on_overflow="split")[0]] == ["Rye.<turn|>", "A week.<turn|>"]


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"])
@pytest.mark.parametrize("larger", [False, True])
def test_thinking_before_a_call(name: str, larger: bool) -> None:
    result = {"role": "tool", "content": "Four metres", "name": "tide", "tool_call_id": "c1"}
    row = [*talk("Tide?"), answer("", "Look it up.", tool_calls=[CALL]), result, answer("Four metres.")]
    asked = {"messages": row, "tools": TOOLS}
    if name == "gemma4_v5":  # it feeds the beginning of a thought behind the tool's answer
        assert refused(chat(name, True, larger), asked) == BEGUN.replace("2", "4")
        row[3] = answer("Four metres.", "High.")
    own = chat(name, name == "gemma4_v5" or larger, larger)
    call = '<|tool_call>call:tide{port:<|"|>Brest<|"|>}<tool_call|><|tool_response>'
    last = "High.\n<channel|>Four metres.<turn|>" if name == "gemma4_v5" else "Four metres.<turn|>"
    [(text, part)], ledger = prepared(own, asked)
    assert part == f"<|channel>thought\nLook it up.\n<channel|>{call}{last}"
    assert text.startswith(fed(own, row[:1], TOOLS) + "<|channel>thought")
    assert ledger.thinking_tokens == ledger.trained_thinking_tokens > 4
    [(_, part)], ledger = prepared(own, asked, train_on_thinking=False)
    assert part.startswith("<|channel>thought\n")
    assert "Look" not in part
    assert "High" not in part
    assert call in part
    assert part.endswith("Four metres.<turn|>")
    if larger:
        assert refused(chat(name, False, True), asked) == CLOSED


def test_a_conversation_whose_earlier_thinking_is_dropped() -> None:
    row = [*talk("Which?"), answer("Rye.", "Dense."), *talk("And?"), answer("A week.", "Dry.")]
    rows, ledger = prepared(chat("gemma4_v5", True), row)
    assert [part for _, part in rows] == [
        "<|channel>thought\nDense.\n<channel|>Rye.<turn|>",
        "<|channel>thought\nDry.\n<channel|>A week.<turn|>",
    ]
    assert "Dense" not in rows[1][0]
    assert list(ledger.mended) == [
        "rows split into one row per exchange, because the chat template renders earlier turns differently"
    ]
    # Each thinking text counts once, in the row in which it is rendered.
    alone = [prepared(chat("gemma4_v5", True), row[:end])[1].thinking_tokens for end in (2,)]
    assert ledger.thinking_tokens == ledger.trained_thinking_tokens > alone[0]


# ---------------------------------------------------------------------------------------------------------------
# data.train_on_thinking


def labelled(own: Chat, row: list[Row], **how: Any) -> str:
    encoded = own.encode(row, train_on_thinking=False, **how)
    return str(own.tokenizer.decode(encoded.labels[encoded.labels != IGNORE]))


def test_thinking_that_is_only_fed() -> None:
    own = chat("qwen3", True)
    row = [*talk("Which?"), answer("Rye.", "\n Rye. Rye.\n\n")]
    # ".\n" is one token, and belongs to the thinking.
    assert labelled(own, row) == "<think>\n</think>\n\nRye.<|im_end|>"
    # The same word in the answer and in the thinking of an answer that is not trained on.
    row = [*talk("Rye?"), answer("Rye.", "Rye.") | {"train": False}, *talk("Rye?"), answer("Rye.", "Rye.")]
    encoded = own.encode(row, train_on_thinking=False)
    assert encoded.thinking_tokens[1] == 0
    assert labelled(own, row) == "<think>\n</think>\n\nRye.<|im_end|>"
    every = "user\nRye?<|im_end|>\n<|im_start|>assistant\n<think>\n</think>\n\nRye.<|im_end|>\n"
    assert labelled(own, row[2:], train_on="all") == every


def test_thinking_inside_the_text_is_refused_where_it_must_not_be_trained_on() -> None:
    own = chat("qwen3", True)
    row = [*talk("Which?"), answer("<think>\nDense.\n</think>\n\nRye.")]
    assert prepared(own, row)[0][0][1] == "<think>\nDense.\n</think>\n\nRye.<|im_end|>"
    assert refused(own, row, train_on_thinking=False) == (
        "message 2: its thinking is a part of its text; data.train_on_thinking: false needs it as reasoning_content"
    )


def test_a_template_that_changes_the_thinking() -> None:
    changes = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}[t]{{ m.reasoning_content | truncate(24, true, '') }}[/t]{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = [*talk("Which?"), answer("Rye.", "Dense bread.")]
    assert refused(own_chat(changes), row).startswith("message 2: the chat template ")


def test_the_ledger_counts_thinking() -> None:
    rows = [[*talk(f"{i}?"), answer("Rye.", "Dense bread.")] for i in range(3)]
    _, ledger = prepared(chat("qwen3", True), *rows, train_on_thinking=False)
    count = ledger.thinking_tokens
    assert count % 3 == 0
    account = ledger.as_dict()
    assert (account["thinking_tokens"], account["trained_thinking_tokens"]) == (count, 0)
    assert (count, "tokens of thinking (0% trained on)") in facts(account)
    assert f"; {count} tokens of thinking, {count} not trained on" in ledger.summary()
    _, ledger = prepared(chat("qwen3", True), *rows)
    assert (ledger.thinking_tokens, ledger.trained_thinking_tokens) == (count, count)
    assert (count, "tokens of thinking (100% trained on)") in facts(ledger.as_dict())
    del account["thinking_tokens"], account["trained_thinking_tokens"]  # type: ignore[misc]
    assert all("thinking" not in name for _, name in facts(account))


# ---------------------------------------------------------------------------------------------------------------
# The token that switches thinking on


@pytest.mark.parametrize(("name", "blank"), [("gemma4_v2", ""), ("gemma4_v5", "\n")])
def test_the_token_that_switches_thinking_on(name: str, blank: str) -> None:
    own = chat(name, False, True)
    token = "rows whose system text switched thinking on by its token"
    for text in ("<|think|>Be brief.", " <|think|>\n\nBe brief."):
        row = [{"role": "system", "content": text}, *talk("Which?", "Rye.")]
        [(shown, part)], ledger = prepared(chat_of(name), row)
        assert shown.startswith(f"<bos><|turn>system\n<|think|>{blank}Be brief.<turn|>\n")
        assert part == "Rye.<turn|>"
        assert ledger.mended == {token: 1}
    # With thinking on, the larger model's prompt holds no closed thought; generate feeds the same.
    row = [{"role": "system", "content": "<|think|>"}, *talk("Which?", "Rye.")]
    own = chat_of(name, larger=True)
    [(shown, part)], _ = prepared(own, row)
    jsonl({"messages": row})
    [prompt] = read_prompts("rows.jsonl")
    assert own.tokenizer.decode(Generator(MODEL, own, ()).prompt_ids(prompt.messages)) + part + "\n" == shown
    assert "<|channel>" not in shown


def chat_of(name: str, larger: bool = False) -> Chat:
    """A family's chat, with no default for its variables."""
    own = copy.deepcopy(chat(name, False, larger).tokenizer)
    own.chat_template = own.chat_template.partition("{{ '' }}")[2]
    return Chat(own)


@pytest.mark.parametrize("text", ["Be <|think|> brief.", "<|turn>Be brief.", "<|think|><|think|>Be brief."])
def test_other_tokens_in_a_system_text_stay_refused(text: str) -> None:
    row = [{"role": "system", "content": text}, *talk("Which?", "Rye.")]
    assert "which is a special token of this tokenizer" in refused(chat_of("gemma4_v5"), row)


# ---------------------------------------------------------------------------------------------------------------
# The role developer

# As FunctionGemma: a developer's turn, in which functions are declared; other instructions are refused.
FUNCTIONS = (
    "{{ bos_token }}{% if tools or messages[0].role == 'developer' %}<|im_start|>developer\n"
    "{{ messages[0].content if messages[0].role == 'developer' }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    "{% if m.role != 'developer' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RENAMED = "rows whose developer message became a system message, because the chat template has no such role"


@pytest.mark.parametrize(
    ("own", "shown", "renamed"),
    [
        (own_chat(FUNCTIONS), "<|im_start|>developer\nBe brief.<|im_end|>", False),
        (own_chat(CHATML), "<|im_start|>system\nBe brief.<|im_end|>", True),
        (own_chat("gemma3"), "<start_of_turn>user\nBe brief.\n\nTide?", True),
        (chat("gptoss", True), "<|start|>developer<|message|># Instructions\n\nBe brief.", False),
        (chat("gemma4_v5", True), "Be brief.<turn|>", False),
        (chat("qwen3", True), "<|im_start|>system\nBe brief.<|im_end|>", True),
    ],
)
def test_a_developer_s_message(own: Chat, shown: str, renamed: bool) -> None:
    row = [{"role": "developer", "content": "Be brief."}, *talk("Tide?", "Four metres.")]
    [(text, part)], ledger = prepared(own, row)
    assert shown in text
    assert "Four metres." in part
    assert ledger.mended[RENAMED] == renamed
    jsonl({"messages": row})
    [prompt] = read_prompts("rows.jsonl")
    ids = Generator(MODEL, own, ()).prompt_ids(prompt.messages)
    assert text.startswith(own.tokenizer.decode(ids))


def test_a_developer_s_message_beside_other_instructions() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    tools = {"messages": [developer, *talk("Tide?", "Four metres.")], "tools": TOOLS}
    [(text, _)], ledger = prepared(own_chat(FUNCTIONS), tools)
    assert '<|im_start|>developer\nBe brief.[{"type": "function"' in text
    assert not ledger.mended
    row = [{"role": "system", "content": "Be kind."}, developer, *talk("Tide?", "Four metres.")]
    adapted = adapt(own_chat(CHATML).render, row)
    assert [message["role"] for message in adapted.messages] == ["system", "system", "user", "assistant"]
    merged, _ = prepared(own_chat(CHATML), row, merge_same_role=True)
    assert "Be kind.\n\nBe brief." in merged[0][0]
    # The column system names the same text.
    [(text, _)], _ = prepared(own_chat(CHATML), {"system": "Be brief.", "messages": [developer, *talk("a", "b")]})
    assert text.count("Be brief.") == 1
    assert refused(own_chat(CHATML), {"system": "x", "messages": [developer, *talk("a", "b")]}).startswith(
        "its column system and its first message differ"
    )
    split, _ = prepared(own_chat(FUNCTIONS), [developer, *talk("a", "b")], on_overflow="split")
    assert split[0][0].count("Be brief.") == 1
