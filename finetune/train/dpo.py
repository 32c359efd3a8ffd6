"""DPO and ORPO: trainers on pairs of a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from trl import DPOTrainer

from finetune.data.encoded import IGNORE
from finetune.train.preference import Batch, PreferenceTrainer, padded_rows, row_indices


class DpoTrainer(PreferenceTrainer, DPOTrainer):  # type: ignore[misc]
    """trl's DPO on pairs: `input_ids` and `labels` are the chosen side."""

    columns = ("input_ids", "labels", "rejected_input_ids", "rejected_labels")

    def __init__(self, model: Any, args: Any, *positional: Any, **rows: Any) -> None:
        super().__init__(model, args, *positional, **rows)
        self._read_settings(args)

    def _read_settings(self, args: Any) -> None:
        self.loss_types, self.ld_alpha = args.loss_type, args.ld_alpha
        self.loss_weights = args.loss_weights or [1.0] * len(self.loss_types)
        self.f_divergence_type, self.f_alpha_divergence_coef = args.f_divergence_type, args.f_alpha_divergence_coef
        self.label_smoothing, self.use_weighting = args.label_smoothing, args.use_weighting

    def _collator(self, pad_id: int, train: Any, evaluation: Any, args: Any) -> Callable[[list[Batch]], Batch]:
        def collate(rows: list[Batch]) -> Batch:
            sides = [(row["input_ids"], row["labels"]) for row in rows]
            sides += [(row["rejected_input_ids"], row["rejected_labels"]) for row in rows]
            return padded_rows(sides, pad_id, args) | row_indices(rows)

        return collate

    def _for_trl(self, batch: Batch) -> Batch:
        first, second = self._reference_of(batch).unbind(1)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "completion_mask": (batch["labels"] != IGNORE).long(),
            "ref_chosen_logps": first,
            "ref_rejected_logps": second,
        }


class OrpoTrainer(DpoTrainer):
    """ORPO on pairs, without a reference.

    Each pair's loss is that of its chosen answer's tokens, minus `beta` times the log of the sigmoid of its log odds
    ratio. trl 1.16 takes the mean over all tokens of a batch's chosen rows, prompts included, so that its loss depends
    on how pairs are batched. Source: Hong et al. 2024, equations 5 to 7.
    """

    needs_reference = False

    def _read_settings(self, args: Any) -> None:
        self.ld_alpha = None

    def _compute_loss(self, model: Any, inputs: Batch, return_outputs: bool) -> torch.Tensor:
        mask = inputs["completion_mask"][:, 1:].bool()
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**rows, labels=labels, use_cache=False, fused_lm_head=True)
        mean_2B = outputs.log_probs.sum(1) / mask.sum(1).clamp(min=1)
        chosen, rejected = mean_2B.float().chunk(2)
        log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        loss: torch.Tensor = (-chosen - self.beta * F.logsigmoid(log_odds)).mean()
        metrics = {
            "rewards/chosen": self.beta * chosen,
            "rewards/rejected": self.beta * rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": self.beta * (chosen - rejected),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "nll_loss": -chosen,
            "log_odds_ratio": F.logsigmoid(log_odds),
            "log_odds_chosen": log_odds,
        }
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(value.detach().float().mean().item())
        return loss


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """`log(1 - exp(x))` of negative numbers. Source: Mächler 2012, equation 7."""
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
