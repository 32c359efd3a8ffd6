"""Converts configurations of other trainers: each key becomes one of a recipe, or is listed with the reason."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from finetune.recipe.conversion import Conversion
from finetune.recipe.convert_rows import ROWS
from finetune.recipe.convert_values import VALUES
from finetune.recipe.foreign_keys import INSTEAD
from finetune.recipe.load import load_recipe
from finetune.recipe.notebook_cell import Unread, read_cell
from finetune.recipe.peers import PEER_DEFAULTS, PEERS, peer_of
from finetune.recipe.schema import CONFIGS
from finetune.recipe.upstream_types import upstream_keys
from finetune.recipe.yaml_tree import Node, RecipeTree, Section, read_file
from finetune.system.errors import RecipeError

CONVERTERS = VALUES | ROWS


def convert(path: Path) -> Conversion:
    """The recipe of a configuration of another trainer.

    Args:
        path: YAML of axolotl, LLaMA-Factory, ms-swift, trl or alignment-handbook; a notebook or Python text of unsloth,
            which is parsed and never run.

    Raises:
        RecipeError: The file cannot be read, or it is for none of these trainers.
    """
    given, peer = _read(path)
    conversion = Conversion(peer, given, path)
    table, keys = PEERS[peer], given
    # These first: the method decides which of trl's keys exist, an adapter which defaults apply.
    first = sorted(keys, key=lambda key: not table.get(key, "").startswith(("method", "lora =", "quantization")))
    _guess_method(conversion)
    for key in first:
        _convert_key(conversion, key, given[key], table.get(key))
    _finish(conversion)
    return conversion


def _read(path: Path) -> tuple[Section, str]:
    refused = "is for none of axolotl, LLaMA-Factory, ms-swift, trl, alignment-handbook and unsloth"
    if path.suffix not in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError([f"{path}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"]) from error
        if cell := read_cell(text, path):
            return cell, "unsloth"
    tree = RecipeTree(Node({}, str(path)))
    root = read_file(path, tree)
    if root is None or tree.faults:
        raise RecipeError(tree.report())
    given: Section = root.plain()
    peer = peer_of(given)
    if peer is None:
        ours = " (it is a recipe already)" if isinstance(given.get("model"), dict) else ""
        raise RecipeError([f"{path}: {refused}{ours}"])
    return given, peer


def _guess_method(conversion: Conversion) -> None:
    """Guesses the method: with trl the script decides it, not the configuration."""
    given = conversion.given
    if conversion.peer not in ("trl", "alignment-handbook", "unsloth"):
        return
    named = next((method for method in CONFIGS if method in given.get("trainer", conversion.path.name).lower()), None)
    rates = {"desirable_weight", "undesirable_weight"} & given.keys()
    pairs = {"beta", "max_prompt_length", "precompute_ref_log_probs", "rpo_alpha"} & given.keys()
    method = "kto" if rates else named or ("dpo" if pairs else "sft")
    if method != "sft":
        conversion.put("method", method, f"from {', '.join(sorted(rates or pairs)) or 'the name of the file'}")


def _convert_key(conversion: Conversion, key: str, value: Any, entry: str | None) -> None:
    if value is None:
        conversion.leave(key, "null: the default")
    elif isinstance(value, Unread):
        conversion.leave(key, "its value is computed in the notebook; write it")
    elif entry is None:
        _convert_common(conversion, key, value)
    elif entry.startswith("- "):
        conversion.leave(key, entry[2:])
    else:
        target, _, function = entry.partition(" = ")
        if function:
            CONVERTERS[function](conversion, target, key, value)
        else:
            conversion.put(target, value, key)


def _convert_common(conversion: Conversion, key: str, value: Any) -> None:
    """A key that has no entry: one of trl's configuration, or one that a section of a recipe answers for."""
    if key in upstream_keys(conversion.method)["training"]:
        conversion.put(f"training.{key}", value, key)
        return
    reasons = (INSTEAD[section].get(key) for section in ("training", "lora", "model", "quantization", "data"))
    conversion.leave(key, next(filter(None, reasons), f"a recipe has no such key of {conversion.peer}"))


def _finish(conversion: Conversion) -> None:
    """Adds the peer's defaults, the sections that follow from others, and takes out what a recipe refuses."""
    recipe, given = conversion.recipe, conversion.given
    evaluated = given.get("eval_strategy", "no") != "no" and "dataset_test_split" not in given
    if conversion.peer == "trl" and "dataset_name" in given and evaluated:
        CONVERTERS["test_split"](conversion, "data.eval", "the default of trl", "test")
    # With these trainers an adapter is trained only where the configuration says so.
    if "lora" not in recipe and conversion.peer in ("trl", "alignment-handbook", "axolotl"):
        recipe["lora"] = None
    if recipe.get("lora", ()) is None:
        for key in [key for key in recipe if key.startswith("lora.")]:
            conversion.leave(conversion.origins[key], "all weights are trained")
            del recipe[key]
    else:
        recipe.pop("lora", None)
        recipe.setdefault("lora.target_modules", "all-linear")
    defaults = PEER_DEFAULTS[conversion.peer]
    for key, value in defaults.items():
        section = key.split(".")[0]
        wanted = section == "training" or (section == "lora" and recipe.get("lora", ()) is not None)
        if (key in recipe and not (key == "lora.target_modules" and key not in conversion.origins)) or not wanted:
            continue
        value = 2 * recipe["lora.r"] if value == "twice r" else value
        conversion.put(key, value, f"the default of {conversion.peer}")
    if conversion.peer == "unsloth" and "load_in_4bit" not in given and not given.get("load_in_8bit"):
        CONVERTERS["four_bit"](conversion, "quantization.load_in_4bit", "the default of unsloth", True)
    bits = [key for key in recipe if key.startswith("quantization.")]
    if bits and not (recipe.get("quantization.load_in_4bit") or recipe.get("quantization.load_in_8bit")):
        for key in bits:
            conversion.leave(conversion.origins.get(key, key), "nothing is quantised")
            del recipe[key]
    elif bits and recipe.get("lora", ()) is None:
        recipe.pop("lora")
        recipe["lora.target_modules"] = "all-linear"
    if not recipe.get("data.eval") and "data.eval_fraction" not in recipe:
        for name in ("eval_strategy", "eval_steps", "eval_on_start", "eval_packing", "load_best_model_at_end"):
            if f"training.{name}" in recipe and recipe[f"training.{name}"] != "no":
                conversion.leave(conversion.origins[f"training.{name}"], "there are no rows to evaluate on")
                del recipe[f"training.{name}"]
    _take_out_refused(conversion)


def _take_out_refused(conversion: Conversion) -> None:
    """Leaves out values that `check` refuses, with its reason; it says the rest, such as files that are not there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        for _ in range(len(conversion.recipe)):
            file.write_text(conversion.as_yaml(), encoding="utf-8")
            try:
                load_recipe(file)
                return
            except RecipeError as error:
                # FILE:LINE: key: what is there; what to write
                faults = [fault.split(": ", 2)[1:] for fault in error.faults]
            # A package that is not installed here may be where the recipe is trained.
            refused = [
                (key, text)
                for key, text in ((key, " ".join(text)) for key, *text in faults if key in conversion.recipe)
                if key.startswith(("training.", "lora.")) and "needs the package" not in text
            ]
            if not refused:
                return
            for key, text in refused:
                if key in conversion.recipe:
                    conversion.leave(conversion.origins.get(key, key), text)
                    del conversion.recipe[key]
