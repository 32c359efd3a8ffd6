"""Variables of chat templates: as a recipe's, which become the defaults of the saved template, and as a row's."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_chat import chat, prove, talk
from test_chat import trained as trained_turns
from test_data import jsonl, section
from test_referee import tokenizer
from transformers import AutoTokenizer

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.mixture import build_datasets
from finetune.data.template_variables import set_default_variables, split_defaults, variables_read, with_values_forced
from finetune.evaluate.prompts import held_out_prompts, read_prompts
from finetune.export.gguf.ollama.modelfile import modelfile_text
from finetune.export.gguf.tokenizer.vocabulary import _chat_templates
from finetune.model.load import load_tokenizer
from finetune.recipe.diff import check_changes
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import ModelSection
from finetune.system.errors import DataError, LabelError, RunError, TemplateError

# Thinks unless it is told not to: then an empty thought is fed.
THINKER = (
    "\n{{- bos_token -}}{%- macro thought(t) -%}[t]{{ t }}{% if tone is defined %}({{ tone }}){% endif %}[/t]"
    "{%- endmacro -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- if m['role'] == 'assistant' and loop.last -%}{{- thought(m['reasoning_content'] or '') -}}{%- endif -%}"
    "{{- m['content'] + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- thought('') -}}{%- endif -%}{%- endif -%}"
)
SUM = talk("6 x 7?", "42")


def own(text: str = THINKER, **values: Any) -> Any:
    tokenizer = copy.deepcopy(chat(text).tokenizer)
    set_default_variables(tokenizer, values)
    return tokenizer


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("thinker.jinja").write_text(THINKER, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# The saved template


FAMILIES = {
    "gemma4": {"enable_thinking": True},
    "gemma4_v2": {"enable_thinking": True},
    "gemma4_v3": {"enable_thinking": True},
    "gemma4_v4": {"enable_thinking": True},
    "gemma4_v5": {"enable_thinking": True, "preserve_thinking": True},
    "glm4moe": {"enable_thinking": False},
    "gptoss": {"reasoning_effort": "high", "model_identity": 'You are "it",\n{{ not }} {% this %}. Ä😀\\'},
    "nemotron_3_nano": {"enable_thinking": False},
    "qwen3": {"enable_thinking": False},
    "qwen3_5_think": {"enable_thinking": False},
    "qwen3_6": {"enable_thinking": False, "preserve_thinking": True},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_template_renders_unasked_what_was_chosen(name: str) -> None:
    values, saved = FAMILIES[name], copy.deepcopy(tokenizer(name))
    set_default_variables(saved, values)
    thought = {"role": "assistant", "content": "Rye.", "reasoning_content": "It is dense."}
    changed = 0
    for messages in ([*talk("Which bread?", "Rye."), *talk("And in a tin?")], [*talk("Which?"), thought], talk("Hi")):
        for ask in (False, True):
            how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": ask}
            wanted = tokenizer(name).apply_chat_template(messages, **how, **values)
            assert saved.apply_chat_template(messages, **how) == wanted
            changed += wanted != tokenizer(name).apply_chat_template(messages, **how)
            # A value that is given goes before the default.
            other = {key: not value if isinstance(value, bool) else "low" for key, value in values.items()}
            assert saved.apply_chat_template(messages, **how, **other) == tokenizer(name).apply_chat_template(
                messages, **how, **other
            )
    assert changed


@pytest.mark.parametrize(
    "value", [0, -1.5e-07, "", 'it\'s "so"\r\n\t\\n', "-%}{%- endif -%}", [1, [None, "a"]], {"a b": {"c": False}}]
)
def test_values_of_every_kind(value: Any) -> None:
    text = "\n\n{{ note | tojson if note is defined else 'none' }}" + THINKER
    saved = own(text, note=value)
    shown = saved.apply_chat_template(SUM, tokenize=False)
    assert shown == chat(text).tokenizer.apply_chat_template(SUM, tokenize=False, note=value)
    assert shown.startswith("\n\n")
    assert split_defaults(saved.chat_template)[1] == text


def test_defaults_are_written_once() -> None:
    saved = own(enable_thinking=False, tone="dry")
    once = saved.chat_template
    set_default_variables(saved, {"tone": "dry"})
    assert saved.chat_template == once
    set_default_variables(saved, {"tone": None})
    assert saved.chat_template == once
    set_default_variables(saved, {"enable_thinking": True})
    assert split_defaults(saved.chat_template) == ({"enable_thinking": "true", "tone": '"dry"'}, THINKER)
    assert variables_read(saved) == ["enable_thinking", "tone"]
    assert own().chat_template == THINKER


def test_several_templates_get_the_same_defaults() -> None:
    saved = copy.deepcopy(chat(THINKER).tokenizer)
    saved.chat_template = {"default": THINKER, "tool_use": "{{ 'tools' }}" + THINKER}
    set_default_variables(saved, {"enable_thinking": False})
    assert [split_defaults(text)[0] for text in saved.chat_template.values()] == [{"enable_thinking": "false"}] * 2


@pytest.mark.parametrize(
    ("text", "values", "fault"),
    [
        (THINKER, {"thinking": True}, "the chat template reads no variable thinking; write enable_thinking, tone"),
        (THINKER, {"tools": []}, "tools is set by transformers itself; remove it"),
        (THINKER, {"bos_token": ""}, "bos_token is set by transformers itself; remove it"),
        (THINKER, {"padding": True}, "padding is set by transformers itself; remove it"),
        ("{{ bos_token }}", {"a": 1}, "the chat template reads no variable a; it has none, remove it"),
        (THINKER, {"tone": float("nan")}, "tone is nan; write a text, a finite number, true or false"),
        (
            "{{ range(9999) | random }}{{ tone }}",
            {"tone": 1},
            "the chat template renders otherwise with tone as its default than as an argument; write the value into a "
            "template of your own (model.chat_template)",
        ),
        (None, {"tone": 1}, "the model has no chat template; name one in model.chat_template"),
    ],
)
def test_what_cannot_be_given_is_refused(text: str | None, values: dict[str, Any], fault: str) -> None:
    tokenizer = copy.deepcopy(chat(THINKER).tokenizer)
    tokenizer.chat_template = text
    with pytest.raises(TemplateError) as caught:
        set_default_variables(tokenizer, values)
    assert str(caught.value) == f"model.chat_template_kwargs: {fault}"
    assert tokenizer.chat_template == text


def test_a_program_that_sets_a_variable_itself_gets_the_value_forced() -> None:
    saved = own(enable_thinking=False, tone="dry")
    forced = with_values_forced(saved.chat_template, ["enable_thinking"])
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "chat_template": forced}
    shown = saved.apply_chat_template(talk("Hi"), **how, enable_thinking=True, tone="wry")
    assert shown.endswith("<|im_start|>assistant\n[t](wry)[/t]")
    assert with_values_forced(THINKER, ["enable_thinking"]) == THINKER


# ---------------------------------------------------------------------------------------------------------------
# The recipe


def model_section(**values: Any) -> ModelSection:
    return ModelSection(name_or_path="random:llama", chat_template="thinker.jinja", chat_template_kwargs=values)


def prepared(model: ModelSection) -> list[tuple[str, str]]:
    """Each row's text, and the part of it that is trained on."""
    tokenizer = load_tokenizer(model)
    dataset = build_datasets(section(), Chat(tokenizer), 512)[0].dataset
    assert dataset is not None
    return [
        (tokenizer.decode(row["input_ids"]), tokenizer.decode([i for i in row["labels"] if i != IGNORE]))
        for row in dataset
    ]


