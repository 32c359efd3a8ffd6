"""Converts the sources of rows of other trainers: each function is named by `peers` and takes one of their keys.

Their arguments are the conversion so far, the recipe's key, the peer's key and its value.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from finetune.recipe.conversion import Conversion, Converter
from finetune.recipe.yaml_tree import Section


def _put_sources(c: Conversion, target: str, key: str, sources: list[Section]) -> None:
    if sources:
        c.put(target, [*c.recipe.get(target, []), *sources], key)


def _axolotl_sources(c: Conversion, target: str, key: str, value: Any) -> None:
    entries = value if isinstance(value, list) else [value]
    sources = [_axolotl_source(c, f"{key}.{i}", entry) for i, entry in enumerate(entries) if isinstance(entry, dict)]
    _put_sources(c, target, key, sources)


# By the end of a type of axolotl's pairs, the columns that they have other names for.
_PAIRS = {
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "icr": {"prompt": "input"},
}


def _axolotl_source(c: Conversion, place: str, entry: Section) -> Section:
    entry = dict(entry)
    path, files = entry.pop("path", None), entry.pop("data_files", None)
    if files and path in ("json", "csv", "parquet", None):
        path = files[0] if isinstance(files, list) else files
        if isinstance(files, list) and len(files) > 1:
            c.leave(f"{place}.data_files", f"one source has one path or glob; add sources for {', '.join(files[1:])}")
    source: Section = {"path": path}
    for theirs, ours in (("name", "config"), ("split", "split"), ("revision", "revision")):
        if (value := entry.pop(theirs, None)) is not None and not (ours == "split" and files):
            source[ours] = value
    kind, messages = str(entry.pop("type", "")), entry.pop("field_messages", "messages")
    columns: Section = {}
    if c.method in ("dpo", "orpo") or (c.method == "kto" and "pair" in kind):
        source["format"] = "preference"
        columns = dict(_PAIRS.get(kind.rpartition(".")[2], {}))
        for name in ("chosen", "rejected"):
            if (own := entry.pop(f"field_{name}", name)) != name:
                columns[name] = own
    elif c.method == "kto":
        source["format"] = "rated"
    elif kind.startswith("alpaca"):
        source["format"] = "alpaca"
    elif kind in ("completion", "pretrain"):
        source["format"], column = "text", entry.pop("field", entry.pop("text_column", "text"))
        columns = {"text": column} if column != "text" else {}
    elif kind.startswith(("chat_template", "sharegpt")) or not kind:
        source["format"] = "sharegpt" if messages == "conversations" or kind.startswith("sharegpt") else "messages"
        columns = {"messages": messages} if messages not in ("messages", "conversations") else {}
        known = {"role": {"from", "role"}, "content": {"value", "content"}}
        mapping = entry.get("message_property_mappings", {})
        if isinstance(mapping, dict) and all(value in known.get(name, ()) for name, value in mapping.items()):
            entry.pop("message_property_mappings", None)
        for name in ("message_field_role", "message_field_content"):
            if entry.get(name) in {*known["role"], *known["content"]}:
                entry.pop(name)
    else:
        c.leave(
            f"{place}.type", f"{kind}: the format is told from the columns; if it cannot be, write format and columns"
        )
    if columns:
        source["columns"] = columns
    for name in entry:
        c.leave(f"{place}.{name}", "a source has no such key")
    return source


def _factory_sources(c: Conversion, target: str, key: str, value: Any) -> None:
    names = value.split(",") if isinstance(value, str) else value
    folder = c.given.get("dataset_dir") or "data"
    known: Section = {}
    for place in (c.path.parent / folder, Path(folder)):
        if (place / "dataset_info.json").is_file():
            try:
                known = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
            except ValueError:
                continue
            folder = os.path.relpath(place, c.path.parent)
            break
    _put_sources(c, target, key, [_factory_source(c, key, name.strip(), folder, known) for name in names])


def _factory_source(c: Conversion, key: str, name: str, folder: str, known: Section) -> Section:
    info = known.get(name)
    if not isinstance(info, dict):
        c.leave(
            f"{key} {name}", "dataset_info.json, which says what it is, is not beside the file; its path is a guess"
        )
        return {"path": os.path.join(folder, f"{name}.json")}
    path = info.get("hf_hub_url") or os.path.join(folder, info.get("file_name", f"{name}.json"))
    source: Section = {"path": path}
    for theirs, ours in (("subset", "config"), ("split", "split")):
        if theirs in info and "hf_hub_url" in info:
            source[ours] = info[theirs]
    given, columns = info.get("columns", {}), {}
    if info.get("ranking"):
        source["format"] = "preference"
        names = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "system"}
    elif info.get("formatting") == "sharegpt":
        source["format"] = "sharegpt"
        names = {"messages": "conversations", "system": "system", "tools": "tools"}
        if given.get("messages", "conversations") == "messages":
            source["format"], names["messages"] = "messages", "messages"
    else:
        source["format"] = "alpaca"
        names = {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "history": "history",
            "system": "system",
        }
    if "kto_tag" in given:
        source["format"], names = "rated", {"prompt": "prompt", "response": "completion", "kto_tag": "label"}
    for theirs, column in given.items():
        if theirs in names and column and names[theirs] != column:
            columns[names[theirs]] = column
    return source | ({"columns": columns} if columns else {})


def _swift_sources(c: Conversion, target: str, key: str, value: Any) -> None:
    sources = []
    for name in [value] if isinstance(value, str) else value:
        path, _, count = str(name).partition("#")
        path = path.removeprefix("HF::").removeprefix("hf::")
        if path.partition("::")[0].lower() == "ms":
            path = path.partition("::")[2]
        path, _, subset = path.partition(":")
        source: Section = {"path": path}
        if subset:
            source["config"] = subset
        if count:
            source["samples"] = int(count)
        sources.append(source)
    _put_sources(c, target, key, sources)


def _first_source(name: str, c: Conversion, target: str, key: str, value: Any) -> None:
    """Writes a key of the first source, to which several keys of trl's contribute; defaults are left out."""
    if value != {"split": "train", "streaming": False}.get(name):
        c.source()[name] = value
    c.came_from(target, key)


