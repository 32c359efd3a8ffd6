"""A model in GGUF: each type with and without its importance matrix, measured by llama.cpp, the better one kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.data.samples import LabelledRow, sample_rows
from finetune.export.gguf.imatrix import files as matrices
from finetune.export.gguf.imatrix.calibration import calibration_rows, collect_importance
from finetune.export.gguf.llama_cpp.measure import Measurement, TokenizedText, measure
from finetune.export.gguf.quantize import ImportanceMatrix
from finetune.export.gguf.tokenizer.source import Difference, trained_tokenizer
from finetune.export.gguf.tokenizer.vocabulary import expected_ids, probe_texts, read_tokenizer
from finetune.export.gguf.write import check_writable, write_gguf
from finetune.recipe.schema import ExportSection, ImatrixDataSection

# Types whose rounding no importance of columns changes.
_WITHOUT_MATRIX = ("F32", "F16", "BF16", "Q8_0")
_CONVERSATIONS = 10
# A file that agrees on fewer tokens than this was not written rightly: 2 bits of a small model agree on about half.
_MIN_TOP1 = 0.2
# Nats of the log-probability that differs most. F32 weights give transformers' float32 numbers but for the order of
# sums and llama.cpp's table for GELU: Gemma 3 270M's differ by 0.05 at most, of 262,144 tokens at 1,059 places.
_MAX_DIFFERENCE = 0.2


@dataclass(frozen=True)
class Calibration:
    """Token ids that an importance matrix is collected from, and words that say what they are of."""

    rows: Sequence[Sequence[int]]
    where: str


@dataclass(frozen=True)
class Tokens:
    """A model's tokenizer as GGUF metadata, and what llama.cpp does otherwise with it."""

    vocabulary: dict[str, Any]
    limits: Sequence[Difference]

    @property
    def add_bos(self) -> bool:
        """Whether llama.cpp puts a BOS before every prompt."""
        return bool(self.vocabulary["tokenizer.ggml.add_bos_token"])


def tokens_of(model: Path) -> Tokens:
    """The tokenizer of a model that can be written as GGUF, as far as can be told without reading its numbers.

    Raises:
        GGUFError, VocabularyError, ShardError: It cannot.
    """
    found = Tokens(*read_tokenizer(model))
    check_writable(model, found.vocabulary)
    return found


def calibration_of(
    model: Path,
    kinds: Sequence[str],
    compared: Sequence[LabelledRow],
    options: ExportSection,
    trained: Path,
    say: Callable[[str], None],
) -> matrices.Importance | Calibration | None:
    """A matrix that was made elsewhere, or the rows that one is to be made from; None where no type needs one.

    Args:
        model: A folder with a whole model.
        kinds: Of `kinds.GGUF_TYPES`.
        compared: Rows that measure what was lost, from which none is made.
        options: Whether and from what.
        trained: The run whose conversations it is made from, or the model itself.
        say: Gets a line where the run's data are not here.

    Raises:
        ImatrixError, DataError: There is no such matrix, or none of this model; no rows, or they cannot be read.
    """
    if options.imatrix == "never" or set(kinds) <= set(_WITHOUT_MATRIX):
        return None
    data = options.imatrix_data or ImatrixDataSection()
    if data.path and data.path.endswith((".gguf", ".dat")):
        given = matrices.read_imatrix(Path(data.path).expanduser())
        matrices.check_fits(given, model, data.path)
        # Where the text lay on the machine that made it is nobody else's matter.
        return replace(given, datasets=tuple(re.split(r"[/\\\\]", name)[-1] for name in given.datasets))
    return Calibration(*calibration_rows(trained, data.path, data.rows, data.max_tokens, compared, say))


