"""Modelfiles: what Go's own text/template makes of one is what the trained Jinja template makes, to the character.

No Ollama runs here. `ollama_template/main.go` reads a Modelfile and executes its template as Ollama's source does.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, USER_CACHE

from finetune.data.template import load_template, set_system_role
from finetune.export.gguf.ollama.go_template import BLANKS, go_string
from finetune.export.gguf.ollama.modelfile import modelfile_text, write_modelfile
from finetune.model.load import load_tokenizer
from finetune.recipe.schema import ModelSection
from finetune.system.errors import OllamaError

Message = dict[str, str]
Go = Callable[..., list[dict[str, Any]]]

SHIPPED = ["gemma", "gemma2_system", "gemma3", "gemma4", "functiongemma", "llama3", "chatml"]
ROLES = ["template", "fold", "turn", "error"]
REFUSES = "template: :.*takes no system message"


def said(*texts: str, first: str = "user") -> list[Message]:
    """A conversation in which the roles alternate."""
    roles = (["system"] if first == "system" else []) + ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


CONVERSATIONS = [
    said("What is the capital of Japan?"),
    said("Hi", "Hello! How can I help?", "Name a prime."),
    said("一番高い山は？", "富士山です。\n高さは3,776メートルです。", "　では、二番目は？　"),
    said(" \n leading", "\ttrailing \r\n", f"{BLANKS}all blanks{BLANKS}"),
    said("{{ .System }} {{- end }} {% raw %}", "`a` \\n \\ \"b\" 'c' <d> & $e", "{{"),
    said("a\r\nb\rc\n\n\nd", '"""', '""" x """\n"'),
    said("👨‍👩‍👧 e\u0301 \u200b\ufeff", "\u200b\ufeff", "\u00ad\u202e.\u200b"),
    said("<start_of_turn>user", "<|im_end|>", "<bos><eos></s>[INST]"),
    said("one", "two", "three", "four", "five", "six", "seven"),
    said("x" * 3000 + " " * 3000, "y\n" * 500, "." + "　" * 500),
]
SYSTEMS = [
    "Be brief.",
    "You are kind.\nYou are brief.\n",
    "　日本語で答えてください。　",
    f"{BLANKS}Rules{BLANKS}",
    "{{ .Prompt }}",
    '"""\r\n\\n"quoted"\\',
    "👨‍👩‍👧",
    "<end_of_turn>",
    "one\n\n\ntwo",
    "",
]
WITH_SYSTEM = [
    [{"role": "system", "content": system}, *messages] for system, messages in zip(SYSTEMS, CONVERSATIONS, strict=True)
]