PROMPT = "<bos><|im_start|>user\n6 x 7?<|im_end|>\n<|im_start|>assistant\n"


def test_the_recipes_and_the_rows_variables_decide_what_is_fed() -> None:
    jsonl({"messages": SUM})
    assert prepared(model_section()) == [(f"{PROMPT}[t][/t]42<|im_end|>\n", "[t][/t]42<|im_end|>")]
    assert prepared(model_section(enable_thinking=False)) == [(f"{PROMPT}[t][/t]42<|im_end|>\n", "42<|im_end|>")]
    # A row's go before the recipe's; they may be a text of JSON, and null is no value.
    rows = [{"enable_thinking": False}, {"enable_thinking": True}, {"enable_thinking": None}, {}, None]
    jsonl(*({"messages": talk(f"{i}?", "42"), "chat_template_kwargs": row} for i, row in enumerate(rows)))
    off, on = "42<|im_end|>", "[t][/t]42<|im_end|>"
    assert [part for _, part in prepared(model_section())] == [off, on, on, on, on]
    assert [part for _, part in prepared(model_section(enable_thinking=False))] == [off, on, off, off, off]
    jsonl({"messages": SUM, "chat_template_kwargs": json.dumps({"enable_thinking": False, "tone": "dry"})})
    assert prepared(model_section()) == [(f"{PROMPT}[t](dry)[/t]42<|im_end|>\n", "42<|im_end|>")]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (
            {"thinking": True},
            "chat_template_kwargs: the chat template reads no variable thinking; write enable_thinking, tone",
        ),
        ({"messages": []}, "chat_template_kwargs: messages is set by transformers itself; remove it"),
        ([True], 'its chat_template_kwargs are not a map; write {"enable_thinking": false}'),
    ],
)
def test_a_rows_variables_that_cannot_be_given_make_a_bad_row(value: Any, fault: str) -> None:
    jsonl({"messages": SUM, "chat_template_kwargs": value})
    with pytest.raises(DataError) as caught:
        prepared(model_section())
    assert str(caught.value) == f"rows.jsonl:1: {fault}; mend the row, or write data.on_bad_row: skip"


