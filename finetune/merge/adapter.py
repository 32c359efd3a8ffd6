"""The arithmetic of a merge: an adapter's open file, and the merged rows of a tensor.

The results equal those of PEFT's `merge_and_unload()` to the bit: the update of a linear layer is added in float32 and
rounded once; that of an embedding or of stacked experts is rounded before it is added.

Suffixes name the dimensions of a tensor: O output features, I input features, R rank, E experts; N rows and W width
(all numbers of one row) of a weight as it is stored.

Source: peft 0.21 `tuners/lora/layer.py` (`Linear.merge`, `Embedding.merge`, `ParamWrapper.merge`),
`tuners/lora/variants.py` (`DoraLinearVariant.merge_unsafe`), `tuners/trainable_tokens/layer.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.merge.changes import PRODUCTS, Change
from finetune.model.shards import all_finite, dtype_name, read_header, read_tensor, row_ranges
from finetune.system.errors import MergeError
from finetune.system.files import ADAPTER_WEIGHTS


class Adapter:
    """An adapter's open file and its weight in a merge. All its numbers are checked to be finite when it is opened.

    Args:
        folder: The adapter's folder.
        weight: The factor of its changes.

    Raises:
        MergeError: From `with`: a number is not finite, or a tensor is not of floating point.
    """

    def __init__(self, folder: Path, weight: float) -> None:
        self.weight = weight
        self.path = folder / ADAPTER_WEIGHTS
        self.header = read_header(self.path)

    def __enter__(self) -> Adapter:
        self.descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for name, stored in self.header.items():
                if not stored.dtype.is_floating_point:
                    raise MergeError(f"{self.path}: {name} is {dtype_name(stored.dtype)}, not a weight")
                ranges = row_ranges(stored.count)
                if not all(all_finite(read_tensor(self.descriptor, stored, *part)) for part in ranges):
                    raise MergeError(f"{self.path}: {name} holds NaN or infinity; the run that saved it is broken")
        except BaseException:
            os.close(self.descriptor)
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.descriptor)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A whole tensor in its shape, or its numbers `start` to `stop`, flat.

        Raises:
            ModelError: The file is damaged.
        """
        return read_tensor(self.descriptor, self.header[name], start, stop)


def check_combination(name: str, changes: Sequence[Change], adapters: Sequence[Adapter]) -> None:
    """Refuses changes of one tensor that cannot be combined.

    Args:
        name: The tensor's name, for the message.
        changes: The changes, of all adapters.
        adapters: The adapters of the merge, in order.

    Raises:
        MergeError: They are of different kinds, or one is of a DoRA adapter that is weighted or not alone.
    """
    products = [c for c in changes if c.kind in PRODUCTS]
    if len({(c.kind, c.transposed, c.experts, c.swapped) for c in products}) > 1:
        raise MergeError(f"{name}: the adapters change it in different ways; merge them one after the other")
    for change in products:
        if "magnitude" in change.keys and (len(products) > 1 or adapters[change.adapter].weight != 1):
            raise MergeError(f"{name}: DoRA adapters cannot be weighted or added to others; merge it alone")