@pytest.fixture(scope="session")
def tokenizer() -> Callable[..., Any]:
    """A tiny model's tokenizer with a chat template, which may be shipped or a text."""

    def load(template: str, system_role: str = "template") -> Any:
        found = load_tokenizer(ModelSection(name_or_path="random:gemma"))
        found.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
        found.chat_template = load_template(template) if template in SHIPPED else template
        set_system_role(found, system_role)
        return found

    return load


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Go's rendering of conversations by a Modelfile: `text`, `error`, `commands`."""
    if not shutil.which("go"):
        pytest.skip("go is not installed; Debian's golang-go has it")
    program = tmp_path_factory.mktemp("go") / "ollama_template"
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    environment |= {"XDG_CACHE_HOME": USER_CACHE} if USER_CACHE else {}
    source = ROOT / "tests" / "ollama_template" / "main.go"
    built = subprocess.run(["go", "build", "-o", program, source], env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    def run(file: str, conversations: Sequence[Sequence[Message]]) -> list[dict[str, Any]]:
        asked = "".join(json.dumps({"modelfile": file, "messages": messages}) + "\n" for messages in conversations)
        done = subprocess.run([program], input=asked, capture_output=True, check=True, encoding="utf-8")
        return [json.loads(line) for line in done.stdout.split("\n")[:-1]]

    return run


def trained(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """A conversation rendered by the tokenizer's own template, without the BOS that is added when tokenising."""
    options = {"add_generation_prompt": True} | options
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text.removeprefix("<bos>")


# ---------------------------------------------------------------------------------------------------------------
# Rendered by Go


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("template", SHIPPED)
def test_go_renders_what_was_trained(template: str, role: str, tokenizer: Callable[..., Any], go: Go) -> None:
    """Ten conversations without a system text and the same with one; where Jinja refuses that, Go does."""
    own = tokenizer(template, role)
    file = modelfile_text(own, "model.gguf", add_bos=True)
    assert [told["text"] for told in go(file, CONVERSATIONS)] == [trained(own, m) for m in CONVERSATIONS]
    if role == "error" or (template, role) == ("gemma", "template"):
        told = go(file, WITH_SYSTEM[:-1])
        assert all(re.match(REFUSES, each["error"]) for each in told), told
        return
    told = go(file, WITH_SYSTEM)
    assert not any(each["error"] for each in told)
    assert [each["text"] for each in told] == [trained(own, messages) for messages in WITH_SYSTEM]


@pytest.mark.parametrize("template", SHIPPED)
def test_a_shifted_line_break_is_seen(template: str, tokenizer: Callable[..., Any], go: Go) -> None:
    """The comparison itself can fail: each piece of text that is changed changes what Go renders."""
    own = tokenizer(template)
    file = modelfile_text(own, "model.gguf", add_bos=True)
    talks = [said("Hello", "Hi", "Bye")]
    talks += [] if template == "gemma" else [said("Rules", "Hello", first="system")]
    expected = [trained(own, messages) for messages in talks]
    assert [told["text"] for told in go(file, talks)] == expected
    pieces = list(re.finditer(r'{{ "[^" ]*" }}', file))
    assert len(pieces) >= 5
    for piece in pieces:
        at = piece.end() - len('" }}')
        shifted = file[:at] + r"\n" + file[at:]
        assert [told["text"] for told in go(shifted, talks)] != expected, piece[0]


def test_neighbours_of_one_role_are_one_message(tokenizer: Callable[..., Any], go: Go) -> None:
    own = tokenizer("chatml")
    talk = [{"role": role, "content": text} for role, text in zip("ssuuau", "abcdef", strict=True)]
    names = {"s": "system", "u": "user", "a": "assistant"}
    talk = [message | {"role": names[message["role"]]} for message in talk]
    told = go(modelfile_text(own, "model.gguf", add_bos=True), [talk])[0]
    assert told["text"] == trained(own, said("a\n\nb", "c\n\nd", "e", "f", first="system"))


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("chatml", "<|im_start|>user\nb<|im_end|>\n<|im_start|>system\na<|im_end|>\n"),
        ("gemma3", "<start_of_turn>user\na\n\nb<end_of_turn>\n"),
        ("gemma2_system", "a\n<start_of_turn>user\nb<end_of_turn>\n"),
    ],
)
def test_a_later_system_text_is_not_lost(template: str, shown: str, tokenizer: Callable[..., Any], go: Go) -> None:
    """It stays where it is if the template knows such turns, else it goes to the front."""
    own = tokenizer(template)
    talk = [{"role": "user", "content": "b"}, {"role": "system", "content": "a"}]
    told = go(modelfile_text(own, "model.gguf", add_bos=True), [talk])[0]
    prompt = trained(own, said("x")).rpartition("\n<")[2]
    assert told["text"] == f"{shown}<{prompt}"


@pytest.mark.parametrize("template", SHIPPED)
def test_an_unfinished_answer_is_continued(template: str, tokenizer: Callable[..., Any], go: Go) -> None:
    own = tokenizer(template)
    talk = said("Count to five.", "One, two", "Go on.", " three,\nfour ")
    told = go(modelfile_text(own, "model.gguf", add_bos=True), [talk])[0]
    whole = trained(own, talk, add_generation_prompt=False)
    assert told["text"] == whole[: whole.rindex("four") + 4] + (" " if template == "chatml" else "")
    assert not told["error"]


