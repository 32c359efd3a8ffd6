"""Model cards of runs, merged models and exports. Every number in a card is read from the files of the folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from finetune.data.ledger import Account
from finetune.data.template_trial import try_template
from finetune.evaluate.report import EvaluationReport, intro, tables
from finetune.hub.metadata import (
    License,
    Metadata,
    Sections,
    base_metadata,
    evaluation_metadata,
    language_metadata,
    result_metadata,
    source_paths,
)
from finetune.model import provenance
from finetune.model.adapter_readers import READERS, problems_of
from finetune.model.provenance import BaseReference
from finetune.recipe.export_formats import COMPRESSED_FORMATS, MLX_BITS, QUANTIZED_FORMATS
from finetune.system.errors import RunError, reworded
from finetune.system.files import ADAPTER_CONFIG, read_json, read_records, run_file
from finetune.system.pages import render

# The last line of a generated card, with the hash of the text above it; in a card that a person has edited, it differs.
_MARK = "\n<!-- Written by finetune from the files of this repository. {} -->\n"
# The end of the name of a GGUF file with an adapter.
_ADAPTER_FILE = "-adapter.gguf"
_GGUF_FOLDERS = ("gguf", "ollama")
_MODEL_CONFIGS = (ADAPTER_CONFIG, "config.json")
_SMALL_FORMATS = {*QUANTIZED_FORMATS, *COMPRESSED_FORMATS, *(name for name, bits in MLX_BITS.items() if bits < 16)}


class TrainingValues(TypedDict):
    """The values of a card about the training; a value is empty if its file does not exist."""

    checkpoint: int | None
    sources: list[str]
    quantization: Sections | None
    recipe: str
    ledger: dict[str, Account]
    environment: dict[str, Any]
    losses: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    finished: dict[str, Any] | None


def folder_card(
    folder: Path, repo: str | None = None, base: BaseReference | None = None, terms: License | None = None
) -> str:
    """The card of a run, a checkpoint, a merged model, an export, or one format of an export.

    Args:
        folder: The folder.
        repo: Its repository on the Hub, owner/name; by default the card calls it by the folder's name.
        base: The base model; by default the one that `base_reference` finds.
        terms: The license as metadata of the card; by default the license that the base's id implies.

    Raises:
        RunError: A file of the folder is damaged.
    """
    from jinja2 import TemplateError as JinjaError

    damage = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, JinjaError)
    with reworded(RunError, f"{folder}: no card can be made of its files, one of which is damaged", *damage):
        report = provenance.export_report(folder)
        kinds = [item["name"] for item in report.get("models") or []]
        if (folder / "config.json").is_file() and folder.name in kinds and not (folder / "report.json").is_file():
            return export_card(report, folder.name, folder, repo, base, terms)
        if any((folder / name).is_file() for name in _MODEL_CONFIGS):
            return model_card(folder, repo, base, terms)
        return export_card(report, None, folder, repo, base, terms)


def is_generated(text: str) -> bool:
    """True for a card that nobody has edited since it was generated."""
    above, _, _ = text.rpartition(_MARK.split("{}")[0])
    return bool(above) and text == above + _MARK.format(_digest(above))


def is_of_peft(text: str) -> bool:
    """True for the card that PEFT writes beside an adapter, and that nobody has filled in.

    Source: peft 0.21 `peft_model.py`, `create_or_update_model_card`: huggingface_hub's template, PEFT's release, and
    the settings of bitsandbytes.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if "\n- PEFT " not in text:
        return False
    template = ModelCard.from_template(ModelCardData()).text.splitlines()
    body = text.partition("\n---\n")[2] if text.startswith("---\n") else text
    added = [line for line in body.splitlines() if line and line not in template]
    known = r"#+ (Framework versions|Training procedure)|- (PEFT .*|\w+: .*)|The following `bitsandbytes` .*"
    return all(re.fullmatch(known, line) for line in added)


def mark_generated(text: str) -> str:
    """A generated card whose text was rewritten for the Hub, with its hash renewed."""
    above, _, _ = text.rpartition(_MARK.split("{}")[0])
    return above + _MARK.format(_digest(above))


def model_card(
    folder: Path, repo: str | None = None, base: BaseReference | None = None, terms: License | None = None
) -> str:
    """The card of a run, of one of its checkpoints, or of a merged model.

    Args:
        folder: The folder.
        repo: Its repository on the Hub, owner/name; by default the card calls it by the folder's name.
        base: The base model; by default the one that `base_reference` finds.
        terms: The license as metadata of the card; by default the license that the base's id implies.

    Raises:
        RunError: A file of the folder is damaged.
    """
    base = base or provenance.base_reference(folder)
    run, recipe = provenance.source_run(folder), provenance.recipe_sections(folder)
    adapter, merged = read_json(folder / ADAPTER_CONFIG), provenance.merge_record(folder)
    several = merged is not None and len(merged["adapters"]) > 1
    relation = "adapter" if adapter else "merge" if several else "finetune"
    evaluation = cast(EvaluationReport | None, read_json((run or folder) / "evaluation/report.json") or None)
    name = _name(folder, repo)
    training = _training_values(folder, run, recipe)
    values = {
        **training,
        "name": name,
        "base": base,
        "method": _method(recipe) if recipe else "",
        "relation": relation,
        "merged": merged,
        "evaluation": tables(evaluation) if evaluation else [],
        "intro": intro(evaluation) if evaluation else "",
        "picture": bool(run and run_file(run, "loss.png")),
    }
    use = "adapter" if adapter else "whole"
    values["use"] = _usage((folder,), repo or name, use, base, training, adapter)
    data = base_metadata(base, relation, "peft" if adapter else "transformers", terms, recipe)
    data |= language_metadata(training["ledger"])
    data |= evaluation_metadata(name, recipe, evaluation, training["evaluations"])
    return _render_card("hub/model_card.md.jinja", data, values)


