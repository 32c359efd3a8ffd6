"""An adapter: which tensors of its base it changes, as PEFT tells, and the arithmetic of the change.

The arithmetic is that of PEFT's `merge_and_unload()` to the bit: a linear layer's update is added in float32 and
rounded once, an embedding's and a stacked expert's is rounded before it is added.

Source: peft 0.21 `tuners/lora/layer.py` (`Linear.merge`, `Embedding.merge`, `ParamWrapper.merge`),
`tuners/lora/variants.py` (`DoraLinearVariant.merge_unsafe`), `tuners/trainable_tokens/layer.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.model.shards import StoredTensor, all_finite, read_header, read_tensor, row_ranges
from finetune.system.errors import MergeError
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.system.terminal import quiet

# Changes that are a product of two matrices.
PRODUCTS = ("lora", "embedding", "experts")


@dataclass(frozen=True)
class Change:
    """What one adapter does to one tensor.

    `kind` is lora (a linear layer), embedding, experts (a parameter, of one expert or several), rows, value (in place
    of the base's, trained), base (the base's own, saved beside its adapter) or bias. `keys` names the tensors in the
    adapter's file by their role; `magnitude` makes it DoRA.
    """

    adapter: int
    kind: str
    keys: dict[str, str]
    scaling: float = 1.0
    transposed: bool = False
    rows: tuple[int, ...] = ()
    experts: int = 1
    swapped: bool = False


def changes_of(folder: Path, number: int, model: Any) -> tuple[list[tuple[str, Change]], set[str]]:
    """What an adapter changes, each change with the name in memory of its tensor; and the names that follow a tied one.

    Args:
        folder: Holds the adapter.
        number: Which of several it is.
        model: Its base on the meta device, which is wrapped and good for nothing else afterwards.

    Raises:
        MergeError: It is of another base, or holds what has no merged form.
    """
    import peft

    if not (folder / ADAPTER_CONFIG).is_file():
        raise MergeError(f"{folder} holds no adapter (adapter_config.json)")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        what = (
            "only adapter_model.bin, a pickle, which can run code when it is read"
            if pickled
            else f"no {ADAPTER_WEIGHTS}"
        )
        raise MergeError(f"{folder} holds {what}; an adapter must be saved as {ADAPTER_WEIGHTS}")
    stored = read_header(folder / ADAPTER_WEIGHTS)
    try:
        options = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MergeError(f"{folder / ADAPTER_CONFIG} is damaged: {_line(error)}") from error
    _refuse(folder, options)
    # What training began with is in the file; here it would only be computed in vain.
    options.init_lora_weights = True
    try:
        with torch.device("meta"), quiet():
            wrapped = peft.PeftModelForCausalLM(model, options, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise MergeError(f"{folder} does not fit its base: {_line(error)}") from error
    expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    found, follows = _walk(folder, wrapped, number)
    for name, _ in found:
        if name in follows:
            raise MergeError(
                f"{folder}: {name} is trained, and so are token rows that it shares; it is not merged"
            )
    if options.bias != "none":
        for key in expected:
            if key.endswith(".bias") and ".lora_B." not in key:
                plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
                found.append((plain, Change(number, "value", {"value": key})))
    taken = {key for _, change in found for key in change.keys.values()}
    for key in stored.keys() - taken:
        # PEFT saves the embedding itself beside the adapter that it carries.
        if key.endswith(".base_layer.weight"):
            plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
            found.append((plain, Change(number, "base", {"value": key})))
            taken.add(key)
            expected[key] = wrapped.get_parameter(key)
        elif key not in expected:
            raise MergeError(
                f"{folder}: {key} leads to no part of its base; was it trained on another model?"
            )
    for key in sorted(taken | expected.keys()):
        if key not in stored:
            raise MergeError(
                f"{folder}: {key} is missing from {ADAPTER_WEIGHTS}; is it of another base, or cut off?"
            )
        if tuple(expected[key].shape) != stored[key].shape:
            raise MergeError(
                f"{folder}: {key} is {list(stored[key].shape)}, but its base needs {list(expected[key].shape)}: "
                "the adapter is of another base"
            )
    assert taken == stored.keys(), f"not accounted for: {sorted(stored.keys() - taken)}"
    if options.ensure_weight_tying:
        for name, source in model.all_tied_weights_keys.items():
            sides = [[c for n, c in found if n == side] for side in (name, source)]
            if _same(folder, stored, *sides):
                follows.add(name)
    return found, follows


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _same(folder: Path, stored: dict[str, StoredTensor], target: list[Change], source: list[Change]) -> bool:
    """Whether two tied layers were changed alike. PEFT ties their adapters, but not once it has cast them (0.21)."""
    descriptor = os.open(folder / ADAPTER_WEIGHTS, os.O_RDONLY)
    try:
        ours, theirs = (
            {
                role: read_tensor(descriptor, stored[key])
                for c in side
                if c.kind != "base"
                for role, key in c.keys.items()
            }
            for side in (target, source)
        )
    finally:
        os.close(descriptor)
    if not ours:
        return True
    if (
        "A" in ours and target[0].kind != source[0].kind
    ):  # an embedding's factors are an output layer's, turned
        theirs = {"A": theirs["B"].T, "B": theirs["A"].T}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[role], theirs[role]) for role in ours)


def _refuse(folder: Path, options: Any) -> None:
    """Refuses, by name, what has no merged form, or whose base was changed when training began."""
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
            raise MergeError(f"{folder}: {name} has no merged form; answer with the adapter instead")


def _walk(folder: Path, wrapped: Any, number: int) -> tuple[list[tuple[str, Change]], set[str]]:
    """Every layer that PEFT wrapped, as changes of the base's tensors."""
    from peft.tuners.lora import layer as lora
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    found: list[tuple[str, Change]] = []
    follows: set[str] = set()
    for name, module in wrapped.base_model.model.named_modules():
        key = f"base_model.model.{name}"
        plain = name.replace(".base_layer", "")
        if isinstance(module, ModulesToSaveWrapper):
            parts = module.modules_to_save["default"].state_dict()
            found += [(f"{plain}.{p}", Change(number, "value", {"value": f"{key}.{p}"})) for p in parts]
        elif isinstance(module, TrainableTokensLayer):
            plain = plain.removesuffix(".token_adapter")
            if module.tied_adapter is not None:
                follows.add(f"{plain}.weight")
                continue
            rows = {"rows": f"{key}.trainable_tokens_delta"}
            indices = tuple(module.token_indices["default"])
            found.append((f"{plain}.weight", Change(number, "rows", rows, rows=indices)))
        elif isinstance(module, lora.LoraLayer):
            variant = module.lora_variant.get("default")
            if variant is not None and type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
                raise MergeError(f"{folder}: {name} is {type(variant).__name__}, which is not merged here")
            scaling = float(module.scaling["default"])
            if type(module) is lora.Embedding:
                keys = {"A": f"{key}.lora_embedding_A", "B": f"{key}.lora_embedding_B"}
                change = Change(number, "embedding", keys, scaling, transposed=True)
            elif type(module) is lora.Linear:
                keys = {"A": f"{key}.lora_A.weight", "B": f"{key}.lora_B.weight"}
                change = Change(number, "lora", keys, scaling, transposed=bool(module.fan_in_fan_out))
            elif type(module) is lora.ParamWrapper:
                keys = {"A": f"{key}.lora_A.weight", "B": f"{key}.lora_B.weight"}
                change = Change(
                    number,
                    "experts",
                    keys,
                    scaling,
                    experts=module.num_experts,
                    swapped=module._did_swap_in_out_features,
                )
            else:
                raise MergeError(
                    f"{folder}: {name} is a {type(module).__name__} layer, which is not merged here"
                )
            if variant is not None:
                change.keys["magnitude"] = f"{key}.lora_magnitude_vector"
            if getattr(module, "lora_bias", {}).get("default"):
                if getattr(module.get_base_layer(), "bias", None) is None:
                    raise MergeError(
                        f"{folder}: {name} has a lora_bias, but the base has no bias to take it up"
                    )
                bias = Change(number, "bias", {"bias": f"{key}.lora_B.bias"}, scaling)
                found.append((f"{plain}.bias", bias))
            found.append((f"{plain}.{getattr(module, 'parameter_name', 'weight')}", change))
    return found, follows


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic


