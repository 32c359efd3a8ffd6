"""Refuses options of an export that contradict its model or this machine, before the model is merged."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune.export import mlx
from finetune.export.verify import LIMITS
from finetune.export.w4a16 import no_matrix_reason
from finetune.model.locate import Base
from finetune.model.provenance import adapter_below, is_adapter
from finetune.recipe.export_formats import (
    ADAPTER,
    COMPRESSED_FORMATS,
    FORMATS_HELP,
    GGUF_ADAPTER,
    MLX_BITS,
    W4A16,
    needs_gguf,
)
from finetune.recipe.schema import ModelSection
from finetune.system.errors import ExportError
from finetune.system.extras import install_command


def check_options(model: Path, formats: Sequence[str], base: str | None, gate: dict[str, float]) -> None:
    """Refuses a folder that is no model, no format, an unknown limit, and what only a run has for a whole model.

    Raises:
        ExportError: One of these; the arguments are those of `export`, with the recipe's in place of those left out.
    """
    is_run = is_adapter(model)
    if not is_run and not (model / "config.json").is_file():
        below = adapter_below(model)
        raise ExportError(f"{model} is neither a run (adapter_config.json) nor a model (config.json){below}")
    if unknown := gate.keys() - LIMITS.keys():
        raise ExportError(f"--gate {min(unknown)} is no limit; write one of {', '.join(LIMITS)}")
    if not formats:
        raise ExportError(f"no format is given; write --format with {FORMATS_HELP}")
    if is_run:
        return
    if wanted := [name for name in (ADAPTER, GGUF_ADAPTER) if name in formats]:
        raise ExportError(f"--format {wanted[0]}: {model} is a whole model; export the run that it was merged from")
    if base:
        raise ExportError(
            f"--base {base}: {model} is a whole model, not a run; leave out --base, or export the run that it was "
            "merged from"
        )


def check_formats(section: ModelSection, formats: Sequence[str], always_matrix: bool = False) -> None:
    """Checks what the formats ask of a model and of this machine.

    Args:
        section: The section that names the model, or a run's base.
        formats: Names from `export_formats.FORMATS`.
        always_matrix: True if no format may do without an importance matrix.

    Raises:
        ExportError: A package is not installed, or the model cannot be written in a format.
        ModelError: The model's config cannot be read.
    """
    if compressed := [name for name in formats if name in COMPRESSED_FORMATS]:
        _check_compressed(section, compressed)
    if always_matrix and W4A16 in formats and (reason := no_matrix_reason(Base.of(section).config.model_type)):
        raise ExportError(f"export.imatrix: is always, and {W4A16} can have no importance matrix: {reason}")
    if for_mlx := [name for name in formats if name in MLX_BITS]:
        mlx.check_computable(Base.of(section).config, for_mlx)
    if needs_gguf(formats):
        _check_gguf(section)


def _check_compressed(section: ModelSection, formats: Sequence[str]) -> None:
    """Refuses a missing package, and a model without a layer that servers have a kernel for, before the merge."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ExportError(
            f"--format {formats[0]}: compressed-tensors is not installed; run {install_command('compressed')}"
        )
    from finetune.merge.tensor_map import skeleton
    from finetune.model.compressed import quantised_layers

    shape, _ = skeleton(Base.of(section).config, torch.bfloat16, section.trust_remote_code)
    for kind in formats:
        if not quantised_layers(shape, kind):
            raise ExportError(
                f"--format {kind}: this model has experts, or no linear layer of a shape that vLLM's and SGLang's "
                "kernels take; write int8, nf4 or bf16"
            )


def _check_gguf(section: ModelSection) -> None:
    """Refuses a missing package, and a base whose config alone shows that it has no GGUF form, before the merge."""
    for package in ("gguf", "xllamacpp"):
        if importlib.util.find_spec(package) is None:
            raise ExportError(f"--format gguf: {package} is not installed; run {install_command('gguf')}")
    from finetune.export.gguf.tensors import checked_model_type

    checked_model_type({"model_type": Base.of(section).config.get_text_config().model_type})
