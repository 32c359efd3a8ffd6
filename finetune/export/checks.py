"""Refuses formats that a model has no form in, or whose packages are not installed, before the model is merged."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from finetune.export import mlx
from finetune.export.w4a16 import no_matrix_reason
from finetune.model.locate import Base
from finetune.recipe.export_formats import COMPRESSED_FORMATS, MLX_BITS, W4A16, needs_gguf
from finetune.recipe.schema import ModelSection
from finetune.system.errors import ExportError
from finetune.system.extras import install_command


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
