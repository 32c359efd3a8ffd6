"""Keys and values that trl, peft and transformers take, and what to write in place of other names."""

import copy
import dataclasses
import difflib
import json
import re
import typing
import warnings
from collections.abc import Mapping
from enum import Enum
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from finetune.recipe.yaml_tree import NUMBER_PATTERN, RecipeTree, Section, Sections

# The keys of each section and the types of their values. Under "" are the sections themselves, under "source" the keys
# of an entry of `data.train`, under "fsdp_config", "judge", "lm_eval" and "prices" those of the maps of that name.
Keys = Mapping[str, Mapping[str, Any]]

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

# The values of `init_lora_weights` that take a part out of the base's weights begin so.
INITS_FROM_BASE = ("pissa", "olora", "mica")
# What to write instead of keys that upstream renamed or removed, that other trainers use, or that a recipe must not
# set. Keys of another section are found without this table.
_LAUNCH = "choose it in the file given to `accelerate launch --config_file`"
_WORDS: dict[str, dict[str, str]] = {
    "": {"peft": "write lora", "dataset": "write data", "bnb": "write quantization"},
    "model": {
        "name path model base_model model_name_or_path id": "write name_or_path",
        "torch_dtype precision": "write dtype",
        "use_flash_attention_2": "write attn_implementation: flash_attention_2",
        "device_map": _LAUNCH,
        "adapter_name_or_path lora_model_dir": "write adapter",
        "token": "run `hf auth login`",
    },
    "data": {
        "path dataset datasets train_file": "write train: [{path: ...}]",
        "test validation eval_file": "write eval: [{path: ...}]",
        "test_size val_size validation_split": "write eval_fraction",
        "train_on_inputs": "write train_on: all, or assistant",
    },
    "source": {"file dataset data_files": "write path", "name subset": "write config", "type": "write format"},
    "export": {"format types": "write formats", "max_kl max_kl_p99 min_top1 max_perplexity_ratio": "write gate: {...}"},
    "evaluate": {
        "questions prompt_file": "write prompts",
        "max_tokens max_length": "write max_new_tokens",
        "max_samples": "write limit",
    },
    "judge": {
        "api_key key token": "set OPENAI_API_KEY in the environment",
        "url api_base endpoint": "write base_url",
        "name": "write model",
    },
    "lm_eval": {"task": "write tasks: [...]"},
    "prices": {"prompt_tokens": "write input", "completion_tokens": "write output"},
    "training": {
        "max_seq_length": "write max_length",
        "evaluation_strategy do_eval": "write eval_strategy",
        "per_gpu_train_batch_size batch_size": "write per_device_train_batch_size",
        "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
        "no_cuda": "write use_cpu",
        "lr": "write learning_rate",
        "epochs": "write num_train_epochs",
        "lr_scheduler": "write lr_scheduler_type",
        "use_liger": "write use_liger_kernel",
        "warmup_ratio": "write warmup_steps; below 1 it is a share of all steps",
        "group_by_length": "write train_sampling_strategy: group_by_length",
        "adafactor": "write optim: adafactor",
        "include_inputs_for_metrics": "write include_for_metrics: [inputs]",
        "torchdynamo": "write torch_compile_backend",
        "overwrite_output_dir": "write another output_dir, or remove that folder",
        "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
        "save_safetensors": "remove it; safetensors is the only format",
        "half_precision_backend fp16_backend fp16_opt_level": "remove it; torch's autocast is the only one",
        "dataset_batch_size dataset_kwargs num_of_sequences": "remove it; the data section prepares the rows",
        "use_mps_device use_ipex jit_mode_eval tpu_num_cores": "remove it; the device is found",
        "dataset_text_field": "write columns: {text: COLUMN} in the source",
        "truncation_mode": "write data.on_overflow",
        "completion_only_loss assistant_only_loss": "write data.train_on",
        "chat_template_path": "write model.chat_template",
        "eos_token": "write model.chat_template, which ends the turns",
        "pad_token": "remove it; the tokenizer's is used",
        "model_init_kwargs": "write the sections model and quantization",
        "do_train do_predict": "remove it; a recipe trains",
        "fsdp deepspeed local_rank parallelism_config": _LAUNCH,
        "hub_token": "run `hf auth login`",
        "push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision": (
            "write the section hub: {repo_id: owner/name}"
        ),
    },
    "fsdp_config": {
        "version reshard_after_forward cpu_offload offload_params auto_wrap_policy min_num_params state_dict_type "
        "activation_checkpointing cpu_ram_efficient_loading fsdp_version fsdp_reshard_after_forward "
        "fsdp_offload_params fsdp_auto_wrap_policy fsdp_min_num_params fsdp_state_dict_type "
        "fsdp_activation_checkpointing fsdp_cpu_ram_efficient_loading": _LAUNCH,
        "transformer_layer_cls_to_wrap fsdp_transformer_layer_cls_to_wrap": (
            "remove it; the layer is found from the model"
        ),
        "xla_fsdp_settings": "remove it; it has no effect with xla_fsdp_v2",
    },
    "lora": {
        "rank lora_r": "write r",
        "alpha": "write lora_alpha",
        "dropout": "write lora_dropout",
        "target lora_target target_linear": "write target_modules",
        "base_model_name_or_path": "write model.name_or_path",
        "revision": "write model.revision",
        "peft_type task_type": "remove it; it is LoRA on a causal language model",
        "inference_mode": "remove it; a recipe trains",
        "loftq_config": "remove it; LoftQ changes the base's weights, which an adapter's files do not hold",
        "auto_mapping peft_version": "remove it; peft writes it",
        "eva_config corda_config lora_ga_config": "remove it; inits that need a pass over the rows are not supported",
        "runtime_config": "remove it; it has no form in YAML",
    },
    "quantization": {
        "load_4bit bits quant_method": "write load_in_4bit: true or load_in_8bit: true",
        "load_8bit": "write load_in_8bit",
    },
}
INSTEAD = {
    section: {name: instead for names, instead in table.items() for name in names.split()}
    for section, table in _WORDS.items()
}

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


