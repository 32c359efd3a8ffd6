"""The metadata on top of a model card: base model, license, data sets, languages and results, in the Hub's form."""

from __future__ import annotations

import re
from typing import Any

from finetune.data.ledger import Account
from finetune.data.readers import is_file
from finetune.evaluate.report import HELD_OUT_ROWS, EvaluationReport
from finetune.model.provenance import BaseReference, license_of
from finetune.system.pages import one_line

# The metadata about the license: `license`, and for other licenses `license_name` and `license_link`.
License = dict[str, str]
# The sections of a recipe, as `recipe.yaml` holds them.
Sections = dict[str, Any]
# Keyword arguments of `huggingface_hub.ModelCardData`.
Metadata = dict[str, Any]
# The languages that the ledger counts, as codes for the Hub.
_LANGUAGE_CODES = {"English": "en", "Japanese": "ja"}


def base_metadata(
    base: BaseReference, relation: str, library: str, terms: License | None, recipe: Sections
) -> Metadata:
    """The base model, license, library, data sets and task.

    Args:
        base: The base model.
        relation: The model's relation to its base in the Hub's words: adapter, finetune, merge or quantized.
        library: The library that loads it: peft, transformers, mlx or gguf.
        terms: The license; by default the one that the base's id implies.
        recipe: The recipe's sections.
    """
    terms = license_of(base.hub) if terms is None else terms
    data = {
        "base_model": base.hub,
        "base_model_relation": relation if base.hub else None,
        "library_name": library,
        **terms,
        "datasets": list(dict.fromkeys(map(one_line, _hub_datasets(recipe)))) or None,
        "pipeline_tag": "text-generation",
        "tags": ["mlx"] if library == "mlx" else None,
    }
    return {key: value for key, value in data.items() if value is not None}


def source_paths(recipe: Sections) -> list[str]:
    """The paths of the training data: files, and data sets on the Hub."""
    return [source["path"] for source in (recipe.get("data") or {}).get("train") or []]


def _hub_datasets(recipe: Sections) -> list[str]:
    return [path for path in source_paths(recipe) if not is_file(path)]


def language_metadata(ledger: dict[str, Account]) -> Metadata:
    """The languages of at least a tenth of the training rows, of those that the ledger counts."""
    languages = ledger["train"].get("languages", {}) if ledger else {}
    rows = {name: counts["rows"] for name, counts in languages.items()}
    codes = [
        _LANGUAGE_CODES[name]
        for name in sorted(rows, key=lambda name: -rows[name])
        if name in _LANGUAGE_CODES and rows[name] * 10 >= sum(rows.values())
    ]
    return {"language": codes} if codes else {}


def evaluation_metadata(
    name: str, recipe: Sections, evaluation: EvaluationReport | None, losses: list[dict[str, Any]]
) -> Metadata:
    """The languages and results of an evaluation; without one, the last loss on held-out rows.

    Args:
        name: The model's name.
        recipe: The recipe's sections.
        evaluation: The report of the evaluation.
        losses: The records of `metrics.jsonl` that have an `eval_loss`.
    """
    if not evaluation:
        method = recipe.get("method", "sft")
        title = "loss (nats a token)" if method == "sft" else f"loss of {method.upper()}"
        last = [("loss", title, losses[-1]["eval_loss"])] if losses else []
        if losses and "eval_rewards/accuracies" in losses[-1]:
            last.append(("accuracy", "pairs whose chosen answer is ahead", losses[-1]["eval_rewards/accuracies"]))
        return result_metadata(name, recipe, last, "held-out rows")
    model = evaluation["models"][-1]
    figures: list[tuple[str, str, float | None]] = []
    if whole := model["loss"]["all"].get("all"):
        figures += [("perplexity", "perplexity", whole["perplexity"])]
        figures += [("accuracy", "accuracy of the next token", whole["accuracy"])]
    if gained := model.get("pairs", {}).get("gained", {}).get("all"):
        share = gained["right"] / gained["judged"]
        figures.append(("preference", "pairs whose chosen answer gained more than the rejected one", share))
    if (answers := model["answers"]) and (judged := answers["language"]["judged"]):
        share = answers["language"]["right"] / judged
        figures.append(("language", "answers in the language of the prompt", share))
    if answers:
        figures.append(("stopped", "answers ended by a stop token", answers["stopped"]))
    known = [(kind, title, value) for kind, title, value in figures if value is not None]
    rows = f"held-out rows (at most {evaluation['limit']})" if evaluation["limit"] else "held-out rows"
    if evaluation["prompts"] != HELD_OUT_ROWS:
        rows += f"; prompts: {evaluation['prompts']}"
    data = result_metadata(name, recipe, known, rows)
    languages = [code for code in (answers.get("languages") or {}) if re.fullmatch("[a-z]{2,3}", code)]
    return data | ({"language": languages} if languages else {})


def result_metadata(name: str, recipe: Sections, figures: list[tuple[str, str, float]], rows: str) -> Metadata:
    """Results, which the Hub shows next to the card.

    Args:
        name: The model's name.
        recipe: The recipe's sections; the results name its data sets.
        figures: The type, name and value of each result.
        rows: The rows that they were measured on.
    """
    from huggingface_hub import EvalResult

    datasets = _hub_datasets(recipe)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=one_line(datasets[0]) if datasets else "private",
            dataset_name=one_line(", ".join(dict.fromkeys([*datasets, rows]))),
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for kind, title, value in figures
    ]
    return {"model_name": one_line(name), "eval_results": results} if results else {}
