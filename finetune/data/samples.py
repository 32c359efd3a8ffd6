"""The sample rows of the project, and encoded rows with their labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.data.chat import IGNORE


def sample_rows() -> Path:
    """The project's sample conversations: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "sample" / "chat_sample.jsonl"
    return inside if inside.exists() else Path(__file__).parents[2] / "data" / "chat_sample.jsonl"


@dataclass(frozen=True)
class LabelledRow:
    """Token ids, and the same with all that is not predicted masked; both of length T."""

    input_ids: list[int]
    labels: list[int]

    @property
    def prompt(self) -> list[int]:
        """What a model is fed before it answers: what stands before the first predicted token; of plain text half."""
        first = next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))
        return self.input_ids[: first if first > 1 else max(1, len(self.input_ids) // 2)]
