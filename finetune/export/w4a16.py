"""The importance matrix of w4a16: that of the GGUF files, or none where a model or this machine has none."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.export.rows import HeldOutRows
from finetune.recipe.schema import ExportSection
from finetune.system.errors import ExportError
from finetune.system.extras import install_command
from finetune.system.terminal import Say

if TYPE_CHECKING:
    from finetune.export.gguf.imatrix.files import Importance
    from finetune.export.gguf.run import GgufExport


def no_matrix_reason(model_type: str) -> str:
    """The reason why an importance matrix cannot be computed for a model of this type; empty if it can."""
    if importlib.util.find_spec("gguf") is None:
        return f"gguf is not installed; run {install_command('gguf')}"
    from finetune.export.gguf.tensors import checked_model_type

    try:
        checked_model_type({"model_type": model_type})
    except ExportError as error:
        return str(error)
    return ""


def importance_matrix(
    model: Path,
    trained: Path,
    rows: HeldOutRows,
    options: ExportSection,
    gguf: GgufExport | None,
    say: Say,
    progress: bool,
) -> tuple[Importance | None, GgufExport | None, list[str]]:
    """The matrix that w4a16 is quantised with, the GGUF files that then use it too, and notes for the report.

    Args:
        model: A folder with a whole model.
        trained: The run that it was merged from, or the model itself.
        rows: The rows that the formats are measured on, which the matrix is not computed from.
        options: The recipe's section.
        gguf: The GGUF files of the same export.
        say: Called with a line for each step.
        progress: Shows a progress bar on a terminal.

    Returns:
        None for the matrix if the recipe wants none, or there can be none.

    Raises:
        ExportError, DataError, ModelError, TemplateError: As `imatrix_source` and `collect_importance`.
    """
    if options.imatrix == "never":
        return None, gguf, []
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if reason := no_matrix_reason(config.get("model_type")):
        return None, gguf, [f"\nw4a16 is rounded to nearest, without an importance matrix: {reason}."]
    from finetune.export.gguf.make import imatrix_source, importance_of

    shared = gguf.plan.imatrix if gguf else None
    source = shared or imatrix_source(model, ["w4a16"], rows.rows, options, trained, say)
    assert source
    found = importance_of(model, source, say, progress)
    if gguf and shared:
        return found, replace(gguf, plan=replace(gguf.plan, imatrix=found)), []
    return found, gguf, [f"\n{found.note}"]
