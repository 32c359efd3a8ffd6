"""Writes `docs/recipe.md` and `docs/cli.md` from the code that reads recipes and command lines.

python docs/reference.py
"""

import argparse
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from finetune.cli.arguments import EXIT_CODES, parser
from finetune.recipe import schema
from finetune.recipe.upstream import INSTEAD, QUANTIZATION, XlaFsdp

HERE = Path(__file__).parent
_MADE = "<!-- Made by docs/reference.py: change the code that it reads, then run it again. -->\n"
_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
# In the order in which a recipe is written, each with how it is reached.
_SECTIONS = {
    "model": schema.ModelSection,
    "data": schema.DataSection,
    "data.train[], data.eval[]": schema.DataSource,
    "export": schema.ExportSection,
    "export.imatrix_data": schema.ImatrixDataSection,
    "evaluate": schema.EvaluateSection,
    "evaluate.judge": schema.JudgeSection,
    "evaluate.judge.prices": schema.PricesSection,
    "evaluate.lm_eval": schema.LmEvalSection,
    "hub": schema.HubSection,
}
_RECIPE = """# The keys of a recipe

`finetune check RECIPE` tells every fault at once and prints the resolved recipe with the origin of each value.

- `extends: other.yaml` (relative to this file) builds on another recipe: maps are laid over each other, all else
  is replaced.
- `section.key=value` on the command line goes before both, in YAML's short form; `lora=null` takes a section out.
- `${NAME}` reads the environment, `$${NAME}` is that text itself.
- A key that is not here is an error.
"""
_CLI = f"""# The command line

`finetune VERB`, or `python -m finetune VERB`; `finetune RECIPE` trains. The result goes to standard output, everything
else to standard error. {EXIT_CODES}
"""
_UPSTREAM = """## training, lora, quantization

Upstream's, key by key, under upstream's names and with upstream's defaults but for those below: `training` is
[`trl.SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig), `lora`
[`peft.LoraConfig`](https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig), `quantization`
[`transformers.BitsAndBytesConfig`](https://huggingface.co/docs/transformers/main_classes/quantization#transformers.BitsAndBytesConfig).
Without `lora` it is full fine-tuning, without `quantization` the base stays as `model.dtype` says.

| key | where it is absent | |
|---|---|---|
| `training.output_dir` | `runs/` and the recipe's name | |
| `training.report_to` | `none` | upstream would report to whatever is installed |
| `training.resume_from_checkpoint` | no | a path, or true for the newest whole checkpoint |
| `training.bf16`, `training.fp16` | as `model.dtype` | a contrary pair is an error |
| `lora.target_modules` | `all-linear` | of the part that reads text |
| `lora.trainable_token_indices` | `auto` | turn tokens that the base never learned; `none`, or a list |
"""


def recipe() -> str:
    """The page of a recipe's keys."""
    lines = [
        _MADE,
        _RECIPE,
    ]
    for name, section in _SECTIONS.items():
        lines += [
            f"## {name}\n",
            f"{section.__doc__}\n",
            "| key | takes | where it is absent | |",
            "|---|---|---|---|",
        ]
        lines += [_row(key, field) for key, field in section.model_fields.items()]
        lines.append("")
    lines += [_UPSTREAM, "`quantization` takes these:\n", "| key | takes |", "|---|---|"]
    lines += [f"| `{key}` | {taken(kind)} |" for key, kind in QUANTIZATION.items()]
    keys = ", ".join(f"`{key}`" for key in XlaFsdp.model_fields)
    lines += [
        "",
        f"`training.fsdp_config` takes {keys} (a TPU's); how cards share a model is in the launcher's file.\n",
    ]
    lines += [
        "## What other trainers call it\n",
        "Each of these is an error that says what to write instead.\n",
    ]
    lines += ["| section | key | instead |", "|---|---|---|"]
    for name, table in INSTEAD.items():
        place = next((path for path in _SECTIONS if name and path.split(",")[0].endswith(f".{name}")), name)
        place = {"": "top", "source": "data.train[]", "fsdp_config": "training.fsdp_config"}.get(name, place)
        groups: dict[str, list[str]] = {}
        for key, instead in table.items():
            groups.setdefault(instead, []).append(f"`{key}`")
        for instead, given in groups.items():
            lines.append(f"| {place} | {', '.join(given)} | {_cell(instead)} |")
    return "\n".join(lines).rstrip() + "\n"


