"""Converts a BPE tokenizer's merges to GGUF metadata, and reports the differences that remain.

Its tokenizer `llama` joins any two neighbours that make a token, the one with the highest score first; given the ranks
of the merges as scores, that is what a BPE with byte fallback does. Its `gemma4` applies the merges themselves, to each
line of a text. Its `gpt2` knows merges, but splits texts by none but its own list of pre-tokenizers, of which the one
that splits alike is named.

Source: llama.cpp b11549, src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from tokenizers import Regex
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split

from finetune.export.gguf.tokenizer.source import TokenizerFiles, contains_any, shown_steps

SPACE = "▁"
BYTE_TOKENS = dict.fromkeys(f"<0x{i:02X}>" for i in range(256))  # in order, and quickly found
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_SPLIT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = "ByteLevel"  # its own regex
# How a text is split before merges, and llama.cpp's two names for it: with `ignore_merges` (a word in the vocabulary is
# not merged), and without. An empty name: llama.cpp has none.
_PRE_TOKENIZERS: dict[tuple[str, ...], tuple[str, str]] = {
    (rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}",): ("llama-bpe", "smaug-bpe"),
    (rf"{_SHORT}|{_WORDS}|\p{{N}}|{_SIGNS}|{_BLANKS}",): ("", "qwen2"),
    (rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",): (
        "",
        "qwen35",
    ),
    (rf"{_CASED % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}",): ("tekken", ""),
    (rf"{_CASED % (_SHORT + '?', _SHORT + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}",): (
        "",
        "gpt-4o",
    ),
    (r"\p{N}", _GPT2): ("", "smollm"),
    (_GPT2,): ("", "gpt-2"),
}
# llama.cpp's form of two of them, in which only A to Z are capitals and marks are no letters.
_CASED_IN_LLAMA_CPP = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+%s|"
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*%s"
)


def byte_fallback(source: TokenizerFiles, rows: int) -> dict[str, Any]:
    """The metadata of a BPE with byte fallback (Gemma, Llama 2).

    Args:
        source: The tokenizer.
        rows: The rows of the embedding, each of which gets a score.

    Raises:
        ExportError: llama.cpp cannot read it, or would normalise texts otherwise.
    """
    if missing := [token for token in BYTE_TOKENS if token not in source.ids]:
        raise source.refuse(f"byte tokens are missing ({', '.join(missing[:3])}...), without which llama.cpp fails")
    key = "tokenizer.ggml."
    metadata = {key + "model": "llama", key + "pre": "default", key + "add_space_prefix": _adds_space_prefix(source)}
    # A token's first merge counts; what no merge makes comes after all of them.
    scores = [-float(len(source.merges) + i) for i in range(rows)]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(source.merges):
        token = left + right
        if token not in ranks:
            ranks[token] = rank
            scores[source.ids[token]] = -float(rank)
    spelt = [token for token, item in source.added.items() if SPACE in token and not item.special]
    if spelt:
        source.differs(f"a text that holds {spelt[0]!r} is read as if it held spaces", contains_any(*spelt))
    _check_merges(source, ranks)
    return metadata | {key + "scores": scores}


def is_gemma4(source: TokenizerFiles, model_type: str, bos_first: bool) -> bool:
    """True for a tokenizer that llama.cpp's `gemma4` can be: its conversion of Gemma 4 writes no other.

    Args:
        source: A tokenizer with byte fallback.
        model_type: Of the model's config.
        bos_first: The model's texts begin with BOS, which llama.cpp then adds whatever the file says.
    """
    steps = [step for step in (*source.parts("normalizer"), *source.parts("pre_tokenizer")) if step != _SPLIT_SPACES]
    return model_type.startswith("gemma4") and bos_first and steps == [_REPLACE]


def gemma4(source: TokenizerFiles, rows: int) -> dict[str, Any]:
    """The metadata of Gemma 4's tokenizer, as llama.cpp's conversion/gemma.py writes it (October 2026).

    Args:
        source: The tokenizer.
        rows: The rows of the embedding, each of which gets the same score, which nobody reads.
    """
    across = [left + right for left, right in source.merges if "\n" in left + right and (left + right).strip("\n")]
    if across:
        source.differs(f"llama.cpp joins nothing across line breaks, as {across[0]!r} does", contains_any(*across))
    key = "tokenizer.ggml."
    merges = [f"{left} {right}" for left, right in source.merges]
    metadata: dict[str, Any] = {key + "model": "gemma4", key + "merges": merges, key + "scores": [-1000.0] * rows}
    metadata |= {key + "add_space_prefix": False, key + "add_bos_token": True}
    mask = source.tokenizer.mask_token_id
    return metadata | ({} if mask is None else {key + "mask_token_id": mask})


def _adds_space_prefix(source: TokenizerFiles) -> bool:
    """True if llama.cpp is to write a space before a text and after each special token."""
    steps = [*source.parts("normalizer"), *source.parts("pre_tokenizer")]
    steps = [step for step in steps if step != _SPLIT_SPACES]  # of which there are none left
    spaces = steps[0] if len(steps) == 1 else {}
    scheme = "always" if steps in ([_PREPEND, _REPLACE], [_REPLACE, _PREPEND]) else None
    if steps == [_REPLACE]:
        scheme = "never"
    elif spaces.get("type") == "Metaspace" and spaces["replacement"] == SPACE:
        scheme = spaces["prepend_scheme"]
        across = [left + right for left, right in source.merges if SPACE in (left + right)[1:]]
        if spaces["split"] and across:
            raise source.refuse(
                f"it splits texts at spaces, which llama.cpp does not, and has merges across them ({across[0]!r})"
            )
    if scheme is None:
        raise source.refuse(
            f"its normalizer and pre_tokenizer are {shown_steps(steps)}; llama.cpp knows spaces written as {SPACE}, "
            "with one before the text (Prepend, or Metaspace) or not"
        )
    if scheme == "never":
        return False
    if not spaces:
        for token in [token for token, item in source.added.items() if item.normalized]:
            source.differs(f"{token} is looked for once a space was put before the text", contains_any(token))
        return True
    # Metaspace writes none before a space, and `first` none after a special token.
    if source.tokenizer.chat_template is None:
        names = tuple(source.added)
        again = [token + space for token in names for space in (" ", SPACE)]
        source.differs("a text that begins with spaces gets one more", lambda text: text.startswith((" ", SPACE)))
        special = names if scheme == "first" else again
        source.differs("a text behind a special token begins with a space more", contains_any(*special))
        return True
    edges = "|".join(re.escape(token) for token in sorted(source.added, key=len, reverse=True))
    pieces = list(enumerate(re.split(edges, source.opening)))
    wanted = {(scheme == "always" or i == 0) and not piece.startswith((" ", SPACE)) for i, piece in pieces if piece}
    source.differs(
        "a text alone begins with as many spaces as it has, as texts in a conversation do"
        if wanted == {False}
        else "texts between special tokens begin with a space, be there one or not"
    )
    return wanted != {False}


def _check_merges(source: TokenizerFiles, ranks: dict[str, int]) -> None:
    """Notes tokens that llama.cpp, by their scores, would merge differently from the trained tokenizer."""
    pairs, last = set(source.merges), ""
    mixed = []
    seen: set[str] = set()
    for left, right in source.merges:
        token = left + right
        if token != last and token in seen:
            mixed.append(token)
        seen.add(token)
        last = token
    if mixed:
        source.differs(f"{len(mixed)} tokens ({mixed[0]!r} is one) have merges of several ranks, of which one is used")
    parts = source.ids.keys() - source.added.keys()
    more = [
        (token[:at], token[at:])
        for token in parts
        for at in range(1, len(token))
        if (at == 1 or token[:at] in parts)
        and (at == len(token) - 1 or token[at:] in parts)
        and (token[:at], token[at:]) not in pairs
    ]
    if more:
        left, right = min(more)
        source.differs(f"llama.cpp joins what no merge joins: {len(more):,} pairs, such as {left!r} and {right!r}")


def byte_level(source: TokenizerFiles) -> dict[str, Any]:
    """The metadata of a byte-level BPE (GPT-2, Llama 3, Qwen).

    Raises:
        ExportError: llama.cpp cannot read it, or has no way to split texts as it does.
    """
    missing = sorted(set(ByteLevel.alphabet()) - source.ids.keys())
    # Without an unknown token such a byte is dropped by both.
    if missing and source.tokenizer.backend_tokenizer.model.unk_token:
        splits = ByteLevel(add_prefix_space=False, use_regex=False)
        source.differs(
            f"{len(missing)} bytes have no token, and llama.cpp drops them",
            lambda text: not set(missing).isdisjoint(splits.pre_tokenize_str(text)[0][0] if text else ""),
        )
    changes = source.parts("normalizer")
    if changes not in ([], [{"type": "NFC"}]):
        raise source.refuse(f"its normalizer is {shown_steps(changes)}, which llama.cpp lacks")
    if changes:
        source.differs("llama.cpp does not compose characters (NFC)", lambda t: unicodedata.normalize("NFC", t) != t)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_name(source),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in source.merges],
    }


def _pre_tokenizer_name(source: TokenizerFiles) -> str:
    """llama.cpp's name for the way in which texts are split."""
    steps = source.parts("pre_tokenizer")
    how: list[str] = []
    for step in steps:
        if step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
            how.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            how.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            how += [_GPT2] if step["use_regex"] else []
        else:
            how.append("")
    names = _PRE_TOKENIZERS.get(tuple(how))
    if names is None or [i for i, step in enumerate(steps, 1) if step["type"] == "ByteLevel"] != [len(steps)]:
        raise source.refuse(
            f"its pre_tokenizer is {shown_steps(steps)}; llama.cpp's that are known here are "
            f"{', '.join(sorted(name for both in _PRE_TOKENIZERS.values() for name in both if name))}"
        )
    whole = bool(source.tokenizer.backend_tokenizer.model.ignore_merges)
    name = names[not whole]
    if not name:
        name = names[whole]
        found = _tokens_without_merges(source)
        if found:
            source.differs(f"{len(found)} tokens ({found[0]!r} is one) are a whole word's without merges, or not")
    in_llama_cpp = (
        how[0]
        .replace(_CASED % ("", ""), _CASED_IN_LLAMA_CPP % ("", ""))
        .replace(_CASED % (_SHORT + "?", _SHORT + "?"), _CASED_IN_LLAMA_CPP % (_SHORT + "?", _SHORT + "?"))
    )
    if in_llama_cpp != how[0]:
        split, llama_split = (Split(Regex(pattern), "isolated").pre_tokenize_str for pattern in (how[0], in_llama_cpp))
        source.differs(f"{name}: llama.cpp knows capitals from A to Z alone", lambda t: split(t) != llama_split(t))
    return name


def _tokens_without_merges(source: TokenizerFiles) -> list[str]:
    """The tokens that the merges do not make from the token's own text."""
    model = BPE(vocab=source.ids, merges=source.merges)
    return [token for token in source.ids if token not in source.added and len(model.tokenize(token)) > 1]
