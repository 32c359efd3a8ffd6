"""The trained text, to the character, for templates known and unknown."""

import copy
import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import examples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE, Encoded
from finetune.data.template import load_template
from finetune.model.load import load_tokenizer
from finetune.model.tiny import _train_tokenizer
from finetune.recipe.schema import ModelSection
from finetune.system.errors import LabelError, TemplateError

SHIPPED = ("gemma", "gemma3", "chatml")
END = {"gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "chatml": "<|im_end|>"}


@cache
def tokenizer() -> Any:
    return load_tokenizer(ModelSection(name_or_path="random:gemma3"))


@cache
def chat(template: str) -> Chat:
    """A shipped template's name, or the template itself."""
    own = copy.deepcopy(tokenizer())
    own.chat_template = load_template(template) if template in SHIPPED else template
    return Chat(own)


def talk(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def trained(chat: Chat, row: Encoded) -> list[str]:
    """The text of each run of tokens that have a label."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (token, IGNORE)
        if label != IGNORE:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [chat.tokenizer.decode(run) for run in runs if run]


def prove(chat: Chat, messages: Sequence[dict[str, Any]], row: Encoded) -> None:
    """Invariants 1, 2 and 5, by transformers' own word."""
    tokenizer = chat.tokenizer
    assert row.input_ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert len(row.labels) == len(row.input_ids)
    for turn in row.turns:
        fed = tokenizer.apply_chat_template(
            messages[: turn.message], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert row.input_ids[: turn.start].tolist() == fed
        assert (row.labels[turn.start : turn.end] == row.input_ids[turn.start : turn.end]).all()
        assert row.input_ids[turn.end - 1] in tokenizer.all_special_ids + list(tokenizer.added_tokens_decoder)
    assert sum(turn.end - turn.start for turn in row.turns) == row.trained_tokens


def refusal(chat: Chat, messages: Sequence[dict[str, Any]], train_on: str = "assistant") -> str:
    with pytest.raises(LabelError) as caught:
        chat.encode(messages, train_on)
    return str(caught.value)


CONVERSATIONS = {
    "one": ("Hi", "Hello!"),
    "two": ("Hi", "Hello!", "And now?", "Good bye.\n\nReally."),
    "three": ("a", "b", "c", "d", "e", "f"),
    "japanese": ("東京の天気は？", "晴れです。傘は要りません。", "明日は？", "雨でしょう。"),
    "emoji": ("👩‍👩‍👧‍👦?", "👍🏽 はい 🇯🇵", "é", "e\u0301 ﷽"),
    "spaces": ("  two before", " one before", "behind  ", "behind \n "),
    "same": ("yes", "yes", "yes", "yes"),
    "braces": ("{{ 7*7 }}", "{% raw %}{{ 7*7 }}", "{# no #}", "{{ messages }}"),
    "angles": ("1 < 2 <b>bold</b>", "<end_of_turn <start> </s> <|x|>"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", SHIPPED)
def test_text_and_trained_text(template: str, name: str) -> None:
    texts = CONVERSATIONS[name]
    if template == "chatml":
        text = "<bos>" + "".join(
            f"<|im_start|>{('user', 'assistant')[i % 2]}\n{t}<|im_end|>\n" for i, t in enumerate(texts)
        )
        wanted = [t + "<|im_end|>" for t in texts[1::2]]
    else:
        text = "<bos>" + "".join(
            f"<start_of_turn>{('user', 'model')[i % 2]}\n{t.strip()}<end_of_turn>\n" for i, t in enumerate(texts)
        )
        wanted = [t.strip() + "<end_of_turn>" for t in texts[1::2]]
    own, messages = chat(template), talk(*texts)
    assert own.render(messages) == text
    row = own.encode(messages)
    prove(own, messages, row)
    assert own.tokenizer.decode(row.input_ids) == text
    assert trained(own, row) == wanted
    assert [turn.message for turn in row.turns] == list(range(1, len(texts), 2))
    # The line break behind the end of a turn is text that inference feeds.
    for turn in row.turns:
        assert own.tokenizer.decode(row.input_ids[turn.end : turn.end + 1]) == "\n"
        assert row.labels[turn.end] == IGNORE
        assert row.labels[turn.end - 1] == own.end_of_turn_id


def test_each_label_of_the_example() -> None:
    own = chat("gemma3")
    row = own.encode(talk("Hi", "ok"))
    tokens = own.tokenizer.convert_ids_to_tokens(row.input_ids)
    end = tokens.index("<end_of_turn>", tokens.index("<end_of_turn>") + 1)
    start = row.turns[0].start
    assert tokens[0] == "<bos>"
    assert [i for i, label in enumerate(row.labels) if label != IGNORE] == list(range(start, end + 1))
    assert own.tokenizer.decode(row.input_ids[:start]) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
    assert own.tokenizer.decode(row.input_ids[end + 1 :]) == "\n"


def test_system_text() -> None:
    messages = talk("Hi", "Hello!", system=" Be kind. ")
    assert chat("gemma3").render(messages) == (
        "<bos><start_of_turn>user\n Be kind. \n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    )
    assert chat("chatml").render(messages) == (
        "<bos><|im_start|>system\n Be kind. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    for template in ("gemma3", "chatml"):
        row = chat(template).encode(messages)
        prove(chat(template), messages, row)
        assert trained(chat(template), row) == ["Hello!" + END[template]]
    assert refusal(chat("gemma"), messages) == (
        "the chat template refuses it: the gemma template has no system role; put the text into the first user "
        "message, or write model.system_role: fold"
    )


PARTS = st.sampled_from(
    [
        "a",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "日本",
        "。",
        "👍🏽",
        "é",
        "́",
        "<",
        ">",
        "<bos>",
        "<end_of_turn>",
        "<|im_end|>",
        "<unk>",
        "model\n",
        "assistant",
        "{{ 1 }}",
        "{%",
        "\x00",
        "\x1c",
        "\u200b",
        "\ufeff",
        "\u3000",
        "�",
        "12",
        "Hello",
    ]
)
TEXTS = st.one_of(st.text(max_size=12), st.lists(PARTS, max_size=5).map("".join))


@settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    template=st.sampled_from(SHIPPED),
    texts=st.lists(TEXTS, min_size=1, max_size=6),
    system=st.none() | TEXTS,
    train_on=st.sampled_from(["assistant", "last_assistant"]),
)
@example("chatml", ["a", "\n\n b"], None, "assistant")
@example("gemma", ["\ud800", "b"], None, "assistant")
def test_any_text_is_proved_or_refused(template: str, texts: list[str], system: str | None, train_on: str) -> None:
    own, messages = chat(template), talk(*texts, system=system)
    try:
        row = own.encode(messages, train_on)
    except LabelError:
        return
    prove(own, messages, row)
    answers = texts[1::2] if train_on == "assistant" else texts[1::2][-1:]
    clean = str if template == "chatml" else str.strip
    assert trained(own, row) == [clean(text) + END[template] for text in answers]


# ---------------------------------------------------------------------------------------------------------------
# Templates that nobody told us of

ENDS_WITH_EOS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HUMAN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}### Human: {{ m.content }}\n"
    "{% else %}### Assistant: {{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "text", "wanted"),
    [
        (
            ENDS_WITH_EOS,
            "<bos><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo!<|im_end|>\n"
            "<|im_start|>user\nOh<|im_end|>\n<|im_start|>assistant\nはい<|im_end|>\n<eos>",
            ["Yo!<|im_end|>", "はい<|im_end|>"],
        ),
        (
            DEFAULT_SYSTEM,
            "<bos><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo!"
            "<|im_end|>\n<|im_start|>user\nOh<|im_end|>\n<|im_start|>assistant\nはい<|im_end|>\n",
            ["Yo!<|im_end|>", "はい<|im_end|>"],
        ),
        (
            HUMAN,
            "<bos>### Human: Hi\n### Assistant: Yo!<eos>\n### Human: Oh\n### Assistant: はい<eos>\n",
            [" Yo!<eos>", " はい<eos>"],
        ),
    ],
    ids=["ends with eos", "default system", "human"],
)
def test_unknown_templates(template: str, text: str, wanted: list[str]) -> None:
    own, messages = chat(template), talk("Hi", "Yo!", "Oh", "はい")
    assert own.render(messages) == text
    row = own.encode(messages)
    prove(own, messages, row)
    assert trained(own, row) == wanted
    assert own.tokenizer.convert_ids_to_tokens(own.end_of_turn_id) in wanted[0]


PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHOUTS = load_template("chatml").replace("~ content -}}", "~ content | upper -}}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            HUMAN.replace("### Assistant:{% endif %}", "### Assistant:<think>{% endif %}"),
            "message 2: inference feeds the beginning of a thought before this turn, which has none; add "
            "reasoning_content, or switch thinking off by chat_template_kwargs",
        ),
        (SHOUTS, "message 1: the chat template leaves out or changes the user's text"),
        (
            PLAIN,
            "message 2: the template ends the turn with '\\n', in which this tokenizer has no special token, "
            "so the model could not learn to stop",
        ),
        (
            HUMAN.replace("{{ bos_token }}", ""),
            "the chat template writes 0 BOS tokens (<bos>); exactly one must come first",
        ),
        (
            "{{ bos_token }}" + load_template("chatml"),
            "the chat template writes 2 BOS tokens (<bos>); exactly one must come first",
        ),
        ("{{ 1 / 0 }}", "the chat template fails on it: division by zero"),
        (
            "{{ messages[0].content.nothing.there }}",
            "the chat template refuses it: 'str object' has no attribute 'nothing'",
        ),
        ("", "message 1: the chat template leaves out or changes the user's text"),
    ],
)
def test_templates_that_cannot_be_proved(template: str, reason: str) -> None:
    assert refusal(chat(template), talk("Hello there", "Good day")) == reason
    with pytest.raises(TemplateError) as caught:
        _ = chat(template).end_of_turn_id
    assert str(caught.value) == f"chat template: {reason}"


def test_a_turn_ends_before_the_next_begins() -> None:
    """Only the last turn has an end here; the start of the next turn is not taken for one."""
    own = chat(
        # `<eos>` and `<|im_start|>` have their first character in common.
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = talk("a", "one", "b", "two")
    assert refusal(own, messages) == (
        "message 2: the template ends the turn with '<', in which this tokenizer has no special token, "
        "so the model could not learn to stop"
    )
    assert trained(own, own.encode(messages, "last_assistant")) == ["two<eos>"]


ENDLESS = (
    "{{ bos_token }}{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% else %}{{ eos_token }}{% endif %}"
)
HEADED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<start_of_turn>' }}"
    "{{ m.content }}{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>{% endif %}"
)


@pytest.mark.parametrize("template", [ENDLESS, HEADED])
def test_a_turn_without_an_end_is_not_trained_to_the_next_one(template: str) -> None:
    """Neither the end of the conversation nor the head of the next turn ends this one."""
    own = chat(template)
    assert trained(own, own.encode(talk("a", "one"))) in (["one\n\n<eos>"], ["one<eos>"])
    assert refusal(own, talk("a", "one", "b", "two")).startswith("message 2: the template ends the turn with ")


def test_a_turn_that_a_later_message_is_written_into() -> None:
    """As Gemma 4 writes a tool's answer before the text that stands beside the call."""
    own = chat(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% elif m.role == 'assistant' %}<start_of_turn>"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }} "
        "{% if messages | length > 2 %}{{ messages[2].content }} {% endif %}{% endfor %}"
        "{{ m.content }}<end_of_turn>{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages = [*talk("a", "I look"), {"role": "tool", "content": "seen"}, *talk("b", "c")]
    messages[1]["tool_calls"] = [call]
    assert refusal(own, messages) == "message 2: the chat template writes a later message inside its turn"


def test_labels_do_not_depend_on_the_rows_before() -> None:
    template = load_template("chatml").replace(
        "<|im_end|>\\n' -}}\n{%- endfor -%}\n{%- if add",
        "<|im_end|>' ~ (eos_token if messages[0]['role'] == 'system' else '') ~ '\\n' -}}\n{%- endfor -%}\n{%- if add",
    )
    assert template != load_template("chatml")
    plain, told = talk("a", "b", "c", "d"), talk("a", "b", "c", "d", system="s")
    orders = []
    for rows in ((plain, told), (told, plain)):
        own = Chat(chat(template).tokenizer)
        orders.append({len(row): trained(own, own.encode(row)) for row in rows})
    assert orders[0] == orders[1]


def test_the_template_is_not_told_what_is_trained_on() -> None:
    own = chat(
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m | length }}<start_of_turn>{{ m.content }}<|im_end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>2<start_of_turn>{% endif %}"
    )
    messages = talk("a", "b", "c", "d")
    messages[1]["train"] = False
    row = own.encode(messages)
    assert own.tokenizer.decode(row.input_ids[:4]) == "<bos><|im_start|>2<start_of_turn>"
    assert trained(own, row) == ["d<|im_end|>"]


