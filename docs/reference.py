"""Writes `docs/recipe.md`, `docs/cli.md` and the list of modules in `docs/architecture.md` from the code.

python docs/reference.py
"""

import argparse
import ast
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from finetune.cli.arguments import EXIT_CODES, parser
from finetune.recipe import schema
from finetune.recipe.foreign_keys import INSTEAD, NOT_WITH_PREFERENCES
from finetune.recipe.json_schema import recipe_schema
from finetune.recipe.peers import PEERS
from finetune.recipe.upstream import QUANTIZATION, XlaFsdp

HERE = Path(__file__).parent
_MADE = "<!-- Made by docs/reference.py: change the code that it reads, then run it again. -->\n"
_PLAIN = {
    Any: "any value",
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
}
# In the order of a recipe, by path.
_SECTIONS = {
    "model": schema.ModelSection,
    "data": schema.DataSection,
    "data.train[], data.eval[]": schema.DataSource,
    "early_stopping": schema.EarlyStoppingSection,
    "export": schema.ExportSection,
    "export.imatrix_data": schema.ImatrixDataSection,
    "evaluate": schema.EvaluateSection,
    "evaluate.judge": schema.JudgeSection,
    "evaluate.judge.prices": schema.PricesSection,
    "evaluate.lm_eval": schema.LmEvalSection,
    "hub": schema.HubSection,
}
_RECIPE = """# The keys of a recipe

`finetune check RECIPE` reports all errors at once and prints what is set, with the origin of each value; with
`--all` the defaults, too.

- `extends: other.yaml` (relative to this file) builds on another recipe: maps are merged, everything else is replaced.
- Paths of files to read (rows, templates, a local model, an adapter, prompts) are relative to the file in which they
  stand; what is not there is looked for in the working directory. `training.output_dir` and paths on the command line
  are relative to the working directory.
- `section.key=value` on the command line overrides both, in YAML's flow style; `quantization=null` removes a section.
- `${NAME}` is read from the environment, and stays `${NAME}` in all files that are written or pushed
  ([security.md](security.md)). `$${NAME}` is that text itself.
- A key that is not listed here is an error.
- Editors with a YAML language server complete and check keys by `recipes/schema.json`, which `finetune schema` prints:
  write `# yaml-language-server: $schema=PATH` into a recipe, as the shipped ones do.
"""
# The method, what it trains on, and the page of its class in trl's documentation.
_METHODS = [
    ("sft", "conversations and texts", "sft_trainer"),
    ("dpo", "pairs of a chosen and a rejected answer", "dpo_trainer"),
    ("kto", "answers that are rated good or bad, or pairs", "kto_trainer"),
    ("orpo", "pairs, without a reference", "orpo_trainer"),
]
_METHOD = """## method

A word beside the sections, by default `sft`. The keys of `training` are the parameters of the method's class in trl; a
key of another method is an error that names the methods which have it.

| method | trains on | keys of `training` |
|---|---|---|"""
_NOT_SFT = """
With `dpo`, `kto` and `orpo`, `data.on_overflow` is `drop` (the default) or `error`, `data.train_on` is absent because
the answers are trained on, and no source is streamed.
"""
_CONVERT = """`finetune convert FILE > recipe.yaml` converts a configuration: each key becomes one of the recipe, or is
listed at its end with the reason. Keys of trl's configurations are keys of `training` and not listed here; where the
trainer's default is another than trl's, it is written out. unsloth's are the arguments of a notebook, which is not run.
"""
_MODULES = (
    "<!-- modules: made by docs/reference.py from the first lines of the files -->\n",
    "<!-- end of modules -->",
)
# As in tests/test_house.py.
_IMPORTS = {
    "system": "nothing of ours",
    "recipe": "system",
    "data": "recipe, system",
    "model": "data, recipe, system",
    "merge": "model, recipe, system",
    "evaluate": "data, model, recipe, system",
    "hub": "data, evaluate, model, recipe, system",
    "train": "data, hub, model, recipe, system",
    "export": "data, evaluate, hub, merge, model, recipe, system",
    "plan": "data, model, recipe, train, system",
    "cli": "all packages",
}
_RESULTS = (
    "<!-- results: made by docs/reference.py from clients.json, which make clients writes -->\n",
    "<!-- end of results -->",
)
# Which artefacts stand in one table of docs/clients.md.
_TABLES = {
    "Whole models": ("full run", "merged", "bf16", "fp16", "int8", "nf4", "fp8", "w4a16"),
    "Folders for mlx-lm": ("mlx-bf16", "mlx-8bit", "mlx-4bit"),
    "Adapters on their base": ("run", "run with token rows", "adapter"),
    "GGUF files": ("gguf:F32", "gguf:Q8_0", "gguf:adapter", "ollama"),
}
_CLI = f"""# The command line

`finetune VERB`, or `python -m finetune VERB`; `finetune RECIPE` trains. The result goes to standard output, everything
else to standard error. {EXIT_CODES}
"""
_UPSTREAM = """## training, lora, quantization

These sections take upstream's keys, with upstream's defaults except for those below: `training` is the configuration of
the recipe's `method` (above), `lora`
[`peft.LoraConfig`](https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig), `quantization`
[`transformers.BitsAndBytesConfig`](https://huggingface.co/docs/transformers/main_classes/quantization#transformers.BitsAndBytesConfig).
Without `lora` an adapter with these defaults is trained, and `lora: null` trains all weights; without `quantization`
the base is loaded in `model.dtype`.

| key | default | |
|---|---|---|
| `training.output_dir` | `runs/NAME` for `NAME.yaml` | |
| `training.report_to` | `none` | upstream reports to every tracker that is installed |
| `training.resume_from_checkpoint` | no | a path, or true for the newest complete checkpoint |
| `training.bf16`, `training.fp16` | as `model.dtype` | a contradiction is an error |
| `lora.target_modules` | `all-linear` | the language model's attention and MLP, not routers or per-layer embeddings |
| `lora.trainable_token_indices` | `auto` | the turn tokens that the base has not learned; or `none`, or a list |
"""


