"""The pages of runs, models and exports, as the Hub shows them; every number in them is read from files beside them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from finetune.data.readers import is_file
from finetune.evaluate.report import HELD_OUT_ROWS, EvaluationReport, intro, tables
from finetune.model.provenance import (
    BaseReference,
    base_reference,
    export_report,
    hub_id,
    license_of,
    merge_record,
    recipe_sections,
    source_run,
)
from finetune.system.files import ADAPTER_CONFIG, read_json, read_records, run_file
from finetune.system.pages import render

# Of a page that nobody has changed since: the digest of what stands above it.
_MARK = "\n<!-- Written by finetune from the files of this repository. {} -->\n"
_MODEL_CONFIGS = (ADAPTER_CONFIG, "config.json")
# The ledger's names.
_LANGUAGE_CODES = {"English": "en", "Japanese": "ja"}
# vLLM serves adapters up to one of these ranks, and none that change more than their layers.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def folder_card(
    folder: Path,
    repo: str | None = None,
    base: BaseReference | None = None,
    terms: dict[str, str] | None = None,
) -> str:
    """The page of whatever lies in a folder: a run, a checkpoint, a merged model, a format, a whole export.

    Args:
        folder: The folder.
        repo: Its place on the Hub; absent, it is called by its own name.
        base: As `base_reference` finds it.
        terms: Metadata that says under which terms it stands; absent, as the base's id tells.

    Raises:
        RunError: A file of the folder is damaged.
    """
    report = export_report(folder)
    kinds = [item["name"] for item in report.get("models") or []]
    if (folder / "config.json").is_file() and folder.name in kinds and not (folder / "report.json").is_file():
        return export_card(report, folder.name, folder, repo, base, terms)
    if any((folder / name).is_file() for name in _MODEL_CONFIGS):
        return model_card(folder, repo, base, terms)
    return export_card(report, None, folder, repo, base, terms)


def is_generated(text: str) -> bool:
    """Whether a page is as it was written here; one that a person has changed is kept."""
    above, _, _ = text.rpartition(_MARK.split("{}")[0])
    return bool(above) and text == above + _MARK.format(_digest(above))


def mark_generated(text: str) -> str:
    """A page of ours that was changed on its way to the Hub, as one that nobody has changed since."""
    above, _, _ = text.rpartition(_MARK.split("{}")[0])
    return above + _MARK.format(_digest(above))


def model_card(
    folder: Path,
    repo: str | None = None,
    base: BaseReference | None = None,
    terms: dict[str, str] | None = None,
) -> str:
    """The page of a run, of one of its checkpoints, or of a merged model."""
    base, run, recipe = base or base_reference(folder), source_run(folder), recipe_sections(folder)
    adapter, merged = read_json(folder / ADAPTER_CONFIG), merge_record(folder)
    several = merged is not None and len(merged["adapters"]) > 1
    relation = "adapter" if adapter else "merge" if several else "finetune"
    evaluation = cast(EvaluationReport | None, read_json((run or folder) / "evaluation/report.json") or None)
    name = _name(folder, repo)
    values: dict[str, Any] = _training_values(folder, run, recipe) | {
        "name": name,
        "base": base,
        "method": _method(recipe) if recipe else "",
        "relation": relation,
        "merged": merged,
        "evaluation": tables(evaluation) if evaluation else [],
        "asked": intro(evaluation) if evaluation else "",
        "picture": bool(run and run_file(run, "loss.png")),
    }
    values["use"] = _usage((folder,), repo or name, "adapter" if adapter else "whole", base, values, adapter)
    data = _metadata(base, relation, "peft" if adapter else "transformers", terms, recipe)
    data |= _languages(values["ledger"]) | _evaluation_results(
        name, recipe, evaluation, values["evaluations"]
    )
    return _render_card("hub/model_card.md.jinja", data, values)


def export_card(
    report: Mapping[str, Any],
    kind: str | None,
    folder: Path | None = None,
    repo: str | None = None,
    base: BaseReference | None = None,
    terms: dict[str, str] | None = None,
) -> str:
    """The page of one exported format, with its own line of the report; without a kind, of a folder of several files.

    Args:
        report: `report.json` of the export.
        kind: The format.
        folder: Where it lies; absent, it is told by its name alone.
        repo: Its place on the Hub.
        base: As `base_reference` finds it.
        terms: As `page` takes them.
    """
    base = base or BaseReference(report.get("base", ""), hub_id(report.get("base", "")))
    place = folder or Path(kind or ".")
    run, recipe = source_run(place), recipe_sections(place)
    files, modelfile = _gguf_files(place)
    found = next((item for item in report.get("models") or [] if item["name"] == kind), None)
    name = _name(place, repo) if folder else report["title"]
    folders = sorted(p.parent.name for p in place.glob("*/config.json")) if kind is None else []
    small = {kind or "", *folders} - {""} <= {"int8", "nf4"} and bool(kind or folders)
    only_files = bool(files) and not folders
    relation = "quantized" if only_files or small else "finetune"
    use = "gguf" if only_files else (kind or folders[0]) if small else "whole"
    target = repo or (kind or name if folder is None else name)
    values = _training_values(place, run, recipe) | {
        "name": name,
        "kind": kind,
        "base": base,
        "relation": relation,
        "report": report,
        "found": found,
        "table": _export_table(place),
        "folders": folders,
        "picture": bool(run and repo and run_file(run, "loss.png")),
    }
    # A GGUF file holds the template of the model that it was written from.
    places = (place / folders[0] if folders else place, run or place, Path(report.get("model") or place))
    values["use"] = _usage(places, target, use, base, values, {}) | {"files": files, "modelfile": modelfile}
    data = _metadata(base, relation, "gguf" if only_files else "transformers", terms, recipe)
    data |= _languages(values["ledger"])
    perplexity = (found or {}).get("perplexity")
    if perplexity is not None and repo:
        data |= _eval_results(name, recipe, [("perplexity", "perplexity", perplexity)], str(report["rows"]))
    return _render_card("hub/export_card.md.jinja", data, values)


# ---------------------------------------------------------------------------------------------------------------
# What a page tells


def _training_values(folder: Path, run: Path | None, recipe: dict[str, Any]) -> dict[str, Any]:
    """Of the training: the recipe as it stands, ledger, losses, machine, time, versions; as far as files are here."""
    metrics: list[dict[str, Any]] = []
    if run and (file := run_file(run, "metrics.jsonl")):
        metrics = read_records(file)
    step = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    if step:  # what the run became later is not what lies here
        metrics = [m for m in metrics if m["step"] <= int(step[1]) and "train_runtime" not in m]
    text = (run and run_file(run, "recipe.yaml")) or run_file(folder, "recipe.yaml")
    return {
        "checkpoint": int(step[1]) if step else None,
        "sources": [source["path"] for source in (recipe.get("data") or {}).get("train") or []],
        "quantization": recipe.get("quantization"),
        "recipe": text.read_text(encoding="utf-8") if text else "",
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
    told: dict[str, Any],
    adapter: dict[str, Any],
) -> dict[str, Any]:
    """How it is asked: by which programs, and with which text around a message, by the first place that tells."""
    rank = max([adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()])
    more = ("modules_to_save", "trainable_token_indices", "use_dora", "target_parameters", "lora_bias")
    fits = adapter and adapter.get("peft_type") == "LORA" and not any(adapter.get(name) for name in more)
    prompt, system = _example_prompt(
        next((p for p in places if (p / "chat_template.jinja").is_file()), places[0])
    )
    bits = told["quantization"]
    # Upstream computes in float32 where nothing is said. Float16 is no example: a Gemma overflows in it elsewhere.
    if bits and bits.get("load_in_4bit") and told["environment"].get("dtype") == "bfloat16":
        bits = {"bnb_4bit_compute_dtype": "bfloat16"} | bits
    return {
        "kind": kind,
        "target": target,
        "base": base.hub or base.name,
        "revision": base.revision,
        "quantization": bits,
        "rank": next((n for n in _VLLM_RANKS if n >= rank), None) if fits else None,
        "prompt": prompt,
        "system": system,
        "modelfile": None,
        "files": [],
    }


def _gguf_files(place: Path) -> tuple[list[str], list[str] | None]:
    """The GGUF files of a folder or of its formats, and those of Ollama's: the Modelfile first."""
    patterns = ("*/*.gguf", "gguf/*.gguf", "*.gguf")  # Ollama's is the same file again
    found = {path.name: path for pattern in patterns for path in place.glob(pattern)}
    found.pop("imatrix.gguf", None)
    # The one that most will want stands first.
    files = sorted(found.values(), key=lambda path: ("Q4_K_M" not in path.name, path.name))
    modelfile = next((p for p in (place / "Modelfile", place / "ollama" / "Modelfile") if p.is_file()), None)
    named = [path.relative_to(place).as_posix() for path in files]
    if modelfile is None:
        return named, None
    beside = next((path.name for path in files if (modelfile.parent / path.name).is_file()), "")
    return named, [p.relative_to(place).as_posix() for p in (modelfile, modelfile.parent / beside)]


