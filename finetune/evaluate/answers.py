"""Greedy answers to many prompts in batches: the longest prompts first, padded on the left."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data.turns import Message, called_functions
from finetune.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from finetune.model.generate import Generator

# The largest batch; it is halved when memory runs out.
_BATCH_SIZE = 16
_NGRAM = 4


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Attributes:
        prompt: The prompt.
        messages: The conversation before the answer.
        text: The answer.
        tokens: Its length in tokens, its stop token included.
        stopped: A stop token ended it; otherwise `max_new_tokens` cut it off.
        repetition: The share of repeated 4-grams; see `repetition`.
    """

    prompt: Prompt
    messages: tuple[Message, ...]
    text: str
    tokens: int
    stopped: bool
    repetition: float

    @property
    def asked(self) -> list[Message]:
        """The conversation before the answer as texts alone; functions and their calls are JSON."""
        tools = [{"role": "tools", "content": _as_json(self.prompt.tools)}] if self.prompt.tools else []
        return tools + [{"role": message["role"], "content": _as_text(message)} for message in self.messages]

    @property
    def question(self) -> str:
        """The last text of the user."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")

    @property
    def calls(self) -> list[str]:
        """The names of the functions that the answer names."""
        return [name for tool in self.prompt.tools if (name := str(tool["function"]["name"])) in self.text]


def _as_text(message: Message) -> str:
    calls = called_functions(message)
    return "\n".join(part for part in (message["content"], _as_json(calls) if calls else "") if part)


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def answer_prompts(
    generator: Generator,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The answers to all prompts and their follow-up questions, in the order of the prompts.

    Args:
        generator: The model that answers.
        prompts: The prompts, each with one turn or several.
        max_new_tokens: The most tokens of an answer.
        advance: Called with the number of new answers.

    Raises:
        LabelError: The chat template refuses a conversation.
    """
    answers: dict[int, list[Answer]] = defaultdict(list)
    conversations = {i: prompt.messages for i, prompt in enumerate(prompts)}
    turn = 0
    while conversations:
        ids = {
            i: generator.prompt_ids(messages, prompts[i].variables, prompts[i].tools)
            for i, messages in conversations.items()
        }
        for i, tokens in _in_batches(generator, ids, max_new_tokens, advance):
            stopped = bool(tokens) and tokens[-1] in generator.stop_ids
            content = tokens[:-1] if stopped else tokens
            text = generator.text(tokens).strip()
            answers[i].append(Answer(prompts[i], conversations[i], text, len(tokens), stopped, repetition(content)))
        conversations = {
            i: (
                *messages,
                {"role": "assistant", "content": answers[i][-1].text},
                {"role": "user", "content": prompts[i].follow_ups[turn]},
            )
            for i, messages in conversations.items()
            if turn < len(prompts[i].follow_ups)
        }
        turn += 1
    return [answer for i in range(len(prompts)) for answer in answers[i]]


def _in_batches(
    generator: Generator, ids: dict[int, list[int]], max_new_tokens: int, advance: Callable[[int], None]
) -> list[tuple[int, list[int]]]:
    import torch

    # The longest first, so that a lack of memory shows at once.
    waiting = sorted(ids, key=lambda i: -len(ids[i]))
    size, answered = _BATCH_SIZE, []
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
        answered += list(zip(batch, answers, strict=True))
        waiting = waiting[len(batch) :]
        advance(len(batch))
    return answered


def repetition(tokens: Sequence[int]) -> float:
    """The share of a text's 4-grams that occur earlier in it, from 0 to 1.

    Args:
        tokens: The token ids of the text.

    Source: Welleck et al., Neural Text Generation with Unlikelihood Training (2020), section 4, seq-rep-4.
    """
    ngrams = [tuple(tokens[i : i + _NGRAM]) for i in range(len(tokens) - _NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