def test_a_footer_is_none_of_the_last_turn() -> None:
    own = chat(ENDLESS.replace("{{ eos_token }}", "== the end =={{ eos_token }}"))
    assert refusal(own, talk("a", "one")) == (
        "message 2: the template ends the turn with '\\n\\n', in which this tokenizer has no special token, "
        "so the model could not learn to stop"
    )


def official(name: str) -> str:
    package = importlib.util.find_spec("trl")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_gemma_renders_as_the_official_template(name: str, generation: bool) -> None:
    conversations = [talk(*texts) for texts in CONVERSATIONS.values()] + [talk("Hi"), talk("", "x", ""), talk("a", "")]
    if name == "gemma3":
        conversations += [talk("Hi", "Yo", system=text) for text in ("", " Be kind. ", "一\n\n二")]
    for messages in conversations:
        assert chat(name).render(messages, generation) == chat(official(name)).render(messages, generation)
    row, ours = (chat(text).encode(conversations[1]) for text in (official(name), name))
    assert (row.input_ids == ours.input_ids).all()
    assert (row.labels == ours.labels).all()


# ---------------------------------------------------------------------------------------------------------------
# Rows that are refused


def said(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "there is no assistant message"),
        (talk("Hi"), "there is no assistant message"),
        (
            talk("a <end_of_turn>", "b"),
            "message 1: its text holds <end_of_turn>, which is a special token of this tokenizer",
        ),
        (talk("a", "<bos>"), "message 2: its text holds <bos>, which is a special token of this tokenizer"),
        (talk("a", "<unk>"), "message 2: its text holds <unk>, which is a special token of this tokenizer"),
        (
            talk("a", "b", system="<|im_end|>"),
            "message 1: its text holds <|im_end|>, which is a special token of this tokenizer",
        ),
        (talk("\ud800", "b"), "message 1: its text holds a lone surrogate ('\\ud800'), which is no character"),
        ([said("human", "a")], "message 1: unknown role 'human'; known are system, developer, user, assistant, tool"),
        ([said(None, "a")], "message 1: unknown role None; known are system, developer, user, assistant, tool"),
        ([said(["user"], "a")], "message 1: unknown role ['user']; known are system, developer, user, assistant, tool"),
        ([{"content": "a"}], "message 1: unknown role None; known are system, developer, user, assistant, tool"),
        ([said("user", None)], "message 1: its content is NoneType, not text"),
        ([said("user", 7)], "message 1: its content is int, not text"),
        ([said("user", [["a"]])], "message 1: its content is list, not text"),
        (
            [said("user", "a"), said("user", "b"), said("assistant", "c")],
            "the chat template refuses it: roles must alternate user, assistant, user, ... after the system message; "
            "turn 2 is user",
        ),
        (
            [said("assistant", "c"), said("user", "a")],
            "the chat template refuses it: roles must alternate user, assistant, user, ... after the system message; "
            "turn 1 is assistant",
        ),
        (
            [said("user", "a", train=True), said("assistant", "c")],
            "message 1: `train` on a user message; only an assistant's can be chosen or left out",
        ),
    ],
)
def test_rows_that_are_refused(messages: list[dict[str, Any]], reason: str) -> None:
    assert refusal(chat("gemma3"), messages) == reason