class Adapter:
    """An adapter's file and how much it weighs; every number in it is looked at before the first is used."""

    def __init__(self, folder: Path, weight: float) -> None:
        self.weight = weight
        self.path = folder / ADAPTER_WEIGHTS
        self.header = read_header(self.path)

    def __enter__(self) -> Adapter:
        self.descriptor = os.open(self.path, os.O_RDONLY)
        for name, stored in self.header.items():
            if not stored.dtype.is_floating_point:
                os.close(self.descriptor)
                raise MergeError(
                    f"{self.path}: {name} is {str(stored.dtype).removeprefix('torch.')}, not a weight"
                )
            for start, stop in row_ranges(stored.count):
                if not all_finite(read_tensor(self.descriptor, stored, start, stop)):
                    os.close(self.descriptor)
                    raise MergeError(
                        f"{self.path}: {name} holds NaN or infinity; the run that saved it is broken"
                    )
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.descriptor)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The numbers `start` to `stop` of a tensor, flat; of the whole, in its shape."""
        return read_tensor(self.descriptor, self.header[name], start, stop)


def check_combination(name: str, changes: Sequence[Change], adapters: Sequence[Adapter]) -> None:
    """Refuses what adapters cannot do to one tensor together.

    Raises:
        MergeError: They change it in different ways, or one of them is a DoRA that is weighted or not alone.
    """
    products = [c for c in changes if c.kind in PRODUCTS]
    if len({(c.kind, c.transposed, c.experts, c.swapped) for c in products}) > 1:
        raise MergeError(f"{name}: the adapters change it in different ways; merge them one after the other")
    for change in products:
        if "magnitude" in change.keys and (len(products) > 1 or adapters[change.adapter].weight != 1):
            raise MergeError(f"{name}: DoRA adapters cannot be weighted or added to others; merge it alone")


class Update:
    """What the adapters do to one tensor, rows at a time. Products are formed once and whole, as PEFT forms them."""

    def __init__(
        self,
        name: str,
        changes: Sequence[Change],
        shape: tuple[int, ...],
        adapters: Sequence[Adapter],
        held: Callable[[int, int], torch.Tensor],
    ) -> None:
        self.name, self.shape, self.adapters, self.held = name, shape, adapters, held
        self.own = [c for c in changes if c.kind == "base"]
        self.delta: torch.Tensor | None = None
        self.factor: torch.Tensor | None = None
        self.rounded = False
        products = [c for c in changes if c.kind in PRODUCTS]
        self.others = [c for c in changes if c not in products and c not in self.own]
        if products:
            self._multiply(products)
        dora = [c for c in products if "magnitude" in c.keys]
        if dora:
            self._normalise(dora[0])

    def _multiply(self, products: list[Change]) -> None:
        first = products[0]
        alone = len(self.adapters) == 1 and self.adapters[first.adapter].weight == 1
        many_a, many_b = [], []
        for change in products:
            adapter = self.adapters[change.adapter]
            a, b = adapter.read(change.keys["A"]).float(), adapter.read(change.keys["B"]).float()
            if not alone:  # one product of all, as PEFT's add_weighted_adapter(combination_type="cat")
                a = a * adapter.weight * change.scaling
            many_a.append(a)
            many_b.append(b)
        scaling = first.scaling if alone else 1.0
        if first.kind == "experts" and first.experts > 1:
            self.delta = sum(  # type: ignore[assignment]
                _experts(a, b, first) for a, b in zip(many_a, many_b, strict=True)
            )
        else:
            self.delta = (
                (many_b[0] @ many_a[0]) if len(products) == 1 else torch.cat(many_b, 1) @ torch.cat(many_a)
            )
            self.delta = self.delta.T if first.transposed else self.delta
        assert self.delta is not None
        self.delta *= scaling
        self.rounded = first.kind in ("embedding", "experts") and "magnitude" not in first.keys
        if tuple(self.delta.shape) != self.shape:
            raise MergeError(
                f"{self.name} is {list(self.shape)}, but the adapter's product {list(self.delta.shape)}"
            )

    def _base(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the base as the run held them, in memory of their own."""
        part = self.held(start, stop)
        for change in self.own:
            self._replace(change, self.adapters[change.adapter], part, start, stop)
        return part

    def _normalise(self, change: Change) -> None:
        """DoRA: the updated weight, each of its output rows brought to the learned length."""
        assert self.delta is not None
        self.delta = self.delta.contiguous()  # laid out as the base's: sums over a row depend on it
        for start, stop in row_ranges(self.shape[0], self.shape[1]):
            self.delta[start:stop] += self._base(start, stop)
        norm = torch.linalg.norm(self.delta.T if change.transposed else self.delta, dim=1)
        magnitude = self.adapters[change.adapter].read(change.keys["magnitude"]).float()
        self.factor = magnitude / norm
        self.factor = self.factor.view(1, -1) if change.transposed else self.factor.view(-1, 1)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the base, updated, in the type that the run held them in."""
        part = self._base(start, stop)
        if self.factor is not None and self.delta is not None:
            factor = self.factor if self.factor.shape[0] == 1 else self.factor[start:stop]
            part = (factor * self.delta[start:stop]).to(part.dtype)
        elif self.delta is not None:
            delta = self.delta[start:stop].reshape(part.shape)
            if self.rounded or part.dtype == torch.float32:
                part += delta.to(part.dtype)
            else:  # added in float32 and rounded once, as `part += delta` does, in a third of its time
                part = part.float().add_(delta).to(part.dtype)
        origin = None
        for change in self.others:
            adapter = self.adapters[change.adapter]
            if change.kind == "bias":
                part += (
                    adapter.read(change.keys["bias"]).float() * (change.scaling * adapter.weight)
                ).view_as(part)
                continue
            if adapter.weight == 1 and len(self.adapters) == 1:
                self._replace(change, adapter, part, start, stop)
                continue
            # Of several, each adds what it moved away from the base.
            origin = part.clone() if origin is None else origin
            moved = origin.clone()
            self._replace(change, adapter, moved, start, stop)
            part += (moved.float() - origin.float()) * adapter.weight
        return part

    def _replace(self, change: Change, adapter: Adapter, part: torch.Tensor, start: int, stop: int) -> None:
        width = part.shape[1]
        if "value" in change.keys:
            part.copy_(adapter.read(change.keys["value"], start * width, stop * width).view_as(part))
            return
        values = adapter.read(change.keys["rows"])
        for place, row in enumerate(change.rows):
            if start <= row < stop:
                part[row - start] = values[place].to(part.dtype)


def _experts(a: torch.Tensor, b: torch.Tensor, change: Change) -> torch.Tensor:
    """The update of stacked experts; `a` is (experts * rank, in), `b` (out, rank * experts)."""
    a = a.reshape(change.experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, change.experts)
    return torch.einsum("o r e, e r i -> e o i" if change.swapped else "o r e, e r i -> e i o", b, a)