class XlaFsdp(BaseModel):
    """The keys of `training.fsdp_config`: sharding on a TPU, which the launcher cannot choose."""

    model_config = _STRICT

    xla: bool = False
    xla_fsdp_v2: bool = False
    xla_fsdp_grad_ckpt: bool = False


def upstream_keys() -> Sections:
    """The keys of `training`, `lora` and `quantization`, and the types of their values."""
    from peft import LoraConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import SFTConfig

    def fields(section: str, config: type) -> Section:
        types = typing.get_type_hints(config)
        taken = [f for f in dataclasses.fields(config) if f.name not in INSTEAD[section]]
        return {f.name: _narrowed(types[f.name], f.metadata.get("choices")) for f in taken}

    training, lora = fields("training", SFTConfig), fields("lora", LoraConfig)
    reports = Literal[("none", "all", *INTEGRATION_TO_CALLBACK)]  # type: ignore[valid-type]
    # The inits that `get_peft_model` can compute alone. Without a pass over rows peft 0.21 refuses eva, corda and
    # lora_ga, or leaves them at the default; loftq replaces the base's weights by rounded ones that are not saved.
    # peft's hint spells the pattern of pissa_niter as a literal.
    inits = Literal["gaussian", "olora", "pissa", "orthogonal", "mica"]
    pissa = Annotated[str, Field(pattern=r"^pissa_niter_[0-9]+$")]
    return {
        "training": {
            **training,
            # The trainer also takes true, for the newest checkpoint.
            "resume_from_checkpoint": str | bool | None,
            "output_dir": str,
            "report_to": reports | list[reports],
            **dict.fromkeys(["per_device_train_batch_size", "per_device_eval_batch_size"], PositiveInt),
            "gradient_accumulation_steps": PositiveInt,
            "max_length": PositiveInt | None,
            "fsdp_config": XlaFsdp | None,
        },
        "lora": {
            **lora,
            "r": PositiveInt,
            "init_lora_weights": bool | inits | pissa,
            "trainable_token_indices": lora["trainable_token_indices"] | Literal["auto", "none"],
        },
        "quantization": QUANTIZATION,
    }


