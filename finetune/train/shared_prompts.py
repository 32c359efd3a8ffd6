"""Runs the common beginning of two rows once: chosen and rejected answers behind one prompt.

A batch of B pairs is 2B rows, chosen over rejected. The two rows of a pair become one, `prompt chosen rejected`, in
which positions restart behind the prompt and a mask hides each answer from the other. The hidden states are then put
back into 2B rows, so that nothing outside of the backbone knows of it. They equal those of the 2B rows, up to the order
of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The layer types whose mask is known; other layers (chunked or linear attention, convolutions) mix tokens otherwise.
_FULL, _SLIDING = "full_attention", "sliding_attention"


class SharedPrompts:
    """Gives a causal LM's backbone a forward pass that runs the common beginning of two rows once, if asked to.

    Shapes are suffixes: B pairs, T tokens of the longest row, L tokens of the longest joined row, H hidden size.

    Args:
        model: A causal LM of transformers, whose `base_model` is patched.
    """

    def __init__(self, model: Any) -> None:
        self._config = model.config.get_text_config()
        self._backbone = model.base_model
        self._plain_forward = self._backbone.forward
        self._length: int | None = None
        self._backbone.forward = self._forward

    @staticmethod
    def fit(model: Any) -> bool:
        """True if the model's attention takes a mask of its own and its config has only layers whose mask is known."""
        config = model.config.get_text_config()
        types = set(getattr(config, "layer_types", None) or [_FULL])
        return model.config._attn_implementation in ("sdpa", "eager") and types <= {_FULL, _SLIDING}

    @contextmanager
    def of_pairs(self, length: int = 0) -> Iterator[None]:
        """While it is open, batches are pairs whose common beginnings are run once.

        Args:
            length: The number of tokens L; 0: as the batch needs, which fake tensors cannot tell.
        """
        before, self._length = self._length, length
        try:
            yield
        finally:
            self._length = before

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._length is None:
            return self._plain_forward(*args, **kwargs)
        ids_2BT, mask_2BT = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
        joined = _Joined(ids_2BT, mask_2BT.bool(), self._length)
        output = self._plain_forward(
            *args,
            input_ids=joined.ids_BL,
            position_ids=joined.positions_BL,
            attention_mask=self._masks(joined),
            **kwargs,
        )
        output.last_hidden_state = joined.apart(output.last_hidden_state)
        return output

    def _masks(self, joined: _Joined) -> Any:
        """The mask, or one for each type of layer, as the model's attention takes it."""
        types = getattr(self._config, "layer_types", None)
        window = getattr(self._config, "sliding_window", None)
        if not types:
            uses_window = window is not None and getattr(self._config, "use_sliding_window", True)
            return self._mask(joined, window if uses_window else None)
        return {kind: self._mask(joined, window if kind == _SLIDING else None) for kind in dict.fromkeys(types)}

    def _mask(self, joined: _Joined, window: int | None) -> torch.Tensor:
        allowed = joined.allowed_BLL(window).unsqueeze(1)
        if self._backbone.config._attn_implementation != "eager":
            return allowed
        dtype = self._backbone.get_input_embeddings().weight.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )


class _Joined:
    """Each pair of rows as one row of at most L tokens; the rows are padded on the right."""

    def __init__(self, ids_2BT: torch.Tensor, mask_2BT: torch.Tensor, length: int) -> None:
        (first_BT, second_BT), (first_mask_BT, second_mask_BT) = ids_2BT.chunk(2), mask_2BT.chunk(2)
        count, width = first_BT.shape
        device = ids_2BT.device
        same_BT = (first_BT == second_BT) & first_mask_BT & second_mask_BT
        prompt_B1 = same_BT.long().cumprod(1).sum(1, keepdim=True)
        first_B1, second_B1 = (mask.sum(1, keepdim=True) for mask in (first_mask_BT, second_mask_BT))
        length = length or int((first_B1 + second_B1 - prompt_B1).max())
        place_1T = torch.arange(width, device=device).unsqueeze(0)
        self.first_place_BT = place_1T.expand(count, width)
        self.second_place_BT = torch.where(place_1T < prompt_B1, place_1T, place_1T + first_B1 - prompt_B1)
        # Padding is written to a column behind the last one, which is cut off.
        first_to_BT = torch.where(first_mask_BT, self.first_place_BT, length)
        second_to_BT = torch.where(second_mask_BT, self.second_place_BT, length)
        self.second_place_BT = self.second_place_BT.clamp(max=length - 1)

        def joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            row = torch.zeros(count, length + 1, dtype=first.dtype, device=device)
            row.scatter_(1, second_to_BT, second.expand(count, width).contiguous())
            return row.scatter_(1, first_to_BT, first.expand(count, width).contiguous())[:, :length]

        self.ids_BL = joined(first_BT, second_BT)
        self.positions_BL = joined(place_1T, place_1T)
        # 1: the prompt, 2: the rest of the first row, 3: that of the second, 0: padding, which sees itself alone.
        one = torch.ones_like(prompt_B1)
        self.part_BL = joined(
            torch.where(place_1T < prompt_B1, one, 2 * one), torch.where(place_1T < prompt_B1, one, 3 * one)
        )

    def allowed_BLL(self, window: int | None) -> torch.Tensor:
        """True where the token of the second-last index sees that of the last."""
        part, positions = self.part_BL, self.positions_BL
        length = part.shape[1]
        earlier_LL = torch.ones(length, length, dtype=torch.bool, device=part.device).tril_()
        allowed = ((part.unsqueeze(1) == 1) | (part.unsqueeze(1) == part.unsqueeze(2))) & earlier_LL
        if window is not None:
            allowed &= positions.unsqueeze(2) - positions.unsqueeze(1) < window
        return allowed

    def apart(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        """The hidden states of the 2B rows."""
        width = hidden_BLH.shape[-1]
        places = (self.first_place_BT, self.second_place_BT)
        return torch.cat([hidden_BLH.gather(1, place.unsqueeze(2).expand(-1, -1, width)) for place in places])
