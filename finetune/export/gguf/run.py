"""The GGUF files of an export, and its folder for Ollama: what is told before hours are spent, then the files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.chat import Chat
from finetune.data.samples import LabelledRow, rows_by_language
from finetune.export.gguf import make
from finetune.export.gguf.imatrix.files import Importance
from finetune.export.gguf.llama_cpp.measure import Measurement
from finetune.export.gguf.ollama.modelfile import write_modelfile
from finetune.export.gguf.ollama.system_text import common_system_text
from finetune.model.load import load_tokenizer
from finetune.recipe.schema import ExportSection, ModelSection
from finetune.system.terminal import Say

# Of each language, where files are compared by language.
_GROUP = 8


@dataclass(frozen=True)
class GgufExport:
    """What is to be written of a whole model, and what it is measured on.

    `groups` are rows by language, `told` words that say how many and which they are; `modelfile` is a Modelfile for
    the file called `best`, or None.
    """

    model: Path
    kinds: Sequence[str]
    name: str
    best: str
    modelfile: Path | None
    tokens: make.Tokens
    rows: Sequence[LabelledRow]
    groups: dict[str, list[LabelledRow]]
    told: str
    options: ExportSection
    calibrated: Importance | make.Calibration | None

    def write(
        self,
        folder: Path,
        place: str,
        against: str,
        reference: Path | None,
        work: Path,
        say: Say,
        progress: bool,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The files, and where it is asked for the folder `ollama`; what is found, and notes.

        Args:
            folder: That of the export.
            place: What the folder of the files is called in it.
            against: The name of the model whose predictions they are held against.
            reference: Those predictions; None where that model could not be measured.
            work: A folder for what passes between processes.
            say: Gets a line for each step.
            progress: Whether a terminal shows bars.

        Raises:
            GGUFError, GGMLError, VocabularyError, ImatrixError, ShardError: From the rooms that raise them.
        """
        into = folder / place
        into.mkdir()
        on = Measurement(list(self.rows), self.groups, against=against, reference=reference)
        found, notes = make.make_files(
            self.model,
            self.tokens,
            into,
            self.kinds,
            self.name,
            on,
            self.options,
            self.calibrated,
            work,
            say,
            progress,
        )
        if self.modelfile:
            _for_ollama(into / self.best, folder / "ollama", self.modelfile)
        return found, [self.told, *notes]


def prepare_gguf(
    model: Path,
    trained: Path,
    formats: Sequence[str],
    kinds: Sequence[str],
    name: str,
    rows: Sequence[LabelledRow],
    where: str,
    options: ExportSection,
    work: Path,
    say: Say,
) -> GgufExport:
    """All that can be refused before a weight is read.

    Args:
        model: A folder with a whole model.
        trained: The run that it was merged from, or the model itself.
        formats: All that the export was asked for.
        kinds: Of `kinds.GGUF_TYPES`.
        name: What the files are called.
        rows: What they are measured on.
        where: Words that say which rows these are.
        options: The recipe's section.
        work: A folder for a Modelfile until its file is there.
        say: Gets a line where the run's data are not here.

    Raises:
        GGUFError, VocabularyError, ShardError, OllamaError, ImatrixError, DataError: It cannot be written as asked.
    """
    tokens = make.tokens_of(model)
    best = f"{name}-{'Q4_K_M' if 'Q4_K_M' in kinds else kinds[0]}.gguf"
    if "ollama" in formats:
        write_modelfile(model, work, best, tokens.add_bos, common_system_text(trained))
    chat = Chat(load_tokenizer(ModelSection(name_or_path=str(model))))
    parts = {name: (part[:_GROUP], of) for name, (part, of) in rows_by_language(rows, where, chat).items()}
    groups = {name: part for name, (part, _) in parts.items()}
    compared = [*rows, *(row for part in groups.values() for row in part)]
    return GgufExport(
        model,
        kinds,
        name,
        best,
        work / "Modelfile" if "ollama" in formats else None,
        tokens,
        rows,
        groups,
        f"\nBy language: {'; '.join(f'{name}: {len(part)} {of}' for name, (part, of) in parts.items())}.",
        options,
        make.calibration_of(model, kinds, compared, options, trained, say),
    )


def _for_ollama(file: Path, folder: Path, modelfile: Path) -> None:
    """A folder for `ollama create`: the file, which is not stored twice, and its Modelfile."""
    if folder != file.parent:
        folder.mkdir()
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
    modelfile.replace(folder / "Modelfile")
