"""The rows that an export's models are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.chat import Chat
from finetune.data.mixture import build_datasets
from finetune.data.samples import SAMPLE_ROWS, LabelledRow, encoded_sample_rows
from finetune.model.load import load_tokenizer
from finetune.model.provenance import tokenizer_section
from finetune.recipe.load import load_recipe
from finetune.system.errors import DataError, LabelError, RecipeError, TemplateError, first_line
from finetune.system.files import run_file
from finetune.system.terminal import Say

# With more rows the figures would change by less than they differ between two samples of rows.
_ROWS = 32


class HeldOutRows(NamedTuple):
    """Encoded rows, and a description of their origin."""

    rows: list[LabelledRow]
    source: str


def held_out(
    model: Path, say: Say = lambda line: None, base: str | None = None, trust_remote_code: bool = False
) -> HeldOutRows:
    """Rows that a run was not trained on, encoded by its own tokenizer.

    If the run held no rows out, the rows are from its training; if its data cannot be read, they are sample rows.

    Args:
        model: A run, one of its checkpoints, or a folder with a whole model.
        say: Called with a line if the run's data cannot be read.
        base: The path or id of a run's base, in place of the one that its files name.
        trust_remote_code: True if the user lets Python files of the model's repository run.

    Raises:
        ModelError: The model has no tokenizer that can be loaded.
    """
    chat = Chat(load_tokenizer(tokenizer_section(model, base, trust_remote_code)))
    if recipe_file := run_file(model, "recipe.yaml"):
        try:
            recipe = load_recipe(recipe_file)
            training, evaluation = build_datasets(recipe.data, chat, recipe.max_length, method=recipe.method)
            if evaluation.dataset is not None:
                return HeldOutRows(_first_rows(evaluation.dataset), "held-out rows of the run")
            if not any(source.streaming for source in recipe.data.train):
                rows = _first_rows(training.dataset)
                return HeldOutRows(rows, "rows that the run was trained on (it held none out)")
        except (RecipeError, DataError, TemplateError, LabelError) as error:
            say(f"the run's rows cannot be read ({first_line(error)}); the project's sample rows are used")
    return HeldOutRows(encoded_sample_rows(chat)[:_ROWS], SAMPLE_ROWS)


def _first_rows(dataset: Any) -> list[LabelledRow]:
    rows = dataset.select(range(min(_ROWS, len(dataset))))
    return [LabelledRow(list(row["input_ids"]), list(row["labels"])) for row in rows]