def export_card(
    report: Mapping[str, Any],
    kind: str | None,
    folder: Path | None = None,
    repo: str | None = None,
    base: BaseReference | None = None,
    terms: License | None = None,
) -> str:
    """The card of an export, or of one of its formats.

    Args:
        report: `report.json` of the export.
        kind: The format; None for the whole export.
        folder: The folder; None: the card is made from the report alone.
        repo: Its repository on the Hub, owner/name.
        base: The base model; by default the one that the report names.
        terms: The license as metadata of the card; by default the license that the base's id implies.

    Raises:
        RunError: A file of the folder is damaged.
    """
    base = base or BaseReference(report.get("base", ""), provenance.hub_id(report.get("base", "")))
    place = folder or Path(kind or ".")
    run, recipe = provenance.source_run(place), provenance.recipe_sections(place)
    files, modelfile = _gguf_files(place)
    models = (report.get("models") or []) if kind else []
    of_kind = (item for item in models if kind in (item["name"], item.get("kind")))
    measured = next((item for item in of_kind if item.get("kept", True)), None)
    # The folder of GGUF files is called `gguf` in every export.
    name = _name(place, repo) if repo or (folder and place.name not in _GGUF_FOLDERS) else report["title"]
    folders = sorted(p.parent.name for p in place.glob("*/config.json")) if kind is None else []
    kinds = [kind] if kind else folders
    small, for_mlx = (bool(kinds) and names >= set(kinds) for names in (_SMALL_FORMATS, MLX_BITS.keys()))
    only_files = bool(files) and not folders
    relation = "quantized" if only_files or small else "finetune"
    use = "gguf" if only_files else "mlx" if for_mlx else kinds[0] if small else "whole"
    target = repo or (kind or name if folder is None else name)
    training = _training_values(place, run, recipe)
    values = {
        **training,
        "name": name,
        "kind": kind,
        "base": base,
        "relation": relation,
        "report": report,
        "measured": measured,
        "table": _export_table(place),
        "folders": folders,
        "picture": bool(run and repo and run_file(run, "loss.png")),
    }
    # `_usage` takes the first folder with a chat template; a GGUF file has the one of the model that it was made from.
    places = (place / folders[0] if folders else place, run or place, Path(report.get("model") or place))
    values["use"] = _usage(places, target, use, base, training, {}) | {
        "files": [file for file in files if not file.endswith(_ADAPTER_FILE)],
        "adapters": [file for file in files if file.endswith(_ADAPTER_FILE)],
        "modelfile": modelfile,
    }
    library = "gguf" if only_files else "mlx" if for_mlx else "transformers"
    data = base_metadata(base, relation, library, terms, recipe) | language_metadata(training["ledger"])
    perplexity = (measured or {}).get("perplexity")
    if perplexity is not None and repo:
        data |= result_metadata(name, recipe, [("perplexity", "perplexity", perplexity)], str(report["rows"]))
    return _render_card("hub/export_card.md.jinja", data, values)


# ---------------------------------------------------------------------------------------------------------------
# The values of a card


def _training_values(folder: Path, run: Path | None, recipe: Sections) -> TrainingValues:
    """The values about the training, from the files that exist: recipe, ledger, losses, environment, time."""
    file = run and run_file(run, "metrics.jsonl")
    metrics = read_records(file) if file else []
    step = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    if step:
        # The card of a checkpoint leaves out the steps after it.
        metrics = [m for m in metrics if m["step"] <= int(step[1]) and "train_runtime" not in m]
    recipe_file = (run and run_file(run, "recipe.yaml")) or run_file(folder, "recipe.yaml")
    return {
        "checkpoint": int(step[1]) if step else None,
        "sources": source_paths(recipe),
        "quantization": recipe.get("quantization"),
        "recipe": recipe_file.read_text(encoding="utf-8") if recipe_file else "",
        "ledger": read_json(run and run_file(run, "ledger.json")),
        "environment": read_json(run and run_file(run, "environment.json")),
        "losses": [m for m in metrics if "loss" in m],
        "evaluations": [m for m in metrics if "eval_loss" in m],
        "finished": next((m for m in metrics if "train_runtime" in m), None),
    }


