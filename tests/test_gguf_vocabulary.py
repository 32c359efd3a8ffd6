"""A trained tokenizer as llama.cpp reads it: the same token ids on 200 texts and a conversation, or a refusal."""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.base import RANDOM_ARCHITECTURES, locate
from finetune.export.vocabulary import (
    BYTE,
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    expected,
    probes,
    read,
    vocabulary,
)
from finetune.export.vocabulary import VocabularyError as Refused
from finetune.template import load_template
from tests.conftest import ROOT, USER_CACHE

TALK = [
    {"role": "user", "content": "今日は\n  晴れ？ It's 42°C"},
    {"role": "assistant", "content": "はい 😀"},
    {"role": "user", "content": "<b>Why</b>?"},
]
TEXTS = [
    message["content"]
    for line in (ROOT / "data" / "chat_sample.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    for message in json.loads(line)["messages"]
]
TEXTS += ["a  b    c\n\n\nd 2025 12345 'll 'LL don't café NaïveText HTTPServer"] * 3
K = "tokenizer.ggml."

# -----------------------------------------------------------------------------------------------------------------
# Tiny tokenizers of each kind

SPACE = normalizers.Replace(" ", "▁")
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>"]
LLAMA = ["<unk>", "<s>", "</s>"]
MISTRAL = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
ABBREVIATED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ABBREVIATED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    ABBREVIATED
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = TEKKEN.replace("]+|", f"]+{ABBREVIATED}?|", 1).replace("]*|", f"]*{ABBREVIATED}?|", 1)
GPT4O = GPT4O.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@functools.cache
def pieces() -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Merges, the tokens that they make, and single characters."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = SPACE
    trainer = trainers.BpeTrainer(vocab_size=1800, show_progress=False, limit_alphabet=300)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    made = list(dict.fromkeys(left + right for left, right in merges))
    return merges, made, [token for token in model["vocab"] if token not in set(made)]


def sentencepiece(special: list[str], whole: bool = True, space: Any = SPACE, split: Any = None) -> Tokenizer:
    """A BPE with byte fallback; `whole`: with each pair that makes a token among its merges, as converters have them."""
    merges, made, single = pieces()
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *made, *single]
    ids = {token: i for i, token in enumerate(tokens)}
    if whole:
        merges = [
            (token[:at], token[at:])
            for token in made
            for at in range(1, len(token))
            if token[:at] in ids and token[at:] in ids
        ]
    found = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if space:
        found.normalizer = space
    if split:
        found.pre_tokenizer = split
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return found


def bytelevel(special: list[str], split: Any, before: Any = None, ignore_merges: bool = False) -> Tokenizer:
    found = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if before:
        found.normalizer = before
    found.pre_tokenizer = split
    found.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    found.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    return found


