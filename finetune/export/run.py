"""A run, or a whole model, as files of several types, each with what it lost."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from finetune import __version__
from finetune.data.chat import Chat
from finetune.data.mixture import build_datasets
from finetune.data.samples import SAMPLE_ROWS, LabelledRow, encoded_sample_rows
from finetune.export.report import as_json, as_markdown
from finetune.export.transformers import FORMATS as WEIGHTS
from finetune.export.transformers import write_format
from finetune.export.verify import LIMITS, Job, add_comparison, measure, missed_limits
from finetune.hub.card import export_card
from finetune.merge.run import merge
from finetune.model.load import load_tokenizer
from finetune.model.locate import Base
from finetune.model.precision import resolve_dtype
from finetune.model.provenance import (
    adapter_base_sections,
    base_reference,
    environment_of,
    is_adapter,
    merged_run,
)
from finetune.recipe.export_formats import FORMATS_HELP, GGUF_ALL
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import ExportSection, ModelSection
from finetune.system.devices import machine_memory
from finetune.system.errors import DataError, ExportError, LabelError, RecipeError, TemplateError
from finetune.system.files import MERGE_RECORD, run_file, whole_folder, write_whole
from finetune.system.terminal import Say

_ADAPTER = "adapter on its base"
# Held-out rows that are predicted; what more of them would change is less than what two samples differ by.
_ROWS = 32


def export(
    model: str | Path,
    output: str | Path,
    formats: Sequence[str] = (),
    base: str | None = None,
    gate: dict[str, float] | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> Path:
    """A folder for each format in `output`, and `report.json` and `report.md` on what each one lost.

    A run is merged first, and the merged model compared with the adapter on the base that it was trained on; each
    format is compared with the merged model. What is absent is taken from the run's recipe, section `export`.

    Args:
        model: A run or one of its checkpoints, or a folder with a whole model.
        output: A folder that does not exist yet.
        formats: Of `kinds.FORMATS`.
        base: Of a run on a quantised base, original or dequantised, as `finetune.merge.merge` takes it.
        gate: Limits: max_kl, max_kl_p99, min_top1, max_perplexity_ratio. `shortfalls` says what is missed.
        overwrite: Replaces what an earlier export left in `output`, once all is done.
        say: Gets a line for each step.
        progress: Whether a terminal shows bars.

    Raises:
        ExportError: No model, no format, or a limit that there is not.
        MergeError, ShardError, RunError: As `merge` raises them.
    """
    model, output = Path(model), Path(output)
    is_run = is_adapter(model)
    if not is_run and not (model / "config.json").is_file():
        raise ExportError(f"{model} is neither a run (adapter_config.json) nor a model (config.json)")
    options = _options(model)
    formats = list(dict.fromkeys(formats or options.formats))
    kinds = _gguf_types(formats)
    if kinds:
        _check_gguf(adapter_base_sections(model)[0] if is_run else ModelSection(name_or_path=str(model)))
    gate = dict(options.gate) | (gate or {})
    for name in gate:
        if name not in LIMITS:
            raise ExportError(f"--gate {name} is no limit; write one of {', '.join(LIMITS)}")
    if not formats:
        raise ExportError(f"no format was asked for; write --format with {FORMATS_HELP}")
    if base and not is_run:
        raise ExportError(f"--base {base}: {model} is merged already; name the run to merge it otherwise")
    merged_from = base or options.base
    trained = model if is_run else merged_run(model)
    trained_as = adapter_base_sections(trained)[1] if trained else None

    with whole_folder(output, overwrite, [model]) as beside:
        work = beside / ".work"
        work.mkdir()
        rows, where = held_out(trained or model, say)
        jobs = [Job(_ADAPTER, trained, _dtype(trained), keep=work / "adapter.bin")] if trained else []
        whole = model
        if is_run:
            for kind in _bases(trained_as, merged_from):
                say(f"merging into the {kind} base")
                place = merge(model, work / f"merged-{kind}", base=kind, progress=progress)
                whole = place if kind == merged_from else whole
                jobs.append(Job(f"merged, {kind} base", place, _dtype(place), _ADAPTER, work / "adapter.bin"))
        else:
            against = (_ADAPTER, work / "adapter.bin") if trained else (None, None)
            name = "merged" if (model / MERGE_RECORD).is_file() else "as trained"
            jobs.append(Job(name, model, _dtype(model), *against))
        at = next(i for i, job in enumerate(jobs) if job.folder == whole)
        jobs[at] = replace(jobs[at], keep=work / "merged.bin")
        gguf = None
        if kinds:  # what cannot be written is told before hours are spent
            from finetune.export.gguf.run import prepare_gguf

            name = _name(trained or model)
            gguf = prepare_gguf(
                whole, trained or model, formats, kinds, name, rows, where, options, work, say
            )
        for kind in (kind for kind in formats if kind in WEIGHTS):
            say(f"{kind}: writing")
            (beside / kind).mkdir()
            write_format(whole, beside / kind, kind, progress)
            jobs.append(Job(kind, beside / kind, _dtype(beside / kind), jobs[at].name, work / "merged.bin"))

        exact = _exact(whole, jobs[at]) if gguf else jobs[at]
        if exact is not jobs[at]:
            jobs.append(replace(exact, keep=work / "exact.bin"))
        found: dict[str, dict[str, Any]] = {}
        lines: list[str] = []
        notes: list[str] = []
        for job in jobs:
            say(f"{job.name}: measuring")
            if job.against and "error" in found[job.against]:
                job = replace(job, reference=None)
            now = found[job.name] = measure(
                job, rows, gguf.groups if gguf and job.name == exact.name else None
            )
            if "error" in now:
                now["error"] = now["error"].replace(str(beside), str(output))
            if job.against:
                add_comparison(now, found[job.against], found[jobs[0].name])
            # The other way to merge is shown beside the one that was chosen; limits are for what is kept.
            if job.name in (jobs[0].name, jobs[at].name, *formats):
                limits = gate if job.against else {}
                lines += missed_limits(now, limits, same=job.against == _ADAPTER and not trained_as)
        if gguf:
            from finetune.export.gguf.make import gguf_faults

            if "error" in found[exact.name] and exact is not jobs[at]:
                # In float32 it is twice as large, most likely too large; of the languages nothing is kept yet.
                say(
                    f"{exact.name}: {found[exact.name]['error']}; GGUF files are held against {jobs[at].name}"
                )
                exact = jobs[at]
                measure(replace(exact, reference=None), rows, gguf.groups)
            kept = work / ("exact.bin" if exact is not jobs[at] else "merged.bin")
            reference = None if "error" in found[exact.name] else kept
            part = "gguf" if any(kind.startswith("gguf:") for kind in formats) else "ollama"
            files, notes = gguf.write(beside, part, exact.name, reference, work, say, progress)
            for now in files:
                add_comparison(now, found[exact.name], found[jobs[0].name])
                found[now["name"]] = now
                if now["kept"]:
                    lines += [*missed_limits(now, gate), *gguf_faults(now)]
        for one in found.values():
            if "answers" in one:
                one["answered"] = len(one["answers"])
        report = {
            "title": output.name,
            "finetune": __version__,
            "model": str(model),
            "base": base_reference(trained or model).name or model.name,
            "rows": where,
            "machine": f"{platform.machine()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
            "gate": gate,
            "models": list(found.values()),
            "notes": [*_notes(list(found.values()), where), *notes],
            "missed": lines,
        }
        for kind in (kind for kind in formats if kind in WEIGHTS):
            (beside / kind / "README.md").write_text(export_card(report, kind), encoding="utf-8")
        shutil.rmtree(work)
        (beside / "report.md").write_text(as_markdown(report), encoding="utf-8")
        write_whole(beside / "report.json", as_json(report))
        for folder in (beside / name for name in ("gguf", "ollama") if (beside / name).is_dir()):
            (folder / "README.md").write_text(export_card(report, None, folder), encoding="utf-8")
    say(f"exported: {output}")
    return output


def shortfalls(output: Path) -> list[str]:
    """What an export falls short of, a line each; none where all is well."""
    report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return list(report["missed"])


def held_out(model: Path, say: Say = lambda line: None) -> tuple[list[LabelledRow], str]:
    """Rows that a run was not trained on, in its own tokens, and words that say which they are.

    Where the run held none out, rows that it was trained on; where its data are not here, the project's sample rows.
    """
    chat = Chat(load_tokenizer(ModelSection(name_or_path=str(model))))
    recipe_file = run_file(model, "recipe.yaml")
    if recipe_file:
        try:
            recipe = load_recipe(recipe_file)
            training, evaluation = build_datasets(recipe.data, chat, recipe.max_length)
            if evaluation.dataset is not None:
                return _rows(evaluation.dataset), "held-out rows of the run"
            if not any(source.streaming for source in recipe.data.train):
                return _rows(training.dataset), "rows that the run was trained on (it held none out)"
        except (RecipeError, DataError, TemplateError, LabelError) as error:
            say(
                f"the run's rows are not here ({str(error).splitlines()[0]}); the project's sample rows are used"
            )
    return encoded_sample_rows(chat)[:_ROWS], SAMPLE_ROWS


def _rows(dataset: Any) -> list[LabelledRow]:
    return [
        LabelledRow(list(row["input_ids"]), list(row["labels"]))
        for row in dataset.select(range(min(_ROWS, len(dataset))))
    ]


def _options(model: Path) -> ExportSection:
    """The `export` section of a run's recipe."""
    path = run_file(model, "recipe.yaml")
    if path is None:
        return ExportSection()
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8")).get("export") or {}
        # YAML takes 1e-06, as the recipe is written, for text.
        return ExportSection.model_validate(saved, strict=False)
    except (yaml.YAMLError, ValidationError, AttributeError) as error:
        raise ExportError(f"{path} is damaged: its section export cannot be read") from error


