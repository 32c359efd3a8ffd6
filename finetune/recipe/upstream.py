"""The keys of `training`, `lora` and `quantization`: which exist, their types, and values that upstream refuses."""

import copy
import difflib
import json
import re
import typing
import warnings
from collections.abc import Hashable
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from finetune.recipe.foreign_keys import INSTEAD
from finetune.recipe.schema import CONFIGS
from finetune.recipe.unknown_keys import Keys, unknown_key
from finetune.recipe.upstream_tables import config_class, tables, unless_known_good
from finetune.recipe.yaml_scalars import NUMBER_PATTERN
from finetune.recipe.yaml_tree import RecipeTree, Section

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

# The beginnings of those values of `init_lora_weights` that move a part of the base's weights into the adapter.
INITS_FROM_BASE = ("pissa", "olora", "mica")
# `BitsAndBytesConfig.__init__` of transformers 5.23 has no type hints and takes any other word in `**kwargs`.
QUANTIZATION: Section = {
    "load_in_8bit": bool,
    "load_in_4bit": bool,
    "llm_int8_threshold": float,
    "llm_int8_skip_modules": list[str] | None,
    "llm_int8_enable_fp32_cpu_offload": bool,
    "llm_int8_has_fp16_weight": bool,
    "bnb_4bit_compute_dtype": Literal["float32", "bfloat16", "float16"] | None,
    "bnb_4bit_quant_type": Literal["nf4", "fp4"],
    "bnb_4bit_use_double_quant": bool,
    "bnb_4bit_quant_storage": Literal["uint8", "int8", "float16", "bfloat16", "float32", "float64"] | None,
}


# The values that the configuration would check against this machine, and those that it gets instead.
_OF_THE_MACHINE_FIXED = {"output_dir": ".", "use_cpu": True, "bf16": False, "fp16": False, "report_to": "none"}
_OF_THE_MACHINE = {*_OF_THE_MACHINE_FIXED, "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"}


def _methods_with(name: str) -> list[str]:
    """The methods whose configuration has a parameter of this name."""
    return [method for method, parameters in tables()["training"].items() if name in parameters]


class XlaFsdp(BaseModel):
    """The keys of `training.fsdp_config`: sharding on a TPU, which the launcher cannot choose."""

    model_config = STRICT

    xla: bool = False
    xla_fsdp_v2: bool = False
    xla_fsdp_grad_ckpt: bool = False


def check_section(tree: RecipeTree, section: str, keys: Keys) -> Section:
    """The keys of a section that are known and have values of the right type; adds faults for all others.

    Args:
        tree: The recipe, to which the faults are added.
        section: The section's name.
        keys: The known keys of all sections.
    """
    node = tree.root.child(section)
    if node is None or section in tree.broken:
        return {}
    if not isinstance(node.value, dict):
        tree.fault(section, f"is {node.shown()}; write a map of keys")
        return {}
    hints, valid = keys[section], {}
    for name, child in node.value.items():
        key = f"{section}.{name}"
        if name not in hints:
            other = _methods_with(name) if section == "training" and name not in INSTEAD[section] else []
            if other and tree.method not in other:
                tree.fault(key, f"is a key of {', '.join(other)}; method is {tree.method}")
            else:
                unknown_key(tree, key, section, keys)
            continue
        value = child.plain()
        kinds = _members(hints[name])
        # Most YAML readers take 2e-4 for text, so recipes quote it.
        if isinstance(value, str) and float in kinds and str not in kinds and re.fullmatch(NUMBER_PATTERN, value):
            value = float(value)
        try:
            # As JSON, whose types are YAML's: enums are text, tuples are lists.
            checked = TypeAdapter(hints[name], config=STRICT).validate_json(json.dumps(value))
        except ValidationError as error:
            _explain(tree, key, error.errors(include_url=False), keys)
        else:
            if key not in tree.broken:
                valid[name] = checked if isinstance(checked, float) else value
    # In place of a refused value upstream would see its default, and might complain about that.
    if section in ("training", "lora") and valid.keys() == node.value.keys() & hints.keys():
        unless_known_good(tree, section, valid, lambda: _ask_upstream(tree, section, valid))
    return valid


def _members(hint: Any) -> set[Any]:
    """The types of a union and those within them."""
    return {hint}.union(*(_members(member) for member in typing.get_args(hint) if isinstance(member, Hashable)))


_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",
    "dataclass_type": "a map",
    "too_short": "at least one entry",
}
_PATTERNS = {
    r"^pissa_niter_[0-9]+$": "pissa_niter_N",
    r"^\w+=[^=,]+(,\w+=[^=,]+)*$": "NAME=VALUE, several of them with commas between",
    r"^https?://": "the base URL of an API, such as http://localhost:8000/v1",
}


