"""Exports a run, or a whole model, in several formats, and reports what each one lost."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from finetune import __version__
from finetune.export import mlx
from finetune.export.adapter import PlainLora, write_adapter
from finetune.export.checks import check_formats, check_options
from finetune.export.report import ModelFigures, Report, as_json, as_markdown, mean_kl, notes_on
from finetune.export.rows import HeldOutRows, held_out
from finetune.export.transformers import saved_dtype, write_format
from finetune.export.verify import Job, Reader, add_comparison, measure, missed_limits
from finetune.export.w4a16 import importance_matrix
from finetune.hub.card import export_card, model_card
from finetune.merge.run import merge
from finetune.model.locate import Base
from finetune.model.precision import resolve_dtype
from finetune.model.provenance import (
    adapter_base_sections,
    base_reference,
    environment_of,
    is_adapter,
    merged_run,
    record_digest,
)
from finetune.recipe.export_formats import ADAPTER, GGUF_ADAPTER, MLX_BITS, W4A16, WEIGHT_FORMATS, needs_gguf
from finetune.recipe.saved import saved_sections
from finetune.recipe.schema import ExportSection, ModelSection
from finetune.recipe.yaml_tree import expanded
from finetune.system.devices import machine_memory
from finetune.system.errors import ExportError
from finetune.system.files import MERGE_RECORD, run_file, whole_folder, write_whole
from finetune.system.terminal import Say

if TYPE_CHECKING:
    from finetune.export.gguf.quantize import ImportanceMatrix
    from finetune.export.gguf.run import GgufExport

_ADAPTER = "adapter on its base"


def export(
    model: str | Path,
    output: str | Path,
    formats: Sequence[str] = (),
    base: str | None = None,
    gate: dict[str, float] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> Path:
    """Writes a folder for each format, and `report.json` and `report.md` on what each one lost; returns `output`.

    A run is merged first. The merged model is compared with the run's adapter on its base, and each format with the
    merged model. Defaults for `formats`, `base` and `gate` are in the section `export` of the run's recipe.

    Args:
        model: A run, one of its checkpoints, or a folder with a whole model.
        output: A folder that does not exist yet.
        formats: Names from `export_formats.FORMATS`.
        base: For a run: `original`, `dequantised`, or the path or id of the base, as `finetune.merge.merge` takes it.
        gate: Limits by name: max_kl, max_kl_p99, min_top1, max_perplexity_ratio. `shortfalls` returns the missed ones.
        overwrite: Replaces an earlier export in `output`, after the new one is complete.
        trust_remote_code: True if the user lets Python files of the model's repository run.
        say: Called with a line for each step.
        progress: Shows progress bars on a terminal.

    Returns:
        `output`.

    Raises:
        ExportError: The model, a format or a limit does not exist, or this model cannot be written in a format.
        MergeError, ModelError, RunError: The run cannot be merged; see `finetune.merge.merge`.
        DataError, TemplateError: The rows of an importance matrix cannot be read or rendered.
    """
    model, output = Path(model), Path(output)
    options, is_run = _export_section(model), is_adapter(model)
    formats = list(dict.fromkeys(formats or options.formats))
    gate = options.gate | (gate or {})
    check_options(model, formats, base, gate)
    given = base if base not in (None, "original", "dequantised") else None
    section = ModelSection(name_or_path=str(model), trust_remote_code=trust_remote_code)
    if is_run:
        section, _ = adapter_base_sections(model, given, trust_remote_code)
    check_formats(section, formats, options.imatrix == "always")
    run = model if is_run else merged_run(model)

    with whole_folder(output, overwrite, [model]) as folder:
        work = folder / ".work"
        work.mkdir()
        rows = held_out(run or model, say, given, trust_remote_code)
        exporting = _Export(model, run, formats, gate, rows, folder, work, say, progress, given, trust_remote_code)
        lora = exporting.write_adapter()
        source = exporting.add_source_models(base or options.base)
        gguf = None
        if needs_gguf(formats):
            # Checks the model and loads its tokenizer before the hours that the other formats take.
            from finetune.export.gguf.run import prepare_gguf

            gguf = prepare_gguf(source.folder, run or model, formats, rows, options, work, say, lora)
        matrix, notes = None, list[str]()
        if W4A16 in formats:
            matrix, gguf, notes = importance_matrix(source.folder, run or model, rows, options, gguf, say, progress)
        exporting.write_folders(source, matrix.matrix if matrix else None, options.imatrix == "always")
        gguf_reference = exporting.add_gguf_reference(source, gguf) if gguf else source
        exporting.measure_folders(source, output)
        exporting.keep_better()
        for_mlx = [name for name in formats if name in MLX_BITS]
        notes += mlx.notes(Base.of(section).config, for_mlx) if for_mlx else []
        notes += exporting.write_gguf(gguf, gguf_reference, source) if gguf else []
        exporting.write_report(exporting.report(output.name, notes))
    say(f"exported: {output}")
    return output


@dataclass
class _Export:
    """An export in progress.

    Attributes:
        model: The run or model that is exported.
        run: The run that `model` is, or that it was merged from, if that is known.
        formats: The formats to write.
        gate: The limits that the report checks.
        rows: The rows that all models are measured on.
        folder: The folder that is filled; it is renamed to the output at the end.
        work: A folder inside it that is removed at the end.
        given_base: The path or id of the run's base, if it is not where the run's files say.
        trust_remote_code: True if the user lets Python files of the model's repository run.
        jobs: The folders to measure. The first is the trained model, whose token ids are the reference.
        models: The figures of the models measured so far, by name.
        tried: The names of the jobs of which one folder is kept: w4a16 with and without an importance matrix.
        missed: A line for each limit that is missed and each broken file.
    """

    model: Path
    run: Path | None
    formats: Sequence[str]
    gate: dict[str, float]
    rows: HeldOutRows
    folder: Path
    work: Path
    say: Say
    progress: bool
    given_base: str | None = None
    trust_remote_code: bool = False
    jobs: list[Job] = field(default_factory=list)
    models: dict[str, ModelFigures] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add_source_models(self, base: str) -> Job:
        """Adds jobs for the adapter and for the whole models; merges a run. Returns the job of the formats' source.

        A run on a quantised base is merged into both bases, to report which of the two is nearer to the adapter.

        Args:
            base: The base of the merged model that the formats are made from: `original`, `dequantised`, or its path or
                id.
        """
        against: dict[str, Any] = {}
        if self.run:
            predictions = self.work / "adapter.bin"
            dtype = _dtype(self.run, self.given_base)
            self.jobs.append(Job(_ADAPTER, self.run, dtype, keep=predictions, base=self.given_base))
            against = {"against": _ADAPTER, "reference": predictions}
        keep = self.work / "merged.bin"
        if self.run != self.model:
            name = "merged" if (self.model / MERGE_RECORD).is_file() else "as trained"
            self.jobs.append(Job(name, self.model, _dtype(self.model), **against, keep=keep))
            return self.jobs[-1]
        bases = [base]
        if self._on_quantised_base():
            bases += [kind for kind in ("original", "dequantised") if kind != base and not self.given_base]
        for kind in bases:
            name = "original" if kind == self.given_base else kind
            self.say(f"merging into the {name} base")
            place, trust = self.work / f"merged-{name}", self.trust_remote_code
            merged = merge(self.model, place, base=kind, trust_remote_code=trust, progress=self.progress)
            kept = keep if kind == base else None
            self.jobs.append(Job(f"merged, {name} base", merged, _dtype(merged), **against, keep=kept))
        return self.jobs[1]

    def write_adapter(self) -> PlainLora | None:
        """Writes the adapter as plain LoRA, once for both of its formats; None if neither is asked for."""
        wanted = [name for name in (ADAPTER, GGUF_ADAPTER) if name in self.formats]
        if not wanted:
            return None
        place = (self.folder if ADAPTER in wanted else self.work) / ADAPTER
        place.mkdir()
        self.say(f"{wanted[0]}: writing")
        return write_adapter(self.model, place, self.given_base, wanted[0], self.trust_remote_code)

    def write_folders(self, source: Job, matrix: ImportanceMatrix | None, always_matrix: bool) -> None:
        """Writes the folders for transformers and mlx-lm; adds a job for each, and for an adapter that is kept.

        Args:
            source: The model to write.
            matrix: The importance matrix for w4a16, which is written without it too, unless `always_matrix`.
            always_matrix: w4a16 is not tried without the matrix.
        """
        for name in self.formats:
            if name == ADAPTER:
                trained = self.jobs[0]
                self.jobs.append(Job(name, self.folder / name, trained.dtype, trained.name, trained.keep))
            elif name in WEIGHT_FORMATS:
                if name == W4A16 and matrix:
                    title = name if always_matrix else f"{name}, with matrix"
                    self._write_folder(title, name, self.folder / name, source, matrix)
                    if not always_matrix:
                        self._write_folder(name, name, self.work / name, source)
                        self.tried = [title, name]
                else:
                    self._write_folder(name, name, self.folder / name, source)

    def _write_folder(
        self, title: str, kind: str, place: Path, source: Job, matrix: ImportanceMatrix | None = None
    ) -> None:
        """Writes a format into a new folder and adds its job; `title` is the job's name."""
        self.say(f"{title}: writing")
        place.mkdir()
        reader: Reader = "transformers"
        if kind in MLX_BITS:
            mlx.write_mlx(source.folder, place, kind, self.progress)
            reader = mlx.reader_of(kind)
        else:
            write_format(source.folder, place, kind, self.progress, self.trust_remote_code, matrix)
        self.jobs.append(Job(title, place, _dtype(place), source.name, source.keep, reader=reader))

    def add_gguf_reference(self, source: Job, gguf: GgufExport) -> Job:
        """The job of the model that GGUF files are compared with: in float32, as llama.cpp computes, if that fits."""
        size = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
        reference = replace(source, groups=gguf.groups)
        if source.dtype != "float32" and size * 2 * 1.3 <= machine_memory()[1]:
            name, keep = f"{source.name}, in float32", self.work / "exact.bin"
            reference = Job(name, source.folder, "float32", keep=keep, groups=gguf.groups)
            self.jobs.append(reference)
        else:
            self.jobs[self.jobs.index(source)] = reference
        return reference

    def measure_folders(self, source: Job, output: Path) -> None:
        """Measures all jobs in order. No limit applies to the model merged into the other base, which is not kept."""
        limited = {self.jobs[0].name, source.name, *self.formats} - set(self.tried)
        for job in self.jobs:
            self.say(f"{job.name}: measuring")
            job = replace(job, trust_remote_code=self.trust_remote_code)
            if job.against and "error" in self.models[job.against]:
                job = replace(job, reference=None)
            figures = measure(job, self.rows.rows)
            if "error" in figures:
                figures["error"] = figures["error"].replace(str(self.folder), str(output))
            # A merge into a base that was not rounded must predict as the adapter does.
            must_match = job.against == _ADAPTER and not self._on_quantised_base()
            self._add_figures(figures, job.name in limited, must_match)

    def keep_better(self) -> None:
        """Keeps the folder with the lower KL of those that were written with and without the importance matrix."""
        if not self.tried:
            return
        best = min(self.tried, key=lambda name: mean_kl(self.models[name]))
        for name in self.tried:
            self.models[name] |= {"kind": W4A16, "matrix": name != W4A16, "kept": name == best}
        if best == W4A16:
            shutil.rmtree(self.folder / W4A16)
            (self.work / W4A16).rename(self.folder / W4A16)
        self.missed += missed_limits(self.models[best], self.gate)

    def _add_figures(self, figures: ModelFigures, limited: bool, must_match: bool = False) -> None:
        """Adds a model's figures, its comparison with the model `against`, and the limits that it misses."""
        against = figures["against"]
        if against:
            add_comparison(figures, self.models[against], self.models[self.jobs[0].name])
        self.models[figures["name"]] = figures
        if limited:
            self.missed += missed_limits(figures, self.gate if against else {}, must_match)

    def write_gguf(self, gguf: GgufExport, reference: Job, source: Job) -> list[str]:
        """Writes and measures the GGUF files; returns notes for the report."""
        from finetune.export.gguf.make import gguf_faults

        error = self.models[reference.name].get("error")
        if error and reference.name != source.name:
            # The model in float32 most likely exceeds the memory. `source` is measured again, on the rows by language.
            self.say(f"{reference.name}: {error}; GGUF files are compared with {source.name}")
            reference = replace(source, reference=None, groups=gguf.groups)
            measure(reference, self.rows.rows)
        predictions = None if "error" in self.models[reference.name] else reference.keep
        files, notes = gguf.write(self.folder, reference.name, predictions, self.work, self.say, self.progress)
        for file in files:
            self._add_figures(file, limited=file["kept"])
            if file["kept"]:
                self.missed += gguf_faults(file)
        return notes

    def report(self, title: str, notes: Sequence[str]) -> Report:
        """The content of report.json."""
        for model in self.models.values():
            if "answers" in model:
                model["answered"] = len(model["answers"])
        models = list(self.models.values())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        return {
            "title": title,
            "finetune": __version__,
            "model": str(self.model),
            "record_sha256": record_digest(self.model),
            "base": base_reference(self.run or self.model).name or self.model.name,
            "rows": self.rows.source,
            "machine": f"{platform.machine()}, {device}",
            "gate": self.gate,
            "models": models,
            "notes": [*notes_on(models, self.rows.source), *notes],
            "missed": self.missed,
        }

    def write_report(self, report: Report) -> None:
        """Writes the report and a model card in each folder, and removes the working folder."""
        for name in self.formats:
            if name in WEIGHT_FORMATS:
                (self.folder / name / "README.md").write_text(export_card(report, name), encoding="utf-8")
        shutil.rmtree(self.work)
        (self.folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
        write_whole(self.folder / "report.json", as_json(report))
        if ADAPTER in self.formats:
            (self.folder / ADAPTER / "README.md").write_text(model_card(self.folder / ADAPTER), encoding="utf-8")
        for place in (self.folder / name for name in ("gguf", "ollama") if (self.folder / name).is_dir()):
            (place / "README.md").write_text(export_card(report, None, place), encoding="utf-8")

    def _on_quantised_base(self) -> bool:
        return bool(self.run and adapter_base_sections(self.run, self.given_base)[1])


def shortfalls(output: Path) -> list[str]:
    """The lines of an export's report on limits that are missed and files that are broken."""
    report: Report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return report["missed"]


def _export_section(model: Path) -> ExportSection:
    """The `export` section of a run's recipe."""
    path = run_file(model, "recipe.yaml")
    try:
        return ExportSection.model_validate(expanded(saved_sections(path)).get("export") or {})
    except ValidationError as error:
        raise ExportError(f"{path} is damaged: its section export cannot be read") from error


def _dtype(model: Path, base: str | None = None) -> str:
    """The dtype to measure a model in: the one that a run was trained in, or that of a folder's weights.

    `base` is the path or id of a run's base, in place of the one that its files name.
    """
    if not is_adapter(model):
        return saved_dtype(model)
    trained = environment_of(model).get("dtype") or resolve_dtype(adapter_base_sections(model, base)[0])
    return str(trained).removeprefix("torch.")