@pytest.mark.parametrize("template", SHIPPED)
def test_a_conversation_cut_at_its_front_goes_on(template: str, tokenizer: Callable[..., Any], go: Go) -> None:
    """Ollama drops messages from the front until the rest fits; trained templates may demand a question first."""
    own = tokenizer(template)
    told = go(modelfile_text(own, "model.gguf", add_bos=True), [said("a", "b", "c", "d", "e")[1:]])[0]
    whole = trained(own, said("a", "b", "c", "d", "e"))
    assert not told["error"]
    assert whole == trained(own, said("a"), add_generation_prompt=False) + told["text"]


def test_a_role_that_the_template_has_not_is_told(tokenizer: Callable[..., Any], go: Go) -> None:
    talk = [*said("a", "b"), {"role": "tool", "content": "42"}]
    told = go(modelfile_text(tokenizer("gemma3"), "model.gguf", add_bos=True), [talk])[0]
    assert "has no turn for a message of this role" in told["error"]


@pytest.mark.parametrize("template", ["gemma2_system", "gemma3", "llama3", "chatml"])
def test_the_system_text_arrives(template: str, tokenizer: Callable[..., Any], go: Go) -> None:
    """A system text that a Modelfile can hold is its SYSTEM; any other is in the template. A user's own replaces it."""
    own = tokenizer(template)
    for system in [*SYSTEMS[:-1], '"', 'a"', '"""', 'x"""\n', "a\u200bb", "\tindented\n\n", "café ☕"]:
        file = modelfile_text(own, "model.gguf", add_bos=True, system=system)
        talks = [said("Hi"), said("Hi", "Yes?", "Bye"), said("Mine", "Hi", first="system")]
        expected = [said(system, *(m["content"] for m in talk), first="system") for talk in talks[:2]]
        told = go(file, talks)
        assert [each["error"] for each in told] == ["", "", ""]
        assert [each["text"] for each in told] == [trained(own, m) for m in [*expected, talks[2]]], system
        held = all(c.isprintable() or c in "\r\n\t" for c in system) and '"""' not in system
        assert held == (["SYSTEM", system] in told[0]["commands"])


def test_go_reads_the_modelfile_as_written(tokenizer: Callable[..., Any], go: Go) -> None:
    file = modelfile_text(
        tokenizer("gemma3"),
        "my model-Q4_K_M.gguf",
        add_bos=True,
        system='Say "hi".\r\n\tThen go.',
        config={"max_position_embeddings": 32768},
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 5]},
    )
    commands = go(file, [said("Hi")])[0]["commands"]
    assert [name for name, _ in commands].count("TEMPLATE") == 1
    assert [command for command in commands if command[0] != "TEMPLATE"] == [
        ["FROM", "./my model-Q4_K_M.gguf"],
        ["SYSTEM", 'Say "hi".\r\n\tThen go.'],
        ["stop", "<end_of_turn>"],
        ["stop", "<eos>"],
        ["num_ctx", "8192"],
        ["temperature", "1.0"],
        ["top_k", "64"],
        ["top_p", "0.95"],
        ["repeat_penalty", "1.0"],
    ]


