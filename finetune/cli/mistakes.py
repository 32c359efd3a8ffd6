"""Common mistakes on the command line, each with what to write instead."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Collection, Sequence

_ROWS = re.compile(r"\.(jsonl?|csv|parquet|ndjson|tsv|txt|xlsx?)(\.gz)?$")
_TAKE_RECIPES = ("train", "sweep", "check", "plan", "inspect")
_TAKE_RUNS = ("generate", "merge", "export", "evaluate", "serve", "report", "push", "check-adapter")
# The names of our commands in other programs.
_VERBS = {
    **dict.fromkeys(["eval", "test", "benchmark"], "evaluate"),
    **dict.fromkeys(["chat", "infer", "inference", "predict", "ask"], "generate"),
    **dict.fromkeys(["sft", "dpo", "kto", "orpo", "rlhf", "fit", "run", "finetune"], "train"),
    **dict.fromkeys(["validate", "lint"], "check"),
    **dict.fromkeys(["quantize", "quantise", "gguf"], "export"),
    **dict.fromkeys(["upload", "publish"], "push"),
    **dict.fromkeys(["server", "deploy", "api"], "serve"),
    **dict.fromkeys(["preprocess", "preview", "show"], "inspect"),
    **dict.fromkeys(["memory", "estimate"], "plan"),
    **dict.fromkeys(["new", "create"], "init"),
}


def mistake(words: Sequence[str], verbs: Collection[str]) -> str | None:
    """The line to print for a command line that cannot be meant so; None if none of the known mistakes was made.

    Args:
        words: The words after `finetune`.
        verbs: The commands that there are.
    """
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if not verb or verb.startswith("-"):
        return None
    if verb not in verbs:
        return _no_verb(verb, rest, verbs)
    if verb in _TAKE_RUNS:
        return _recipe_for_a_run(verb, rest)
    if verb not in _TAKE_RECIPES:
        return None
    recipe = next((word for word in rest if not word.startswith("-")), "")
    if _ROWS.search(recipe):
        return f"{recipe}: a file of rows, not a recipe; write finetune init {shlex.quote(recipe)}, which makes one"
    if not recipe.endswith((".yaml", ".yml")) and os.path.isfile(f"{recipe}.yaml"):
        return f"{recipe}: there is no such recipe; write finetune {verb} {shlex.quote(recipe)}.yaml"
    return next(filter(None, map(_key_as_flag, rest, [*rest[1:], ""])), None)


def _no_verb(verb: str, rest: Sequence[str], verbs: Collection[str]) -> str:
    if _ROWS.search(verb):
        return f"{verb}: a file of rows, not a command; write finetune init {shlex.quote(verb)}"
    near = [_VERBS[verb]] if verb in _VERBS else difflib.get_close_matches(verb, verbs, n=1, cutoff=0.7)
    if near and verb in _VERBS:
        return f"{verb}: there is no such command; write finetune {shlex.join([*near, *rest])}"
    if os.path.isdir(verb):
        return f"{verb}: a folder, not a command; for a run, write finetune generate {shlex.quote(verb)}"
    cure = f"perhaps {near[0]}" if near else f"write one of {', '.join(verbs)}"
    return f"{verb}: there is no such command; {cure}"


def _recipe_for_a_run(verb: str, words: Sequence[str]) -> str | None:
    """The line for a recipe in the place of a run."""
    recipe = next((word for word in words if not word.startswith("-")), "")
    if words[:1] != [recipe] or not recipe.endswith((".yaml", ".yml")) or not os.path.isfile(recipe):
        return None
    from finetune.recipe.load import load_recipe
    from finetune.system.errors import RecipeError

    try:
        run = str(load_recipe(recipe).training["output_dir"])
    except RecipeError:
        run = "RUN"
    return f"{recipe}: a recipe, not a run; write finetune {shlex.join([verb, run, *words[1:]])}"


def _key_as_flag(word: str, after: str) -> str | None:
    """The line for a key of a recipe that is written as a flag: `--learning_rate 1e-4`."""
    name, equals, value = word.removeprefix("--").partition("=")
    name = name.replace("-", "_")
    if not word.startswith("--") or not name.isidentifier():
        return None
    from finetune.recipe.load import known_keys
    from finetune.recipe.peers import target_of

    keys = known_keys()
    found = [f"{section}.{name}" for section in ("training", "lora", "model", "data") if name in keys[section]]
    target = found[0] if found else target_of(name)
    value = value if equals else after if after and not after.startswith("--") else "VALUE"
    return f"{word}: keys of a recipe are not flags; write {target}={value}" if target else None
