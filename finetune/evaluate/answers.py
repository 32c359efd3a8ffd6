"""Greedy answers to many prompts at once: the longest first, padded on the left, as many as memory holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.turns import Message
from finetune.evaluate.prompts import Prompt

# Prompts that are answered together; halved where memory runs out.
_BATCH = 16
_NGRAM = 4


@dataclass(frozen=True)
class Answer:
    """One answer: to what, its text, how many tokens, whether it ended by itself, how much of it it had said before."""

    prompt: str
    messages: tuple[Message, ...]
    text: str
    tokens: int
    stopped: bool
    repeated: float


def answer_prompts(
    generator: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The answers to all prompts, in their order; after each one what the user goes on to ask.

    Args:
        generator: A `finetune.generate.Generator`.
        prompts: Each with one turn or several.
        max_new_tokens: Where an answer is cut off.
        done: Called with how many answers have come.

    Raises:
        LabelError: The chat template refuses a conversation.
    """
    found: dict[int, list[Answer]] = defaultdict(list)
    asked = {i: prompt.messages for i, prompt in enumerate(prompts)}
    turn = 0
    while asked:
        ids = {i: generator.prompt_ids(list(messages)) for i, messages in asked.items()}
        for i, tokens in _in_batches(generator, ids, max_new_tokens, done):
            stopped = bool(tokens) and tokens[-1] in generator.stop_ids
            said = tokens[:-1] if stopped else tokens
            text = generator.chat.tokenizer.decode(said, skip_special_tokens=True).strip()
            found[i].append(Answer(prompts[i].name, asked[i], text, len(tokens), stopped, repetition(said)))
        asked = {
            i: (
                *messages,
                {"role": "assistant", "content": found[i][-1].text},
                {"role": "user", "content": prompts[i].follow_ups[turn]},
            )
            for i, messages in asked.items()
            if turn < len(prompts[i].follow_ups)
        }
        turn += 1
    return [answer for i in range(len(prompts)) for answer in found[i]]


def _in_batches(
    generator: Any, ids: dict[int, list[int]], max_new_tokens: int, done: Callable[[int], None]
) -> list[tuple[int, list[int]]]:
    import torch

    # The longest first: if memory does not hold them, that shows at once.
    waiting = sorted(ids, key=lambda i: -len(ids[i]))
    size, found = _BATCH, []
    while waiting:
        batch = waiting[:size]
        try:
            answers = generator.answers([ids[i] for i in batch], max_new_tokens)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(1, len(batch) // 2)
            torch.cuda.empty_cache()
            continue
        found += list(zip(batch, answers, strict=True))
        waiting = waiting[len(batch) :]
        done(len(batch))
    return found


def repetition(tokens: Sequence[int]) -> float:
    """The share of a text's runs of four tokens that stand in it before, 0 to 1.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training (2020), section 4, seq-rep-4.
    """
    runs = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
