"""Rows to calibrate an importance matrix on, and the matrix that a model's layers give on them."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.data.chat import Chat
from finetune.data.mixture import Prepared, build_datasets
from finetune.data.readers import is_file
from finetune.data.samples import SAMPLE_ROWS, LabelledRow, encoded_sample_rows
from finetune.export.gguf.imatrix.files import CHUNK, Importance, check_fits, without_zeros
from finetune.export.gguf.quantize import is_quantized
from finetune.export.gguf.tensors import gguf_names
from finetune.model.load import load_tokenizer
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import DEFAULT_MAX_LENGTH, DataSection, DataSource, ModelSection
from finetune.system import fresh_process
from finetune.system.errors import (
    DataError,
    ExportError,
    FinetuneError,
    LabelError,
    RecipeError,
    TemplateError,
    first_line,
)
from finetune.system.files import run_file
from finetune.system.terminal import progress_bar

# Tokens of a batch with its padding: enough to keep a processor busy, and its activations are small next to a model.
_BATCH_TOKENS = 1024
# Measured on the down and output projections of Gemma 3 270M in Q2_K and IQ3_S: the quantisation error on held-out
# conversations, relative to a matrix computed from those conversations, is 66% to 500% larger without a matrix, 1% to
# 5% with one from 400 tokens, 1% from 4,000, and no smaller from 8,000. Runs with long rows, of which few fit, need
# more.
ROWS, MAX_TOKENS = 256, 32_768
# Characters that make about a chunk of tokens; Japanese makes more tokens, and they are cut off.
_PASSAGE = 2000
_ROW_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")


# ---------------------------------------------------------------------------------------------------------------
# Rows


def calibration_rows(
    model: Path,
    path: str | None = None,
    rows: int = ROWS,
    max_tokens: int = MAX_TOKENS,
    apart_from: Sequence[LabelledRow] = (),
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[list[int]], str]:
    """Token ids of rows to collect a matrix from, and the name of their source; the same rows at each call.

    They are drawn from the conversations that the run was trained on, rendered whole, or from a file. If the run's data
    cannot be read, or all its rows are in `apart_from`, they are the project's sample rows.

    Args:
        model: A run, one of its checkpoints, or a folder with a whole model.
        path: A file or dataset of rows, as `data.train` takes it, or a text file; None: the run's training rows.
        rows: The most rows.
        max_tokens: The most tokens of all rows together; the row that exceeds them is cut.
        apart_from: Rows to leave out, because exports are measured on them.
        say: Called with a line if the run's data cannot be read.

    Raises:
        ExportError: No row is left, or the file does not exist.
        DataError: The file cannot be read as rows.
        ModelError, TemplateError: The tokenizer or its chat template cannot be used.
    """
    chat = Chat(load_tokenizer(ModelSection(name_or_path=str(model))))
    if path is not None:
        found, where = _rows_of_path(chat, path, rows, len(apart_from))
    else:
        found, where = _rows_of_run(model, chat, rows, len(apart_from), say)
    compared = {tuple(row.input_ids) for row in apart_from}
    if path is None and all(tuple(ids) in compared for ids in found):
        say("all of the run's rows are compared; the matrix is computed from the project's sample rows")
        found, where = _shuffled_sample_rows(chat), SAMPLE_ROWS
    chosen: list[list[int]] = []
    left = max_tokens
    for ids in found:
        if tuple(ids) not in compared and left and len(chosen) < rows:
            chosen.append(ids[:left])
            left -= len(chosen[-1])
    if not chosen:
        raise ExportError(
            f"importance matrix: the export is measured on all {where}, so none is left to compute the matrix from; "
            "write other rows in export.imatrix_data.path"
        )
    return chosen, f"{len(chosen):,} {where}"


def _rows_of_run(
    model: Path, chat: Chat, rows: int, spare: int, say: Callable[[str], None]
) -> tuple[list[list[int]], str]:
    if recipe_file := run_file(model, "recipe.yaml"):
        try:
            recipe = load_recipe(recipe_file)
            training, _ = build_datasets(recipe.data, chat, recipe.max_length, method=recipe.method)
            return _sampled_rows(training, rows, spare), "training rows of the run"
        except (RecipeError, DataError, TemplateError, LabelError) as error:
            reason = first_line(error)
            say(f"the run's rows cannot be read ({reason}); the matrix is computed from the project's sample rows")
    return _shuffled_sample_rows(chat), SAMPLE_ROWS


def _shuffled_sample_rows(chat: Chat) -> list[list[int]]:
    sample = [row.input_ids for row in encoded_sample_rows(chat)]
    return random.Random(0).sample(sample, len(sample))


def _rows_of_path(chat: Chat, path: str, rows: int, spare: int) -> tuple[list[list[int]], str]:
    name = Path(path).expanduser()
    if path.endswith(_ROW_FILES) or not is_file(path):
        # Rows that cannot be rendered, such as those with a special token in their text, are skipped.
        section = DataSection(train=[DataSource(path=path)], on_bad_row="skip")
        return _sampled_rows(build_datasets(section, chat, DEFAULT_MAX_LENGTH)[0], rows, spare), f"rows of {name.name}"
    generator, kept = random.Random(0), list[str]()
    try:
        with name.open(encoding="utf-8") as file:
            # Reservoir sampling: each passage of the text is as likely as another.
            for number, passage in enumerate(iter(lambda: file.read(_PASSAGE), "")):
                if len(kept) < rows + spare:
                    kept.append(passage)
                elif (place := generator.randrange(number + 1)) < len(kept):
                    kept[place] = passage
    except OSError as error:
        raise ExportError(f"imatrix_data.path: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"imatrix_data.path: {path} is no text in UTF-8 (byte {error.start:,})") from error
    generator.shuffle(kept)
    # The name of a special token in a text is text.
    ids = [chat.tokenizer(text, split_special_tokens=True)["input_ids"][:CHUNK] for text in kept if text.strip()]
    return ids, f"passages of {name.name}"


def _sampled_rows(prepared: Prepared, rows: int, spare: int) -> list[list[int]]:
    """Seeded sample of `rows` rows and `spare` more; the first rows of a stream, which is shuffled already."""
    import datasets

    data: Any = prepared.dataset
    wanted = rows + spare
    if isinstance(data, datasets.Dataset):
        places = random.Random(0).sample(range(len(data)), min(len(data), wanted))
        return [list(data[place]["input_ids"]) for place in places]
    return [list(row["input_ids"]) for row in islice(iter(data), wanted)]


# ---------------------------------------------------------------------------------------------------------------
# Collecting


@dataclass(frozen=True)
class _Task:
    """The argument of the fresh process, which writes the sums to `sums`, an npz file."""

    model: Path
    rows: list[list[int]]
    dtype: str
    sums: Path


def collect_importance(
    model: Path, rows: Sequence[Sequence[int]], dtype: str, source: str, progress: bool = False
) -> Importance:
    """The importance matrix of the model in a folder, collected from token ids in a fresh process.

    It covers every weight of a layer, and not the output layer, as llama.cpp's tool without `--process-output`: so no
    logits are computed.

    Args:
        model: A folder with a whole model.
        rows: The token ids of each row; rows do not attend to each other.
        dtype: The dtype that the model computes in.
        source: The description of the rows that the file records.
        progress: Shows a progress bar on a terminal.

    Raises:
        ExportError: The model cannot be loaded or run, or its activations are not finite.
    """
    total = sum(map(len, rows))
    with tempfile.TemporaryDirectory() as folder, progress_bar("importance matrix", total, progress) as advance:
        task = _Task(model, [list(row) for row in rows], dtype, Path(folder, "sums.npz"))
        try:
            fresh_process.call(_collect, task, on_line=lambda line: advance(int(line) if line.isdigit() else 0))
        except fresh_process.ProcessFailed as error:
            raise ExportError(f"{model}: no importance matrix: {error}") from error
        except (FinetuneError, OSError) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ExportError(f"{model}: no importance matrix: {why}") from error
        with np.load(task.sums, allow_pickle=False) as arrays:
            sums = {name.removeprefix("sums/"): arrays[name] for name in arrays.files if name.startswith("sums/")}
            counts = {name: tuple(arrays[f"counts/{name}"].tolist()) for name in sums}
    importance = Importance(without_zeros(sums, counts, str(model)), counts, (source,))
    check_fits(importance, model, "the matrix that was just collected")
    return importance


def _collect(task: _Task) -> None:
    from finetune.model.load import load_base

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads((task.model / "config.json").read_text(encoding="utf-8"))
    model = load_base(str(task.model), getattr(torch, task.dtype)).to(device).eval()
    sums, counts = squared_input_sums(model, config, task.rows, lambda count: fresh_process.report(str(count)))
    arrays = {f"sums/{name}": own for name, own in sums.items()}
    arrays |= {f"counts/{name}": np.array(own) for name, own in counts.items()}
    np.savez(task.sums, **arrays)  # type: ignore[arg-type]


def squared_input_sums(
    model: Any, config: dict[str, Any], rows: Sequence[Sequence[int]], done: Callable[[int], None]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, tuple[int, ...]]]:
    """Squared inputs of every weight of a layer that files quantise, by column, float64, and the tokens summed over.

    Both are as in `Importance`.

    Args:
        model: A causal language model of transformers, on its device; its experts compute one after the other from then
            on, which is what other implementations compute.
        config: Its config.json.
        rows: Token ids.
        done: Called with the number of tokens of each batch.

    Raises:
        ExportError: A layer was given another shape than its weight takes, not all tokens, or values that are not
            finite; or llama.cpp does not know the model.
    """
    decoder = model.get_decoder()
    inputs = _InputSums(model, gguf_names(config))
    if inputs.experts:
        model.set_experts_implementation("eager")
    with torch.inference_mode(), inputs:
        for batch in _batches(rows, padded=not inputs.experts):
            length, tokens = max(map(len, batch)), sum(map(len, batch))
            ids = [[*row, *[0] * (length - len(row))] for row in batch]
            real = [[i < len(row) for i in range(length)] for row in batch]
            inputs.real = torch.tensor(real, device=model.device)
            # A token attends to those before it; padding is after all tokens, and needs no mask.
            decoder(input_ids=torch.tensor(ids, device=model.device), use_cache=False)
            done(tokens)
    total = sum(map(len, rows))
    for name, own in inputs.counts.items():
        # Each token is given to as many experts as any other.
        if not sum(own) or sum(own) % total or (len(own) == 1 and own[0] != total):
            raise ExportError(f"{name} was given {sum(own):,} of {total:,} tokens")
    found = {name: _finite(name, column_sums.flatten().cpu().numpy()) for name, column_sums in inputs.sums.items()}
    return found, {name: tuple(own) for name, own in inputs.counts.items()}


class _InputSums(torch.overrides.TorchFunctionMode):
    """Adds up the squared inputs of a model's weights by column, as long as it is entered.

    Args:
        model: The model.
        translate: llama.cpp's name of a tensor; None for one that it does not have.

    Attributes:
        sums: The sums of each weight, float64 (experts, columns); a weight that is of no experts has one row.
        counts: The tokens that each row was summed over.
        experts: The weight and the expert of each expert's matrix, by its place in memory.
        real: A mask of the places in the current batch that are tokens and not padding.
    """

    def __init__(self, model: Any, translate: Callable[[str], str | None]) -> None:
        super().__init__()
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, list[int]] = {}
        self.experts: dict[int, tuple[str, int]] = {}
        self.real = torch.empty(0)
        self._hooks = []
        for path, parameter in model.named_parameters():
            name = translate(path)
            if not (name and name.startswith("blk.") and parameter.ndim > 1 and is_quantized(name)):
                continue
            columns = parameter.shape[-1]
            matrices = parameter.detach().reshape(-1, *parameter.shape[-2:])
            self.counts[name] = [0] * len(matrices)
            self.sums[name] = torch.zeros(len(matrices), columns, dtype=torch.float64, device=model.device)
            if parameter.ndim == 2:
                module = model.get_submodule(path.rpartition(".")[0])
                self._hooks.append(module.register_forward_pre_hook(partial(self._add_inputs, name, columns)))
            else:
                self.experts |= {matrix.data_ptr(): (name, number) for number, matrix in enumerate(matrices)}

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _add(self, name: str, expert: int, x: torch.Tensor) -> None:
        # Float32 for the squares of a batch, float64 for the sum of batches.
        self.sums[name][expert] += x.detach().float().square().sum(0).double()
        self.counts[name][expert] += len(x)

    def _add_inputs(self, name: str, columns: int, module: Any, inputs: Any) -> None:
        x, real = inputs[0], self.real
        # A router is given all rows of a batch as one.
        if x.shape not in ((*real.shape, columns), (real.numel(), columns)):
            raise ExportError(
                f"{name} takes {columns:,} columns and was given {list(x.shape)} for {list(real.shape)} tokens"
            )
        self._add(name, 0, x.reshape(-1, columns)[real.flatten()])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Adds the inputs of experts, whose matrices are slices of one parameter and no modules."""
        if func is torch.nn.functional.linear and (place := self.experts.get(args[1].data_ptr())):
            self._add(*place, args[0])
        return func(*args, **(kwargs or {}))


def _finite(name: str, column_sums: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(column_sums).all():
        raise ExportError(f"the activations before {name} are not finite; export from a model in bfloat16")
    return column_sums


def _batches(rows: Sequence[Sequence[int]], padded: bool) -> Iterator[list[Sequence[int]]]:
    """Batches of rows of similar lengths; of equal lengths where no row may be padded."""
    batch: list[Sequence[int]] = []
    for row in sorted(rows, key=len):
        full = len(row) * (len(batch) + 1) > _BATCH_TOKENS
        if batch and (full or (not padded and len(row) != len(batch[0]))):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
