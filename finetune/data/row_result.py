"""The result of preparing one row: its encoded rows, or the reason why there are none, and what the ledger counts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from finetune.data.encoded import Encoded
from finetune.data.ledger import Ledger, PieceCounts


@dataclass(slots=True)
class RowResult:
    """The result of one row that was read.

    Attributes:
        row: The row's name, such as `data/chat.jsonl:12`.
        pieces: The encoded rows for the trainer that it became; several if it was split. A pair is one, or for kto two.
        desirable: For answers, true or false for each side in its order; empty for other rows.
        mended: The changes that were made to it.
        unread: Its keys that hold a value and that are ignored.
        dropped: The reason for which it was dropped, or "".
        bad: The reason for which it cannot be used, or "".
        detail: What is particular to this row, in addition to the reason in `bad`.
        lost: The trained tokens that did not fit `max_length`.
        language: The language of its text: `ja`, `en` or `other`.
    """

    row: str
    pieces: list[Encoded] = field(default_factory=list)
    desirable: list[bool] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    dropped: str = ""
    bad: str = ""
    detail: str = ""
    lost: int = 0
    language: str = "other"

    def count_into(self, ledger: Ledger) -> None:
        """Counts the row as read, and as mended, dropped or bad; its pieces are counted by `Ledger.keep_row`."""
        ledger.read += 1
        ledger.lost_tokens += 0 if self.pieces else self.lost
        ledger.mended.update(self.mended)
        ledger.unread.update(self.unread)
        for reason, account in ((self.dropped, ledger.dropped), (self.bad, ledger.bad)):
            if reason:
                account[reason] += 1
                ledger.first.setdefault(reason, f"{self.row}{self.detail and f'; {self.detail}'}")

    def counts(self, piece: Encoded) -> PieceCounts:
        """The counts of one of the pieces."""
        sides = piece.sides
        shorter, longer = sorted([0, *(len(side.input_ids) for side in sides)])[-2:]
        labels = [side.trained_tokens for side in sides]
        thinking, trained_thinking = map(sum, zip(*(side.thinking_tokens for side in sides), strict=True))
        chosen, rejected = (
            labels if len(sides) == 2 else (labels[0] * (piece.desirable is side) for side in (True, False))
        )
        return PieceCounts(
            length=longer,
            trained_tokens=sum(labels),
            turns=sum(len(side.turns) for side in sides),
            ends=sum(int(side.labels[t.end - 1] == side.input_ids[t.end - 1]) for side in sides for t in side.turns),
            characters=sum(side.characters for side in sides),
            thinking=thinking,
            trained_thinking=trained_thinking,
            shorter_side=shorter,
            chosen=chosen,
            rejected=rejected,
            language=self.language,
        )

    @property
    def digests(self) -> tuple[bytes, bytes]:
        """Two hashes of 16 bytes: one of the token ids (for answers of the prompt's), one of all ids and labels."""
        text = hashlib.blake2b(digest_size=16)
        sides = [side for piece in self.pieces for side in piece.sides]
        if self.desirable:
            text.update(sides[0].input_ids[: sides[0].prompt_length].tobytes())
        else:
            for side in sides:
                text.update(side.input_ids.tobytes())
        row = text.copy()
        for side in sides:
            row.update(side.labels.tobytes())
        if self.desirable:
            row.update(bytes(self.desirable))
        return text.digest(), row.digest()