def test_an_error_has_its_parts_as_fields() -> None:
    roles = "known are system, developer, user, assistant, tool"
    for messages, parts in (
        ([said("user", "a"), said("a; message 3: b", "c")], (1, "unknown role 'a; message 3: b'", roles)),
        ([], (None, "there is no assistant message", "")),
        (
            talk("a")[:1] * 2 + talk("a", "b")[1:],
            (
                None,
                "the chat template refuses it: roles must alternate user, assistant, user, ...",
                "message 2 is user",
            ),
        ),
    ):
        with pytest.raises(LabelError) as caught:
            chat("gemma").encode(messages)
        assert (caught.value.message, caught.value.reason, caught.value.detail) == parts


@pytest.mark.parametrize("text", ["", " \n\u3000"])
def test_an_empty_answer_is_its_end_of_turn(text: str) -> None:
    for i, row in enumerate([talk("a", text), talk("a", "b", "c", text, "e", "f")]):
        encoded = chat("gemma3").encode(row)
        prove(chat("gemma3"), row, encoded)
        assert trained(chat("gemma3"), encoded)[i] == "<end_of_turn>"


def test_gemma_names_the_message_out_of_turn() -> None:
    assert refusal(chat("gemma"), talk("a", "b")[:1] * 2 + talk("a", "b")[1:]) == (
        "the chat template refuses it: roles must alternate user, assistant, user, ...; message 2 is user"
    )


