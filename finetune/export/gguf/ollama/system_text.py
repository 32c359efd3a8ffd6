"""The system message that all of a run's conversations begin with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from finetune.data.formats import FORMATS, detect_format, map_columns, matches_filter, with_known_pair
from finetune.data.readers import read_rows
from finetune.data.turns import INSTRUCTING
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import DataSource
from finetune.system.errors import DataError, LabelError, RecipeError
from finetune.system.files import run_file

# The rows of each source that are read.
_ROWS = 1000


def common_system_text(model: Path) -> str:
    """The system message of all training conversations of a run, judged by their first rows.

    It is empty if some have another or none, or if the run's rows cannot be read.

    Args:
        model: A run, one of its checkpoints, or a folder with a whole model.
    """
    file = run_file(model, "recipe.yaml")
    if file is None:
        return ""
    try:
        recipe = load_recipe(file)
        texts = {text for source in recipe.data.train for text in _texts(source, recipe.method)}
    except (RecipeError, DataError):
        return ""
    return texts.pop() if len(texts) == 1 else ""


def _texts(source: DataSource, method: str) -> Iterator[str]:
    """The system message of each row that can be read; empty if a row has none."""
    for _, row in islice(read_rows(source), _ROWS):
        if isinstance(row, LabelError):
            continue
        try:
            if source.filter and not matches_filter(source.filter, row):
                continue
            source = with_known_pair(source, row, method)
            row = map_columns(source, row)
            messages = FORMATS[source.format or detect_format(source, row, method)](row).get("messages")
        except LabelError:
            continue
        first = messages[0] if messages and not source.raw else {}
        content = first["content"] if first.get("role") in INSTRUCTING else ""
        yield content if isinstance(content, str) else ""
