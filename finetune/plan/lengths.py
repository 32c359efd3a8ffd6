"""The rows of a recipe as a plan sees them, where they are at hand."""

from __future__ import annotations

import glob
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from finetune.model.locate import Base
from finetune.recipe.load import Recipe
from finetune.system.files import cache_dir


@dataclass(frozen=True)
class RowLengths:
    """Lengths of the prepared rows, and how many tokens of each are trained on; the longest first."""

    lengths: Any
    labels: Any

    @classmethod
    def of(cls, dataset: Any) -> RowLengths:
        """Of a dataset with `input_ids` and `labels`."""
        lengths, labels = [], []
        for table in (
            dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000)
        ):
            lengths.append(pc.list_value_length(table["input_ids"]).to_numpy())
            labels += [sum(label != -100 for label in row[1:]) for row in table["labels"].to_pylist()]
        every = np.concatenate(lengths)
        order = np.argsort(-every, kind="stable")
        return cls(every[order], np.asarray(labels)[order])

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return int(self.lengths[0])

    @property
    def tokens(self) -> int:
        """Tokens of all."""
        return int(self.lengths.sum())

    def trained(self, count: int) -> int:
        """Tokens that are trained on, of a batch of the rows that have most of them."""
        return int(np.sort(self.labels)[::-1][:count].sum())


def row_lengths(recipe: Recipe, say: Callable[[str], None], base: Base | None = None) -> RowLengths | None:
    """The rows that would be trained on; None where they, or the tokenizer, are not on this machine."""
    if not all(_is_file(source) for source in recipe.data.train) or not _has_tokenizer(recipe.model):
        return None
    from finetune.data.chat import Chat
    from finetune.data.mixture import build_datasets
    from finetune.model.load import load_tokenizer

    tokenizer = load_tokenizer(recipe.model, base)
    data, _ = build_datasets(recipe.data, Chat(tokenizer), recipe.max_length, say)
    return RowLengths.of(data.dataset)


def _is_file(source: Any) -> bool:
    return not source.streaming and bool(glob.glob(str(Path(source.path).expanduser()), recursive=True))


def _has_tokenizer(section: Any) -> bool:
    """Whether loading it fetches and converts nothing."""
    kind, _, rest = section.name_or_path.partition(":")
    if kind == "random":
        return True
    if kind == "package":
        # Converted once, which takes a minute, into a folder that is named after its file.
        if importlib.util.find_spec(rest) is None:
            return False
        package = importlib.import_module(rest)
        name = f"{Path(package.MODEL_NAME).stem}-{package.EXPECTED_SHA256[:16]}-v*"
        return next(cache_dir().glob(name), None) is not None
    if Path(section.name_or_path).expanduser().exists():
        return True
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(section.name_or_path, "tokenizer_config.json", revision=section.revision)
    return isinstance(cached, str)