def _gguf_types(formats: Sequence[str]) -> list[str]:
    """The types of llama.cpp's that are asked for, each once; for Ollama alone one that fits most machines."""
    kinds: list[str] = []
    for kind in formats:
        name = kind.removeprefix("gguf:")
        if name != kind:
            kinds += list(GGUF_ALL) if name == "all" else [name]
    return list(dict.fromkeys(kinds)) or (["Q4_K_M"] if "ollama" in formats else [])


def _check_gguf(section: ModelSection) -> None:
    """Refuses what can be told by its config alone to be no GGUF file, before it is merged."""
    for package in ("gguf", "xllamacpp"):
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"--format gguf: {package} is not installed; run pip install 'finetune[gguf]'")
    from finetune.export.gguf.tensors import checked_model_type

    checked_model_type({"model_type": Base.of(section).config.get_text_config().model_type})


def _exact(whole: Path, job: Job) -> Job:
    """The model in float32, as llama.cpp computes, which GGUF files are held against; where that fits into memory."""
    size = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    width = 4 if job.dtype == "float32" else 2
    if width == 4 or size * 4 / width * 1.3 > machine_memory()[1]:
        return job
    return Job(f"{job.name}, in float32", whole, "float32")


def _name(model: Path) -> str:
    """What its files are called: by the run, also where it is one of its checkpoints."""
    place = model.resolve()
    return f"{place.parent.name}-{place.name}" if place.name.startswith("checkpoint-") else place.name


