"""Prompts and reference answers: from JSONL files, or from the rows that a run held out."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune.data.formats import FORMATS, detect_format, map_columns, matches_filter, with_known_pair
from finetune.data.json_rows import Row
from finetune.data.readers import read_rows
from finetune.data.turns import INSTRUCTING, Message, Tool, without_train_key
from finetune.recipe.schema import DataSection, DataSource
from finetune.system.errors import EvaluateError, LabelError

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    Attributes:
        name: The row's name.
        messages: The conversation.
        follow_ups: The user's questions after each answer.
        variables: The row's `chat_template_kwargs`.
        tools: The functions that may be called.
    """

    name: str
    messages: tuple[Message, ...]
    follow_ups: tuple[str, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Tool] = ()

    @classmethod
    def before_last_answer(cls, name: str, chat: Row) -> Prompt | None:
        """The prompt that a row's conversation is before its last answer; None if no user or tool speaks before it."""
        messages = [without_train_key(message) for message in chat["messages"]]
        last = len(messages)
        if messages[-1]["role"] == "assistant" or messages[-1]["role"] in INSTRUCTING:
            last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
        asked = tuple(messages[:last])
        texts = all(isinstance(m["content"], str) or m.get("tool_calls") for m in asked)
        if not asked or not texts or asked[-1]["role"] in ("assistant", *INSTRUCTING):
            return None
        return cls(name, asked, variables=chat.get("variables", {}), tools=tuple(chat.get("tools", ())))


def read_prompts(path: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a JSONL file, whose rows hold `prompt` (text), `turns` (the user's texts) or `messages`.

    Raises:
        EvaluateError: A row has none of them, or there are no rows.
        DataError: The file cannot be read.
    """
    prompts: list[Prompt] = []
    for name, row in read_rows(DataSource(path=path)):
        if limit is not None and len(prompts) == limit:
            break
        if isinstance(row, LabelError):
            raise EvaluateError(f"evaluate.prompts: {name}: {row}")
        prompts.append(_prompt(name, row))
    if not prompts:
        raise EvaluateError(f"evaluate.prompts: {path} holds no prompt")
    return prompts


def _prompt(name: str, row: dict[str, Any]) -> Prompt:
    name = _row_id(row, name)
    turns = row.get("turns") or ([row["prompt"]] if row.get("prompt") else [])
    if isinstance(turns, list) and turns and all(isinstance(text, str) and text for text in turns):
        return Prompt(name, ({"role": "user", "content": turns[0]},), tuple(turns[1:]))
    with contextlib.suppress(LabelError):
        if prompt := Prompt.before_last_answer(name, FORMATS["messages"](row)):
            return prompt
    raise EvaluateError(
        f"evaluate.prompts: {name}: it has no prompt; write prompt (text), turns (a list of texts) or messages"
    )


def _row_id(row: Mapping[str, object], default: str) -> str:
    """The row's `id` or `question_id`, by which prompts and reference answers are matched."""
    return str(next((row[key] for key in ("id", "question_id") if key in row), default))


def held_out_prompts(
    section: DataSection, names: set[str], limit: int | None = None, method: str = "sft"
) -> list[Prompt]:
    """The conversations of held-out rows without their last answer; rows without turns are left out.

    Args:
        section: The recipe's `data` section.
        names: The names of the held-out rows.
        limit: The most prompts, in equal parts from all sources.
        method: The recipe's method.

    Raises:
        DataError: A source cannot be read.
        LabelError: A row cannot be converted into messages.
    """
    prompts = [
        (number, prompt)
        for number, source in enumerate(section.eval or section.train)
        for name, chat in _conversations(source, method)
        if name in names and (prompt := Prompt.before_last_answer(name.rpartition("/")[2], chat))
    ]
    return [prompt for _, prompt in spread_evenly(prompts, lambda numbered: numbered[0], limit)]


def spread_evenly(items: Sequence[T], group: Callable[[T], Hashable], limit: int | None) -> list[T]:
    """At most `limit` items in order, in equal numbers from all groups, as far as each has that many."""
    seen: Counter[Hashable] = Counter()
    ranks = []
    for item in items:
        ranks.append(seen[group(item)])
        seen[group(item)] += 1
    chosen = sorted(range(len(items)), key=lambda i: ranks[i])[:limit]
    return [items[i] for i in sorted(chosen)]


def _conversations(source: DataSource, method: str) -> Iterator[tuple[str, Row]]:
    form: str | None = source.format
    for name, row in read_rows(source):
        # A faulty row was reported when the rows were prepared.
        with contextlib.suppress(LabelError):
            if isinstance(row, LabelError) or (source.filter and not matches_filter(source.filter, row)):
                continue
            source = source if form else with_known_pair(source, row, method)
            row = map_columns(source, row)
            form = form or detect_format(source, row, method)
            converted = {} if source.raw else FORMATS[form](row)
            if "messages" in converted:
                yield name, converted


def reference_answers(path: str, prompts: Sequence[Prompt]) -> list[str]:
    """The reference answers to the prompts, one for each turn, in the order of the prompts.

    Args:
        path: A JSONL file, as `read_reference` reads it.
        prompts: The prompts.

    Raises:
        EvaluateError: The file lacks an answer, or two prompts have the same name.
        DataError: The file cannot be read.
    """
    reference = read_reference(path)
    found: list[str] = []
    for name, count in Counter(prompt.name for prompt in prompts).items():
        if count > 1:
            raise EvaluateError(f"evaluate.prompts: {count} prompts are named {name}; give each its own id")
    for prompt in prompts:
        answers, turns = reference.get(prompt.name, []), 1 + len(prompt.follow_ups)
        if len(answers) != turns:
            raise EvaluateError(
                f"evaluate.judge.reference: {path} holds {len(answers)} answers to prompt {prompt.name}, which asks "
                f"{turns} questions; write one for each, under the prompt's id"
            )
        found += answers
    return found


def read_reference(path: str) -> dict[str, list[str]]:
    """The answers of a JSONL file by the name of their prompt.

    Each row holds `id` or `question_id`, and `answer` (text) or `answers` (a list, one for each turn).

    Raises:
        EvaluateError: A row has no answer, or two rows answer the same prompt.
        DataError: The file cannot be read.
    """
    found: dict[str, list[str]] = {}
    for place, row in read_rows(DataSource(path=path)):
        fault = f"evaluate.judge.reference: {place}: "
        if isinstance(row, LabelError):
            raise EvaluateError(f"{fault}{row}")
        name = _row_id(row, place)
        answers = row.get("answers") or [row.get("answer")]
        if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
            raise EvaluateError(f"{fault}it has no answer; write answer (text), or answers (a list, one a turn)")
        if name in found:
            raise EvaluateError(f"{fault}{name} is answered above already; remove one")
        found[name] = answers
    return found