def _row(key: str, field: Any) -> str:
    default = field.default
    if field.is_required():
        absent = "an error"
    elif default is None or default is PydanticUndefined or default in ([], {}):
        absent = ""
    else:
        absent = f"`{str(default).lower() if isinstance(default, bool) else default}`"
    return f"| `{key}` | {taken(field.rebuild_annotation())} | {absent} | {_cell(field.description)} |"


def taken(kind: Any) -> str:
    """What a key takes, in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return taken(inner[0]) + "".join(_bound(bound) for bound in inner[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(taken(one) for one in inner if one is not type(None)))
    if origin is Literal:
        # GGUF's types are many, and stand on the page of exports.
        shown = [f"`{value}`" for value in inner if not str(value).startswith("gguf:") or value == "gguf:all"]
        return ", ".join([*shown, "`gguf:TYPE`"] if "gguf:all" in inner else shown)
    if origin is list:
        maps = isinstance(inner[0], type) and issubclass(inner[0], BaseModel)
        return "a list of maps, below" if maps else f"a list of {taken(inner[0])}"
    if origin is dict:
        # Of the values of one map the types are many.
        values = taken(inner[1]) if typing.get_args(inner[1]) == () or inner[0] is not str else "values"
        return f"a map of {values}" if inner[0] is str else f"a map of {taken(inner[0])} to a {values}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a map, below"
    return _PLAIN[kind]


def _bound(bound: Any) -> str:
    limits = getattr(bound, "metadata", [bound])
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    said = [
        f"{word} {getattr(limit, name)}"
        for limit in limits
        for name, word in words.items()
        if hasattr(limit, name)
    ]
    return f" {' and '.join(said)}" if said else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def cli() -> str:
    """The page of the verbs."""
    lines = [
        _MADE,
        _CLI,
    ]
    verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    said = {choice.dest: choice.help for choice in verbs._choices_actions}
    common = {"--traceback", "--quiet", "--help"}
    for name, verb in verbs.choices.items():
        own = [a for a in verb._actions if not common & set(a.option_strings)]
        places = " ".join(_place(a) for a in own if not a.option_strings)
        lines += [
            f"## {f'finetune {name} {places}'.strip()}\n",
            f"{_cell(said[name])[0].upper()}{_cell(said[name])[1:]}.\n",
        ]
        lines += ["| | |", "|---|---|", *_flags(sorted(own, key=lambda a: bool(a.option_strings))), ""]
    lines += [
        "Every verb also takes `--quiet` (errors only) and `--traceback` (Python's, and the warnings of libraries)."
    ]
    return "\n".join(lines) + "\n"


def _place(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest.upper())
    return f"[{name} ...]" if action.nargs == "*" else name


def _flags(actions: list[argparse.Action]) -> Iterator[str]:
    for action in actions:
        name = action.option_strings[-1] if action.option_strings else _place(action)
        takes = action.nargs != 0 and action.option_strings
        choices = "\\|".join(map(str, action.choices)) if action.choices and not action.metavar else ""
        value = f" {action.metavar or choices or action.dest.upper()}" if takes else ""
        absent = action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in (
            action.help or ""
        )
        text = _cell(action.help or "")
        default = f"default: {action.default}" if absent and action.option_strings else ""
        needed = "needed" if action.required and action.option_strings else ""
        yield f"| `{name}{value}` | {'; '.join(part for part in (text, default, needed) if part)} |"


PAGES = {"recipe.md": recipe, "cli.md": cli}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
