"""Checks that the trainer holds the rows that the ledger counts, and that packed rows do not attend to each other."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
import torch
from transformers import TrainerCallback

from finetune.data.encoded import IGNORE
from finetune.data.mixture import Prepared
from finetune.system.errors import DataError, ModelError, first_line
from finetune.train.trainer import RunTrainer


def check_row_counts(dataset: Any, prepared: Prepared, use: str) -> None:
    """Checks that trl's dataset, packed or not, holds the ledger's rows, tokens and labels.

    Args:
        dataset: The trainer's dataset.
        prepared: The rows that it was made from.
        use: A verb for the message: `train` or `evaluate`.

    Raises:
        DataError: The numbers differ.
    """
    rows = tokens = trained = 0
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        packed = "seq_lengths" in table.column_names
        rows += len(pc.list_flatten(table["seq_lengths"])) if packed else len(table)
        for name in table.column_names:  # a pair has two of each
            if name.endswith("input_ids"):
                tokens += pc.sum(pc.list_value_length(table[name])).as_py()
            elif name.endswith("labels"):
                trained += pc.sum(pc.not_equal(pc.list_flatten(table[name]), IGNORE)).as_py()
    ledger = prepared.ledger
    if (rows, tokens, trained) != (ledger.kept, ledger.tokens, ledger.trained_tokens):
        raise DataError(
            f"trl would {use} on {rows:,} rows with {tokens:,} tokens and {trained:,} labels where the ledger counts "
            f"{ledger.kept:,} rows with {ledger.tokens:,} tokens and {ledger.trained_tokens:,} labels"
        )


class PackedRowsCheck(TrainerCallback):  # type: ignore[misc]
    """Refuses, before the first step, a model whose packed rows attend to each other.

    sdpa and eager attention keep rows apart only if the model passes their positions to its mask. GPT-OSS, OPT, BLOOM
    and RecurrentGemma's convolution do not, and transformers 5.23 gives no warning.
    """

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures whether a row's log-probabilities depend on the row before it.

        Raises:
            ModelError: They do depend on it, or the model takes no packed rows.
        """
        key = "training.packing" if args.packing else "training.padding_free"
        model = self.trainer.model.eval()
        name = f"{model.config.model_type} with {model.config._attn_implementation} attention"
        text = "One two three four five six seven eight nine ten eleven twelve"
        ids = self.trainer.processing_class(text, add_special_tokens=False)["input_ids"]
        try:
            one, other = self._log_probs([ids, ids]), self._log_probs([ids[::-1], ids])
            one_read, other_read = self._log_probs([ids + ids]), self._log_probs([ids[::-1] + ids])
        except ValueError as error:  # from models that need another package for it
            reason = first_line(error).rstrip(".")
            raise ModelError(f"{key}: {name} takes no packed rows: {reason}; or write false") from error
        # Where rows are kept apart, only rounding that depends on the batch changes the result: the outliers of 8-bit
        # weights (Gemma 3 270M: 1.2 nats; attending to the row before changes 18), and on a GPU the sums of experts.
        share = 0.3 if getattr(model, "is_loaded_in_8bit", False) else 0.02
        if (one - other).abs().max() > share * (one_read - other_read).abs().max():
            raise ModelError(
                f"{key}: {name} would let packed rows attend to each other; write false, or another "
                "model.attn_implementation"
            )

    def _log_probs(self, rows: list[list[int]]) -> Any:
        """Log-probabilities of the second half of a batch's tokens."""
        batch = self.trainer.data_collator([{"input_ids": row} for row in rows])
        half = sum(map(len, rows)) // 2
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            output = self.trainer.model(**self.trainer._prepare_inputs(batch), fused_lm_head=True)
        # No token comes before the first one of a row, so nothing predicts it.
        return output.log_probs[0, half : 2 * half - 1]
