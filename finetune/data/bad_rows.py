"""The rows of a source that cannot be used, reported together; a fault of every conversation is the template's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from finetune.data.chat import Chat
from finetune.recipe.schema import DataSource
from finetune.system.errors import DataError, LabelError, TemplateError

# The most reasons that are shown, and the most rows that are named for each.
_REASONS, _ROWS = 10, 4


@dataclass
class BadRows:
    """The rows of a source that cannot be used, where `data.on_bad_row` is `error`.

    A stream has no end, so its first bad row is reported at once.
    """

    chat: Chat
    source: DataSource
    read: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    # By reason the fault of its first row, and the names of the rows after it.
    named: dict[str, list[str]] = field(default_factory=dict)

    def add(self, row: str, error: LabelError) -> None:
        """Keeps a row and its fault.

        Raises:
            TemplateError: The fault is the chat template's.
            DataError: The source is streamed.
        """
        check_template(self.chat, error.reason)
        self.counts[error.reason] += 1
        named = self.named.setdefault(error.reason, [])
        if len(named) < _ROWS:
            named.append(row if named else f"{row}: {error}")
        if self.source.streaming:
            self.check()

    def check(self) -> None:
        """Raises an error with the rows of the first ten reasons, if a row was kept.

        Raises:
            DataError: A row was kept.
        """
        if not self.counts:
            return
        lines = []
        for reason, (line, *others) in list(self.named.items())[:_REASONS]:
            more = self.counts[reason] - 1 - len(others)
            also = ", ".join(others) + (f" and {more:,} more" if more else "")
            lines.append(f"{line}; also {also}" if others else line)
        if self.counts.total() == 1:
            raise DataError(f"{lines[0]}; mend the row, or write data.on_bad_row: skip")
        if len(self.named) > _REASONS:
            lines.append(f"{self.source.name}: rows with {len(self.named) - _REASONS:,} other faults")
        count = f"{self.counts.total():,} of {self.read:,} rows cannot be used"
        raise DataError("\n".join([*lines, f"{self.source.name}: {count}; mend them, or write data.on_bad_row: skip"]))


def check_template(chat: Chat, reason: str) -> None:
    """Checks that a fault of a row is the row's: the shortest conversations do not all have it.

    Args:
        chat: The tokenizer and its chat template.
        reason: The fault of a row that is a conversation.

    Raises:
        TemplateError: The fault is the template's.
    """
    if chat.tokenizer.chat_template is None:
        return
    try:
        _ = chat.end_of_turn_id
    except TemplateError as fault:
        if isinstance(fault.__cause__, LabelError) and fault.__cause__.reason == reason:
            raise