def _test_split(c: Conversion, target: str, key: str, value: Any) -> None:
    if c.given.get("eval_strategy", "no") == "no":
        c.leave(key, "nothing is evaluated: eval_strategy is no")
        return
    config = {"config": c.given["dataset_config"]} if c.given.get("dataset_config") else {}
    c.put(target, [{"path": c.given.get("dataset_name"), **config, "split": value}], key)


def _mixture(c: Conversion, target: str, key: str, value: Any) -> None:
    _mixed(c, target, key, value if isinstance(value, list) else [], {"path": "path", "name": "config"}, "fraction")


def _handbook_mixture(c: Conversion, target: str, key: str, value: Any) -> None:
    _mixed(c, target, key, value.get("datasets", []), {"id": "path", "config": "config"}, "weight")
    if seed := value.get("seed"):
        c.put("data.seed", seed, f"{key}.seed")
    if size := value.get("test_split_size"):
        c.leave(f"{key}.test_split_size", f"a share of the rows is held out, not {size}: write data.eval_fraction")


def _mixed(c: Conversion, target: str, key: str, entries: list[Section], names: dict[str, str], weight: str) -> None:
    sources = []
    for entry in entries:
        source = {ours: entry[theirs] for theirs, ours in names.items() if entry.get(theirs) not in (None, "default")}
        if entry.get("split", "train") != "train":
            source["split"] = entry["split"]
        if entry.get(weight) not in (None, 1, 1.0):
            source["weight"] = entry[weight]
        sources.append(source)
    _put_sources(c, target, key, sources)


def _mixer(c: Conversion, target: str, key: str, value: Any) -> None:
    splits = c.given.get("dataset_splits") or ["train"]
    sources = [{"path": path, "split": splits[0], "weight": share} for path, share in value.items()]
    _put_sources(c, target, key, [{k: v for k, v in source.items() if v not in (1, "train")} for source in sources])


def _mixer_splits(c: Conversion, target: str, key: str, value: Any) -> None:
    tests = [split for split in value if "test" in split]
    paths = c.given.get("dataset_mixer", {})
    if c.given.get("eval_strategy", "no") == "no" or not tests:
        c.leave(key, "the first split is that of data.train")
    else:
        c.put(target, [{"path": path, "split": split} for path in paths for split in tests], key)


ROWS: dict[str, Converter] = {
    "axolotl_sources": _axolotl_sources,
    "factory_sources": _factory_sources,
    "swift_sources": _swift_sources,
    "hub_source": partial(_first_source, "path"),
    "source_config": partial(_first_source, "config"),
    "source_split": partial(_first_source, "split"),
    "source_streaming": partial(_first_source, "streaming"),
    "test_split": _test_split,
    "mixture": _mixture,
    "handbook_mixture": _handbook_mixture,
    "mixer": _mixer,
    "mixer_splits": _mixer_splits,
}
