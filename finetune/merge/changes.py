"""Finds the changes of an adapter: which tensors of the base it changes, and how, by PEFT's own layers.

Source: peft 0.21 `tuners/lora/layer.py`, `tuners/trainable_tokens/layer.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.model.attach import check_adapter_files, misfit, peft_weights, refuse_later_options, without_warnings
from finetune.model.patterns import check_patterns
from finetune.model.shards import StoredTensor, read_header, read_tensor
from finetune.system.errors import MergeError, reworded
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

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


def changes_of(
    folder: Path, number: int, model: Any, converted: Path
) -> tuple[list[tuple[str, Change]], set[str], Path]:
    """The changes of an adapter, each with the name of its tensor in memory; and the tensors that stay tied.

    Args:
        folder: The adapter's folder.
        number: The adapter's position in a merge of several, from 0.
        model: The base on the meta device; PEFT wraps it, so it cannot be used for anything else afterwards.
        converted: A folder that is made for an adapter that PEFT renames or fuses when it loads it.

    Returns:
        The changes; the names of tied tensors without changes of their own, which share the changed tensor; and the
        folder of the adapter's tensors under the names in the changes: `folder` or `converted`.

    Raises:
        MergeError: The adapter was trained on another base, is damaged, or has a part that cannot be merged.
        ModelError: The adapter's file cannot be read, or an expression of its config cannot be matched in time.
    """
    import peft

    stored, options = _read_adapter(folder)
    check_patterns(vars(options), model, f"{folder / ADAPTER_CONFIG}: ")
    misfit = reworded(MergeError, f"{folder} does not fit its base", ValueError, TypeError)
    with misfit, torch.device("meta"), without_warnings():
        wrapped = peft.PeftModelForCausalLM(model, options, low_cpu_mem_usage=True)
    expected = dict(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    _check_rows(folder, stored, wrapped)
    renamed = any(key not in expected and not key.endswith(".base_layer.weight") for key in stored)
    if renamed and _write_as_peft_loads(folder, wrapped, converted):
        folder, stored = converted, read_header(converted / ADAPTER_WEIGHTS)
    changes, follows = _layer_changes(folder, wrapped, number)
    for name, _ in changes:
        if name in follows:
            raise MergeError(f"{folder}: {name} is trained, and so are token rows that it shares; it is not merged")
    if options.bias != "none":
        biases = [key for key in expected if key.endswith(".bias") and ".lora_B." not in key]
        changes += [(_base_name(key), Change(number, "value", {"value": key})) for key in biases]
    used = {key for _, change in changes for key in change.keys.values()}
    unused: set[str] = set()
    # PEFT saves an embedding next to the adapter that changes it.
    for key in sorted(stored.keys() - used):
        name = _base_name(key)
        if key.endswith(".base_layer.weight"):
            changes.append((name, Change(number, "base", {"value": key})))
            expected[key] = wrapped.get_parameter(key)
        elif _is_embedding(wrapped, key):
            # It was saved although it was not trained, and PEFT loads it in place of the base's.
            expected[key] = wrapped.get_parameter(key)
            tied = wrapped.base_model.model.all_tied_weights_keys
            if name not in tied:
                changes.append((name, Change(number, "value", {"value": key})))
                follows |= {other for other, source in tied.items() if source == name}
            else:
                unused.add(key)
    _check_tensors(folder, {key: stored[key] for key in stored.keys() - unused}, expected, changes)
    if options.ensure_weight_tying:
        for name, source in model.all_tied_weights_keys.items():
            tied = [[change for n, change in changes if n == side] for side in (name, source)]
            if _changed_alike(folder, stored, *tied):
                follows.add(name)
    return changes, follows, folder


def _read_adapter(folder: Path) -> tuple[dict[str, StoredTensor], Any]:
    """The tensors of an adapter's file and its `peft.PeftConfig`, after a check that it can be merged."""
    import peft

    if not (folder / ADAPTER_CONFIG).is_file():
        raise MergeError(f"{folder} holds no adapter (adapter_config.json)")
    check_adapter_files(folder)
    refuse_later_options(folder)
    stored = read_header(folder / ADAPTER_WEIGHTS)
    with reworded(MergeError, f"{folder / ADAPTER_CONFIG} is damaged", ValueError, TypeError, KeyError, AttributeError):
        options = peft.PeftConfig.from_pretrained(str(folder))
    _refuse_unmergeable(folder, options)
    # The initial values are not needed, because the file holds the trained ones.
    options.init_lora_weights = True
    return stored, options


def _write_as_peft_loads(folder: Path, wrapped: Any, into: Path) -> bool:
    """Writes an adapter's tensors under the names, and fused, as PEFT loads them; False if they do not fit the model.

    PEFT 0.21 takes the names of earlier transformers (Gemma 3 before 4.52), experts one by one, and `.default.`.
    """
    import peft
    from safetensors.torch import save_file

    loaded: dict[str, torch.Tensor] = {}
    load = wrapped.load_state_dict

    def keep(state: dict[str, torch.Tensor], **options: Any) -> Any:
        loaded.update(state)
        return load(state, **options)

    # On the meta device, to which PEFT moves the adapter, the tensors would be lost.
    wrapped.load_state_dict = keep
    try:
        with without_warnings():
            weights = peft_weights(wrapped.get_base_model(), folder)
            result = peft.set_peft_model_state_dict(wrapped, weights, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError):
        return False
    finally:
        del wrapped.load_state_dict
    if misfit(result.missing_keys, result.unexpected_keys):
        return False
    state = dict(peft.get_peft_model_state_dict(wrapped, loaded, save_embedding_layers=False))
    # Embeddings that were saved with the adapter, and are parts of the base.
    state |= {key: weights[key] for key in weights if key.endswith(".base_layer.weight") or _is_embedding(wrapped, key)}
    into.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, into / ADAPTER_WEIGHTS)
    return True


def _check_rows(folder: Path, stored: Mapping[str, StoredTensor], wrapped: Any) -> None:
    """Refuses an adapter whose embeddings have more rows than those of its base."""
    rows = wrapped.get_base_model().get_input_embeddings().weight.shape[0]
    for key, entry in stored.items():
        if key.endswith(("embed_tokens.weight", "lm_head.weight")) and entry.shape[0] > rows:
            raise MergeError(
                f"{folder}: {key} has {entry.shape[0]:,} rows, and the embedding of its base {rows:,}: the vocabulary "
                "was grown before the training; give the model that was grown to --base"
            )


def _is_embedding(wrapped: Any, key: str) -> bool:
    """True if a key is that of the weight of the base's input or output embedding."""
    model = wrapped.get_base_model()
    module = dict(model.named_modules()).get(key.removeprefix("base_model.model.").removesuffix(".weight"))
    return module is not None and module in (model.get_input_embeddings(), model.get_output_embeddings())


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
    return key.removeprefix("base_model.model.").replace(".token_adapter.base_layer", "").replace(".base_layer", "")


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
        raise MergeError(f"{folder} is of another base: it holds {key}, which is no part of this one")
    for key in sorted(used | expected.keys()):
        if key not in stored:
            raise MergeError(f"{folder} is of another base, or damaged: it lacks {key}")
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
