"""The rows of a run, read and prepared, with the tokenizer and template that render them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.mixture import Prepared, build_datasets
from finetune.data.preference import balance
from finetune.model.load import load_tokenizer
from finetune.model.locate import Base
from finetune.model.resize import check_token_ids, tokens_of_any_row
from finetune.recipe.load import Recipe
from finetune.system.files import write_json
from finetune.system.terminal import Say


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a run, and what renders them.

    Attributes:
        tokenizer: The tokenizer, which is saved with the model.
        chat: The tokenizer and its chat template.
        has_conversations: False for plain text, which no template renders.
        train: The rows to train on.
        evaluation: The rows to evaluate on; its `dataset` is None if there are none.
        streamed: True if the rows to train on are read while training.
    """

    tokenizer: Any
    chat: Chat
    has_conversations: bool
    train: Prepared
    evaluation: Prepared
    streamed: bool

    def write_ledgers(self, output: Path) -> None:
        """Writes `ledger.json` into the run directory."""
        write_json(
            output / "ledger.json", {"train": self.train.ledger.as_dict(), "eval": self.evaluation.ledger.as_dict()}
        )

    def ends_of_turns(self) -> list[int]:
        """The end-of-turn token of the rows, where the template shows it for no other conversation than theirs."""
        dataset = self.train.dataset
        if dataset is None or self.streamed or not self.has_conversations or self.chat.finds_end_of_turn:
            return []
        labels = [label for label in dataset[0]["labels"] if label != IGNORE]
        return labels[-1:]


def read_training_rows(recipe: Recipe, base: Base, day: date, say: Say) -> TrainingRows:
    """Reads and prepares the rows of a recipe.

    Args:
        recipe: The recipe.
        base: The base, which has the tokenizer.
        day: The date for chat templates that ask for it.
        say: Called with lines about the preparation, and a summary of the rows.

    Raises:
        ModelError: The tokenizer cannot be loaded, or rows hold tokens that the base's embedding has no row for.
        TemplateError, DataError, LabelError: The chat template or the rows cannot be used.
    """
    tokenizer = load_tokenizer(recipe.model, base)
    chat = Chat(tokenizer, day)
    streamed = any(source.streaming for source in recipe.data.train)
    special_tokens = any(source.special_tokens for source in recipe.data.train)
    check_token_ids(tokens_of_any_row(chat, streamed, special_tokens), tokenizer, base.config)
    train, evaluation = build_datasets(recipe.data, chat, recipe.max_length, say, recipe.method)
    say("data: read while training" if streamed else f"data: {train.ledger.summary()}")
    if recipe.method == "kto":
        say(balance(train.ledger.answer_totals, recipe.training))
    if evaluation.dataset is not None:
        say(f"evaluation: {evaluation.ledger.summary()}")
    check_token_ids([rows.highest_token_id() for rows in (train, evaluation)], tokenizer, base.config)
    conversations = any(source.format != "text" and not source.raw for source in recipe.data.train)
    has_conversations = conversations and tokenizer.chat_template is not None
    return TrainingRows(tokenizer, chat, has_conversations, train, evaluation, streamed)
