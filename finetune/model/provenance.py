"""The origin of a folder, read from its files: base model, license of the base, and the run that it was made from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from finetune.model.attach import check_adapter_files
from finetune.recipe.checks import PACKAGED_BASES, is_local_base
from finetune.recipe.saved import saved_sections
from finetune.recipe.schema import ModelSection
from finetune.recipe.yaml_tree import expanded
from finetune.system.errors import ModelError, RunError, reworded
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MERGE_RECORD, read_json, run_file, sha256

# Licenses by patterns of ids on the Hub. For other ids the license is read from the base's page.
_LICENSES = {
    r"google/gemma-4-.*": "apache-2.0",
    r"google/(codegemma|gemma-(2b|7b|1\.1|2|3|3n)|(function|shield|translate|vault)gemma)(-.*)?": "gemma",
    r"google/medgemma-.*": "health-ai-developer-foundations",
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
# Where the terms of a license stand that the Hub has no name for.
_LINKS = {"health-ai-developer-foundations": "https://developers.google.com/health-ai-developer-foundations/terms"}
_DTYPES = ("float32", "bfloat16", "float16")


# The sections `model` and `quantization` of a recipe: how a base model is loaded.
BaseSections = tuple[ModelSection, dict[str, Any] | None]


@dataclass(frozen=True)
class BaseReference:
    """A base model as others refer to it.

    Attributes:
        name: Its name in the run's recipe.
        hub: Its id on the Hub; None if it is only on this machine.
        revision: Its revision on the Hub.
    """

    name: str
    hub: str | None
    revision: str | None = None


class MergedAdapter(TypedDict):
    """An adapter of a merge: its folder, its weight, and the SHA-256 of its file."""

    path: str
    weight: float
    sha256: str


class MergeRecord(TypedDict):
    """`merge.json`, which merge writes to the folder of a merged model."""

    base: str
    revision: str | None
    dtype_of_training: str
    finetune: str
    run: str
    adapters: list[MergedAdapter]
    base_weights: str
    dtype: str


# ---------------------------------------------------------------------------------------------------------------
# The base


def base_reference(folder: Path, given: str | None = None) -> BaseReference:
    """The base of a run, a merged model or an export; its name is empty if no file of the folder names it.

    Args:
        folder: The folder.
        given: The base's id on the Hub, which overrides the files.

    Raises:
        RunError: A file of the folder is damaged.
    """
    recipe, merged = recipe_sections(folder), merge_record(folder)
    model, adapter = recipe.get("model") or {}, read_json(folder / ADAPTER_CONFIG)
    name = str(
        (merged and merged["base"])
        or model.get("name_or_path")
        or export_report(folder).get("base")
        or adapter.get("base_model_name_or_path")
        or ""
    )
    commit = environment_of(folder).get("base_commit")
    revision = (merged and merged["revision"]) or commit or model.get("revision") or adapter.get("revision")
    name = expanded(name)
    hub = given or expanded((recipe.get("hub") or {}).get("base_model")) or hub_id(name)
    return BaseReference(name, hub, revision if hub == name else None)


def hub_id(name: str) -> str | None:
    """A base's id on the Hub; None if it is only on this machine.

    Args:
        name: The value of `model.name_or_path`.
    """
    path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    return PACKAGED_BASES.get(name) or (None if not name or path or is_local_base(name) else name)


def license_of(base: str | None) -> dict[str, str]:
    """The license of a base on the Hub, as metadata of a model card; empty if the id implies none.

    Args:
        base: The id.
    """
    name = next((name for pattern, name in _LICENSES.items() if re.fullmatch(pattern, base or "")), None)
    if name in _LINKS:
        return {"license": "other", "license_name": name, "license_link": _LINKS[name]}
    return {"license": name} if name else {}


def adapter_base_sections(folder: Path, given: str | None = None, trust_remote_code: bool = False) -> BaseSections:
    """The `model` and `quantization` sections of an adapter's base.

    They are read from the run's recipe, without its checks, because the data may have moved since. For an adapter that
    another tool trained, `adapter_config.json` names the base. The folder may be somebody else's: what its files say of
    `trust_remote_code`, and attention kernels on the Hub, which are code, count for nothing.

    Args:
        folder: The adapter's folder: a run, a checkpoint, or what PEFT saved.
        given: The base's path or id on the Hub, in place of the one that the files name.
        trust_remote_code: True if the user lets Python files of the model's repository run.

    Raises:
        ModelError: Neither file can be read, the adapter's files are not PEFT's, or the base is a path that does not
            exist here.
    """
    if is_adapter(folder):
        check_adapter_files(folder)
    if path := run_file(folder, "recipe.yaml"):
        try:
            saved = expanded(saved_sections(path))
            section, quantization = ModelSection(**saved["model"]), saved.get("quantization")
            if section.attn_implementation and "/" in section.attn_implementation:
                section = section.model_copy(update={"attn_implementation": None})
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is damaged: it names no base model") from error
        section = section.model_copy(update={"trust_remote_code": trust_remote_code})
        return _base_section(section, path, given), quantization
    from peft import PeftConfig

    config = folder / ADAPTER_CONFIG
    with reworded(ModelError, f"{config} is damaged", ValueError, TypeError, KeyError, AttributeError):
        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not (name or given):
        raise ModelError(f"{config} names no base (base_model_name_or_path); write --base with its path or id")
    section = ModelSection(name_or_path=str(name or given), trust_remote_code=trust_remote_code)
    return _base_section(section, config, given), None


def _base_section(section: ModelSection, file: Path, given: str | None) -> ModelSection:
    """The section, with the base that is given; refuses a path, named by `file`, that is not on this machine."""
    if given:
        same = given == section.name_or_path
        return section if same else section.model_copy(update={"name_or_path": given, "revision": None})
    name = section.name_or_path
    if "${" in name:
        raise ModelError(f"{file}: its base is {name}, which is not set in the environment; export it, or write --base")
    foreign = name.startswith(("/", "./", "../", "~")) or "\\" in name or name.count("/") > 1
    if foreign and ":" not in name.removeprefix(name[:1] + ":") and not os.path.exists(os.path.expanduser(name)):
        raise ModelError(f"{file}: its base {name} is not on this machine; write --base with its path or id")
    return section


# ---------------------------------------------------------------------------------------------------------------
# The run


def is_adapter(folder: Path) -> bool:
    """True if a folder holds an adapter of PEFT: a run, a checkpoint, or one that was trained elsewhere."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_below(folder: Path) -> str:
    """The words of an error for a folder whose adapters PEFT saved in folders of their names; empty for any other."""
    below = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return f"; its adapter is in {below[0]}, write that" if below else ""