DEFAULT = """\
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nA default.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"""
ALWAYS = """\
{%- set first = messages[0].role == 'system' %}{{- bos_token ~ '<|im_start|>system\\nKnows 2023.\\n\\n' }}
{{- (messages[0].content | trim if first else '') ~ '<|im_end|>' }}
{%- for m in (messages[1:] if first else messages) %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
HEAD = """\
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}
{{- '\\n--' if loop.first and m.role == 'system' }}{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
INSTRUCTIONS = """\
{{- bos_token }}{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST] ' ~ m.content ~ '[/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' ~ m.content.strip() ~ eos_token }}
{%- else %}{{- raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
MARKERS = """\
{{- '{{ "' }}{%- for m in messages %}{{- m.role ~ ' }} \\\\ `' ~ m.content ~ '{{- end }}\\u3000' }}{% endfor %}
{%- if add_generation_prompt %}{{- 'assistant }} \\\\ `' }}{% endif %}"""

OTHERS = {"default": DEFAULT, "always": ALWAYS, "head": HEAD, "instructions": INSTRUCTIONS, "markers": MARKERS}


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS.keys())
def test_templates_of_others(text: str, tokenizer: Callable[..., Any], go: Go) -> None:
    """A default system text, another generation prompt than an answer's beginning, pieces that mean something to Go."""
    own = tokenizer(text)
    bos = "bos_token" in text
    file = modelfile_text(own, "model.gguf", add_bos=bos)
    talks = CONVERSATIONS if "raise" in text else CONVERSATIONS + WITH_SYSTEM
    assert [told["text"] for told in go(file, talks)] == [trained(own, messages) for messages in talks]


def test_the_bos_is_written_where_nobody_adds_it(tokenizer: Callable[..., Any], go: Go) -> None:
    own = tokenizer("llama3")
    adds, writes = (modelfile_text(own, "model.gguf", add_bos=added) for added in (True, False))
    talk = [said("Hi"), said("Rules", "Hi", first="system")]
    assert [each["text"] for each in go(adds, talk)] == [trained(own, messages) for messages in talk]
    assert [each["text"] for each in go(writes, talk)] == ["<bos>" + trained(own, messages) for messages in talk]


# ---------------------------------------------------------------------------------------------------------------
# Without Go


def test_a_modelfile_as_a_person_reads_it(tokenizer: Callable[..., Any]) -> None:
    own = tokenizer("chatml")
    config = {"text_config": {"max_position_embeddings": 2048}}
    assert (
        modelfile_text(own, "model.gguf", add_bos=True, system="Be brief.", config=config)
        == """\
FROM ./model.gguf
TEMPLATE \"""{{- $ask := true }}
{{- range $i, $_ := .Messages }}
{{- if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}
{{- else if eq .Role "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ .Content }}\
{{ if eq (len (slice $.Messages $i)) 1 }}{{ $ask = false }}{{ else }}{{ "<|im_end|>\\n" }}{{ end }}
{{- else if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}
{{- else }}{{ template "the chat template of this model has no turn for a message of this role" . }}{{ end }}
{{- end }}
{{- if $ask }}{{ "<|im_start|>assistant\\n" }}{{ end }}\"""
SYSTEM "Be brief."
PARAMETER stop "<|im_end|>"
PARAMETER stop "<eos>"
PARAMETER num_ctx 2048
PARAMETER repeat_penalty 1.0
"""
    )


def test_literals_hold_only_what_can_be_printed() -> None:
    text = 'a"\\\n\t\r\x0b\x85\u3000é日👨\u200d\U000e0001'
    assert go_string(text) == r'"a\"\\\n\t\r\x0b\u0085\u3000é日👨\u200d\U000e0001"'


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {"repeat_penalty": "1.0"}),
        ({"temperature": 0.6}, {"temperature": "0.6", "repeat_penalty": "1.0"}),
        ({"do_sample": False, "top_k": 50}, {"top_k": "50", "temperature": "0", "repeat_penalty": "1.0"}),
        (
            {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.1},
            {
                "temperature": "1.0",
                "top_k": "50",
                "top_p": "1.0",
                "min_p": "0.05",
                "repeat_penalty": "1.1",
                "repeat_last_n": "-1",
            },
        ),
    ],
)
def test_sampling_is_what_transformers_would_do(
    generation: dict[str, Any], expected: dict[str, str], tokenizer: Callable[..., Any]
) -> None:
    file = modelfile_text(tokenizer("chatml"), "model.gguf", add_bos=True, generation=generation)
    found = dict(re.findall(r"^PARAMETER (?!stop)(\w+) (.*)$", file, re.MULTILINE))
    assert found == expected


def test_every_end_of_an_answer_stops_it(tokenizer: Callable[..., Any]) -> None:
    own = tokenizer("llama3")
    ids = own.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    file = modelfile_text(own, "model.gguf", add_bos=True, generation={"eos_token_id": ids})
    assert re.findall(r"stop (.*)", file) == ['"<|eot_id|>"', '"<end_of_turn>"', '"<eos>"']