class Update:
    """The merged rows of one tensor. A product is formed once and whole, as PEFT forms it.

    Args:
        name: The tensor's name, for messages.
        changes: The changes, which `check_combination` passed.
        shape: The tensor's shape.
        adapters: The adapters of the merge, in order.
        read_base: Returns a copy of rows `start` to `stop` of the base's tensor, in the dtype in which the run loaded
            it; the copy is changed in place.

    Raises:
        MergeError: The product has another shape.
    """

    def __init__(
        self,
        name: str,
        changes: Sequence[Change],
        shape: tuple[int, ...],
        adapters: Sequence[Adapter],
        read_base: Callable[[int, int], torch.Tensor],
    ) -> None:
        self.name, self.shape, self.adapters, self.read_base = name, shape, adapters, read_base
        self.saved_base = [c for c in changes if c.kind == "base"]
        self.others = [c for c in changes if c.kind != "base" and c.kind not in PRODUCTS]
        self.delta: torch.Tensor | None = None
        # DoRA's factor of each output feature: (N, 1), or (1, W) of a transposed weight.
        self.factor: torch.Tensor | None = None
        self.rounded_before_added = False
        products = [c for c in changes if c.kind in PRODUCTS]
        if products:
            self.delta = self._multiply(products)
        for change in products:
            if "magnitude" in change.keys:
                self.factor = self._normalise(change)

    def _multiply(self, products: list[Change]) -> torch.Tensor:
        """The scaled sum of the products, in the weight's shape."""
        first = products[0]
        alone = len(self.adapters) == 1 and self.adapters[first.adapter].weight == 1
        pairs = []
        for change in products:
            adapter = self.adapters[change.adapter]
            a_RI, b_OR = (adapter.read(change.keys[role]).float() for role in ("A", "B"))
            # Several adapters give one product, as in PEFT's add_weighted_adapter(combination_type="cat").
            pairs.append((a_RI if alone else a_RI * adapter.weight * change.scaling, b_OR))
        if first.kind == "experts" and first.experts > 1:
            delta = functools.reduce(torch.add, (_expert_product(a, b, first) for a, b in pairs))
        else:
            all_a, all_b = zip(*pairs, strict=True)
            delta_OI = torch.cat(all_b, 1) @ torch.cat(all_a) if len(pairs) > 1 else all_b[0] @ all_a[0]
            delta = delta_OI.T if first.transposed else delta_OI
        delta *= first.scaling if alone else 1.0
        self.rounded_before_added = first.kind in ("embedding", "experts") and "magnitude" not in first.keys
        if tuple(delta.shape) != self.shape:
            raise MergeError(f"{self.name} is {list(self.shape)}, but the adapter's product {list(delta.shape)}")
        return delta

    def _normalise(self, change: Change) -> torch.Tensor:
        """DoRA's factor for each output feature: the learned length divided by that of the updated weight.

        Adds the base to `delta`, which holds the updated weight afterwards.
        """
        assert self.delta is not None
        # In the memory layout of the base's weight, on which the rounding of sums over a row depends.
        self.delta = self.delta.contiguous()
        for start, stop in row_ranges(self.shape[0], self.shape[1]):
            self.delta[start:stop] += self._base_rows(start, stop)
        norm_O = torch.linalg.norm(self.delta.T if change.transposed else self.delta, dim=1)
        magnitude_O = self.adapters[change.adapter].read(change.keys["magnitude"]).float()
        factor_O: torch.Tensor = magnitude_O / norm_O
        return factor_O.view((1, -1) if change.transposed else (-1, 1))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the merged tensor, (stop - start, W), in the run's dtype of the base."""
        part_NW = self._base_rows(start, stop)
        if self.factor is not None and self.delta is not None:
            factor = self.factor if self.factor.shape[0] == 1 else self.factor[start:stop]
            part_NW = (factor * self.delta[start:stop]).to(part_NW.dtype)
        elif self.delta is not None:
            delta_NW = self.delta[start:stop].reshape(part_NW.shape)
            if self.rounded_before_added or part_NW.dtype == torch.float32:
                part_NW += delta_NW.to(part_NW.dtype)
            else:
                # The sum in float32, rounded once, as `part_NW += delta_NW` gives it in three times the time.
                part_NW = part_NW.float().add_(delta_NW).to(part_NW.dtype)
        before_NW = None
        for change in self.others:
            adapter = self.adapters[change.adapter]
            if change.kind == "bias":
                bias = adapter.read(change.keys["bias"]).float() * (change.scaling * adapter.weight)
                part_NW += bias.view_as(part_NW)
            elif adapter.weight == 1 and len(self.adapters) == 1:
                self._replace(change, part_NW, start, stop)
            else:
                # Each of several adapters adds its difference from the base.
                before_NW = part_NW.clone() if before_NW is None else before_NW
                replaced_NW = before_NW.clone()
                self._replace(change, replaced_NW, start, stop)
                part_NW += (replaced_NW.float() - before_NW.float()) * adapter.weight
        return part_NW

    def _base_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the base as the run held them: the base's file, or what was saved with the adapter."""
        part_NW = self.read_base(start, stop)
        for change in self.saved_base:
            self._replace(change, part_NW, start, stop)
        return part_NW

    def _replace(self, change: Change, part_NW: torch.Tensor, start: int, stop: int) -> None:
        """Writes an adapter's values over rows `start` to `stop`, which `part_NW` holds."""
        adapter, width = self.adapters[change.adapter], part_NW.shape[1]
        if "value" in change.keys:
            values = adapter.read(change.keys["value"], start * width, stop * width)
            part_NW.copy_(values.view_as(part_NW))
            return
        trained_rows = adapter.read(change.keys["rows"])
        for place, row in enumerate(change.rows):
            if start <= row < stop:
                part_NW[row - start] = trained_rows[place].to(part_NW.dtype)


def _expert_product(a: torch.Tensor, b: torch.Tensor, change: Change) -> torch.Tensor:
    """The update of stacked experts, (E, O, I) or (E, I, O), from A of shape (E * R, I) and B of shape (O, R * E)."""
    a_ERI = a.reshape(change.experts, -1, a.shape[-1])
    b_ORE = b.reshape(b.shape[0], -1, change.experts)
    return torch.einsum("o r e, e r i -> e o i" if change.swapped else "o r e, e r i -> e i o", b_ORE, a_ERI)
