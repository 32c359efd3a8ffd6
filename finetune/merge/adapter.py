"""The changes of an adapter: which tensors of the base it changes, found through PEFT, and the arithmetic.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.model.shards import StoredTensor, all_finite, dtype_name, read_header, read_tensor, row_ranges
from finetune.system.errors import MergeError, reworded
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.system.terminal import quiet

# The kinds of `Change` that are a product of two matrices.
PRODUCTS = ("lora", "embedding", "experts")


@dataclass(frozen=True)
class Change:
    """One adapter's change of one tensor.

    Attributes:
        adapter: The adapter's position among those of the merge, from 0.
        kind: lora (a linear layer's weight), embedding, experts (a parameter of one expert or several), rows (trained
            token rows), value (a trained tensor that replaces the base's), base (the base's own tensor, saved with the
            adapter) or bias.
        keys: The names of tensors in the adapter's file, by role; `magnitude` makes the change DoRA's.
        scaling: The factor of the product or bias.
        transposed: True if the product is transposed before it is added.
        rows: The rows that are replaced, of kind rows.
        experts: The number of experts, of kind experts.
        swapped: True if each expert's matrix is stored as (out, in), of kind experts.
    """

    adapter: int
    kind: str
    keys: dict[str, str]
    scaling: float = 1.0
    transposed: bool = False
    rows: tuple[int, ...] = ()
    experts: int = 1
    swapped: bool = False


# ---------------------------------------------------------------------------------------------------------------
# Which tensors an adapter changes


def changes_of(folder: Path, number: int, model: Any) -> tuple[list[tuple[str, Change]], set[str]]:
    """The changes of an adapter, each with the name of its tensor in memory; and the tied tensors that stay tied.

    Args:
        folder: The adapter's folder.
        number: The adapter's position in a merge of several, from 0.
        model: The base on the meta device; PEFT wraps it, so it cannot be used for anything else afterwards.

    Returns:
        The changes, and the names of tied tensors that take over the changes of the tensor that they are tied to.

    Raises:
        MergeError: The adapter was trained on another base, is damaged, or has a part that cannot be merged.
        ModelError: The adapter's file cannot be read.
    """
    import peft

    stored, options = _read_adapter(folder)
    misfit = reworded(MergeError, f"{folder} does not fit its base", ValueError, TypeError)
    with misfit, torch.device("meta"), quiet():
        wrapped = peft.PeftModelForCausalLM(model, options, low_cpu_mem_usage=True)
    expected = dict(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    changes, follows = _layer_changes(folder, wrapped, number)
    for name, _ in changes:
        if name in follows:
            raise MergeError(f"{folder}: {name} is trained, and so are token rows that it shares; it is not merged")
    if options.bias != "none":
        biases = [key for key in expected if key.endswith(".bias") and ".lora_B." not in key]
        changes += [(_base_name(key), Change(number, "value", {"value": key})) for key in biases]
    used = {key for _, change in changes for key in change.keys.values()}
    # PEFT saves an embedding next to the adapter that changes it.
    for key in sorted(stored.keys() - used):
        if key.endswith(".base_layer.weight"):
            changes.append((_base_name(key), Change(number, "base", {"value": key})))
            expected[key] = wrapped.get_parameter(key)
    _check_tensors(folder, stored, expected, changes)
    if options.ensure_weight_tying:
        for name, source in model.all_tied_weights_keys.items():
            tied = [[change for n, change in changes if n == side] for side in (name, source)]
            if _changed_alike(folder, stored, *tied):
                follows.add(name)
    return changes, follows


def _read_adapter(folder: Path) -> tuple[dict[str, StoredTensor], Any]:
    """The tensors of an adapter's file and its `peft.PeftConfig`, after a check that it can be merged."""
    import peft

    if not (folder / ADAPTER_CONFIG).is_file():
        raise MergeError(f"{folder} holds no adapter (adapter_config.json)")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        there = f"no {ADAPTER_WEIGHTS}"
        if pickled:
            there = "only adapter_model.bin, a pickle, which can run code when it is read"
        raise MergeError(f"{folder} holds {there}; an adapter must be saved as {ADAPTER_WEIGHTS}")
    stored = read_header(folder / ADAPTER_WEIGHTS)
    with reworded(MergeError, f"{folder / ADAPTER_CONFIG} is damaged", ValueError, TypeError, KeyError, AttributeError):
        options = peft.PeftConfig.from_pretrained(str(folder))
    _refuse_unmergeable(folder, options)
    # The initial values are not needed, because the file holds the trained ones.
    options.init_lora_weights = True
    return stored, options


def _refuse_unmergeable(folder: Path, options: Any) -> None:
    """Refuses options of PEFT that have no merged form, or that changed the base's weights before training."""
    kind = getattr(options.peft_type, "value", options.peft_type)
    if kind != "LORA":
        raise MergeError(f"{folder}: peft_type is {kind}; only LORA is merged")
    init = options.init_lora_weights
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "mica")):
        raise MergeError(
            f"{folder}: init_lora_weights is {init}, which changed the base's own weights before training; train it "
            "here, which saves it as plain LoRA, or let PEFT (path_initial_model_for_weight_conversion)"
        )
    for name in ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config"):
        if getattr(options, name, None):
            raise MergeError(f"{folder}: {name} has no merged form; use the adapter without a merge")