def make_files(
    model: Path,
    tokens: Tokens,
    folder: Path,
    kinds: Sequence[str],
    name: str,
    on: Measurement,
    options: ExportSection,
    calibrated: matrices.Importance | Calibration | None,
    work: Path,
    say: Callable[[str], None],
    progress: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """`NAME-TYPE.gguf` for each type in the empty folder, the matrix and `test.log`; what is found, and notes.

    Args:
        model: A folder with a whole model.
        tokens: Its tokenizer.
        folder: Where the files go.
        kinds: Of `kinds.GGUF_TYPES`.
        name: What the files are called.
        on: What they are measured on, but for texts, which are added.
        options: Whether each file is tried with a matrix, without, or both.
        calibrated: As `calibration_of` gives it.
        work: A folder for what passes between processes, and for files that are not kept.
        say: Gets a line for each step.
        progress: Whether a terminal shows bars.

    Raises:
        GGUFError, GGMLError, VocabularyError, ImatrixError, ShardError: From the rooms that raise them, before a file
            is written.
    """
    vocabulary, limits = tokens.vocabulary, tokens.limits
    notes = [f"\nllama.cpp is not quite the trained tokenizer: {limit.what}." for limit in limits]
    told = [
        TokenizedText(text, ids)
        for text, ids in expected_ids(model, vocabulary, probe_texts())
        if not any(limit.concerns(text) for limit in limits)
    ]
    conversations, prompts = _conversations(model)
    on = replace(on, texts=told, conversations=conversations, prompts=prompts)
    importance = None
    if calibrated:
        importance = _importance(model, calibrated, say, progress)
        matrices.write_imatrix(importance, folder)
        of = ", ".join(importance.datasets)
        notes.append(f"\nImportance matrix: of {max(importance.counts.values()):,} tokens ({of}).")
    found: list[dict[str, Any]] = []
    for kind in kinds:
        tried: list[tuple[dict[str, Any], Path]] = []
        for matrix in _variants(kind, importance, options):
            title = f"gguf:{kind}" + (
                "" if matrix is None or options.imatrix == "always" else ", with matrix"
            )
            file = (work if tried else folder) / f"{name}-{kind}.gguf"
            say(f"{title}: writing")
            write_gguf(model, file, kind, matrix, progress, vocabulary)
            say(f"{title}: measuring")
            now = measure(file, title, on)
            now |= {"kind": kind, "file": file.name, "matrix": matrix is not None, "kept": False}
            if "error" in now:
                now["error"] = now["error"].replace(str(file), file.name)
            tried.append((now, file))
        best, file = min(tried, key=lambda one: _loss(one[0]))
        best["kept"] = True
        for _, other in tried:
            if other != file:
                other.unlink()
        file.replace(folder / file.name)
        found += [one for one, _ in tried]
    kept = [one for one in found if one["kept"]]
    (folder / "test.log").write_text("\n".join(_log_entry(one) for one in kept), encoding="utf-8")
    return found, notes


def gguf_faults(found: Mapping[str, Any]) -> list[str]:
    """What shows that a file was not written rightly, a line each; none where all is well."""
    name, lines = found["name"], []
    if "error" in found:
        return []  # told already
    for key, what in (
        ("same_texts", "texts give other token ids than"),
        ("same_prompts", "prompts are rendered unlike"),
    ):
        same = found.get(key)
        if same and same["equal"] < same["count"]:
            first = json.dumps(same["differences"][0]["text"][:60], ensure_ascii=False)
            lines.append(
                f"{name}: {same['count'] - same['equal']} of {same['count']} {what} the trained tokenizer's, "
                f"the first is {first}"
            )
    top1, largest = found.get("top1"), found.get("largest")
    # Two tokens that are nearly as likely may change places; a number that is off shows more.
    if found["kind"] == "F32" and top1 is not None and not (largest or 0) <= _MAX_DIFFERENCE:
        lines.append(
            f"{name}: does not compute what the model computes: it predicts the same token in {top1:.2%}, and a "
            f"log-probability is off by {largest:.2g}"
        )
    elif top1 is not None and top1 < _MIN_TOP1:
        lines.append(f"{name}: predicts the same token in {top1:.1%} only; the file is broken, or of no use")
    return lines


def _importance(
    model: Path,
    calibrated: matrices.Importance | Calibration,
    say: Callable[[str], None],
    progress: bool,
) -> matrices.Importance:
    if isinstance(calibrated, matrices.Importance):
        return calibrated
    rows, where = calibrated.rows, calibrated.where
    say(f"importance matrix: of {sum(map(len, rows)):,} tokens, {where}")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return collect_importance(model, rows, dtype, where, progress)


def _variants(
    kind: str, importance: matrices.Importance | None, options: ExportSection
) -> list[ImportanceMatrix | None]:
    if importance is None or kind in _WITHOUT_MATRIX:
        return [None]
    return [importance.matrix] if options.imatrix == "always" else [importance.matrix, None]


def _loss(found: Mapping[str, Any]) -> float:
    """What the better of two files has less of; a file that cannot be measured is the worst."""
    kl = found.get("kl")
    return math.inf if kl is None or math.isnan(kl) else float(kl)


def _conversations(model: Path) -> tuple[list[TokenizedText], list[TokenizedText]]:
    """Ten of the project's own conversations, and what stands before their last answers, as the model was trained."""
    tokenizer = trained_tokenizer(model)
    whole: list[TokenizedText] = []
    begun: list[TokenizedText] = []
    for line in sample_rows().read_text(encoding="utf-8").splitlines()[:_CONVERSATIONS]:
        messages = json.loads(line)["messages"]
        if tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages)
            whole.append(TokenizedText(text, list(tokenizer(text)["input_ids"])))
            continue
        for part, into, asks in ((messages, whole, False), (messages[:-1], begun, True)):
            text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=asks)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            into.append(TokenizedText(text, list(ids), messages=part))
    return whole, begun


def _log_entry(found: Mapping[str, Any]) -> str:
    """What a file answered, for `test.log`."""
    head = f"== {found['file']}"
    if "error" in found:
        return f"{head}\n{found['error']}\n"
    asked = found["question"]
    end = "" if asked["ended"] else "\n(cut off)"
    return f"{head}\n{asked['prompt']}{asked['answer']}{end}\n"