def _usage(
    places: Sequence[Path],
    target: str,
    kind: str,
    base: BaseReference,
    training: TrainingValues,
    adapter: dict[str, Any],
) -> dict[str, object]:
    """The values of the section that shows how to use the model.

    Args:
        places: Folders, of which the first one with a chat template is used.
        target: The repository or folder that the commands name.
        kind: `adapter`, `whole` (full weights), `gguf`, `mlx`, or one of `QUANTIZED_FORMATS` or `COMPRESSED_FORMATS`.
        base: The base model.
        training: As `_training_values` returns them.
        adapter: The adapter's `adapter_config.json`; empty for full weights.
    """
    rank = max([adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()])
    vllm = READERS["vllm"]
    in_vllm = adapter and not problems_of(vllm, adapter)
    prompt, system = _example_prompt(next((p for p in places if (p / "chat_template.jinja").is_file()), places[0]))
    bits = training["quantization"]
    # bitsandbytes computes in float32 by default. Float16 is not suggested: outside this toolkit Gemma overflows in it.
    if bits and bits.get("load_in_4bit") and training["environment"].get("dtype") == "bfloat16":
        bits = {"bnb_4bit_compute_dtype": "bfloat16"} | bits
    return {
        "kind": kind,
        "target": target,
        "base": base.hub or base.name,
        "revision": base.revision,
        "quantization": bits,
        "rank": next((n for n in vllm.ranks if n >= rank), None) if in_vllm else None,
        "token_rows": bool(adapter.get("trainable_token_indices")),
        "prompt": prompt,
        "system": system,
        "modelfile": None,
        "files": [],
        "adapters": [],
    }


def _gguf_files(place: Path) -> tuple[list[str], list[str] | None]:
    """The GGUF files of a folder and its formats, and Ollama's Modelfile with the file that it names."""
    # The file in `ollama/` has the name of one in `gguf/`, which replaces it here.
    patterns = ("*/*.gguf", "gguf/*.gguf", "*.gguf")
    by_name = {path.name: path for pattern in patterns for path in place.glob(pattern)}
    by_name.pop("imatrix.gguf", None)
    # Q4_K_M first: it is what most people use.
    files = sorted(by_name.values(), key=lambda path: ("Q4_K_M" not in path.name, path.name))
    modelfile = next((p for p in (place / "Modelfile", place / "ollama" / "Modelfile") if p.is_file()), None)
    names = [path.relative_to(place).as_posix() for path in files]
    if modelfile is None:
        return names, None
    weights = next((path.name for path in files if (modelfile.parent / path.name).is_file()), "")
    return names, [p.relative_to(place).as_posix() for p in (modelfile, modelfile.parent / weights)]


def _example_prompt(folder: Path) -> tuple[str | None, bool]:
    """A rendered prompt (None without a template), and True if the template renders a system message in it."""
    file = folder / "chat_template.jinja"
    if not file.is_file():
        return None, False
    from transformers.utils.chat_template_utils import render_jinja_template

    config = read_json(folder / "tokenizer_config.json")
    tokens = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    question = {"role": "user", "content": "(question)"}
    text = file.read_text(encoding="utf-8")
    try_template(text, str(file))
    for messages in ([{"role": "system", "content": "(system)"}, question], [question]):
        try:
            rendered, _ = render_jinja_template([messages], chat_template=text, add_generation_prompt=True, **tokens)
        except Exception:  # a template is anybody's program, and may need tools; no card is worth a run
            continue
        system = len(messages) > 1
        if not system or "(system)" in rendered[0]:
            return rendered[0], system
    return None, False


def _method(recipe: Sections) -> str:
    """The kind of training, as a sentence names it: `LoRA`, or `DPO with LoRA, which went on from an adapter`."""
    bits = recipe.get("quantization")
    if recipe.get("lora") is None:
        kind = "full fine-tuning"
    elif bits is None:
        kind = "LoRA"
    else:
        kind = "QLoRA (4 bit)" if bits.get("load_in_4bit") else "QLoRA (8 bit)"
    method = recipe.get("method", "sft")
    if method == "sft":
        return kind
    continued = ", which went on from an adapter," if recipe["model"].get("adapter") else ""
    return f"{method.upper()} with {kind}{continued}"


def _export_table(folder: Path) -> str:
    """An export's `report.md` without its title."""
    file = next((p for p in (folder / "report.md", folder.parent / "report.md") if p.is_file()), None)
    text = file.read_text(encoding="utf-8") if file else ""
    return re.sub(r"^# .*\n+", "", text)


# ---------------------------------------------------------------------------------------------------------------
# Files


def _render_card(template: str, data: Metadata, values: dict[str, object]) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    body = render(template, markup=False, **values)
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    card = ModelCard.from_template(
        ModelCardData(**data), template_str="---\n{{ card_data }}\n---\n\n{{ body }}", body=body
    )
    text = str(card).rstrip("\n") + "\n"
    return text + _MARK.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _name(folder: Path, repo: str | None) -> str:
    return repo.partition("/")[2] if repo else folder.resolve().name
