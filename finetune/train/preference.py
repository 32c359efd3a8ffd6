"""Preference tuning: the base of the trainers in `dpo.py` and `kto.py`, with trl's losses on prepared rows.

Of trl's trainers only the losses and metrics are used. Their constructors would tokenise the rows again, and keep a
copy of the adapter as reference, which lacks what PEFT stores elsewhere (trl 1.16: trained token rows, LoRA on
embeddings). Here the reference is a table of log-probabilities (`reference.py`).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from trl.models import get_act_offloading_ctx_manager
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, pad

from finetune.data.encoded import IGNORE
from finetune.train.loss import use_token_head
from finetune.train.shared_prompts import SharedPrompts
from finetune.train.trainer import RunTrainer

# The outputs of trl's fused head that its losses and metrics read.
_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")

Batch = dict[str, Any]


class PreferenceTrainer(RunTrainer):
    """The base of the trainers of preferences; a mixin, which a class names before a trainer of trl.

    The loss of a step is the mean over its items (pairs, or answers), however they are spread over accumulated batches
    and ranks.

    Args:
        model: The model to train, with its adapter.
        args: The trainer's arguments.
        train_dataset: The training rows, as `data.mixture` prepares them for the method.
        eval_dataset: The evaluation rows; None: no evaluation.
        processing_class: The tokenizer.

    Attributes:
        reference: The reference's log-probabilities, (rows, 2), training rows before evaluation rows: of both answers
            of a pair; or of an answer, and of the answer of another row behind its prompt.
        shared: Runs the common beginning of two rows once; None if the model's attention cannot.
    """

    columns: tuple[str, ...]
    loss_is_scaled_for_ga = True
    needs_reference = True
    holds_pairs = True

    def __init__(self, model: Any, args: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any):
        self._tokenizer, self._is_vlm, self._is_vision_dataset = processing_class, False, False
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        model.generation_config.pad_token_id = processing_class.pad_token_id
        is_adapter = hasattr(model, "peft_config")
        if is_adapter and args.gradient_checkpointing:
            model.enable_input_require_grads()
        rows = len(train_dataset)
        train_dataset = _numbered(train_dataset, 0)
        eval_dataset = eval_dataset and _numbered(eval_dataset, rows)
        # Past the constructor of trl's trainer.
        super(self._trl_trainer, self).__init__(
            model=model,
            args=args,
            data_collator=self._collator(processing_class.pad_token_id, train_dataset, eval_dataset, args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        self.padding_free = False
        self.maybe_activation_offload_context = (
            get_act_offloading_ctx_manager(model=model)
            if getattr(args, "activation_offloading", False)
            else contextlib.nullcontext()
        )
        config = model.config.get_text_config()
        coefficient = getattr(args, "router_aux_loss_coef", None)
        self.router_aux_loss_coef = getattr(config, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
        self.aux_loss_enabled = hasattr(config, "output_router_logits") and self.router_aux_loss_coef != 0.0
        self.beta, self.precompute_ref_logps, self.ref_model, self._tp_size = args.beta, True, None, 1
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens = 0
        if args.disable_dropout:
            disable_dropout_in_model(model)
        whole = model.get_base_model() if is_adapter else model
        weighted = getattr(args, "use_weighting", False)
        add_fused_lm_head(whole, outputs=(*_OUTPUTS, "log_sum_sq_probs") if weighted else _OUTPUTS)
        if not weighted:
            use_token_head(whole, mean_logits=True, compiled=args.torch_compile)
        # A router's loss reads the mask of the rows as they are.
        shares = self.holds_pairs and SharedPrompts.fit(whole) and not self.aux_loss_enabled
        self.shared = SharedPrompts(whole) if shares else None
        self.reference = torch.zeros(rows + len(eval_dataset or ()), 2)

    @property
    def _trl_trainer(self) -> Any:
        """The class of trl behind this one."""
        return next(kind for kind in type(self).__mro__ if kind.__module__.startswith("trl."))

    def _collator(self, pad_id: int, train: Any, evaluation: Any, args: Any) -> Callable[[list[Batch]], Batch]:
        raise NotImplementedError

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.columns, "index"]

    # -----------------------------------------------------------------------------------------------------------
    # Loss

    def _for_trl(self, batch: Batch) -> Batch:
        """The batch as trl's `_compute_loss` reads it."""
        raise NotImplementedError

    def with_labels(self, inputs: Batch) -> torch.Tensor:
        """Which items of a batch have labels; rows that only make ranks equal have none."""
        found: torch.Tensor = (inputs["labels"][: len(inputs["index"])] != IGNORE).any(1)
        return found

    def items_in(self, inputs: Batch) -> torch.Tensor:
        """The number of items, which the loss is the mean of."""
        return self.with_labels(inputs).sum()

    def _without_padding(self, inputs: Batch) -> Batch:
        """The items of a batch that have labels; the first one where none has any."""
        count, items = len(inputs["index"]), self.with_labels(inputs).nonzero().flatten()
        if len(items) == count:
            return inputs
        items = items if len(items) else torch.zeros_like(inputs["index"][:1])
        # The rows of a pair's sides are `count` apart.
        return {
            name: value[torch.cat([items + first for first in range(0, len(value), count)])]
            for name, value in inputs.items()
        }

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of a batch.

        Args:
            model: The wrapped model.
            inputs: A batch of the collator.
            return_outputs: Must be false.
            num_items_in_batch: The number of items of the whole step, on all ranks; None: the loss is the mean over the
                batch.
        """
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            real = (inputs["labels"] != IGNORE).any(1, keepdim=True)
            self._total_train_tokens += int(self.accelerator.gather((inputs["attention_mask"] * real).sum()).sum())
        count = int(self.items_in(inputs))
        batch = self._for_trl(self._without_padding(inputs))
        total, kept = self._total_train_tokens, self._metrics[mode]
        self._metrics[mode] = defaultdict(list)
        try:
            # Ranks may hold different numbers of items, and a mean of their means is not the mean of all.
            with _each_rank_for_itself(self.accelerator), self._sharing():
                loss: torch.Tensor = super().compute_loss(model, batch)
            logged = self._metrics[mode]
        finally:
            self._metrics[mode], self._total_train_tokens = kept, total
        if not count:
            return loss * 0
        for name, weight in self._weights(inputs, logged, count).items():
            had, before = kept[name] or (0.0, 0.0)
            kept[name] = [had + logged[name][-1] * weight, before + weight]
        if num_items_in_batch is None:
            return loss
        scaled: torch.Tensor = loss * (count * self.accelerator.num_processes / num_items_in_batch)
        return scaled

    def _weights(self, inputs: Batch, logged: dict[str, list[float]], count: int) -> dict[str, float]:
        """The number of items that each of trl's metrics is the mean of."""
        return {name: float(count) for name in logged if name != "num_tokens"}

    def _sharing(self) -> Any:
        return self.shared.of_pairs() if self.shared else contextlib.nullcontext()

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: Any) -> torch.Tensor:
        count = sum((self.items_in(batch) for batch in batch_samples), torch.tensor(0)).to(device)
        items: torch.Tensor = self.accelerator.gather(count).sum().clamp(min=1)
        return items

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Logs the means of trl's metrics over all items since the last record, on all ranks."""
        mode = "train" if self.model.training else "eval"
        # A rank without an item of a kind lacks its metrics.
        names = sorted({*gather_object(list(self._metrics[mode]))})
        sums = torch.tensor([self._metrics[mode][name] or [0.0, 0.0] for name in names], device=self.args.device)
        if names:
            sums = self.accelerator.reduce(sums, "sum")
        means = {name: [s / n] for name, (s, n) in zip(names, sums.tolist(), strict=True) if n}
        if mode == "eval" and self.needs_reference and not self.state.global_step:
            # All rewards are 0 up to rounding, which would decide what answer is ahead.
            means.pop("rewards/accuracies", None)
        self._metrics[mode] = defaultdict(list, means, num_tokens=[self._total_train_tokens])
        super().log(logs, *args, **kwargs)

    # -----------------------------------------------------------------------------------------------------------
    # Reference

    def log_probs(self, inputs: Batch) -> torch.Tensor:
        """The log-probabilities that `reference` holds, of the model as it is: (items, 2), in evaluation mode.

        Args:
            inputs: A batch of the collator, on the device.
        """
        model = self.model_wrapped
        # Otherwise trl would switch the adapter off.
        self.ref_model = model
        training = model.training
        model.eval()
        try:
            with self._sharing():
                first, second = self.compute_ref_log_probs(model, self._for_trl(inputs))
        finally:
            self.ref_model = None
            model.train(training)
        return torch.stack([first, torch.zeros_like(first) if second is None else second], dim=1).float()

    def _reference_of(self, inputs: Batch) -> torch.Tensor:
        self.reference = self.reference.to(inputs["index"].device)
        return self.reference[inputs["index"]]


# ---------------------------------------------------------------------------------------------------------------
# Batches


def _numbered(dataset: Any, first: int) -> Any:
    """The dataset with the column `index`: its row's place in the table of the reference."""
    return dataset.add_column("index", np.arange(first, first + len(dataset)))


def row_indices(rows: list[Batch]) -> Batch:
    """The rows' places in the table of the reference, as a part of their batch."""
    return {"index": torch.tensor([row["index"] for row in rows])}


def padded_rows(sides: list[tuple[list[int], list[int]]], pad_id: int, args: Any) -> Batch:
    """Rows of token ids and labels, padded on the right."""
    multiple = getattr(args, "pad_to_multiple_of", None)
    ids, labels = (
        pad([torch.tensor(side[i]) for side in sides], padding_value=value, pad_to_multiple_of=multiple)
        for i, value in enumerate((pad_id, IGNORE))
    )
    lengths = torch.tensor([len(side[0]) for side in sides]).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths).long(), "labels": labels}


# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _each_rank_for_itself(accelerator: Any) -> Iterator[None]:
    """Makes an accelerator's gathering return what this rank has."""
    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, lambda value: value)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)
