"""Cuts a config to some of its layers, by what its lists and overrides say of each layer."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from typing import Any

# Lists of layers' numbers, such as `mlp_only_layers` and `hybrid_layer_ids`; `eos_token_ids` has other numbers.
_LAYER_NUMBERS = re.compile(r"(?!.*token).*(layers|ids|idxs|indices)")


def layer_types(config: Any) -> list[str]:
    """The distinct types of layers, such as `sliding_attention`, in their order; ["all"] where the config has none."""
    return list(dict.fromkeys(getattr(config.get_text_config(), "layer_types", None) or ["all"]))


def layer_kinds(config: Any) -> list[str]:
    """All that a config says of each of its layers, as a text: equal for layers that are built alike.

    Args:
        config: The base's transformers config.
    """
    text = config.get_text_config()
    depth = int(text.num_hidden_layers)
    overrides = _overrides(text)
    kinds: list[list[Any]] = [[overrides.get(layer)] for layer in range(depth)]
    for name, value in _lists(text):
        for layer, kind in enumerate(kinds):
            if _has_layer_numbers(name, value, depth):
                kind.append(layer in value)
            elif len(value) == depth:
                kind.append(value[layer])
    if shared := getattr(text, "num_kv_shared_layers", 0):
        for layer, kind in enumerate(kinds):
            kind.append(layer >= depth - shared)
    return [repr(kind) for kind in kinds]


def with_layers(config: Any, kept: Sequence[int]) -> Any:
    """A copy of the config that has only some of its layers.

    Args:
        config: The base's transformers config.
        kept: The numbers of the layers, ascending. Where the last layers reuse keys and values of earlier ones, it must
            have such an earlier one for each of their types.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = int(text.num_hidden_layers)
    if len(kept) == depth:
        return config
    overrides = _overrides(text)
    if overrides:
        text.per_layer_config = None
    for name, value in _lists(text):
        if _has_layer_numbers(name, value, depth):
            setattr(text, name, type(value)(i for i, layer in enumerate(kept) if layer in value))
        elif len(value) == depth:
            setattr(text, name, type(value)(value[layer] for layer in kept))
    text.num_hidden_layers = len(kept)
    if shared := getattr(text, "num_kv_shared_layers", 0):
        text.num_kv_shared_layers = sum(layer >= depth - shared for layer in kept)
    if overrides:
        text.per_layer_config = {i: overrides[layer] for i, layer in enumerate(kept) if layer in overrides}
    return config


def _lists(text: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(text).items() if isinstance(value, (list, tuple)) and value]


def _has_layer_numbers(name: str, value: Sequence[Any], depth: int) -> bool:
    return (
        _LAYER_NUMBERS.fullmatch(name) is not None
        and all(isinstance(each, int) and not isinstance(each, bool) and each < depth for each in value)
        and all(a < b for a, b in itertools.pairwise(value))
    )


def _overrides(text: Any) -> dict[int, dict[str, Any]]:
    """The values that single layers have in place of the config's own, by layer (`per_layer_config`)."""
    if not text.is_heterogeneous:
        return {}
    return {int(layer): values for layer, values in text.to_dict()["per_layer_config"].items()}