def _explain(tree: RecipeTree, key: str, errors: list[ErrorDetails], keys: Keys) -> None:
    """Adds pydantic's errors about one key as faults, each at the deepest node of the tree that it concerns."""
    expected: dict[str, list[str]] = {}
    for error in errors:
        place, node = key, tree.at(key)
        # `loc` also names the members of unions, which are not in the tree.
        for step in map(str, error["loc"]):
            if node.child(step):
                place, node = f"{place}.{step}", node.child(step) or node
        words = expected.setdefault(place, [])
        kind = error["type"]
        if kind == "missing":
            tree.fault(place, f"has no {error['loc'][-1]}; write {error['loc'][-1]}: ...")
        elif kind == "extra_forbidden":
            within = place.split(".")[-2]
            unknown_key(tree, place, within if within in keys else "source", keys)
        elif error["loc"][-1:] == ("[key]",):
            names = re.findall(r"'([^']*)'", error["msg"])
            near = difflib.get_close_matches(str(error["input"]), names, n=1)
            tree.fault(place, f"is unknown; write {', '.join(near or names)}")
        elif kind == "unexpected_keyword_argument":
            tree.fault(place, "is unknown; write a parameter that peft documents")
        else:
            message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            message = re.sub(r"\b(True|False)\b", lambda word: word[0].lower(), message)
            choices = re.findall(r"'[^']*'", message)
            if len(choices) > 9:
                message = (difflib.get_close_matches(f"'{error['input']}'", choices, n=1) or [message])[0]
            if kind == "string_pattern_mismatch":
                message = _PATTERNS[error["ctx"]["pattern"]]
            words.append(_EXPECTED.get(kind, re.sub("^(greater|less) ", r"a number \1 ", message)))
    for place, words in expected.items():
        deeper = any(other.startswith(f"{place}.") for other in expected)
        if words and not deeper and place not in tree.broken:
            tree.fault(place, f"is {tree.shown(place)}; write {' or '.join(dict.fromkeys(words))}")


def checked_config(training: Section, method: str) -> Any:
    """The configuration of a recipe's `training` section: its values, and nothing of this machine.

    It opens no device, joins no process group and sets no global flag.

    Args:
        training: The section.
        method: The recipe's method.

    Raises:
        Exception: The configuration refuses a value; of any type.
    """
    upstream = config_class(method)
    config = type(upstream.__name__, (upstream,), {"device": SimpleNamespace(type="cpu")})
    given = {name: value for name, value in training.items() if name not in _OF_THE_MACHINE}
    return config(**copy.deepcopy(given), **_OF_THE_MACHINE_FIXED)


def _ask_upstream(tree: RecipeTree, section: str, given: Section) -> None:
    """Adds faults for values that the upstream configuration refuses or warns that it ignores."""
    from peft import LoraConfig

    def lora(arguments: Section) -> None:
        # `trainable_model` lists the modules where it has to.
        listed = {"target_modules": ["linear"]} if arguments.get("target_modules") == "all-linear" else {}
        LoraConfig(**copy.deepcopy(arguments) | listed, task_type="CAUSAL_LM")

    training = section == "training"
    owner = CONFIGS[tree.method].rpartition(".")[2] if training else "LoraConfig"
    skipped = _OF_THE_MACHINE if training else {"trainable_token_indices"}

    def complaints(arguments: Section) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                checked_config(arguments, tree.method) if training else lora(arguments)
            except Exception as error:  # of any type; it is about these values
                return [str(error)]
        return [str(warning.message) for warning in caught if "ignored" in str(warning.message)]

    left = {name: value for name, value in given.items() if name not in skipped}
    while texts := complaints(left):
        for text in texts:
            named = [name for name in left if re.search(rf"\b{name}\b", text)]
            named = named or [name for name in left if text in complaints({name: left[name]})]
            key = f"{section}.{min(named, key=text.find)}" if named else section
            there = f"is {tree.shown(key)}" if named else "is refused"
            tree.fault(key, f"{there}; {owner} says: {text}")
            # Keys that have a fault are taken out, to find further ones.
            left = {name: value for name, value in left.items() if name not in (named or left)}
        if not left:
            break  # the remaining complaint is about this machine, not about a value


def check_quantization(tree: RecipeTree, bits: Section) -> None:
    """Adds faults for keys of `quantization` without effect, and for a 4-bit type left to upstream's default."""
    four, eight = bits.get("load_in_4bit"), bits.get("load_in_8bit")
    if bool(four) == bool(eight):
        have = "has both load_in_4bit and" if four else "has neither load_in_4bit nor"
        tree.fault("quantization", f"{have} load_in_8bit; write one of them, with true")
        return
    if four and "bnb_4bit_quant_type" not in tree.at("quantization").value:
        message = "is true, and upstream's bnb_4bit_quant_type would be fp4; write bnb_4bit_quant_type: nf4"
        tree.fault("quantization.load_in_4bit", message)
    for name in bits:
        if name.startswith("bnb_4bit_") and not four:
            tree.fault(f"quantization.{name}", "has no effect without load_in_4bit: true; remove it")
        if name in ("llm_int8_threshold", "llm_int8_has_fp16_weight") and not eight:
            tree.fault(f"quantization.{name}", "has no effect without load_in_8bit: true; remove it")
