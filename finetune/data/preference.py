"""Pairs of answers: the prompt that two conversations share, and the proof that both answers follow the same tokens."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from finetune.data.encoded import IGNORE, Encoded
from finetune.data.turns import Message
from finetune.recipe.yaml_tree import Section
from finetune.system.errors import LabelError

# Reasons for which rows of answers are dropped.
EMPTY_ANSWER = "with an empty answer"
EQUAL_ANSWERS = "with equal answers"
UNTRAINED_ANSWER = "with an answer of which nothing is trained on"

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def read_transcript(text: str) -> list[Message] | None:
    r"""The messages of a text in the form of HH-RLHF, `\n\nHuman: ...\n\nAssistant: ...`; None for any other text."""
    if not text.lstrip().startswith("Human:"):
        return None
    _, *parts = _SPEAKER.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": said.strip()} for speaker, said in pairs]


def split_at_answers(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages with which two conversations begin, and the answers with which each goes on.

    Both answers begin with an assistant's message. Calls of tools that both conversations make alike, and their equal
    results, belong to the prompt. An answer is empty where its conversation is the beginning of the other one.

    Args:
        chosen: The conversation with the chosen answer.
        rejected: The conversation with the rejected answer.

    Raises:
        LabelError: The conversations differ before an assistant speaks.
    """
    both = min(len(chosen), len(rejected))
    common = next((i for i in range(both) if chosen[i] != rejected[i]), both)
    if common == len(chosen) == len(rejected):
        common = max(0, common - 1)  # the last message is the answer, twice
    while 0 < common < both and any(side[common]["role"] == "tool" for side in (chosen, rejected)):
        common -= 1  # a result differs because its call does, or because it is a part of the answer
    if any(side[common]["role"] != "assistant" for side in (chosen, rejected) if common < len(side)):
        raise LabelError("its chosen and rejected do not answer the same prompt")
    return list(chosen[:common]), list(chosen[common:]), list(rejected[common:])


def is_empty(answer: Sequence[Message]) -> bool:
    """True for an answer without a message, or with an assistant's message that says, thinks and calls nothing."""
    said = [message for message in answer if message["role"] == "assistant"]
    parts = [[message.get(key) for key in ("content", "reasoning_content", "tool_calls")] for message in said]
    return not said or any(not any(part and str(part).strip() for part in each) for each in parts)


def balance(answers: Mapping[str, int], training: Section) -> str:
    """A line on the desirable and undesirable answers of a KTO run, and the weights that would balance them.

    Args:
        answers: Their numbers, as `chosen` and `rejected`.
        training: The recipe's section, with the weights of their losses.

    Source: https://arxiv.org/abs/2402.01306: desirable answers should weigh 1 to 4/3 times as much as undesirable ones
        in all; `KTOTrainer` of trl 1.16 warns by the same rule.
    """
    good, bad = answers["chosen"], answers["rejected"]
    of_good, of_bad = (float(training.get(f"{name}_weight", 1)) for name in ("desirable", "undesirable"))
    ratio = good * of_good / (bad * of_bad)
    line = f"kto: {good:,} desirable and {bad:,} undesirable answers, weighted {ratio:.2f} : 1"
    if 0.995 <= ratio <= 4 / 3 + 0.005:
        return f"{line}, within the recommended 1 to 1.33"
    low, high = of_bad * bad / good, of_bad * bad / good * 4 / 3
    few, many = of_good * good / bad * 3 / 4, of_good * good / bad
    return (
        f"{line}; for the recommended 1 to 1.33 write training.desirable_weight: {low:.2f} to {high:.2f}, "
        f"or training.undesirable_weight: {few:.2f} to {many:.2f}"
    )


@contextlib.contextmanager
def on_side(name: str) -> Iterator[None]:
    """Adds to an error the side of the pair, `chosen` or `rejected`, that it is about."""
    try:
        yield
    except LabelError as error:
        side = f"on the {name} side"
        raise LabelError(error.reason, f"{error.detail}; {side}" if error.detail else side, error.message) from error


def without_tail(side: Encoded) -> Encoded:
    """The row up to its last token that is trained on, which ends its last turn."""
    end = int(np.flatnonzero(side.labels != IGNORE)[-1]) + 1
    return replace(side, input_ids=side.input_ids[:end], labels=side.labels[:end])


def check_same_prompt(chosen: Encoded, rejected: Encoded) -> None:
    """Checks that the tokens before the first label are the same on both sides.

    Raises:
        LabelError: They are not.
    """
    before, other = (side.input_ids[: side.prompt_length] for side in (chosen, rejected))
    if not np.array_equal(before, other):
        raise LabelError("the tokens before its two answers differ")