def test_assistant_first_has_nothing_to_be_fed() -> None:
    messages = [said("assistant", "Welcome!"), *talk("a", "b")]
    assert refusal(chat("chatml"), messages) == (
        "no message stands before it, and a chat template renders no empty conversation"
    )
    messages[0]["train"] = False
    assert trained(chat("chatml"), chat("chatml").encode(messages)) == ["b<|im_end|>"]


def test_a_token_that_straddles_the_turn() -> None:
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(["a\n\n\nb", "\n\n", "user assistant"] * 40),
        bos_token="<bos>",
        eos_token="<eos>",
    )
    own.chat_template = load_template("chatml")
    assert len(own("\n\n", add_special_tokens=False)["input_ids"]) == 1
    assert refusal(Chat(own), talk("a", "\n\nb")) == (
        "message 2: a token straddles the start of the turn; the text begins with '\\n\\nb'"
    )
    # No token lies across the edge here, but the prompt alone is other tokens: ⏎⏎ is one, before `b` it is two.
    with pytest.raises(LabelError) as caught:
        Chat(own).encode_text("a\n\n", "b")
    assert str(caught.value) == "a token straddles the boundary of prompt and completion"
    # A template that asks with a space, which then belongs to the first word.
    human = chat(HUMAN.replace("### Assistant:{% endif %}", "### Assistant: {% endif %}"))
    assert refusal(human, talk("a", "hello there, you")) == (
        "message 2: a token straddles the start of the turn; the text begins with 'hello there,'"
    )