def _example_prompt(folder: Path) -> tuple[str | None, bool]:
    """What the model is fed for a system message and a question, and whether its template knows the former."""
    file = folder / "chat_template.jinja"
    if not file.is_file():
        return None, False
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    known = read_json(folder / "tokenizer_config.json")
    tokens = {key: value for key, value in known.items() if key.endswith("_token") and isinstance(value, str)}
    question = {"role": "user", "content": "(question)"}
    for messages in ([{"role": "system", "content": "(system)"}, question], [question]):
        try:
            rendered, _ = render_jinja_template(
                [messages],
                chat_template=file.read_text(encoding="utf-8"),
                add_generation_prompt=True,
                **tokens,
            )
        except (TemplateError, ValueError):
            continue
        system = len(messages) > 1
        if not system or "(system)" in rendered[0]:
            return rendered[0], system
    return None, False


def _metadata(
    base: BaseReference, relation: str, library: str, terms: dict[str, str] | None, recipe: dict[str, Any]
) -> dict[str, Any]:
    """What stands on top of a page for the Hub to read."""
    terms = license_of(base.hub) if terms is None else terms
    sources = [source["path"] for source in (recipe.get("data") or {}).get("train") or []]
    data = {
        "base_model": base.hub,
        "base_model_relation": relation if base.hub else None,
        "library_name": library,
        **terms,
        "datasets": list(dict.fromkeys(path for path in sources if not is_file(path))) or None,
        "pipeline_tag": "text-generation",
    }
    return {key: value for key, value in data.items() if value is not None}


