"""What the trainer was given is what the ledger counts, and packed rows do not read one another."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
import torch
from transformers import TrainerCallback

from finetune.data.chat import IGNORE
from finetune.data.mixture import Prepared
from finetune.system.errors import DataError, ModelError


def check_rows(dataset: Any, prepared: Prepared, use: str) -> None:
    """The rows and tokens that trl made its dataset of, packed or not, are those of the ledger."""
    rows = tokens = trained = 0
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        packed = "seq_lengths" in table.column_names
        rows += len(pc.list_flatten(table["seq_lengths"])) if packed else len(table)
        labels = pc.list_flatten(table["labels"])
        tokens += pc.sum(pc.list_value_length(table["input_ids"])).as_py()
        trained += pc.sum(pc.not_equal(labels, IGNORE)).as_py()
    ledger = prepared.ledger
    if (rows, tokens, trained) != (ledger.kept, ledger.tokens, ledger.trained_tokens):
        raise DataError(
            f"trl would {use} on {rows:,} rows with {tokens:,} tokens and {trained:,} labels where the ledger counts "
            f"{ledger.kept:,} rows with {ledger.tokens:,} tokens and {ledger.trained_tokens:,} labels"
        )


class RowsApart(TrainerCallback):  # type: ignore[misc]
    """Refuses a model that lets packed rows read one another, before the first step.

    sdpa and eager attention keep rows apart where the model hands their positions to its mask. Where it does not,
    transformers 5.23 says nothing: so with GPT-OSS, OPT, BLOOM, and RecurrentGemma's convolution.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures whether a row's log-probabilities move with the row before it."""
        key = "training.packing" if args.packing else "training.padding_free"
        model = self.trainer.model.eval()
        kind = f"{model.config.model_type} with {model.config._attn_implementation} attention"
        text = "One two three four five six seven eight nine ten eleven twelve"
        ids = self.trainer.processing_class(text, add_special_tokens=False)["input_ids"]
        try:
            one, other = self._log_probs([ids, ids]), self._log_probs([ids[::-1], ids])
            one_read, other_read = self._log_probs([ids + ids]), self._log_probs([ids[::-1] + ids])
        except ValueError as error:  # what some models say that cannot do it without a package
            reason = str(error).splitlines()[0].rstrip(".")
            raise ModelError(f"{key}: {kind} takes no packed rows: {reason}; or write false") from error
        # Where rows are apart nothing changes at all, but for what is rounded by the batch: the outliers of 8-bit
        # weights (Gemma 3 270M: 1.2 nats, where a row that may be read changes 18), on a GPU the sums of experts.
        share = 0.3 if getattr(model, "is_loaded_in_8bit", False) else 0.02
        if (one - other).abs().max() > share * (one_read - other_read).abs().max():
            raise ModelError(
                f"{key}: {kind} would let packed rows read one another; write false, or another "
                "model.attn_implementation"
            )

    def _log_probs(self, rows: list[list[int]]) -> Any:
        """Log-probabilities of the second half of a batch's tokens."""
        batch = self.trainer.data_collator([{"input_ids": row} for row in rows])
        half = sum(map(len, rows)) // 2
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            output = self.trainer.model(**self.trainer._prepare_inputs(batch), fused_lm_head=True)
        # The first token of a row is predicted by nothing.
        return output.log_probs[0, half : 2 * half - 1]