def test_turns_end_where_the_rows_variables_say() -> None:
    end = "{{ '<|im_end|>' if long is not defined else '<|im_end|><eos>' }}"
    plain = chat(
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + end + "\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert trained_turns(plain, plain.encode(SUM)) == ["42<|im_end|>"]
    assert trained_turns(plain, plain.encode(SUM, variables={"long": True})) == ["42<|im_end|><eos>"]
    with pytest.raises(LabelError):
        plain.render(SUM, variables={"short": True})
    prove(plain, SUM, plain.encode(SUM))


def test_prompts_are_rendered_with_their_rows_variables() -> None:
    variables = {"enable_thinking": False}
    jsonl({"messages": SUM, "chat_template_kwargs": variables}, {"messages": SUM})
    assert [prompt.variables for prompt in read_prompts("rows.jsonl")] == [variables, {}]
    assert [p.variables for p in held_out_prompts(section(), {"rows.jsonl:1", "rows.jsonl:2"})] == [variables, {}]


RECIPE = """\
model: {name_or_path: "random:llama", chat_template: thinker.jinja, chat_template_kwargs: {enable_thinking: false}}
lora: {r: 4}
data: {train: [{path: rows.jsonl}]}
"""


def test_the_recipe_keeps_them_and_a_resume_compares_them() -> None:
    jsonl({"messages": SUM})
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe("recipe.yaml")
    assert recipe.model.chat_template_kwargs == {"enable_thinking": False}
    Path("saved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe("saved.yaml") == recipe
    other = load_recipe("recipe.yaml", ["model.chat_template_kwargs.enable_thinking=true"])
    with pytest.raises(RunError, match=r"model.chat_template_kwargs.enable_thinking was false and is true"):
        check_changes(Path("saved.yaml"), other, print, True, (1, 1))


def test_a_run_s_template_holds_them_once() -> None:
    saved = load_tokenizer(model_section(enable_thinking=False))
    saved.save_pretrained("run")
    assert AutoTokenizer.from_pretrained("run").chat_template == saved.chat_template
    again = ModelSection(name_or_path="random:llama", adapter="run", chat_template_kwargs={"enable_thinking": False})
    assert load_tokenizer(again).chat_template == saved.chat_template
    assert Chat(saved).render(talk("6 x 7?"), True) == f"{PROMPT}[t][/t]"


# ---------------------------------------------------------------------------------------------------------------
# Exports

NAMED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + (name | default('assistant') if m.role == 'assistant' "
    "else m.role) + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' + name | default('assistant') + '\n' }}{% endif %}"
)


def test_ollama_s_template_has_the_defaults() -> None:
    assert "<|im_start|>assistant" in modelfile_text(own(NAMED), "a.gguf", True)
    file = modelfile_text(own(NAMED, name="harbour"), "a.gguf", True)
    assert "<|im_start|>harbour" in file
    assert "<|im_start|>assistant" not in file


def test_a_gguf_file_s_template_forces_what_llama_cpp_sets() -> None:
    source: Any = SimpleNamespace(tokenizer=own(enable_thinking=False, tone="dry"))
    written = _chat_templates(source)["tokenizer.chat_template"]
    assert written == "{%- set enable_thinking = false -%}{{ '' }}" + source.tokenizer.chat_template