# ---------------------------------------------------------------------------------------------------------------
# What is trained on


@pytest.mark.parametrize("template", SHIPPED)
def test_train_on(template: str) -> None:
    own, end = chat(template), END[template]
    messages = talk("a", "one", "b", "two", "c", "three")
    everything = own.render(messages).removeprefix("<bos>")

    def run(train_on: str, **train: bool) -> list[str]:
        marked = [m | ({"train": train[m["content"]]} if m["content"] in train else {}) for m in messages]
        row = own.encode(marked, train_on)
        assert (row.input_ids == own.encode(messages).input_ids).all()
        return trained(own, row)

    assert run("assistant") == [f"one{end}", f"two{end}", f"three{end}"]
    assert run("last_assistant") == [f"three{end}"]
    assert run("all") == [everything]
    assert run("assistant", two=False) == [f"one{end}", f"three{end}"]
    assert run("last_assistant", one=True) == [f"one{end}", f"three{end}"]
    assert run("last_assistant", one=True, three=False) == [f"one{end}"]
    assert run("assistant", one=False, two=False, three=False) == []
    assert run("assistant", a=False) == [f"one{end}", f"two{end}", f"three{end}"]
    before, _, behind = everything.partition(f"two{end}")
    assert run("all", two=False) == [before, behind]
    assert run("all", two=True) == [everything]
    assert refusal(own, [messages[0] | {"train": False}, *messages[1:]], "all") == (
        "message 1: `train` on a user message; only an assistant's can be chosen or left out"
    )


def test_the_first_token_has_no_label() -> None:
    row = chat("gemma3").encode(talk("a", "b"), "all")
    assert row.labels.tolist() == [IGNORE, *row.input_ids[1:]]


