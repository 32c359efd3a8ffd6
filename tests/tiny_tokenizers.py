"""A tiny tokenizer of each kind that llama.cpp has something for, saved as a model's folder without weights."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from finetune.data.template import load_template
from finetune.model.locate import locate
from finetune.recipe.checks import RANDOM_ARCHITECTURES

TEXTS = [
    message["content"]
    for line in (ROOT / "data" / "chat_sample.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    for message in json.loads(line)["messages"]
]
TEXTS += ["a  b    c\n\n\nd 2025 12345 'll 'LL don't café NaïveText HTTPServer"] * 3
TEXTS += ["re\u0301sume\u0301 the\u0301 e\u0301"] * 20  # so that merges join letters and marks

SPACE = normalizers.Replace(" ", "▁")
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>"]
LLAMA = ["<unk>", "<s>", "</s>"]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ABBREVIATED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ABBREVIATED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = ABBREVIATED + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = TEKKEN.replace("]+|", f"]+{ABBREVIATED}?|", 1).replace("]*|", f"]*{ABBREVIATED}?|", 1)
GPT4O = GPT4O.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@functools.cache
def pieces() -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Tokens in the order of their merges, single characters, and the merges as trained."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = SPACE
    trainer = trainers.BpeTrainer(vocab_size=1800, show_progress=False, limit_alphabet=300)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    made = list(dict.fromkeys(left + right for left, right in merges))
    return made, [token for token in model["vocab"] if token not in set(made)], merges


def sentencepiece(special: list[str], space: Any = SPACE, split: Any = None, as_trained: bool = False) -> Tokenizer:
    """A BPE with byte fallback, whose merges have each pair that makes a token, as converters write them.

    Those of `as_trained` make each token from one pair only, and none of a line break and something else.
    """
    made, single, trained = pieces()
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256)), *made, *single]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (token[:at], token[at:])
        for token in made
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    if as_trained:
        merges = [pair for pair in trained if "\n" not in "".join(pair) or not "".join(pair).strip("\n")]
    found = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
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
    return pre.Sequence([pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])


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
    model_type: str = "llama",
) -> Path:
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    whole.chat_template = template
    whole.save_pretrained(folder)
    config = {"model_type": model_type, "vocab_size": rows or len(whole)}
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


GEMMA4 = ["<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>']
GEMMA4 += [f"<{bar}>" for name in ("tool", "tool_call", "tool_response") for bar in (f"|{name}", f"{name}|")]


def gemma4(folder: Path) -> Path:
    split = pre.Split(" ", "merged_with_previous")
    tokenizer = begin(sentencepiece([*GEMMA, *GEMMA4], split=split, as_trained=True), "<bos>")
    stops = [tokenizer.token_to_id(name) for name in ("<eos>", "<turn|>", "<|tool_response>")]
    names = G | {"mask_token": "<mask>", "extra_special_tokens": GEMMA4[1:]}
    return save(folder, tokenizer, names, load_template("gemma4"), stops=stops, model_type="gemma4_text")


def small(folder: Path) -> Path:
    """It joins `b c`, `a b` and `ab c`, but not `a bc`."""
    tokens = [*GEMMA, *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "bc", "ab", "abc"]
    found = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[("b", "c"), ("a", "b"), ("ab", "c")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    found.normalizer = SPACE
    found.add_special_tokens(GEMMA)
    return save(folder, begin(found, "<bos>"), G)


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
    "gemma, byte fallback": gemma,
    "gemma4": gemma4,
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
    **{f"random:{it}": lambda folder, it=it: Path(locate(f"random:{it}")) for it in RANDOM_ARCHITECTURES},
}
