"""Shortens a row that is longer than `training.max_length`, as `data.on_overflow` says."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

import numpy as np

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE, Encoded
from finetune.data.rendering import RenderedChat
from finetune.data.turns import INSTRUCTING
from finetune.recipe.schema import DataSection


def shorten(
    encoded: Encoded, rendered: RenderedChat | None, chat: Chat, section: DataSection, max_length: int
) -> tuple[list[Encoded], str]:
    """The rows of at most `max_length` tokens that a longer row becomes; none if it is dropped.

    Args:
        encoded: The row, longer than `max_length`.
        rendered: Its conversation; None for text without turns.
        chat: The tokenizer and its chat template.
        section: The recipe's section `data`; its `on_overflow` is not `error`, which `prepare.py` handles.
        max_length: The longest row, in tokens.

    Returns:
        The rows, and the reason why trained tokens are lost, as the ledger words it.
    """
    if section.on_overflow == "drop":
        return [], f"longer than training.max_length {max_length}"
    if rendered is None:
        pieces = _cut_text(section.on_overflow, encoded, max_length, chat.tokenizer.bos_token_id)
        return pieces, f"with no trained token within training.max_length {max_length}"
    if section.on_overflow == "truncate_turns":
        return _cut_turns(
            encoded, max_length
        ), f"with no trained turn that ends within training.max_length {max_length}"
    pieces = _split_turns(rendered, encoded, chat, section.train_on_thinking, max_length)
    return pieces, f"with no exchange that fits into training.max_length {max_length}"


def _cut_turns(encoded: Encoded, max_length: int) -> list[Encoded]:
    """The row up to the last trained turn that ends within `max_length`."""
    whole = tuple(turn for turn in encoded.turns if turn.end <= max_length)
    if not whole:
        return []
    return [_slice(encoded, 0, whole[-1].end, turns=whole, cut=True)]


def _slice(encoded: Encoded, start: int, end: int, **changes: Any) -> Encoded:
    ids = encoded.input_ids[start:end]
    labels = encoded.labels[start:end].copy()
    labels[:1] = IGNORE
    characters = round(encoded.characters * len(ids) / len(encoded.input_ids))
    # Only text without turns, which has no thinking, is cut at its start.
    thinking = tuple((first, min(last, end)) for first, last in encoded.thinking if first < end)
    return replace(encoded, input_ids=ids, labels=labels, characters=characters, thinking=thinking, **changes)


def _cut_text(on_overflow: str, encoded: Encoded, max_length: int, bos: int | None) -> list[Encoded]:
    """A row without turns, cut at `max_length`; with `split` the rest becomes further rows.

    A further row begins with BOS, if the text does, and with the last token of the row before, which has no label. So
    each token is trained on once, predicted from the token before it.
    """
    if on_overflow != "split":
        pieces = [_slice(encoded, 0, max_length, turns=(), cut=True)]
        return [piece for piece in pieces if piece.trained_tokens]
    first = [bos] if bos is not None and encoded.input_ids[0] == bos else []
    pieces = [_slice(encoded, 0, max_length, turns=())]
    step = max_length - len(first) - 1
    for start in range(max_length - 1, len(encoded.input_ids) - 1, max(1, step)):
        piece = _slice(encoded, start, start + step + 1, turns=())
        ids = np.concatenate([first, piece.input_ids])
        labels = np.concatenate([[IGNORE] * len(first), piece.labels])
        pieces.append(replace(piece, input_ids=ids.astype(np.int32), labels=labels.astype(np.int32)))
    return [piece for piece in pieces if piece.trained_tokens]


def _split_turns(
    rendered: RenderedChat, whole: Encoded, chat: Chat, train_on_thinking: bool, max_length: int
) -> list[Encoded]:
    """The conversation as several, each from a user message on, with the system message before it.

    Each holds as many exchanges as fit. An exchange longer than `max_length` is left out, and the row counts as cut.
    """
    messages = list(rendered.messages)
    system = messages[:1] if messages[0]["role"] in INSTRUCTING else []
    body = messages[len(system) :]
    # An assistant's message before the first user's belongs to the first exchange.
    starts = [0, *[i for i, message in enumerate(body) if message["role"] == "user"][1:]]
    # Decided for the whole conversation: `train_on: last_assistant` means its last turn, not that of each piece.
    trained = {turn.message - len(system) for turn in whole.turns}
    body = [
        message | {"train": i in trained} if message["role"] == "assistant" else message
        for i, message in enumerate(body)
    ]
    train_on = rendered.train_on if rendered.train_on == "all" else "assistant"

    def encode(begin: int, end: int) -> Encoded | None:
        part = body[starts[begin] : starts[end] if end < len(starts) else len(body)]
        if not any(message.get("train") for message in part):
            return None
        return chat.encode(system + part, train_on, rendered.tools, rendered.variables, train_on_thinking)

    def too_long(begin: int, end: int) -> bool:
        encoded = encode(begin, end)
        return encoded is not None and len(encoded.input_ids) > max_length

    pieces, begin, lost = [], 0, False
    while begin < len(starts):
        ends = range(begin + 1, len(starts) + 1)
        fitting = bisect_left(ends, True, key=lambda end: too_long(begin, end))
        if not fitting:
            lost, fitting = True, 1
        elif piece := encode(begin, begin + fitting):
            pieces.append(piece)
        begin += fitting
    if pieces:
        pieces[0] = replace(pieces[0], cut=lost)
    return pieces