def _narrowed(hint: Any, choices: Any) -> Any:
    """An upstream type without members that accept anything: `str` beside an enum, `dict` beside a dataclass."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)
    if choices:
        return Union[(Literal[tuple(choices)], *(m for m in members if m is type(None)))]
    enum = any(isinstance(m, type) and issubclass(m, Enum) for m in members)
    loose = (str,) if enum else (dict,) if any(map(dataclasses.is_dataclass, members)) else ()
    return Union[tuple(m for m in members if m not in loose)]  # noqa: UP007 (not a fixed list)


def check_section(tree: RecipeTree, section: str, keys: Keys) -> Section:
    """The keys of a section that are known and have values of the right type; adds faults for all others.

    Args:
        tree: The recipe; takes the faults.
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
            unknown_key(tree, key, section, keys)
            continue
        value = child.plain()
        kinds = (hints[name], *typing.get_args(hints[name]))
        # Most YAML readers take 2e-4 for text, so recipes quote it.
        if isinstance(value, str) and float in kinds and str not in kinds and re.fullmatch(NUMBER_PATTERN, value):
            value = float(value)
        try:
            # As JSON, whose types are YAML's: enums are text, tuples are lists.
            checked = TypeAdapter(hints[name], config=_STRICT).validate_json(json.dumps(value))
        except ValidationError as error:
            _explain(tree, key, error.errors(include_url=False), keys)
        else:
            if key not in tree.broken:
                valid[name] = checked if isinstance(checked, float) else value
    # In place of a refused value upstream would see its default, and might complain about that.
    if section in ("training", "lora") and valid.keys() == node.value.keys() & hints.keys():
        _ask_upstream(tree, section, valid)
    return valid


def unknown_key(tree: RecipeTree, key: str, section: str, keys: Keys) -> None:
    """Adds a fault for a key that its section does not have, with the key that was probably meant.

    Args:
        tree: The recipe; takes the fault.
        key: The dotted key.
        section: The section's name, or "" for a section that is unknown.
        keys: The known keys of all sections.
    """
    name, known = key.rpartition(".")[2], keys[section]
    elsewhere = [f"{other}.{name}" for other in keys[""] if name in keys[other] and other != section]
    near = difflib.get_close_matches(name, known, n=1)
    owner = {"training": "trl.SFTConfig", "lora": "peft.LoraConfig"}.get(section)
    if name in INSTEAD[section]:
        tree.fault(key, f"is not a recipe's key; {INSTEAD[section][name]}")
    elif elsewhere:
        tree.fault(key, f"is unknown; write {' or '.join(elsewhere)}")
    elif near:
        tree.fault(key, f"is unknown; write {near[0]}")
    elif owner:
        tree.fault(key, f"is unknown; write a parameter of {owner}")
    else:
        tree.fault(key, f"is unknown; write one of {', '.join(known)}")


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
    r"^https?://": "where an API begins, such as http://localhost:8000/v1",
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


def _ask_upstream(tree: RecipeTree, section: str, given: Section) -> None:
    """Adds faults for values that the upstream configuration refuses or warns that it ignores."""
    from peft import LoraConfig
    from trl import SFTConfig

    if section == "training":
        # Checks values only: opens no device, joins no process group, sets no global flag.
        config = type("SFTConfig", (SFTConfig,), {"device": SimpleNamespace(type="cpu")})
        fixed = {"output_dir": ".", "use_cpu": True, "bf16": False, "fp16": False, "report_to": "none"}
        skipped = {*fixed, "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
    else:
        config, fixed, skipped = LoraConfig, {"task_type": "CAUSAL_LM"}, {"trainable_token_indices"}

    def complaints(arguments: Section) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                config(**copy.deepcopy(arguments), **fixed)
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
            tree.fault(key, f"{there}; {config.__name__} says: {text}")
            # Keys that have a fault are taken out, to find further ones.
            left = {name: value for name, value in left.items() if name not in (named or left)}
        if not left:
            break  # the remaining complaint is about this machine, not about a value


def check_quantization(tree: RecipeTree, bits: Section) -> None:
    """Adds faults for keys of `quantization` that have no effect, or another one than they seem to have."""
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