@pytest.mark.parametrize(
    ("prompt", "completion", "wanted"),
    [
        ("", "Once upon a time", "Once upon a time<eos>"),
        ("", "  昔々👍🏽\n", "  昔々👍🏽\n<eos>"),
        ("Q: 2+2?\nA:", " 4", " 4<eos>"),
        ("質問", "答え {{ 7*7 }}", "答え {{ 7*7 }}<eos>"),
    ],
)
def test_encode_text(prompt: str, completion: str, wanted: str) -> None:
    own = chat("gemma3")
    row = own.encode_text(prompt, completion)
    assert own.tokenizer.decode(row.input_ids) == f"<bos>{prompt}{completion}<eos>"
    assert row.input_ids[: row.turns[0].start].tolist() == own.tokenizer(prompt)["input_ids"]
    assert trained(own, row) == [wanted]
    assert row.turns[0].end == len(row.input_ids)


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ("a", "", "the text to train on is empty"),
        ("Answer:", "<eos>", "the text: its text holds <eos>, which is a special token of this tokenizer"),
        ("<e", "os>", "the text: its text holds <eos>, which is a special token of this tokenizer"),
        ("a ", "hello", "a token straddles the boundary of prompt and completion"),
        ("", "\udfff", "the text: its text holds a lone surrogate ('\\udfff'), which is no character"),
    ],
)
def test_encode_text_refuses(prompt: str, completion: str, reason: str) -> None:
    with pytest.raises(LabelError) as caught:
        chat("gemma3").encode_text(prompt, completion)
    assert str(caught.value) == reason


# ---------------------------------------------------------------------------------------------------------------
# Templates and tokenizers


def lacking(*tokens: str) -> Chat:
    """The tiny tokenizer without these tokens, and with the ChatML template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = json.loads(tokenizer().backend_tokenizer.to_str())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] not in tokens]
    text["model"]["vocab"] = {
        token if token not in tokens else f"unused{i}": i for token, i in text["model"]["vocab"].items()
    }
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(text)), bos_token="<bos>", eos_token="<eos>"
    )
    own.chat_template = load_template("chatml")
    return Chat(own)


def test_a_template_of_another_family() -> None:
    with pytest.raises(TemplateError) as caught:
        _ = lacking("<|im_start|>").end_of_turn_id
    assert str(caught.value) == (
        "chat template: it writes <|im_start|>, a token that this tokenizer lacks; "
        "choose a template of the model's own family"
    )
    with pytest.raises(TemplateError) as caught:
        _ = lacking("<|im_start|>", "<|im_end|>").end_of_turn_id
    assert str(caught.value) == (
        "chat template: message 2: the template ends the turn with '<|im_end|>\\n', in which this tokenizer has no "
        "special token, so the model could not learn to stop"
    )


@pytest.mark.parametrize("template", SHIPPED)
def test_turn_tokens(template: str) -> None:
    own = chat(template)
    names = ["<|im_start|>", "<|im_end|>"] if template == "chatml" else ["<start_of_turn>", "<end_of_turn>"]
    assert own.tokenizer.convert_ids_to_tokens(own.turn_token_ids) == names
    assert own.tokenizer.convert_ids_to_tokens(own.end_of_turn_id) == END[template]


def test_slow_tokenizer() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(TemplateError) as caught:
        Chat(ByT5Tokenizer())
    assert str(caught.value) == (
        "ByT5Tokenizer is a slow tokenizer, and labels need a fast one; "
        "save a fast tokenizer (tokenizer.json) next to the model"
    )


def test_no_template() -> None:
    own = copy.deepcopy(tokenizer())
    own.chat_template = None
    with pytest.raises(TemplateError) as caught:
        Chat(own).encode(talk("a", "b"))
    assert str(caught.value) == (
        "model.chat_template: this model has no chat template of its own; write chat_template: gemma, or a .jinja file"
    )


def test_load_template(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("日本 {{ bos_token }}", encoding="utf-8")
    assert load_template(str(file)) == "日本 {{ bos_token }}"
    with pytest.raises(TemplateError) as caught:
        load_template("gemma33")
    assert str(caught.value) == (
        "chat template gemma33: No such file or directory; write a .jinja file or one of chatml, functiongemma, "
        "gemma, gemma2_system, gemma3, gemma4, llama3"
    )
    file.write_bytes(b"\xff")
    with pytest.raises(TemplateError) as caught:
        load_template(str(file))
    assert str(caught.value) == (
        f"chat template {file}: not UTF-8 text; write a .jinja file or one of chatml, functiongemma, gemma, "
        "gemma2_system, gemma3, gemma4, llama3"
    )