def has_tokenizer(folder: Path) -> bool:
    """True if an adapter's folder holds a tokenizer; PEFT saves none, so that it is the base's."""
    return (folder / "tokenizer_config.json").is_file()


def tokenizer_section(folder: Path, base: str | None = None, trust_remote_code: bool = False) -> ModelSection:
    """The `model` section whose tokenizer a run or model is prompted with: the folder's own, or that of a run's base.

    Args:
        folder: A run, or what `model.name_or_path` takes.
        base: The path or id of a run's base, in place of the one that its files name.
        trust_remote_code: True if the user lets Python files of the model's repository run.

    Raises:
        ModelError: The folder is a run without a tokenizer, and its base is not known.
    """
    if is_adapter(folder) and not has_tokenizer(folder):
        return adapter_base_sections(folder, base, trust_remote_code)[0]
    return ModelSection(name_or_path=str(folder), trust_remote_code=trust_remote_code)


def source_run(folder: Path) -> Path | None:
    """The run that a folder is, or was merged or exported from; None if it is gone or was trained again since.

    Raises:
        RunError: A record in the folder is damaged.
    """
    if run_file(folder, "ledger.json"):
        return folder
    merged = merge_record(folder)
    run = Path(merged["run"]) if merged else _exported_from(folder)
    if run is None:
        return None
    if not (run / "ledger.json").is_file():
        return source_run(run) if (run / MERGE_RECORD).is_file() and run != folder else None
    if merged and not any(_is_unchanged(run, adapter) for adapter in merged["adapters"]):
        return None
    return run


def record_digest(folder: Path) -> str:
    """The SHA-256 of what a run or a merged model records of itself; empty if it has no such record."""
    for name in ("ledger.json", MERGE_RECORD):
        if file := run_file(folder, name):
            return sha256(file)
    return ""


def _exported_from(folder: Path) -> Path | None:
    """The run or model that a folder was exported from; None if it is gone or has changed.

    A report may be somebody else's and name a folder of this machine: its files count only if the report knows them.
    """
    report = export_report(folder)
    model = Path(str(report.get("model") or "/nowhere"))
    return model if report.get("record_sha256") and record_digest(model) == report["record_sha256"] else None


def merged_run(folder: Path) -> Path | None:
    """The run of a model that only this run, with weight 1, was merged into; None if it is gone or was trained again.

    Raises:
        RunError: The merge's record is damaged.
    """
    record = merge_record(folder)
    if not record or [adapter["weight"] for adapter in record["adapters"]] != [1]:
        return None
    run = Path(record["run"])
    return run if _is_unchanged(run, record["adapters"][0]) else None


def _is_unchanged(run: Path, adapter: MergedAdapter) -> bool:
    """True if a run's adapter is still the one that was merged."""
    file = run / ADAPTER_WEIGHTS
    return file.is_file() and sha256(file) == adapter["sha256"]


def merge_record(folder: Path) -> MergeRecord | None:
    """The `merge.json` of a merged model; None if the folder has none.

    Raises:
        RunError: It is damaged.
    """
    file = folder / MERGE_RECORD
    if not file.is_file():
        return None
    try:
        record = read_json(file)
        sound = bool(record["base"]) and all({"weight", "sha256"} <= set(item) for item in record["adapters"])
    except (RunError, KeyError, TypeError):
        sound = False
    if not sound:
        raise RunError(f"{file} is damaged; write the run that it was merged from")
    return cast(MergeRecord, record)


def recipe_sections(folder: Path) -> dict[str, Any]:
    """The sections of the recipe that a folder, or the run that it was exported from, was trained by.

    Raises:
        RunError: The recipe is damaged.
    """
    file = run_file(folder, "recipe.yaml")
    if file is None and (model := _exported_from(folder)):
        file = run_file(model, "recipe.yaml")
    return saved_sections(file)


def export_report(folder: Path) -> dict[str, Any]:
    """The `report.json` of an export, from its own folder or that of one of its formats; empty if there is none.

    Raises:
        RunError: It is damaged.
    """
    for place in (folder, folder.parent):
        if report := read_json(place / "report.json"):
            # An evaluation's report has the same name.
            return report if "models" in report and "rows" in report else {}
    return {}


def environment_of(run: Path) -> dict[str, Any]:
    """The `environment.json` of a run or of one of its checkpoints; empty if there is none.

    Raises:
        RunError: It is damaged.
    """
    file = run_file(run, "environment.json")
    if file is None:
        return {}
    environment = read_json(file)
    if environment.get("dtype", "float32") not in _DTYPES:
        raise RunError(f"{file} is damaged: it names no dtype that a run trains in")
    return environment
