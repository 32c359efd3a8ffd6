"""Bad input through the command line: one exact line, exit 2, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.commands import main
from finetune.model.locate import locate

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


MEND = "; mend the row, or write data.on_bad_row: skip"
CASES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "rows.jsonl: the file is empty"),
    "ends in the middle of a row": (
        lines(GOOD) + b'{"messages": [{"role": "us',
        f"rows.jsonl:2: the file ends in the middle of a row, inside a string; the row starts at line 2, byte offset "
        f"{len(lines(GOOD))}" + MEND,
    ),
    "no messages": (lines(GOOD, {"messages": []}), "rows.jsonl:2: it has no messages" + MEND),
    "roles that do not alternate": (
        lines(chat(("user", "a"), ("user", "b"), ("assistant", "c"))),
        "rows.jsonl:1: the chat template refuses it: roles must alternate user, assistant, user, ... after the system "
        "message; turn 2 is user" + MEND,
    ),
    "empty assistant turn": (
        lines(GOOD, chat(("user", "a"), ("assistant", " \n"))),
        "rows.jsonl:2: message 2: the assistant's text is empty" + MEND,
    ),
    "unknown role": (
        lines(chat(("user", "a"), ("bot", "b"))),
        "rows.jsonl:1: message 2: unknown role 'bot'; known are system, developer, user, assistant, tool" + MEND,
    ),
    "invalid UTF-8": (
        lines(GOOD) + b'{"messages": "caf\xe9"}\n',
        "rows.jsonl:2: not UTF-8: byte 0xe9 at place 18 of the line" + MEND,
    ),
    "special token in the text": (
        lines(chat(("user", "what is <end_of_turn>?"), ("assistant", "a token"))),
        "rows.jsonl:1: message 1: its text holds <end_of_turn>, which is a special token of this tokenizer" + MEND,
    ),
    "unknown format": (
        lines({"quote": "a", "year": 1, "author": "b"}),
        "rows.jsonl: its format is not known from its columns (quote, year, author); write in the source, for example, "
        "columns: {prompt: quote, completion: author}; the known formats are messages, sharegpt, alpaca, "
        "prompt_completion, text",
    ),
    "unknown column": (
        lines({"quote": "a"}),
        "rows.jsonl: its format is not known from its columns (quote); write in the source, for example, "
        "columns: {text: quote}; the known formats are messages, sharegpt, alpaca, prompt_completion, text",
    ),
    # A context belongs into the prompt, and nobody has said where.
    "question with a context": (
        lines({"context": "a", "question": "b", "answer": "c"}),
        "rows.jsonl: its format is not known from its columns (context, question, answer); write in the source, for "
        'example, columns: {prompt: "{context}\\n\\n{question}", completion: answer}; the known formats are messages, '
        "sharegpt, alpaca, prompt_completion, text",
    ),
}


@pytest.mark.parametrize(("content", "message"), CASES.values(), ids=CASES)
def test_bad_rows(
    content: bytes, message: str, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(data={"train": [{"path": "rows.jsonl"}]})
    Path("rows.jsonl").write_bytes(content)
    assert main(["train", "--quiet", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("runs/chat", "perhaps runs/chats"),
        ("chats", "perhaps runs/chats"),
        ("runs/other", "write the folder of a run or of a model"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "merge", "evaluate", "push", "report"])
def test_the_name_of_a_run_that_is_not_there(
    verb: str, name: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/chats").mkdir(parents=True)
    assert main([verb, name, *(["--output", "out"] if verb == "merge" else [])]) == 2
    wanted = f"error: {name}: there is no such file or folder; {cure}\n"
    assert capsys.readouterr().err == wanted
    if verb == "evaluate":
        assert main(["evaluate", "runs/chats", "--compare", name]) == 2
        assert capsys.readouterr().err == wanted


def pair(**keys: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "chosen": "So.", "rejected": "It is a long story.", **keys}


def rated(prompt: str, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": "So.", "label": label}


ASKED = {"role": "user", "content": "Why?"}
SAID, OTHER = ({"role": "assistant", "content": text} for text in ("So.", "It is so."))
PAIRS: dict[str, tuple[str, bytes, str]] = {
    "no answer is rejected": ("dpo", lines(pair(), pair(rejected=None)), "rows.jsonl:2: it has no rejected" + MEND),
    "no prompt": (
        "orpo",
        lines(pair(prompt="")),
        "rows.jsonl:1: it has no prompt; write it, or whole conversations in chosen and rejected" + MEND,
    ),
    "two prompts": (
        "dpo",
        lines(pair(prompt=None, chosen=[ASKED, SAID], rejected=[{"role": "user", "content": "How?"}, OTHER])),
        "rows.jsonl:1: its chosen and rejected do not answer the same prompt" + MEND,
    ),
    "a text and a conversation": (
        "dpo",
        lines(pair(rejected=[ASKED, OTHER])),
        "rows.jsonl:1: one of its chosen and rejected is a text, the other a conversation; write both alike" + MEND,
    ),
    "prompts of other tokens": (
        "dpo",
        lines(pair(chosen=[ASKED, SAID | {"train": False}, ASKED, SAID], rejected=[ASKED, OTHER, ASKED, OTHER])),
        "rows.jsonl:1: the tokens before its two answers differ" + MEND,
    ),
    "a special token in one answer": (
        "kto",
        lines(pair(rejected="It ends <end_of_turn> here.")),
        "rows.jsonl:1: message 2: its text holds <end_of_turn>, which is a special token of this tokenizer; on the "
        "rejected side" + MEND,
    ),
    "roles that do not alternate": (
        "dpo",
        lines(pair(prompt=[ASKED, ASKED], chosen=[SAID], rejected=[OTHER])),
        "rows.jsonl:1: the chat template refuses it: roles must alternate user, assistant, user, ... after the system "
        "message; turn 2 is user; on the chosen side" + MEND,
    ),
    "ends in the middle of a pair": (
        "dpo",
        lines(pair()) + b'{"prompt": "Why?", "cho',
        "rows.jsonl:2: the file ends in the middle of a row, inside a string; the row starts at line 2, byte offset "
        f"{len(lines(pair()))}" + MEND,
    ),
    "conversations": (
        "dpo",
        lines(GOOD),
        "rows.jsonl: its format for method dpo is not known from its columns (messages); write in the source, for "
        "example, columns: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}; the known formats are preference",
    ),
    "pairs for sft": (
        "sft",
        lines(pair()),
        "rows.jsonl: its rows are pairs (prompt, chosen, rejected); write method: dpo, kto or orpo",
    ),
    "a label that is a word": (
        "kto",
        lines(rated("a", True), rated("b", "good")),
        "rows.jsonl:2: its label is 'good'; write true or false" + MEND,
    ),
    "answers that are all good": (
        "kto",
        lines(rated("a", True), rated("b", 1)),
        "data.train: none of 2 answers is undesirable, and kto needs both; add some",
    ),
    "no pair is left": (
        "dpo",
        lines(pair(rejected="So."), pair(chosen=" "), pair(prompt="long " * 200)),
        "no row is left to train on: 0 of 3 rows, 0 tokens, 0 trained on (0%), longest 0; 1 with equal answers; "
        "1 with an empty answer; 1 longer than training.max_length 128; 100% of the tokens to train on are lost to "
        "training.max_length (raise it, or see data.on_overflow)",
    ),
}


@pytest.mark.parametrize(("method", "content", "message"), PAIRS.values(), ids=PAIRS)
def test_bad_pairs(
    method: str, content: bytes, message: str, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(data={"train": [{"path": "rows.jsonl"}]})
    Path("rows.jsonl").write_bytes(content)
    assert main(["train", "--quiet", str(path), f"method={method}"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not Path("run").exists()


def test_no_row_left(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(data={"train": [{"path": "rows.jsonl"}], "on_bad_row": "skip"})
    Path("rows.jsonl").write_bytes(lines(chat(("user", "a")), chat(("user", "a"), ("assistant", ""))))
    assert main(["train", "--quiet", str(path)]) == 2
    assert capsys.readouterr().err == (
        "error: no row is left to train on: 0 of 2 rows, 0 tokens, 0 trained on (0%), longest 0; "
        "1 there is no assistant message; 1 the assistant's text is empty\n"
    )
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"name_or_path": "weightless"},
            "model.name_or_path: weightless holds no weights; weights must be .safetensors",
        ),
        (
            {"name_or_path": "pickled"},
            "model.name_or_path: pickled holds only pytorch_model.bin, a pickle, which can run code when it is read; "
            "weights must be .safetensors",
        ),
        (
            {"name_or_path": "random:gemma3", "chat_template": "foreign.jinja"},
            "chat template: it writes <|turn|>, a token that this tokenizer lacks; choose a template of the model's "
            "own family",
        ),
        (
            {"name_or_path": "untemplated"},
            "model.chat_template: this model has no chat template of its own; write chat_template: gemma, or "
            "a .jinja file",
        ),
    ],
    ids=["no weights", "pickle only", "foreign template", "no template"],
)
def test_bad_models(
    model: dict[str, str], message: str, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(model=model, data={"train": [{"path": "rows.jsonl"}]})
    Path("rows.jsonl").write_bytes(lines(GOOD))
    Path("foreign.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    )
    source = Path(locate("random:gemma"))
    for name, kept in {
        "weightless": lambda p: p.suffix != ".safetensors",
        "pickled": lambda p: p.suffix != ".safetensors",
        "untemplated": lambda p: p.suffix != ".jinja",
    }.items():
        Path(name).mkdir()
        for file in source.iterdir():
            if kept(file):
                (Path(name) / file.name).write_bytes(file.read_bytes())
    Path("pickled/pytorch_model.bin").write_bytes(b"not read")
    assert main(["train", "--quiet", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not Path("run").exists()