def _languages(ledger: dict[str, Any]) -> dict[str, Any]:
    """The languages of at least a tenth of the training rows, as far as the ledger knows them."""
    languages = (ledger.get("train") or {}).get("languages") or {}
    rows = {name: of["rows"] for name, of in languages.items()}
    codes = [
        _LANGUAGE_CODES[name]
        for name in sorted(rows, key=lambda name: -rows[name])
        if name in _LANGUAGE_CODES and rows[name] * 10 >= sum(rows.values())
    ]
    return {"language": codes} if codes else {}


def _evaluation_results(
    name: str, recipe: dict[str, Any], evaluation: EvaluationReport | None, losses: list[dict[str, Any]]
) -> dict[str, Any]:
    """The languages and figures of an evaluation; without one, the last loss on held-out rows."""
    if not evaluation:
        found = [("loss", "loss (nats a token)", losses[-1]["eval_loss"])] if losses else []
        return _eval_results(name, recipe, found, "held-out rows")
    model = evaluation["models"][-1]
    figures: list[tuple[str, str, Any]] = []
    if whole := model["loss"]["all"].get("all"):
        figures += [("perplexity", "perplexity", whole["perplexity"])]
        figures += [("accuracy", "accuracy of the next token", whole["accuracy"])]
    if (answers := model["answers"]) and (judged := answers["language"]["judged"]):
        share = answers["language"]["right"] / judged
        figures.append(("language", "answers in the language of the prompt", share))
    if answers:
        figures.append(("stopped", "answers that end by themselves", answers["stopped"]))
    found = [figure for figure in figures if figure[2] is not None]
    rows = f"held-out rows (at most {evaluation['limit']})" if evaluation["limit"] else "held-out rows"
    asked = evaluation["prompts"]
    data = _eval_results(name, recipe, found, rows if asked == HELD_OUT_ROWS else f"{rows}; prompts: {asked}")
    languages = [code for code in (answers.get("languages") or {}) if re.fullmatch("[a-z]{2,3}", code)]
    return data | ({"language": languages} if languages else {})


def _eval_results(
    name: str, recipe: dict[str, Any], figures: list[tuple[str, str, Any]], rows: str
) -> dict[str, Any]:
    from huggingface_hub import EvalResult

    sources = [source["path"] for source in (recipe.get("data") or {}).get("train") or []]
    known = [path for path in sources if not is_file(path)]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=known[0] if known else "private",
            dataset_name=", ".join(dict.fromkeys([*known, rows])),
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for kind, title, value in figures
    ]
    return {"model_name": name, "eval_results": results} if results else {}


def _method(recipe: dict[str, Any]) -> str:
    if recipe.get("lora") is None:
        return "full fine-tuning"
    bits = recipe.get("quantization")
    if bits is None:
        return "LoRA"
    return "QLoRA (4 bit)" if bits.get("load_in_4bit") else "QLoRA (8 bit)"


def _export_table(folder: Path) -> str:
    """The report of an export as it was written, its title left out."""
    file = next((p for p in (folder / "report.md", folder.parent / "report.md") if p.is_file()), None)
    text = file.read_text(encoding="utf-8") if file else ""
    return re.sub(r"^# .*\n+", "", text)


# ---------------------------------------------------------------------------------------------------------------
# Files


def _render_card(template: str, data: dict[str, Any], values: dict[str, Any]) -> str:
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
