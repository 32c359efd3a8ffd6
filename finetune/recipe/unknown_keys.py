"""Keys that a recipe does not have: what to write instead, as `foreign_keys`, `peers` or the spelling says."""

import difflib
from collections.abc import Mapping
from typing import Any

from finetune.recipe.foreign_keys import INSTEAD, NOT_WITH_PREFERENCES
from finetune.recipe.peers import target_of
from finetune.recipe.schema import CONFIGS
from finetune.recipe.yaml_tree import RecipeTree

# The keys of each section and the types of their values. Under "" are the sections themselves, under "source" the keys
# of an entry of `data.train`, under "fsdp_config", "judge", "lm_eval" and "prices" those of the maps of that name.
Keys = Mapping[str, Mapping[str, Any]]


def unknown_key(tree: RecipeTree, key: str, section: str, keys: Keys) -> None:
    """Adds a fault for a key that its section does not have, with the key that was probably meant.

    Args:
        tree: The recipe, to which the fault is added.
        key: The dotted key.
        section: The section's name, or "" for a section that is unknown.
        keys: The known keys of all sections.
    """
    name, known, instead = key.rpartition(".")[2], keys[section], INSTEAD.get(section, {})
    elsewhere = [f"{other}.{name}" for other in keys[""] if name in keys[other] and other != section]
    # A guess, so only where one or two letters differ.
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if section == "training" and tree.method != "sft":
        instead = instead | NOT_WITH_PREFERENCES
    owner = {"training": CONFIGS[tree.method], "lora": "peft.LoraConfig"}.get(section)
    target = target_of(name) if section in ("", *keys[""]) else None
    if name in instead:
        tree.fault(key, f"is not a recipe's key; {instead[name]}")
    elif target and target != key:
        tree.fault(key, f"is not a recipe's key; write {target.removeprefix(f'{section}.')}")
    elif elsewhere:
        tree.fault(key, f"is unknown; write {' or '.join(elsewhere)}")
    elif near:
        tree.fault(key, f"is unknown; perhaps {near[0]}")
    elif owner:
        tree.fault(key, f"is unknown; write a parameter of {owner}")
    else:
        tree.fault(key, f"is unknown; write one of {', '.join(known)}")
