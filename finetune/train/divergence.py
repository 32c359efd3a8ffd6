"""The KL divergence of an adapter's model from the model at the start of the run, on answers that it gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.model.predictions import log_probs_at, token_kl

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
        ids, places = [*prompt, *answer][:-1], range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        now_NV = log_probs_at(self.model, ids, places)
        with self._initial_values():
            start_NV = log_probs_at(self.model, ids, places)
        # Rounding alone can make it negative.
        return float(token_kl(now_NV, start_NV).clamp(min=0).mean())

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
