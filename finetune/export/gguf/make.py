"""GGUF files of a model: each type with and without its importance matrix, measured, and the better one kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.chat import Chat
from finetune.data.samples import LabelledRow, sample_rows
from finetune.export.adapter import PlainLora
from finetune.export.gguf.adapter import write_gguf_adapter
from finetune.export.gguf.imatrix.calibration import calibration_rows, collect_importance
from finetune.export.gguf.imatrix.files import Importance, check_fits, read_imatrix, write_imatrix
from finetune.export.gguf.llama_cpp.measure import Measurement, TokenizedText, measure
from finetune.export.gguf.quantize import ImportanceMatrix
from finetune.export.gguf.tokenizer.source import trained_tokenizer
from finetune.export.gguf.tokenizer.vocabulary import TokenizerMetadata, expected_ids, probe_texts, read_tokenizer
from finetune.export.gguf.write import check_writable, write_gguf
from finetune.export.report import ModelFigures, mean_kl
from finetune.export.transformers import saved_dtype
from finetune.export.verify import CONVERSATIONS
from finetune.recipe.export_formats import GGUF_ADAPTER
from finetune.recipe.schema import ExportSection, ImatrixDataSection
from finetune.system.errors import LabelError, TemplateError
from finetune.system.terminal import Say

# Types that an importance matrix does not change.
_WITHOUT_MATRIX = ("F32", "F16", "BF16", "Q8_0")
# The least top-1 agreement; below it a file is broken. A small model in 2 bits agrees on about half of the tokens.
_MIN_TOP1 = 0.2
# Nats of the log-probability that differs most. F32 weights give transformers' float32 numbers but for the order of
# sums and llama.cpp's table for GELU: Gemma 3 270M's differ by 0.05 at most, of 262,144 tokens at 1,059 places.
_MAX_DIFFERENCE = 0.2


@dataclass(frozen=True)
class Calibration:
    """The token ids that an importance matrix is computed from, and a description of their origin."""

    rows: Sequence[Sequence[int]]
    source: str


@dataclass(frozen=True)
class GgufPlan:
    """The GGUF files to write for a model, and the rows that they are measured on."""

    model: Path
    """A folder with a whole model."""
    types: Sequence[str]
    """Some of `export_formats.GGUF_TYPES`."""
    name: str
    """The files are called `NAME-TYPE.gguf`."""
    tokenizer: TokenizerMetadata
    imatrix: Importance | Calibration | None
    """The importance matrix, or the rows to compute it from; None for no matrix."""
    always_matrix: bool
    """Files without the matrix are not tried."""
    measurement: Measurement
    """Without its texts, which `make_files` adds."""
    lora: PlainLora | None = None
    """The adapter to write as `NAME-adapter.gguf`."""

    @property
    def best_file(self) -> str:
        """The name of the file for Ollama: a type that fits most machines, or the first one."""
        return f"{self.name}-{'Q4_K_M' if 'Q4_K_M' in self.types else self.types[0]}.gguf"


def read_writable_tokenizer(model: Path) -> TokenizerMetadata:
    """The tokenizer of a model that can be written as GGUF, as far as is known without reading its weights.

    Raises:
        ExportError, ModelError: The tokenizer or config cannot be written as GGUF.
    """
    tokenizer = read_tokenizer(model)
    check_writable(model, tokenizer.fields)
    return tokenizer


def imatrix_source(
    model: Path, types: Sequence[str], compared: Sequence[LabelledRow], options: ExportSection, trained: Path, say: Say
) -> Importance | Calibration | None:
    """The finished matrix of the recipe, or the rows to compute one from; None if no type is quantised with one.

    Args:
        model: A folder with a whole model.
        types: GGUF types, from `export_formats.GGUF_TYPES`.
        compared: The rows that the files are measured on, which the matrix must not be computed from.
        options: The recipe's section `export`, which may name the matrix's file or data.
        trained: The run with the conversations, or the model itself.
        say: Called with a line if the run's data cannot be read.

    Raises:
        ExportError: The matrix does not exist or is of another model, or there are no rows.
        DataError, ModelError, TemplateError: The rows cannot be read or rendered.
    """
    if options.imatrix == "never" or set(types) <= set(_WITHOUT_MATRIX):
        return None
    data = options.imatrix_data or ImatrixDataSection()
    if data.path and data.path.endswith((".gguf", ".dat")):
        given = read_imatrix(Path(data.path).expanduser())
        check_fits(given, model, data.path)
        # Folders of the machine that made the matrix are not published.
        return replace(given, datasets=tuple(re.split(r"[/\\\\]", name)[-1] for name in given.datasets))
    return Calibration(*calibration_rows(trained, data.path, data.rows, data.max_tokens, compared, say))


def make_files(
    plan: GgufPlan, folder: Path, work: Path, say: Say, progress: bool
) -> tuple[list[ModelFigures], list[str]]:
    """Writes `NAME-TYPE.gguf` for each type, the adapter, the matrix and `test.log`.

    Args:
        plan: The files to write.
        folder: An empty folder for the files.
        work: A folder for files that are not kept.
        say: Called with a line for each step.
        progress: Shows progress bars on a terminal.

    Returns:
        Figures of all files tried, and notes.

    Raises:
        ExportError, ModelError: The matrix cannot be collected, or a file cannot be written.
    """
    differences = plan.tokenizer.differences
    notes = [f"\nllama.cpp is not quite the trained tokenizer: {item.what}." for item in differences]
    on = _with_texts(plan)
    importance = None
    if plan.imatrix:
        importance = importance_of(plan.model, plan.imatrix, say, progress)
        write_imatrix(importance, folder)
        notes.append(f"\n{importance.note}")
        idle, experts = importance.idle_experts
        if idle:
            notes.append(
                f"\n{idle:,} of {experts:,} matrices of experts were given none of these tokens: all their columns "
                "count alike."
            )
    figures: list[ModelFigures] = []
    for file_type in plan.types:
        tried: list[tuple[ModelFigures, Path]] = []
        for matrix in _matrices_to_try(file_type, importance, plan.always_matrix):
            title = f"gguf:{file_type}" + ("" if matrix is None or plan.always_matrix else ", with matrix")
            file = (work if tried else folder) / f"{plan.name}-{file_type}.gguf"
            say(f"{title}: writing")
            write_gguf(plan.model, file, file_type, matrix, progress, plan.tokenizer.fields)
            say(f"{title}: measuring")
            measured = measure(file, title, on)
            measured |= {"kind": file_type, "file": file.name, "matrix": matrix is not None, "kept": False}
            if "error" in measured:
                measured["error"] = measured["error"].replace(str(file), file.name)
            tried.append((measured, file))
        best, file = min(tried, key=lambda pair: mean_kl(pair[0]))
        best["kept"] = True
        for _, other in tried:
            if other != file:
                other.unlink()
        file.replace(folder / file.name)
        figures += [measured for measured, _ in tried]
    if plan.lora:
        figures.append(_make_adapter(plan, plan.lora, folder, work, on, say, progress))
    log = "\n".join(_log_entry(measured) for measured in figures if measured["kept"])
    (folder / "test.log").write_text(log, encoding="utf-8")
    return figures, notes


def _make_adapter(
    plan: GgufPlan, lora: PlainLora, folder: Path, work: Path, on: Measurement, say: Say, progress: bool
) -> ModelFigures:
    """Writes the adapter's file, and measures it on a GGUF file of its base, in the base's own type."""
    file = folder / f"{plan.name}-adapter.gguf"
    say(f"{GGUF_ADAPTER}: writing")
    write_gguf_adapter(lora.folder, lora.base, file)
    base_type = {"float32": "F32", "float16": "F16"}.get(saved_dtype(lora.base), "BF16")
    say(f"{GGUF_ADAPTER}: measuring on its base in {base_type}")
    base = work / f"base-{base_type}.gguf"
    write_gguf(lora.base, base, base_type, None, progress, plan.tokenizer.fields)
    measured = measure(base, GGUF_ADAPTER, on, file)
    base.unlink()
    # A base's file has no template, or its own.
    if (template := plan.model / "chat_template.jinja").is_file():
        shutil.copy(template, folder)
    measured |= {"bytes": file.stat().st_size, "kind": "adapter", "file": file.name, "matrix": False, "kept": True}
    return measured


def gguf_faults(file: ModelFigures) -> list[str]:
    """One line for each figure that shows that a file was not written correctly."""
    if "error" in file:
        return []  # `missed_limits` has a line on it
    name, lines = file["name"], []
    for same, what in (
        (file.get("same_texts"), "texts give other token ids than"),
        (file.get("same_prompts"), "prompts are rendered unlike"),
    ):
        if same and same["equal"] < same["count"]:
            first = json.dumps(same["differences"][0]["text"][:60], ensure_ascii=False)
            lines.append(
                f"{name}: {same['count'] - same['equal']} of {same['count']} {what} the trained tokenizer's, "
                f"the first is {first}"
            )
    top1, largest = file.get("top1"), file.get("largest")
    # Two tokens that are nearly as likely may change places; a wrong number shows in the log-probabilities.
    if file["kind"] == "F32" and top1 is not None and not (largest or 0) <= _MAX_DIFFERENCE:
        lines.append(
            f"{name}: does not compute what the model computes: it predicts the same token in {top1:.2%}, and a "
            f"log-probability is off by {largest:.2g}"
        )
    elif top1 is not None and top1 < _MIN_TOP1:
        lines.append(f"{name}: predicts the same token in {top1:.1%} only; the file is broken, or of no use")
    return lines


def importance_of(model: Path, source: Importance | Calibration, say: Say, progress: bool) -> Importance:
    """The matrix that `imatrix_source` found, or collected from its rows.

    Raises:
        ExportError: The model cannot be loaded or run, or its activations are not finite.
    """
    if isinstance(source, Importance):
        return source
    say(f"importance matrix: of {sum(map(len, source.rows)):,} tokens, {source.source}")
    return collect_importance(model, source.rows, saved_dtype(model), source.source, progress)


def _matrices_to_try(file_type: str, importance: Importance | None, always: bool) -> list[ImportanceMatrix | None]:
    if importance is None or file_type in _WITHOUT_MATRIX:
        return [None]
    return [importance.matrix] if always else [importance.matrix, None]


def _with_texts(plan: GgufPlan) -> Measurement:
    """The measurement with texts, sample conversations, and their beginnings up to the last answers, as trained."""
    tokenizer = trained_tokenizer(plan.model)
    chat = Chat(tokenizer)
    texts = [
        TokenizedText(text, ids)
        for text, ids in expected_ids(plan.model, plan.tokenizer.fields, probe_texts())
        if not any(difference.concerns(text) for difference in plan.tokenizer.differences)
    ]
    whole: list[TokenizedText] = []
    prompts: list[TokenizedText] = []
    for line in sample_rows().read_text(encoding="utf-8").splitlines()[:CONVERSATIONS]:
        messages = json.loads(line)["messages"]
        try:
            rendered = [(messages, whole, chat.render(messages))]
            rendered.append((messages[:-1], prompts, chat.render(messages[:-1], add_generation_prompt=True)))
        except (LabelError, TemplateError):  # there is no template, or it needs more than these messages have
            text = "\n".join(message["content"] for message in messages)
            whole.append(TokenizedText(text, list(tokenizer(text)["input_ids"])))
            continue
        for part, into, text in rendered:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            into.append(TokenizedText(text, list(ids), messages=part))
    return replace(plan.measurement, texts=texts, conversations=whole, prompts=prompts)


def _log_entry(file: ModelFigures) -> str:
    """A file's answer to the question, for `test.log`."""
    head = f"== {file['file']}"
    if "error" in file:
        return f"{head}\n{file['error']}\n"
    question = file["question"]
    end = "" if question["ended"] else "\n(cut off)"
    return f"{head}\n{question['prompt']}{question['answer']}{end}\n"
