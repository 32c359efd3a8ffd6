"""The sample conversations of the project, as a file and as encoded rows; encoded rows by language."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.chat import Chat
from finetune.data.encoded import first_label
from finetune.data.language import language
from finetune.system.errors import LabelError, TemplateError

# The name of the sample rows in reports, which name other rows by the path of their source.
SAMPLE_ROWS = "sample rows of this project"


def sample_rows() -> Path:
    """The path of the sample conversations: next to the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "sample" / "chat_sample.jsonl"
    return inside if inside.exists() else Path(__file__).parents[2] / "data" / "chat_sample.jsonl"


@dataclass(frozen=True)
class LabelledRow:
    """Token ids and labels of a row, both of length T; a label is -100 where the loss does not count the token."""

    input_ids: list[int]
    labels: list[int]

    @property
    def prompt(self) -> list[int]:
        """The token ids before the first label; half of the row if its first tokens already have labels."""
        first = first_label(self.labels)
        return self.input_ids[: first if first > 1 else max(1, len(self.input_ids) // 2)]


def encoded_sample_rows(chat: Chat) -> list[LabelledRow]:
    """The sample conversations as encoded rows; as plain text those that no chat template takes.

    A template may need tools or thinking, which the samples have not, and the tokenizer may have none.
    """
    rows = []
    for line in sample_rows().read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        try:
            encoded = chat.encode(messages)
        except (LabelError, TemplateError):
            encoded = chat.encode_text("", "\n".join(message["content"] for message in messages))
        rows.append(LabelledRow(encoded.input_ids.tolist(), encoded.labels.tolist()))
    return rows


def rows_by_language(
    rows: Sequence[LabelledRow], where: str, chat: Chat, count: int = 16
) -> dict[str, tuple[list[LabelledRow], str]]:
    """Rows grouped by language, sorted by its name, each group with a description of its origin.

    English and Japanese are always present: if `rows` has none of one, the group is made of sample rows.

    Args:
        rows: Encoded rows.
        where: The description of their origin.
        chat: The tokenizer that encoded them.
        count: The most sample rows for a missing language.
    """

    def of(row: LabelledRow) -> str:
        return language(chat.tokenizer.decode(row.input_ids, skip_special_tokens=True))

    groups: dict[str, tuple[list[LabelledRow], str]] = {}
    for row in rows:
        groups.setdefault(of(row), ([], where))[0].append(row)
    if missing := {"English", "Japanese"} - groups.keys():
        for row in encoded_sample_rows(chat):
            if (name := of(row)) in missing and len(groups.get(name, ([], ""))[0]) < count:
                groups.setdefault(name, ([], SAMPLE_ROWS))[0].append(row)
    return dict(sorted(groups.items()))
