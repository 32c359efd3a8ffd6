"""Changes the messages of a conversation so that training can use it, or divides it into parts that can be proved."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.data.row_result import RowResult
from finetune.data.turns import INSTRUCTING, Message, is_text_only
from finetune.recipe.schema import DataSection

# The changes to rows that the ledger counts as mended.
OPENING_REMOVED = "rows whose opening assistant message was removed"
CLOSING_REMOVED = "rows whose messages after the last assistant turn were removed"
SAME_ROLE_MERGED = "rows with messages of one role merged"


def exchanges(messages: list[Message]) -> Iterator[list[Message]]:
    """Yields the conversation up to the end of each exchange, with labels on that exchange only."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start, end in zip(users, [*users[1:], len(messages)], strict=True):
        part = [
            message | {"train": i > start and message.get("train", True)} if message["role"] == "assistant" else message
            for i, message in enumerate(messages[:end])
        ]
        if any(message.get("train") for message in part):
            yield part


def answer_by_answer(exchange: list[Message]) -> Iterator[list[Message]]:
    """Yields the conversation up to each assistant message that is trained on, with labels on that message only."""
    for end, message in enumerate(exchange):
        if message["role"] == "assistant" and message.get("train", True):
            before = [m | {"train": False} if m["role"] == "assistant" else m for m in exchange[:end]]
            yield [*before, message]


def mended(section: DataSection, messages: list[Message], train_on: str, result: RowResult) -> list[Message]:
    """The messages that training can use, merged by role if the recipe says so; counts each change in the result."""
    if section.merge_same_role:
        merged: list[Message] = []
        for message in messages:
            before = merged[-1] if merged else {"role": None}
            mergeable = is_text_only(before) and is_text_only(message) and message["role"] != "tool"
            mergeable &= isinstance(before.get("content"), str) and isinstance(message["content"], str)
            if mergeable and before["role"] == message["role"] and before.get("train") == message.get("train"):
                merged[-1] = before | {"content": f"{before['content']}\n\n{message['content']}"}
            else:
                merged.append(message)
        if len(merged) < len(messages):
            result.mended.append(SAME_ROLE_MERGED)
        messages = merged
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return messages
    first = 1 if roles[0] in INSTRUCTING else 0
    asked = next((i for i in range(first, len(roles)) if roles[i] != "assistant"), first)
    last = len(roles) - roles[::-1].index("assistant")
    if first < asked < last:
        # An opening assistant message answers no prompt, so inference could never produce it.
        result.mended.append(OPENING_REMOVED)
    else:
        asked = first
    if last < len(roles) and train_on != "all":
        # Messages after the last assistant turn hold no trained token and precede none.
        result.mended.append(CLOSING_REMOVED)
    else:
        last = len(roles)
    return [*messages[:first], *messages[asked:last]]