def recipe() -> str:
    """The page of recipe keys."""
    lines = [_MADE, _RECIPE, _METHOD]
    for method, rows, page in _METHODS:
        owner = schema.CONFIGS[method]
        lines.append(f"| `{method}` | {rows} | [`{owner}`](https://huggingface.co/docs/trl/{page}#{owner}) |")
    lines.append(_NOT_SFT)
    for name, section in _SECTIONS.items():
        lines += [f"## {name}\n", f"{section.__doc__}\n", "| key | takes | default | |", "|---|---|---|---|"]
        lines += [_row(key, field) for key, field in section.model_fields.items()]
        lines.append("")
    lines += [_UPSTREAM, "`quantization` takes these:\n", "| key | takes |", "|---|---|"]
    lines += [f"| `{key}` | {accepted(kind)} |" for key, kind in QUANTIZATION.items()]
    keys = ", ".join(f"`{key}`" for key in XlaFsdp.model_fields)
    lines += [
        "",
        f"`training.fsdp_config` takes {keys} (on a TPU); sharding over GPUs is set in the launcher's file.\n",
    ]
    lines += ["## Names in other trainers\n", "Each of these keys is an error that says what to write instead.\n"]
    lines += ["| section | key | instead |", "|---|---|---|"]
    for name, table in [*INSTEAD.items(), ("training", NOT_WITH_PREFERENCES)]:
        place = next((path for path in _SECTIONS if name and path.split(",")[0].endswith(f".{name}")), name)
        place = {"": "top", "source": "data.train[]", "fsdp_config": "training.fsdp_config"}.get(name, place)
        groups: dict[str, list[str]] = {}
        for key, instead in table.items():
            groups.setdefault(instead, []).append(f"`{key}`")
        for instead, given in groups.items():
            where = f"{place} (not sft)" if table is NOT_WITH_PREFERENCES else place
            lines.append(f"| {where} | {', '.join(given)} | {_cell(instead)} |")
    lines += ["", "## Configurations of other trainers\n", _CONVERT]
    for peer, entries in PEERS.items():
        lines += [f"### {peer}\n", "| key | |", "|---|---|"]
        answers: dict[str, list[str]] = {}
        for key, entry in entries.items():
            target = entry.partition(" = ")[0]
            answers.setdefault(target[2:] if target[0] == "-" else f"`{target}`", []).append(f"`{key}`")
        lines += [f"| {', '.join(names)} | {_cell(answer)} |" for answer, names in answers.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(key: str, field: Any) -> str:
    value = field.default
    if field.is_required():
        default = "required"
    elif value is None or value is PydanticUndefined or value in ([], {}):
        default = ""
    else:
        default = f"`{str(value).lower() if isinstance(value, bool) else value}`"
    return f"| `{key}` | {accepted(field.rebuild_annotation())} | {default} | {_cell(field.description)} |"


def accepted(kind: Any) -> str:
    """The values that a type takes, in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return accepted(inner[0]) + "".join(_bound(bound) for bound in inner[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(accepted(one) for one in inner if one is not type(None)))
    if origin is Literal:
        # GGUF's many types are listed on the page of exports.
        shown = [f"`{value}`" for value in inner if not str(value).startswith("gguf:") or value == "gguf:all"]
        return ", ".join([*shown, "`gguf:TYPE`"] if "gguf:all" in inner else shown)
    if origin is list:
        maps = isinstance(inner[0], type) and issubclass(inner[0], BaseModel)
        return "a list of maps, below" if maps else f"a list of {accepted(inner[0])}"
    if origin is dict:
        # The values of a filter have many types.
        values = accepted(inner[1]) if typing.get_args(inner[1]) == () or inner[0] is not str else "values"
        return f"a map of {values}" if inner[0] is str else f"a map of {accepted(inner[0])} to a {values}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a map, below"
    return _PLAIN[kind]


def _bound(bound: Any) -> str:
    limits = getattr(bound, "metadata", [bound])
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    parts = [f"{words[name]} {getattr(limit, name)}" for limit in limits for name in words if hasattr(limit, name)]
    return f" {' and '.join(parts)}" if parts else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def cli() -> str:
    """The page of the commands."""
    lines = [_MADE, _CLI]
    verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: _cell(choice.help or "") for choice in verbs._choices_actions}
    common = {"--traceback", "--quiet", "--help"}
    for name, verb in verbs.choices.items():
        own = [a for a in verb._actions if not common & set(a.option_strings)]
        places = " ".join(_place(a) for a in own if not a.option_strings)
        lines += [f"## {f'finetune {name} {places}'.strip()}\n", f"{helps[name][0].upper()}{helps[name][1:]}.\n"]
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
        text = _cell(action.help or "")
        has_default = action.default not in (None, False, [], argparse.SUPPRESS) and "default" not in text
        default = f"default: {action.default}" if has_default and action.option_strings else ""
        required = "required" if action.required and action.option_strings else ""
        yield f"| `{name}{value}` | {'; '.join(part for part in (text, default, required) if part)} |"


def architecture() -> str:
    """`docs/architecture.md` with its list of modules made from the docstrings of the files."""
    head, begin, rest = (HERE / "architecture.md").read_text(encoding="utf-8").partition(_MODULES[0])
    _, end, tail = rest.partition(_MODULES[1])
    return "".join([head, begin, "\n", *_packages(), end, tail])


def clients() -> str:
    """`docs/clients.md` with its tables made from the results of the tier `clients`."""
    page, results = (HERE / "clients.md").read_text(encoding="utf-8"), HERE / "clients.json"
    head, begin, rest = page.partition(_RESULTS[0])
    _, end, tail = rest.partition(_RESULTS[1])
    return "".join([head, begin, *_results(json.loads(results.read_text(encoding="utf-8"))), end, tail])


def _results(results: dict[str, Any]) -> Iterator[str]:
    """The lines of the tables; a case's key is `client | artefact | base`."""
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for key, seen in results.items():
        client, artefact, base = key.split(" | ")
        cases.setdefault((client, artefact), {})[base] = seen
    for title, columns in _TABLES.items():
        rows = dict.fromkeys(client for client, artefact in cases if artefact in columns)
        if not rows:
            continue
        yield f"\n### {title}\n\n| program | {' | '.join(columns)} | seen |\n|{'---|' * (len(columns) + 2)}\n"
        for client in rows:
            own = [cases.get((client, artefact), {}) for artefact in columns]
            dates = [seen["date"] for bases in own for seen in bases.values()]
            yield f"| {client} | {' | '.join(map(_verdict, own))} | {min(dates)} |\n"
    reasons: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for (client, artefact), bases in cases.items():
        for base, seen in bases.items():
            said = f"`{_cell(seen['error'].replace('`', chr(39)))}`" if seen["error"] else ""
            if why := "; ".join(part for part in (seen["why"], said) if part):
                artefacts, names = reasons.setdefault((client, seen["verdict"], why), ([], []))
                artefacts.append(artefact)
                names.append(base)
    if reasons:
        yield "\n### Why\n\n| program | artefacts | models | verdict | |\n|---|---|---|---|---|\n"
        for (client, verdict, why), parts in reasons.items():
            yield f"| {client} | {' | '.join(', '.join(dict.fromkeys(part)) for part in parts)} | {verdict} | {why} |\n"
    yield "\n"


def _verdict(bases: dict[str, Any]) -> str:
    """A cell: one verdict with the worst figures; one for each base where they differ, or where one was read."""
    if len({seen["verdict"] for seen in bases.values()}) != 1 or len(bases) == 1:
        return "; ".join(f"{base}: {_one_verdict([seen])}" for base, seen in bases.items())
    return _one_verdict(list(bases.values()))


def _one_verdict(results: list[dict[str, Any]]) -> str:
    verdict = results[0]["verdict"]
    largest = max((seen["largest"] for seen in results if seen["largest"] is not None), default=None)
    figures = [] if largest is None else [f"{largest:.2g}"]
    greedy = min((seen["greedy"] for seen in results if seen["greedy"]), default=None)
    if greedy and verdict != "same":
        figures.append(f"{greedy[0]} of {greedy[1]}")
    shown = f"**{verdict}**" if verdict in ("wrong", "refuses", "ignores") else verdict
    return f"{shown} ({', '.join(figures)})" if figures and verdict != "refuses" else shown


def _packages() -> Iterator[str]:
    for package, imports in _IMPORTS.items():
        folder = HERE.parent / "finetune" / package
        yield f"\n### {package}\n\nImports {imports}.\n\n| file | contents |\n|---|---|\n"
        files = (file for file in folder.rglob("*.py") if file.name != "__init__.py")
        for file in sorted(files, key=lambda file: (len(file.parts), file)):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            contents = " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
            yield f"| `{file.relative_to(folder)}` | {contents} |\n"
    yield "\n"


def schema_file() -> str:
    """The JSON schema of a recipe, which the shipped recipes name for editors."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


PAGES = {
    "recipe.md": recipe,
    "cli.md": cli,
    "architecture.md": architecture,
    "clients.md": clients,
    "../recipes/schema.json": schema_file,
}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