QUIRKS = {
    "counts its turns": ("{{- content | trim", "{{- loop.index ~ content | trim"),
    "a break in a later turn": (
        "'<end_of_turn>\\n' -}}",
        "'<end_of_turn>\\n' ~ ('\\n' if loop.index == 4 else '') -}}",
    ),
    "half trimmed": ("{{- content | trim", "{{- content.lstrip()"),
    "one blank is kept": ("{{- content | trim", "{{- content.strip('\u3000 \\n\\t')"),
    "capitals": ("{{- content | trim", "{{- content | trim | upper"),
    "leaves out answers": ("{{- content | trim", "{{- (content if message['role'] == 'user' else '') | trim"),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_what_cannot_be_said_in_go_is_refused(quirk: str, tokenizer: Callable[..., Any]) -> None:
    old, new = QUIRKS[quirk]
    text = load_template("gemma")
    assert old in text
    with pytest.raises(OllamaError, match=r"^the chat template ") as refused:
        modelfile_text(tokenizer(text.replace(old, new)), "model.gguf", add_bos=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["numbering", "instructing"])
def test_templates_that_are_refused(name: str, tokenizer: Callable[..., Any]) -> None:
    text = (ROOT / "tests" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    with pytest.raises(OllamaError, match=r"^the chat template writes the "):
        modelfile_text(tokenizer(text), "model.gguf", add_bos=True)


def test_what_else_is_refused(tokenizer: Callable[..., Any]) -> None:
    own = tokenizer("gemma")
    with pytest.raises(OllamaError, match="takes no system message"):
        modelfile_text(own, "model.gguf", add_bos=True, system="Be brief.")
    for name in ("a/b.gguf", "../b.gguf", " b.gguf", 'b".gguf', "b\u3000.gguf", "c:b.gguf", "b\\c.gguf"):
        with pytest.raises(OllamaError, match="plain name"):
            modelfile_text(own, name, add_bos=True)
    own.chat_template = "{{ 'x' }}" + load_template("chatml")
    with pytest.raises(OllamaError, match=r"begins with 'x<bos>.*not with the BOS token '<bos>'"):
        modelfile_text(own, "model.gguf", add_bos=True)
    own.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(OllamaError, match="fails on a plain conversation: never"):
        modelfile_text(own, "model.gguf", add_bos=True)
    own.chat_template = "{{ bos_token ~ strftime_now('%d %b %Y') }}" + load_template("gemma").replace(
        "{{- bos_token -}}", ""
    )
    with pytest.raises(OllamaError, match="writes the day's date"):
        modelfile_text(own, "model.gguf", add_bos=True)
    own.chat_template = "{{ raise_exception('too short') if not messages[0].content }}" + load_template("gemma3")
    with pytest.raises(OllamaError, match="fails on a plain conversation: too short"):
        modelfile_text(own, "model.gguf", add_bos=True)
    own.chat_template = None
    with pytest.raises(OllamaError, match="no chat template"):
        modelfile_text(own, "model.gguf", add_bos=True)


def test_written_from_a_folder_or_not_at_all(tmp_path: Path, tokenizer: Callable[..., Any]) -> None:
    model, output = tmp_path / "model", tmp_path / "output"
    model.mkdir()
    output.mkdir()
    own = tokenizer("gemma3")
    own.save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "max_position_embeddings": 512}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 4, "top_k": 64}))
    write_modelfile(model, output, "model.gguf", add_bos=True, system="Be brief.")
    text = (output / "Modelfile").read_bytes().decode()
    options: dict[str, Any] = {
        "config": {"max_position_embeddings": 512},
        "generation": {"eos_token_id": 4, "top_k": 64},
    }
    assert text == modelfile_text(own, "model.gguf", True, "Be brief.", **options)
    assert "PARAMETER num_ctx 512\nPARAMETER top_k 64\n" in text
    (output / "Modelfile").unlink()
    own.chat_template = (ROOT / "tests" / "templates" / "numbering.jinja").read_text(encoding="utf-8")
    own.save_pretrained(model)
    with pytest.raises(OllamaError):
        write_modelfile(model, output, "model.gguf", add_bos=True)
    assert not list(output.iterdir())
