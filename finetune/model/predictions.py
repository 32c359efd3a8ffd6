"""A model's predictions of the tokens of a text, and how far two models' predictions are from one another."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from finetune.model.attach import base_of


def log_probs_at(model: Any, input_ids: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (N, V) of the token behind each of N places of a row, in float32 on the CPU.

    Args:
        model: A causal language model, on its device, in evaluation mode.
        input_ids: The row's token ids.
        places: The places, from 0.
    """
    ids = torch.tensor([input_ids], device=model.device)
    index = torch.tensor(places, device=model.device)
    only_some = "logits_to_keep" in inspect.signature(type(base_of(model)).forward).parameters
    # Not in inference mode: a model that is trained further could have kept tensors of the pass.
    with torch.no_grad():
        options = {"logits_to_keep": index} if only_some else {}
        logits = model(input_ids=ids, use_cache=False, **options).logits[0]
        logits = (logits if only_some else logits[index]).float()
        return torch.log_softmax(logits, dim=-1).cpu()


def token_kl(expected_NV: torch.Tensor, found_NV: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) of each of N tokens, in nats, from log-probabilities."""
    probs = expected_NV.exp()
    # A token that is expected with probability 0 adds nothing; 0 * inf would be NaN.
    terms = (probs * (expected_NV - found_NV)).masked_fill_(probs == 0, 0.0)
    return terms.sum(dim=-1, dtype=torch.float64)
