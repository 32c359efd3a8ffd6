"""The lengths of a recipe's rows in tokens, if the rows are on this machine."""

from __future__ import annotations

import glob
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.mixture import build_datasets
from finetune.model.load import load_tokenizer
from finetune.model.locate import Base
from finetune.model.resize import check_token_ids
from finetune.recipe.load import Recipe
from finetune.system.cache import cache_dir
from finetune.system.terminal import Say


@dataclass(frozen=True)
class RowLengths:
    """The tokens of each prepared row and how many of them are trained on; the longest row first.

    Attributes:
        lengths: Tokens, int array of shape (rows,); of a pair those of its longer side.
        trained: Trained tokens, of the same shape; of a pair those of both sides.
        joined: Of pairs, the tokens of the prompt and both answers, of the same shape; None for other rows.
    """

    lengths: NDArray[np.int64]
    trained: NDArray[np.int64]
    joined: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, dataset: Any) -> RowLengths:
        """The lengths of the rows of a dataset, as `data.mixture` prepares them."""
        sides = [side for side in ("", "rejected_") if f"{side}input_ids" in dataset.column_names]
        lengths: list[list[Any]] = [[] for _ in sides]
        trained: list[list[int]] = [[] for _ in sides]
        columns = [f"{side}{name}" for side in sides for name in ("input_ids", "labels")]
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
            for i, side in enumerate(sides):
                lengths[i].append(pc.list_value_length(table[f"{side}input_ids"]).to_numpy())
                rows = table[f"{side}labels"].to_pylist()
                trained[i] += [sum(label != IGNORE for label in row[1:]) for row in rows]
        of_sides, labels = np.array([np.concatenate(found) for found in lengths]), np.array(trained)
        of_rows = of_sides.max(axis=0)
        order = np.argsort(-of_rows, kind="stable")
        # Behind the prompt of a pair stand the tokens that have a label, but for messages between them.
        joined = of_sides.sum(axis=0) - (of_sides[0] - labels[0]) if len(sides) > 1 else None
        return cls(of_rows[order], labels.sum(axis=0)[order], None if joined is None else joined[order])

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths[0])

    @property
    def tokens(self) -> int:
        """Tokens of all rows that a model runs."""
        return int((self.lengths if self.joined is None else self.joined).sum())

    def most_trained(self, count: int) -> int:
        """The most trained tokens that a batch of `count` rows can have."""
        return int(np.sort(self.trained)[::-1][:count].sum())


def row_lengths(recipe: Recipe, say: Say, config: Any, base: Base | None = None) -> RowLengths | None:
    """The lengths of the rows that would be trained on; None if they or the tokenizer are not on this machine.

    Args:
        recipe: The recipe.
        say: Called with lines about the preparation of the rows.
        config: The base's config.
        base: The recipe's base, if it was located already.

    Raises:
        DataError: A source cannot be read.
        TemplateError: The chat template cannot be read or used.
        ModelError: The tokenizer cannot be loaded, or rows hold tokens that the base's embedding has no row for.
    """
    if not all(_is_file(source) for source in recipe.data.train) or not has_tokenizer(recipe.model):
        return None
    tokenizer = load_tokenizer(recipe.model, base)
    data, _ = build_datasets(recipe.data, Chat(tokenizer), recipe.max_length, say, recipe.method)
    check_token_ids([tokenizer.pad_token_id, data.highest_token_id()], tokenizer, config)
    return RowLengths.of(data.dataset)


def _is_file(source: Any) -> bool:
    return not source.streaming and bool(glob.glob(str(Path(source.path).expanduser()), recursive=True))


def has_tokenizer(section: Any) -> bool:
    """True if the tokenizer can be loaded without a download or a conversion of the base."""
    kind, _, rest = section.name_or_path.partition(":")
    if kind == "random":
        return True
    if kind == "package":
        # The base in it is converted once, into a folder named after its file; see `model.locate`.
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
