"""What a folder was made from, by its own files: its base, that base's terms, the run whose files tell of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe.checks import PACKAGED_BASES, is_local_base
from finetune.recipe.schema import ModelSection
from finetune.system.errors import ModelError, RunError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, run_file, sha256

# What an id on the Hub says of the terms. Of others the base's own page is asked, or nothing is said.
_LICENSES = {
    r"google/(codegemma|gemma-(2b|7b|1\.1|2|3|3n))(-.*)?": "gemma",
    r"meta-llama/Llama-2-.*": "llama2",
    r"meta-llama/Meta-Llama-3-.*": "llama3",
    r"meta-llama/(Meta-)?Llama-3\.1-.*": "llama3.1",
    r"meta-llama/Llama-3\.2-.*": "llama3.2",
    r"meta-llama/Llama-3\.3-.*": "llama3.3",
    r"Qwen/Qwen3-.*": "apache-2.0",
    r"Qwen/Qwen2(\.5)?-(0\.5|1\.5|7|14|32)B(-.*)?": "apache-2.0",
    r"mistralai/Mistral-7B-.*": "apache-2.0",
    r"HuggingFaceTB/SmolLM.*": "apache-2.0",
}


@dataclass(frozen=True)
class BaseReference:
    """What a model was made from: as the run calls it, its id on the Hub where it has one, its revision there."""

    name: str
    hub: str | None
    revision: str | None = None


def base_reference(folder: Path, given: str | None = None) -> BaseReference:
    """The base of a run, a merged model or an export; `given` is its Hub id, before all else.

    Raises:
        RunError: A file of the folder is damaged.
    """
    recipe, merged, report = recipe_sections(folder), read_json(folder / "merge.json"), export_report(folder)
    model = recipe.get("model") or {}
    adapter = read_json(folder / ADAPTER_CONFIG)
    name = str(
        merged.get("base")
        or model.get("name_or_path")
        or report.get("base")
        or adapter.get("base_model_name_or_path")
        or ""
    )
    commit = read_json(run_file(folder, "environment.json")).get("base_commit")
    revision = merged.get("revision") or commit or model.get("revision") or adapter.get("revision")
    wanted = given or (recipe.get("hub") or {}).get("base_model") or hub_id(name)
    return BaseReference(name, wanted, revision if wanted == name else None)


def hub_id(name: str) -> str | None:
    """A base's id on the Hub; None where it is on this machine alone."""
    away = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    return PACKAGED_BASES.get(name) or (None if not name or away or is_local_base(name) else name)


def license_of(base: str | None) -> dict[str, str]:
    """The terms that a base on the Hub hands on, as a page's metadata; empty where the id does not tell."""
    found = (name for pattern, name in _LICENSES.items() if re.fullmatch(pattern, base or ""))
    return {"license": name} if (name := next(found, None)) else {}


def source_run(folder: Path) -> Path | None:
    """The run whose files tell of a folder: itself, or the one that it was merged or exported from, if still here."""
    if run_file(folder, "ledger.json"):
        return folder
    merged = read_json(folder / "merge.json")
    run = Path(str(merged.get("run") or export_report(folder).get("model") or "/nowhere"))
    if not (run / "ledger.json").is_file():
        return source_run(run) if (run / "merge.json").is_file() and run != folder else None
    adapters, there = merged.get("adapters"), run / ADAPTER_WEIGHTS
    if adapters and not (there.is_file() and sha256(there) in [item["sha256"] for item in adapters]):
        return None  # it was trained again since
    return run


def recipe_sections(folder: Path) -> dict[str, Any]:
    """The sections of the recipe that a folder, or the run that it was made from, was trained by."""
    file = run_file(folder, "recipe.yaml")
    if file is None and (model := export_report(folder).get("model")):
        file = run_file(Path(model), "recipe.yaml")
    if file is None:
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no map of sections")
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    return found


def export_report(folder: Path) -> dict[str, Any]:
    """`report.json` of the export that a folder is, or is a part of."""
    for place in (folder, folder.parent):
        if found := read_json(place / "report.json"):
            # An evaluation's report has this name, too.
            return found if "models" in found and "rows" in found else {}
    return {}


_DTYPES = ("float32", "bfloat16", "float16")


def environment_of(run: Path) -> dict[str, Any]:
    """The `environment.json` of a run or of one of its checkpoints; empty where there is none.

    Raises:
        RunError: It cannot be read.
    """
    file = run_file(run, "environment.json")
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("dtype", "float32") not in _DTYPES:
        raise RunError(f"{file} is damaged: it names no dtype that a run trains in")
    return found


def adapter_base_sections(folder: Path) -> tuple[ModelSection, dict[str, Any] | None]:
    """An adapter's base and its quantisation: from its run's recipe, or, for somebody else's adapter, from PEFT's file.

    The recipe is not checked again: its data may be elsewhere by now.

    Raises:
        ModelError: Neither can be read.
    """
    if path := run_file(folder, "recipe.yaml"):
        try:
            saved = yaml.safe_load(path.read_text(encoding="utf-8"))
            return ModelSection(**saved["model"]), saved.get("quantization")
        except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is damaged: it names no base model") from error
    from peft import PeftConfig

    try:
        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} is damaged: {error}") from error
    if not name:
        raise ModelError(f"{folder / ADAPTER_CONFIG} names no base (base_model_name_or_path)")
    return ModelSection(name_or_path=str(name)), None
