"""KTO: the trainer on answers that are each desirable or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from trl import KTOTrainer

from finetune.data.encoded import IGNORE, first_label
from finetune.train.preference import Batch, PreferenceTrainer, padded_rows, row_indices


class KtoTrainer(PreferenceTrainer, KTOTrainer):  # type: ignore[misc]
    """trl's KTO on answers that are each desirable or not.

    KTO compares each answer with the mean KL divergence from the reference, estimated on other rows' answers. trl 1.16
    estimates it on each batch of a rank alone; here it is that of all batches of a step, on all ranks.
    """

    columns = ("input_ids", "labels", "desirable")
    holds_pairs = False

    def __init__(self, model: Any, args: Any, *positional: Any, **rows: Any) -> None:
        self.loss_type, self.calculate_KL = args.loss_type, args.loss_type == "kto"
        super().__init__(model, args, *positional, **rows)
        self.desirable_weight, self.undesirable_weight = args.desirable_weight, args.undesirable_weight
        self._kl = torch.tensor(0.0)

    def _collator(self, pad_id: int, train: Any, evaluation: Any, args: Any) -> Callable[[list[Batch]], Batch]:
        def collate(rows: list[Batch]) -> Batch:
            batch = padded_rows([(row["input_ids"], row["labels"]) for row in rows], pad_id, args)
            batch["desirable"] = torch.tensor([row["desirable"] for row in rows])
            if self.calculate_KL:
                sides = []
                for row in rows:
                    first = row["index"] >= len(train)
                    dataset, start = (evaluation, len(train)) if first else (train, 0)
                    sides.append(_with_other_answer(dataset, row, row["index"] - start, args.max_length))
                others = padded_rows(sides, pad_id, args)
                batch |= {f"KL_{name}": value for name, value in others.items()}
            return batch | row_indices(rows)

        return collate

    def _for_trl(self, batch: Batch) -> Batch:
        own = {"label", "index", "labels", "desirable", "KL_labels"}
        result = {name: value for name, value in batch.items() if name not in own}
        result["completion_mask"] = (batch["labels"] != IGNORE).long()
        result["label"] = batch["desirable"]
        result["ref_logps"] = self._reference_of(batch)[:, 0]
        if self.calculate_KL:
            result["KL_completion_mask"] = (batch["KL_labels"] != IGNORE).long()
            result["ref_KL_logps"] = torch.zeros_like(self._kl)
        return result

    def _weights(self, inputs: Batch, logged: dict[str, list[float]], count: int) -> dict[str, float]:
        good = float((inputs["desirable"] & self.with_labels(inputs)).sum())
        weights = super()._weights(inputs, logged, count)
        weights.pop("rewards/margins", None)  # of the batches that hold both kinds
        for name in weights:
            weights[name] = good if name.endswith("/chosen") else count - good if name.endswith("/rejected") else count
        return weights

    # -----------------------------------------------------------------------------------------------------------
    # The divergence from the reference

    def _compute_kl_logps(self, model: Any, batch: Batch) -> Any:
        return self._kl if self.calculate_KL else None

    def _divergence(self, batches: list[Batch]) -> torch.Tensor:
        """The mean of the log-ratios of other rows' answers in some batches, on all ranks."""
        sums = torch.zeros(2, device=self.args.device)
        for inputs in batches:
            inputs = self._prepare_inputs(inputs)
            real = (inputs["KL_labels"] != IGNORE).any(1) & self.with_labels(inputs)
            ratios = (self.log_probs(inputs) - self._reference_of(inputs))[:, 1]
            sums += torch.stack([(ratios * real).sum(), real.sum()])
        total, count = self.accelerator.reduce(sums, "sum")
        mean: torch.Tensor = total / count.clamp(min=1)
        return mean

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step, of which the divergence is estimated before the first."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.calculate_KL and batches:
            self._kl = self._divergence(batches)
        return batches, items

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates after the divergence was estimated on all rows."""
        if self.calculate_KL:
            self._kl = self._divergence(dataloader)
        return super().evaluation_loop(dataloader, *args, **kwargs)


def _with_other_answer(dataset: Any, row: Batch, place: int, longest: int | None) -> tuple[list[int], list[int]]:
    """The row's prompt and the answer of a row before it with another prompt; without labels where none fits."""
    start = first_label(row["labels"])
    prompt = row["input_ids"][:start]
    for step in range(1, min(16, len(dataset))):
        other = dataset[(place - step) % len(dataset)]
        begins = first_label(other["labels"])
        answer = other["input_ids"][begins:]
        if other["input_ids"][:begins] != prompt and len(prompt) + len(answer) <= (longest or len(prompt + answer)):
            return prompt + answer, [IGNORE] * start + other["labels"][begins:]
    return row["input_ids"], [IGNORE] * len(row["input_ids"])
