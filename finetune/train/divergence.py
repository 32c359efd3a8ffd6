"""The KL divergence of an adapter's model from the model at the start of the run, on answers that it gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from finetune.model.attach import base_of

# The most bytes of initial values that are kept: 64 million parameters in float32.
_KEPT_BYTES = 2**28


class AdapterAtStart:
    """A copy of an adapter's initial values, with which the same model predicts as it did at the start.

    Args:
        model: The model with its adapter, before the first step, and before a checkpoint is loaded.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.values = [(p, p.detach().to("cpu", copy=True)) for p in model.parameters() if p.requires_grad]

    @classmethod
    def of(cls, model: Any) -> AdapterAtStart | None:
        """The copy; None without an adapter, and for one of more than 256 MiB, such as one with whole embeddings."""
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return cls(model) if hasattr(model, "peft_config") and size <= _KEPT_BYTES else None

    def divergence(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        """KL(model || model at the start) of the next token's distribution, the mean over an answer, in nats per token.

        Args:
            prompt: Token ids.
            answer: Token ids, at least one.
        """
        now_NV = self._log_probs(prompt, answer)
        with self._initial_values():
            start_NV = self._log_probs(prompt, answer)
        terms_NV = now_NV.exp() * (now_NV - start_NV)
        # The product of a probability of 0 and an infinite difference is NaN.
        return float(terms_NV.nan_to_num_(nan=0.0).sum(-1).clamp(min=0).mean())

    def _log_probs(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Log-probabilities (N, V), in float32, of the N tokens of an answer."""
        count = len(answer)
        ids = torch.tensor([[*prompt, *answer][:-1]], device=self.model.device)
        only_some = "logits_to_keep" in inspect.signature(type(base_of(self.model)).forward).parameters
        with torch.no_grad():
            logits = self.model(
                input_ids=ids, use_cache=False, **({"logits_to_keep": count} if only_some else {})
            ).logits
        return torch.log_softmax(logits[0, -count:].float(), dim=-1)

    @contextmanager
    def _initial_values(self) -> Iterator[None]:
        """Gives the parameters their initial values, and then the very tensors that they had."""
        now = [parameter.data for parameter, _ in self.values]
        try:
            for parameter, initial in self.values:
                parameter.data = initial.to(parameter.device)
            yield
        finally:
            for (parameter, _), data in zip(self.values, now, strict=True):
                parameter.data = data
