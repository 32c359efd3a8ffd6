"""The reference of preference tuning: log-probabilities of the model at the start of the run, computed once.

The model at the start is the reference by definition, whatever was trained before: nothing is copied or switched off.
The table is kept in the run's folder, from which a resumed run reads it, and in the cache, for further runs with the
same start and rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from finetune.data.encoded import IGNORE
from finetune.system import distributed, files
from finetune.system.cache import cache_dir
from finetune.system.errors import RunError, first_line
from finetune.system.terminal import Say
from finetune.train.callbacks.memory_check import restored_state
from finetune.train.preference import PreferenceTrainer
from finetune.train.row_order import row_lengths

FILE = "reference.safetensors"
# The largest mean difference of a token's log-probability between pairs run apart and with their prompt shared.
_SHARED_TOLERANCE = {torch.float32: 1e-4}
# The largest relative difference between a sum of log-probabilities and its entry in the table.
_TOLERANCE = {torch.float32: 1e-5}
# Both in a lower precision: rounding alone changes them, as batches have other shapes.
_ROUNDED = 0.05


class SharedPromptsCheck(TrainerCallback):  # type: ignore[misc]
    """Before the first step: runs the longest pairs apart and shared, and shares no prompt if the results differ."""

    def __init__(self, trainer: PreferenceTrainer, say: Say) -> None:
        self.trainer, self.say = trainer, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decides on all ranks together."""
        trainer = self.trainer
        shared = trainer.shared
        if shared is None:
            return
        batch = _batch(trainer, _by_length(trainer.train_dataset)[: args.per_device_train_batch_size])
        model_type = trainer.model.config.model_type
        fault = ""
        try:
            together = trainer.log_probs(batch)
            trainer.shared = None
            apart = trainer.log_probs(batch)
            tokens = (batch["labels"] != IGNORE).sum(1).view(2, -1).t()
            difference = float(((together - apart).abs() / tokens).mean())
            if not difference <= _SHARED_TOLERANCE.get(_computes(trainer), _ROUNDED):
                fault = f"log-probabilities differ by {difference:.2g} per token"
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            fault = first_line(error)
        fits = not distributed.max_over_ranks(bool(fault))
        trainer.shared = shared if fits else None
        if not fits and state.is_world_process_zero:
            self.say(f"{model_type} cannot run a pair's prompt once ({fault or 'on another rank'}); it is run twice")


class ReferenceLogProbs(TrainerCallback):  # type: ignore[misc]
    """Before the first step: fills the table of the reference, and checks that the run begins at it.

    Args:
        trainer: The trainer.
        output: The run's folder.
        origin: What the model at the start depends on, beside the rows.
        resumed: True if the model is no longer the one at the start.
        say: Called with lines on the progress.
    """

    def __init__(
        self, trainer: PreferenceTrainer, output: Path, origin: dict[str, Any], resumed: bool, say: Say
    ) -> None:
        self.trainer, self.resumed, self.say = trainer, resumed, say
        self.key = hashlib.blake2b(json.dumps(origin, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.files = (output / FILE, cache_dir() / "reference" / f"{self.key}.safetensors")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the table, or computes and writes it.

        Raises:
            RunError: The run is resumed and its table is lost, or the table is not that of this model.
        """
        trainer, main = self.trainer, state.is_world_process_zero
        table = distributed.broadcast_from_first(self._saved() if main else None)
        if table is None:
            if self.resumed:
                raise RunError(
                    f"{self.files[0]}: the reference's log-probabilities of this run are not there, and the model that "
                    "they came from is no longer at hand; put the file back, or start anew in another "
                    "training.output_dir"
                )
            table = self._computed()
        trainer.reference = table.to(args.device)
        if main:
            own, cached = self.files
            if not own.exists():
                _write(own, table, self.key)
            with suppress(OSError, SafetensorError):  # another run computes it again
                if not cached.exists():
                    _write(cached, table, self.key)
        if not self.resumed:
            self._check_start(args)

    def _saved(self) -> torch.Tensor | None:
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as stored:
                    if (stored.metadata() or {}).get("key") == self.key:
                        table: torch.Tensor = stored.get_tensor("log_probs")
                        self.say(f"reference: {len(table):,} rows' log-probabilities read from {file}")
                        return table
            except (OSError, SafetensorError):
                continue
        return None

    def _computed(self) -> torch.Tensor:
        """The table of this model, each batch on one rank."""
        trainer, args = self.trainer, self.trainer.args
        size, ranks, rank = args.per_device_eval_batch_size, distributed.world_size(), distributed.rank()
        table = torch.zeros_like(trainer.reference, device=args.device)
        for dataset in (trainer.train_dataset, trainer.eval_dataset):
            if dataset is None:
                continue
            order = _by_length(dataset)
            starts = range(0, len(order), size)
            if main := trainer.is_world_process_zero():
                filling = sum(set(labels) == {IGNORE} for labels in dataset[-size * ranks :]["labels"])
                self.say(f"reference: log-probabilities of {len(order) - filling:,} rows are computed")
            # Every rank runs the same number of batches, which shards of a model need.
            for turn in range(math.ceil(len(starts) / ranks)):
                place = turn * ranks + rank
                start = starts[min(place, len(starts) - 1)]
                batch = _batch(trainer, order[start : start + size], dataset)
                values = trainer.log_probs(batch)
                if place < len(starts):
                    real = trainer.with_labels(batch)
                    table[batch["index"][real]] = values[real]
                if main and turn and turn % 50 == 0:
                    self.say(f"reference: {min(turn * ranks * size, len(order)):,} of {len(order):,}")
        whole: torch.Tensor = trainer.accelerator.reduce(table, "sum").cpu()
        return whole

    def _check_start(self, args: Any) -> None:
        trainer = self.trainer
        rows = list(range(min(args.per_device_train_batch_size, len(trainer.train_dataset))))
        batch = _batch(trainer, rows)
        now, table = trainer.log_probs(batch), trainer.reference[batch["index"]]
        limit = _TOLERANCE.get(_computes(trainer), _ROUNDED)
        differs = (now - table).abs() > limit * table.abs().clamp(min=1)
        if distributed.max_over_ranks(bool(differs.any())):
            raise RunError(
                f"the reference's log-probabilities are not those of this model: {table[0].tolist()} in the table, "
                f"{now[0].tolist()} now; delete {self.files[0]} and {self.files[1]}"
            )
        with restored_state(trainer), torch.no_grad(), trainer.compute_loss_context_manager():
            trainer.model.eval()
            loss = float(trainer.compute_loss(trainer.model_wrapped, batch))
        if trainer.is_world_process_zero():
            self.say(f"reference: the run begins at it, with a loss of {loss:.6f} and rewards of 0")


def _write(file: Path, table: torch.Tensor, key: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.whole_file(file) as part:
        save_file({"log_probs": table}, part, metadata={"key": key})


def _computes(trainer: PreferenceTrainer) -> torch.dtype:
    """The type that products are computed in."""
    args = trainer.args
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    dtype: torch.dtype = trainer.model.config.dtype or torch.float32
    return dtype


def _by_length(dataset: Any) -> list[int]:
    """The places of a dataset's rows, the longest first."""
    places: list[int] = np.argsort(-row_lengths(dataset), kind="stable").tolist()
    return places


def _batch(trainer: PreferenceTrainer, places: list[int], dataset: Any = None) -> dict[str, Any]:
    dataset = trainer.train_dataset if dataset is None else dataset
    collated: dict[str, Any] = trainer._prepare_inputs(trainer.data_collator([dataset[i] for i in places]))
    return collated
