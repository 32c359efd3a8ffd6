"""Writes the GGUF files of an export and its folder for Ollama, after `prepare_gguf` has checked that it can."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.chat import Chat
from finetune.data.samples import LabelledRow, rows_by_language
from finetune.export.adapter import PlainLora
from finetune.export.gguf.llama_cpp.measure import Measurement
from finetune.export.gguf.make import GgufPlan, imatrix_source, make_files, read_writable_tokenizer
from finetune.export.gguf.ollama.modelfile import write_modelfile
from finetune.export.gguf.ollama.system_text import common_system_text
from finetune.export.report import ModelFigures
from finetune.export.rows import HeldOutRows
from finetune.model.load import load_tokenizer
from finetune.recipe.export_formats import gguf_types
from finetune.recipe.schema import ExportSection, ModelSection
from finetune.system.terminal import Say

# The rows of each language in the comparison by language.
_ROWS_PER_LANGUAGE = 8


@dataclass(frozen=True)
class GgufExport:
    """Checked GGUF files to write: the plan, the folder's name, and the Modelfile if the format ollama is asked for."""

    plan: GgufPlan
    subfolder: str
    modelfile: Path | None
    note: str
    """A line of the report on the rows by language."""

    @property
    def groups(self) -> dict[str, list[LabelledRow]]:
        """The rows by language that files are compared on."""
        return self.plan.measurement.groups

    def write(
        self, folder: Path, against: str, reference: Path | None, work: Path, say: Say, progress: bool
    ) -> tuple[list[ModelFigures], list[str]]:
        """Writes the files, and the folder `ollama` if asked for; returns the files' figures, and notes.

        Args:
            folder: The folder of the export.
            against: The report's name for the model that the files are compared with.
            reference: That model's predictions; None if it could not be measured.
            work: A folder for files that are not kept.
            say: Called with a line for each step.
            progress: Shows progress bars on a terminal.

        Raises:
            ExportError, ModelError: A file cannot be written; see `make_files`.
        """
        place = folder / self.subfolder
        place.mkdir()
        plan = replace(self.plan, measurement=replace(self.plan.measurement, against=against, reference=reference))
        figures, notes = make_files(plan, place, work, say, progress)
        if self.modelfile:
            _write_ollama_folder(place / plan.best_file, folder / "ollama", self.modelfile)
        return figures, [self.note, *notes]


def prepare_gguf(
    model: Path,
    trained: Path,
    formats: Sequence[str],
    held_out: HeldOutRows,
    options: ExportSection,
    work: Path,
    say: Say,
    lora: PlainLora | None = None,
) -> GgufExport:
    """Checks that the files can be written, before a weight is read.

    Args:
        model: A folder with a whole model.
        trained: The run that it was merged from, or the model itself.
        formats: All formats of the export.
        held_out: The rows that the files are measured on.
        options: The recipe's section.
        work: A folder for the Modelfile until its GGUF file is written.
        say: Called with a line if the run's data cannot be read.
        lora: The run's adapter, for the format gguf:adapter.

    Raises:
        ExportError: The model has no GGUF form, or no importance matrix can be made.
        OllamaError: The chat template has no form in Ollama's syntax.
        ModelError, RunError, DataError, TemplateError: The model's tokenizer or the run's rows cannot be used.
    """
    types, name = gguf_types(formats), _file_stem(trained)
    tokenizer = read_writable_tokenizer(model)
    chat = Chat(load_tokenizer(ModelSection(name_or_path=str(model))))
    groups, sources = {}, []
    for language, (rows, source) in rows_by_language(held_out.rows, held_out.source, chat).items():
        groups[language] = rows[:_ROWS_PER_LANGUAGE]
        sources.append(f"{language}: {len(groups[language])} {source}")
    compared = [*held_out.rows, *(row for rows in groups.values() for row in rows)]
    imatrix = imatrix_source(model, types, compared, options, trained, say)
    measurement = Measurement(held_out.rows, groups)
    plan = GgufPlan(model, types, name, tokenizer, imatrix, options.imatrix == "always", measurement, lora)
    modelfile = None
    if "ollama" in formats:
        write_modelfile(model, work, plan.best_file, tokenizer.add_bos, common_system_text(trained))
        modelfile = work / "Modelfile"
    subfolder = "gguf" if any(format.startswith("gguf:") for format in formats) else "ollama"
    return GgufExport(plan, subfolder, modelfile, f"\nBy language: {'; '.join(sources)}.")


def _file_stem(model: Path) -> str:
    """The first part of the files' names: the run's name, followed by the checkpoint's."""
    place = model.resolve()
    return f"{place.parent.name}-{place.name}" if place.name.startswith("checkpoint-") else place.name


def _write_ollama_folder(file: Path, folder: Path, modelfile: Path) -> None:
    """Makes a folder for `ollama create`: the GGUF file, as a hard link where possible, and its Modelfile."""
    if folder != file.parent:
        folder.mkdir()
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
    modelfile.replace(folder / "Modelfile")