def _bases(trained_as: Any, chosen: str) -> list[str]:
    return [chosen] if not trained_as else [chosen, "original" if chosen == "dequantised" else "dequantised"]


def _dtype(model: Path) -> str:
    """The type that a model is measured in: that of the training, or of its files."""
    if is_adapter(model):
        return str(
            environment_of(model).get("dtype")
            or str(resolve_dtype(adapter_base_sections(model)[0])).removeprefix("torch.")
        )
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _notes(found: list[dict[str, Any]], where: str) -> list[str]:
    """What the table means, and what the figures say where two ways to merge were tried."""
    tokens = max((item.get("tokens", 0) for item in found), default=0)
    compared = max((item.get("compared", 0) for item in found), default=0)
    notes = [
        f"Perplexity: of {tokens:,} trained tokens of {where}. "
        + (
            f"KL (nats a token) and top-1: of the first {compared:,}, against the model named in the last column. "
            if compared
            else ""
        )
        + "Answers: greedy, to the beginnings of at most ten rows, each at most 64 tokens. "
        "Token ids: of ten conversations."
    ]
    merges = [item for item in found if item["name"].startswith("merged, ") and item.get("kl") is not None]
    if len(merges) == 2:
        near, far = sorted(merges, key=lambda item: item["kl"])
        low, high = sorted(merges, key=lambda item: item["perplexity"])
        notes.append(
            f"\nNearer to the adapter as trained: {near['name']} (mean KL {near['kl']:.3g} against {far['kl']:.3g})."
            f" Lower perplexity: {low['name']} ({low['perplexity']:.4g} against {high['perplexity']:.4g})."
        )
    notes += [
        f"\n{item['name']}: the largest activation is {seen['largest']:,.0f}, in {seen['in']} (at most: 65,504)"
        for item in found
        if (seen := item.get("activations"))
    ]
    return notes
