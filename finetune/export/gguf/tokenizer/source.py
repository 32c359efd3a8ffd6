"""Reads a trained tokenizer, and checks its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.system.errors import ExportError, reworded
from finetune.system.files import with_repeated_key
from finetune.system.terminal import quiet


@dataclass(frozen=True)
class Difference:
    """A difference of llama.cpp's tokens from the trained tokenizer's that no metadata of the file can remove."""

    what: str
    """One line for the report."""
    concerns: Callable[[str], bool] = lambda text: False
    """True for a text whose tokens can differ by it."""


@dataclass
class TokenizerFiles:
    """A trained tokenizer, and the differences of llama.cpp's from it that are known so far."""

    file: Path
    tokenizer: Any
    merges: list[tuple[str, str]]
    ids: dict[str, int]
    added: dict[str, Any]
    """The AddedToken of the package tokenizers, by its text."""
    differences: list[Difference] = field(default_factory=list)
    opening: str = ""
    """A short conversation as the chat template renders it."""

    def parts(self, name: str) -> list[dict[str, Any]]:
        """The steps of its normalizer, pre-tokenizer or post-processor, as tokenizer.json writes them."""
        whole = getattr(self.tokenizer.backend_tokenizer, name)
        steps = [json.loads(whole.__getstate__())] if whole else []
        while any(step["type"] == "Sequence" for step in steps):
            inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}.get(name, "processors")
            steps = [part for step in steps for part in (step[inner] if step["type"] == "Sequence" else [step])]
        return steps

    def differs(self, what: str, concerns: Callable[[str], bool] = lambda text: False) -> None:
        """Notes a `Difference`."""
        self.differences.append(Difference(what, concerns))

    def refuse(self, what: str) -> ExportError:
        """An error that names the file."""
        return ExportError(f"{self.file}: {what}")


def trained_tokenizer(model: Path) -> Any:
    """The tokenizer as the model was trained with it: transformers 5 may split texts by other rules than its file.

    Raises:
        ExportError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    prefix = f"{model}: its tokenizer cannot be loaded"
    with reworded(ExportError, prefix, OSError, ValueError), quiet():
        return AutoTokenizer.from_pretrained(model)


def read_unique_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ExportError: The file is missing or damaged, or a key is there twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found, twice = with_repeated_key(pairs)
        if twice is not None:
            raise ExportError(f"{file}: {twice!r} is there twice")
        return found

    try:
        whole = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError as error:
        raise ExportError(f"{file} is missing; save the model's tokenizer beside it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExportError(f"{file} is damaged: {error}") from error
    if not isinstance(whole, dict):
        raise ExportError(f"{file} is damaged: it holds no object")
    return whole


def read_bpe(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The token ids and the merges of a tokenizer.json.

    Raises:
        ExportError: The file is damaged, not of a BPE, or its tokens and merges do not fit together.
    """
    whole = read_unique_json(file)
    model, added = whole.get("model"), whole.get("added_tokens") or []
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE" or not isinstance(model, dict):
        raise ExportError(
            f"{file}: its model is {kind or 'missing'}; only BPE (byte-level, or with byte fallback) can be written"
        )
    try:
        vocab = {str(token): int(i) for token, i in model["vocab"].items()}
        merges = [
            (str(left), str(right))
            for left, right in (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        ]
        later = {str(token["content"]): int(token["id"]) for token in added}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    for token, i in later.items():
        if vocab.get(token, i) != i:
            raise ExportError(f"{file}: {token!r} has the ids {vocab[token]} and {i}")
    owners: dict[int, str] = {}
    for token, i in (vocab | later).items():
        if (other := owners.setdefault(i, token)) != token:
            raise ExportError(f"{file}: {other!r} and {token!r} have both the id {i}")
    gap = next((i for i in range(len(owners)) if i not in owners), None)
    if gap is not None:
        raise ExportError(f"{file}: no token has the id {gap}, though there are {len(owners)} tokens")
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise ExportError(f"{file}: a merge names {token!r}, which is no token")
    return vocab, merges


def contains_any(*tokens: str) -> Callable[[str], bool]:
    """A function that is true for a text with one of these in it."""
    return lambda text: any(token in text for token in tokens)


def shown_steps(steps: list[dict[str, Any]]) -> str:
    """Steps of a tokenizer.json on one line, for a message."""
    shown = json.dumps(steps, ensure_ascii=False) if steps else "absent"
    return shown if len(shown) < 400 else shown[:400] + "..."