def regex(pattern: str) -> Any:
    return pre.Sequence(
        [pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def begin(tokenizer: Tokenizer, bos: str, behind: str = "") -> Tokenizer:
    names = [name for name in (bos, behind) if name]
    template = processors.TemplateProcessing(
        single=f"{bos} $A {behind}".strip(),
        pair=f"{bos} $A $B",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def save(
    folder: Path,
    tokenizer: Tokenizer,
    names: dict[str, str],
    template: str | None = None,
    rows: int = 0,
    stops: Any = None,
    plain: tuple[str, ...] = (),
) -> Path:
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    whole.chat_template = template
    whole.save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": rows or len(whole)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if stops is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    return folder


G = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
L = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
T = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
Q = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
THREE = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def gemma(folder: Path) -> Path:
    split = pre.Split(" ", "merged_with_previous")
    tokenizer = begin(sentencepiece([*GEMMA, "<mask>", "<start_of_turn>"], split=split), "<bos>")
    plain = ("<end_of_turn>", "\n", "\n\n", "\n\n\n", "<b>", "</b>", "▁▁")
    return save(folder, tokenizer, G, load_template("gemma3"), 2400, [1, tokenizer.get_vocab_size()], plain)


def llama2(folder: Path) -> Path:
    space = normalizers.Sequence([normalizers.Prepend("▁"), SPACE])
    return save(folder, begin(sentencepiece(LLAMA, space=space), "<s>"), L, MISTRAL)


def mistral(folder: Path, scheme: str = "first", template: str | None = MISTRAL) -> Path:
    split = pre.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = sentencepiece([*LLAMA, "[INST]", "[/INST]"], space=None, split=split)
    return save(folder, begin(tokenizer, "<s>"), L, template, 2300)


def llama3(folder: Path, ignore_merges: bool = True) -> Path:
    tokenizer = bytelevel(THREE, regex(LLAMA3), ignore_merges=ignore_merges)
    return save(folder, begin(tokenizer, THREE[0]), T, load_template("llama3"))


def of(
    special: list[str], names: dict[str, str], template: str | None, split: Any, **more: Any
) -> Callable[[Path], Path]:
    return lambda folder: save(folder, bytelevel(special, split, **more), names, template, 1600)


KINDS: dict[str, Callable[[Path], Path]] = {
    "gemma": gemma,
    "llama 2": llama2,
    "metaspace, first": mistral,
    "metaspace, always": lambda folder: mistral(folder, "always"),
    "metaspace, never": lambda folder: mistral(folder, "never"),
    "metaspace, first, no template": lambda folder: mistral(folder, template=None),
    "llama-bpe": llama3,
    "smaug-bpe": lambda folder: llama3(folder, ignore_merges=False),
    "qwen2": of(CHATML, Q, load_template("chatml"), regex(QWEN2), before=normalizers.NFC()),
    "qwen35": of(CHATML, Q, load_template("chatml"), regex(QWEN35)),
    "tekken": of([*LLAMA, "[INST]", "[/INST]"], L, MISTRAL, regex(TEKKEN), ignore_merges=True),
    "gpt-4o": of(CHATML, Q, load_template("chatml"), regex(GPT4O)),
    "smollm": of(CHATML, Q, load_template("chatml"), pre.Sequence([pre.Digits(True), pre.ByteLevel(False)])),
    "gpt-2": of(CHATML, {"eos_token": "<|endoftext|>"}, None, pre.ByteLevel(False)),
    **{name: lambda folder, name=name: Path(locate(f"random:{name}")) for name in RANDOM_ARCHITECTURES},
}

# -----------------------------------------------------------------------------------------------------------------
# llama.cpp


def write(metadata: dict[str, Any], file: Path) -> Path:
    """A model of one layer that knows nothing, around a vocabulary."""
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
    out.add_tensor("token_embd.weight", np.zeros((len(metadata[K + "tokens"]), 32), np.float16))
    out.add_tensor("output_norm.weight", np.zeros(32, np.float32))
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
from finetune.export.llama import Llama
for file, texts in json.load(sys.stdin):
    with Llama(Path(file)) as llama:
        print(json.dumps([llama.tokenise(text, special=True) for text in texts]))
"""


def ids(*asked: tuple[Path, list[str]]) -> list[list[list[int]]]:
    """llama.cpp's ids of texts by each file; a file that ends the process ends the answers."""
    said = json.dumps([(str(file), texts) for file, texts in asked])
    done = subprocess.run([sys.executable, "-c", IDS], input=said, capture_output=True, text=True, cwd=ROOT)
    return [json.loads(line) for line in done.stdout.splitlines()]


def conversation(model: Path, metadata: dict[str, Any]) -> tuple[str, list[int]]:
    """A conversation as llama.cpp's server gives it to its tokenizer, and its tokens as trained."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    trained = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    return text.removeprefix(tokenizer.bos_token) if metadata[K + "add_bos_token"] else text, trained


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Of each kind: metadata, limits, [(text, trained ids)], llama.cpp's ids."""
    found, asked = {}, []
    for name, make in KINDS.items():
        model = make(tmp_path_factory.mktemp("model"))
        metadata, limits = read(model)
        pairs = expected(model, metadata, probes())
        if "tokenizer.chat_template" in metadata:
            pairs.append(conversation(model, metadata))
        asked.append((write(metadata, model.parent / f"{name}.gguf"), [text for text, _ in pairs]))
        found[name] = (metadata, limits, pairs, model)
    return {name: (*found[name], ids_) for name, ids_ in zip(found, ids(*asked), strict=True)}


def test_there_are_200_probes() -> None:
    assert len(probes()) == len(set(probes())) == 200


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_the_trained_tokens(kind: str, compared: dict[str, tuple[Any, ...]]) -> None:
    _, limits, pairs, _, given = compared[kind]
    differ = [text for (text, trained), now in zip(pairs, given, strict=True) if trained != now]
    assert [text for text in differ if not any(limit.concerns(text) for limit in limits)] == []
    print(kind, len(differ), [limit.what for limit in limits])
