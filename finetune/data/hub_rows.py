"""Reads the rows of a dataset on the Hub, one at a time, each with a name (`owner/name[train]:12`).

`datasets` converts JSON files to typed columns, which changes some texts (5.2): in a column of mixed types "42" becomes
the number 42 and '{"a": 1}' a map; quoted dates become timestamps. The rows of a dataset with such a column are read
from its files.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import re
from collections.abc import Iterator
from typing import IO, Any, cast

from finetune.data.json_rows import Row, read_json, read_jsonl
from finetune.recipe.schema import DataSource
from finetune.system import hub_errors
from finetune.system.errors import DataError, LabelError, first_line, reworded

# The types of columns whose cells may differ from the JSON file, as `repr` writes them.
_CHANGED = re.compile(r"Json\(|'(timestamp|date|time)")
# The keys of texts that `datasets` may have decoded to a map.
_TEXT_KEYS = ("content", "value")


def read_hub(source: DataSource) -> Iterator[tuple[str, Row | LabelError]]:
    """Yields each row with its name; in place of a row that cannot be read, a `LabelError` with the reason.

    Raises:
        DataError: The source as a whole cannot be read.
    """
    rows = _hub(source)[0]
    # Any of the libraries that fetch and unpack a stream may raise its own error.
    with reworded(DataError, f"{source.name}: the Hub dataset cannot be read", Exception):
        found = _rows_of_files(source, rows) if _CHANGED.search(repr(rows.features)) else None
        for number, row in enumerate(_rows_of_columns(rows) if found is None else found):
            yield f"{source.name}[{source.split}]:{number}", row


def hub_fingerprint(source: DataSource) -> str:
    """A hash of a dataset's commit.

    Raises:
        DataError: The dataset cannot be loaded.
    """
    return str(_hub(source)[1])


def _hub(source: DataSource) -> tuple[Any, str]:
    """A dataset of the Hub, loaded once, and a hash of its commit."""
    return _load_hub(source.path, source.config, source.split, source.revision, source.streaming)


@functools.cache
def _load_hub(path: str, config: str | None, split: str, revision: str | None, stream: bool) -> tuple[Any, str]:
    import datasets

    with _load_errors(path):
        rows = datasets.load_dataset(path, config, split=split, revision=revision, streaming=stream)
        if not stream:
            return rows, rows._fingerprint
        # A stream has no fingerprint; the builder's hash is the commit of its repository (datasets 5.2).
        return rows, datasets.load_dataset_builder(path, config, revision=revision).hash


@contextlib.contextmanager
def _load_errors(path: str) -> Iterator[None]:
    """Turns the libraries' errors at loading a dataset into a `DataError`."""
    import datasets

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if words := hub_errors.hub_problem(f"datasets/{path}", error):
            raise DataError(f"{path} {words}") from error
        raise DataError(f"{path}: the Hub dataset cannot be loaded: {first_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------------
# From typed columns


def _rows_of_columns(rows: Any) -> Iterator[Row | LabelError]:
    kinds = rows.features or {}
    # A column of type JSON keeps its maps unchanged.
    exact = {column for column, kind in kinds.items() if "Json(" in repr(kind)}
    for row in rows:
        doubtful = next((c for c in exact if _decoded_text(kinds[c], row[c], c)), None)
        if doubtful is not None:
            yield LabelError(
                f"the column {doubtful!r} was read as JSON by datasets, so a text and a map cannot be told apart",
                "download the file and write its path",
            )
            continue
        yield {column: cell if column in exact else without_null_keys(cell) for column, cell in row.items()}


def _decoded_text(kind: Any, cell: object, key: str) -> bool:
    """True if a cell of type JSON, under a key of a message's text, holds a map."""
    if cell is None:
        return False
    if "Json(" in repr(kind)[:5]:
        return isinstance(cell, dict) and key in _TEXT_KEYS
    if isinstance(kind, dict) and isinstance(cell, dict):
        return any(_decoded_text(inner, cell.get(name), name) for name, inner in kind.items())
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
    return isinstance(cell, list) and any(_decoded_text(inner, item, key) for item in cell)


def without_null_keys(cell: object) -> object:
    """A cell without the null keys of its maps: Arrow gives each map the keys of all others."""
    if isinstance(cell, dict):
        return {key: without_null_keys(value) for key, value in cell.items() if value is not None}
    return [without_null_keys(value) for value in cell] if isinstance(cell, list) else cell


# ---------------------------------------------------------------------------------------------------------------
# From the files


def _rows_of_files(source: DataSource, rows: Any) -> Iterator[Row | LabelError] | None:
    """The rows as the dataset's JSON files hold them, with null for the columns that a row lacks.

    None if the files do not hold one row for each row of the dataset.
    """
    import datasets

    if rows.info.builder_name != "json":
        return None
    builder = datasets.load_dataset_builder(source.path, source.config, revision=source.revision)
    options, files = builder.config, builder.config.data_files or {}
    if options.field is not None or options.encoding != "utf-8":
        return None
    if source.streaming:
        parts = [(source.split, 0, None)]
    else:
        sizes = {name: split.num_examples for name, split in rows.info.splits.items()}
        wanted = datasets.ReadInstruction.from_spec(source.split).to_absolute(sizes)
        parts = [(part.splitname, part.from_, part.to) for part in wanted]
    names = [name for split, _, _ in parts for name in files.get(split, [""])]
    if not all(re.search(r"\.(jsonl?|ndjson)(\.gz)?$", name) for name in names):
        return None
    # The rows of traces of agents are not those of their files.
    first = next(_rows_in(names[0], source.streaming), None)
    if not isinstance(first, dict) or not first.keys() <= rows.features.keys():
        return None
    return _filled(parts, files, rows, source.streaming)


def _filled(parts: Any, files: Any, rows: Any, streaming: bool) -> Iterator[Row | LabelError]:
    columns, count = dict.fromkeys(rows.features), 0
    for split, start, end in parts:
        number = 0
        for name in files[split]:
            for row in _rows_in(name, streaming):
                if start <= number and (end is None or number < end):
                    count += 1
                    yield columns | row if isinstance(row, dict) else row
                number += 1
    if not streaming and count != len(rows):
        raise DataError(f"its files hold {count:,} rows, of which datasets reads {len(rows):,}")


def _rows_in(name: str, streaming: bool) -> Iterator[Row | LabelError]:
    """The rows of one file of a dataset, which is downloaded unless it is streamed."""
    from datasets.utils.file_utils import cached_path, xopen

    with xopen(name, "rb") if streaming else open(cached_path(name), "rb") as file:
        unpacked = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
        text = io.BufferedReader(cast("io.RawIOBase", unpacked))
        is_list = text.peek(1 << 10).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
        for _, row in (read_json if is_list else read_jsonl)(name, cast("IO[bytes]", text)):
            yield row


# ---------------------------------------------------------------------------------------------------------------
# Parts of a dataset


def hub_parts(path: str) -> tuple[str | None, str]:
    """The configuration (None for the only one) and the split of a dataset that are to be trained on.

    Raises:
        DataError: The dataset cannot be found, or has several configurations and none is called `default`.
    """
    import datasets

    with _load_errors(path):
        configs = datasets.get_dataset_config_names(path)
        if len(configs) > 1 and "default" not in configs:
            raise DataError(
                f"{path}: it has the configurations {', '.join(configs[:20])}; write a recipe with data.train: "
                f"[{{path: {path}, config: {configs[0]}}}]"
            )
        config = None if len(configs) == 1 else "default"
        splits = datasets.get_dataset_split_names(path, config)
    return config, next((split for split in ("train", *splits) if split in splits and "train" in split), splits[0])