def _base_name(key: str) -> str:
    """The base's name of a tensor, from PEFT's."""
    return key.removeprefix("base_model.model.").replace(".base_layer", "")


def _layer_changes(folder: Path, wrapped: Any, number: int) -> tuple[list[tuple[str, Change]], set[str]]:
    """The changes of all layers that PEFT wrapped, and the tied tensors that share another tensor's token rows."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    changes: list[tuple[str, Change]] = []
    follows: set[str] = set()
    for name, module in wrapped.base_model.model.named_modules():
        key, base_name = f"base_model.model.{name}", _base_name(name)
        if isinstance(module, ModulesToSaveWrapper):
            parts = module.modules_to_save["default"].state_dict()
            changes += [(f"{base_name}.{part}", Change(number, "value", {"value": f"{key}.{part}"})) for part in parts]
        elif isinstance(module, TrainableTokensLayer):
            weight = f"{base_name.removesuffix('.token_adapter')}.weight"
            if module.tied_adapter is not None:
                follows.add(weight)
                continue
            rows = tuple(module.token_indices["default"])
            keys = {"rows": f"{key}.trainable_tokens_delta"}
            changes.append((weight, Change(number, "rows", keys, rows=rows)))
        elif isinstance(module, lora.LoraLayer):
            change = _lora_change(folder, name, module, number)
            if getattr(module, "lora_bias", {}).get("default"):
                if getattr(module.get_base_layer(), "bias", None) is None:
                    raise MergeError(f"{folder}: {name} has a lora_bias, but the base has no bias to take it up")
                bias = Change(number, "bias", {"bias": f"{key}.lora_B.bias"}, change.scaling)
                changes.append((f"{base_name}.bias", bias))
            changes.append((f"{base_name}.{getattr(module, 'parameter_name', 'weight')}", change))
    return changes, follows


def _lora_change(folder: Path, name: str, module: Any, number: int) -> Change:
    """The change of one LoRA layer's weight."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    variant = module.lora_variant.get("default")
    if variant is not None and type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
        raise MergeError(f"{folder}: {name} is {type(variant).__name__}, which is not merged here")
    key, scaling = f"base_model.model.{name}", float(module.scaling["default"])
    keys = {"A": f"{key}.lora_A.weight", "B": f"{key}.lora_B.weight"}
    dora = {} if variant is None else {"magnitude": f"{key}.lora_magnitude_vector"}
    if type(module) is lora.Embedding:
        keys = {"A": f"{key}.lora_embedding_A", "B": f"{key}.lora_embedding_B"}
        return Change(number, "embedding", keys | dora, scaling, transposed=True)
    if type(module) is lora.Linear:
        return Change(number, "lora", keys | dora, scaling, transposed=bool(module.fan_in_fan_out))
    if type(module) is lora.ParamWrapper:
        experts, swapped = module.num_experts, module._did_swap_in_out_features
        return Change(number, "experts", keys | dora, scaling, experts=experts, swapped=swapped)
    raise MergeError(f"{folder}: {name} is a {type(module).__name__} layer, which is not merged here")


def _check_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, Any], changes: Sequence[tuple[str, Change]]
) -> None:
    """Refuses an adapter's file with a missing tensor, an unknown one, or one of another shape than PEFT expects."""
    used = {key for _, change in changes for key in change.keys.values()}
    for key in sorted(stored.keys() - used - expected.keys()):
        raise MergeError(f"{folder}: {key} belongs to no layer of its base; name the base that it was trained on")
    for key in sorted(used | expected.keys()):
        if key not in stored:
            raise MergeError(f"{folder}: {key} is missing from {ADAPTER_WEIGHTS}: it is damaged, or of another base")
        if tuple(expected[key].shape) != stored[key].shape:
            raise MergeError(
                f"{folder}: {key} is {list(stored[key].shape)}, but its base needs {list(expected[key].shape)}: "
                "the adapter is of another base"
            )
    assert used == stored.keys(), f"not accounted for: {sorted(stored.keys() - used)}"


def _changed_alike(folder: Path, stored: dict[str, StoredTensor], target: list[Change], source: list[Change]) -> bool:
    """True if two tied layers got the same change. PEFT 0.21 ties their adapters, but a cast separates them."""

    def tensors(side: list[Change]) -> dict[str, torch.Tensor]:
        keys = {role: key for change in side if change.kind != "base" for role, key in change.keys.items()}
        return {role: read_tensor(descriptor, stored[key]) for role, key in keys.items()}

    descriptor = os.open(folder / ADAPTER_WEIGHTS, os.O_RDONLY)
    try:
        at_target, at_source = tensors(target), tensors(source)
    finally:
        os.close(descriptor)
    if "A" in at_target and target[0].kind != source[0].kind:
        # An embedding's matrices are those of an output layer, transposed and exchanged.
        at_source = {"A": at_source["B"].T, "B": at_source["A"].T}
    return not at_target or (
        at_target.keys() == at_source.keys()
        and all(torch.equal(at_target[role], at_source[role]) for role in at_target)
    )


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic


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
        read_base: Returns rows `start` to `stop` of the base's tensor, in the dtype that the run held it in, in
            memory that may be changed.

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
