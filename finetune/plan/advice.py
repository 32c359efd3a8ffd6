"""What to change of a recipe so that a card holds it, or computes in its types at all; as overrides to be copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from finetune.model import compatibility
from finetune.model.precision import decide_precision
from finetune.plan.predict import STRIDE, Predictor, StepSettings, with_length, with_rows
from finetune.recipe.load import Recipe
from finetune.system import devices
from finetune.system.devices import Hardware
from finetune.system.errors import ModelError

# Optimizers that cannot step on weights in parts, beside those in 8 bit (train/arguments.py).
_WHOLE = ("adafactor", "lion", "ademamix", "paged")
# Overrides, and what they make of a setting.
_Step = tuple[list[str], Callable[[StepSettings], StepSettings]]
_LORA = {"target_modules": "all-linear", "trainable_token_indices": "auto", "r": 16, "lora_alpha": 16}
_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def advice(own: Predictor, setting: StepSettings, card: Hardware) -> list[tuple[str, int]]:
    """Up to three changes of which each makes it fit, and the bytes with it; those first that change the result least.

    On several cards what each of them holds.
    """
    found: list[tuple[str, int]] = []
    for text, changed in _changes(own, setting, card):
        if (need := own.required_memory(changed).total) <= card.memory and text not in dict(found):
            found.append((text, need))
            if len(found) == 3:
                break
    return found


def _changes(own: Predictor, setting: StepSettings, card: Hardware) -> Iterator[tuple[str, StepSettings]]:
    steps = list(_steps(own, setting, card))
    if not setting.checkpointing:
        yield _text(steps[0][0]), steps[0][1](setting)
    yield from _smaller(own, setting, card)
    for written, change in steps:
        yield _text(written), change(setting)
    # One alone is not enough: one after the other, with a smaller batch behind.
    done: list[str] = []
    now = setting
    for written, change in steps:
        now, done = change(now), [*done, *written]
        yield _text(done), now
        for smaller, its in _smaller(own, now, card):
            yield _text([*done, smaller]), its
    for length in _shorter(setting.batch.length):
        yield f"training.max_length={length}", with_length(setting, length)
    if card.is_gpu and setting.recipe.model.adapter is None:
        yield from _in_parts(setting, card)
    for length in _shorter(setting.batch.length):
        smallest = with_length(with_rows(now, 1), length)
        yield (
            _text([*done, "training.per_device_train_batch_size=1", f"training.max_length={length}"]),
            smallest,
        )


def _steps(own: Predictor, setting: StepSettings, card: Hardware) -> Iterator[_Step]:
    recipe = setting.recipe
    if not setting.checkpointing:
        yield ["training.gradient_checkpointing=true"], lambda s: replace(s, checkpointing=True)
    eight = "adamw_8bit" if own.step(setting).paged or not card.is_gpu else "paged_adamw_8bit"
    if "8bit" not in setting.optim and not setting.sharded:  # weights in parts take no such steps
        yield [f"training.optim={eight}"], lambda s: replace(s, optim=eight)
    if recipe.lora is None:
        yield ["lora.r=16", "lora.lora_alpha=16"], lambda s: replace(s, recipe=replace(s.recipe, lora=_LORA))
    if recipe.quantization is not None:
        return
    bits = dict(_BITS)
    if setting.sharded:
        bits["bnb_4bit_quant_storage"] = _storage(recipe, card)
    written = [f"quantization.{name}={str(value).lower()}" for name, value in bits.items()]
    if recipe.lora is not None:
        yield written, lambda s: replace(s, recipe=replace(s.recipe, quantization=bits))
    else:
        both: dict[str, Any] = {"lora": _LORA, "quantization": bits}
        yield (
            ["lora.r=16", "lora.lora_alpha=16", *written],
            lambda s: replace(s, recipe=replace(s.recipe, **both)),
        )


def _in_parts(setting: StepSettings, card: Hardware) -> Iterator[tuple[str, StepSettings]]:
    """On more cards, or on as many in parts."""
    if (parts := with_fsdp(setting, card)) is None:
        return
    for count in (2, 4, 8, 16):
        if count > setting.cards or (count == setting.cards and not setting.sharded):
            head = f"{count} cards with accelerate_configs/fsdp.yaml"
            yield _text([head, *(["and", *parts[1]] if parts[1] else [])]), replace(parts[0], cards=count)


def with_fsdp(setting: StepSettings, card: Hardware) -> tuple[StepSettings, list[str]] | None:
    """The setting as FSDP takes it, and the overrides that make it so; None where weights cannot be cut."""
    recipe, written = setting.recipe, list[str]()
    if setting.optim.startswith(_WHOLE) or "8bit" in setting.optim or "bnb" in setting.optim:
        written.append("training.optim=adamw_torch_fused")
        setting = replace(setting, optim="adamw_torch_fused")
    if recipe.quantization is not None:
        if recipe.quantization.get("load_in_8bit"):
            return None
        storage = _storage(recipe, card)
        if recipe.quantization.get("bnb_4bit_quant_storage") != storage:
            written.append(f"quantization.bnb_4bit_quant_storage={storage}")
        recipe = replace(recipe, quantization=recipe.quantization | {"bnb_4bit_quant_storage": storage})
    return replace(setting, recipe=recipe, sharded=True), written


def _storage(recipe: Recipe, card: Hardware) -> str:
    return str(decide_precision(recipe, card.device).asked).removeprefix("torch.")


def _smaller(own: Predictor, setting: StepSettings, card: Hardware) -> Iterator[tuple[str, StepSettings]]:
    """The largest part of the batch that fits, as many more of them a step: the same result."""
    rows = setting.batch.rows
    for part in (n for n in range(2, rows + 1) if rows % n == 0):
        changed = replace(with_rows(setting, rows // part), accumulation=setting.accumulation * part)
        if own.required_memory(changed).total <= card.memory:
            yield (
                f"training.per_device_train_batch_size={rows // part} "
                f"training.gradient_accumulation_steps={setting.accumulation * part}",
                changed,
            )
            return


def _shorter(length: int) -> list[int]:
    return [cut for cut in (length * 3 // 4, length // 2, length // 4) if cut >= STRIDE]


def _text(written: list[str]) -> str:
    return " ".join(dict.fromkeys(written))


# ---------------------------------------------------------------------------------------------------------------
# Types


def why_unsupported(recipe: Recipe, config: Any, device: devices.Device) -> str:
    """Why the recipe cannot be trained on such a device as it is written; empty where it can."""
    try:
        precision = decide_precision(recipe, device)
        compatibility.check_attention(recipe.model.attn_implementation, config, device, precision.in_float32)
    except ModelError as error:
        return str(error)
    if precision.computes == "fp16" and device.capability is None:
        return "model.dtype, training.fp16: float16 is trained on a GPU only; on a CPU write float32"
    return ""


def supported_variant(recipe: Recipe, device: devices.Device) -> tuple[Recipe, list[str]]:
    """The recipe in types and attention that the device computes in, and the overrides that make it so."""
    model, training, bits = recipe.model, dict(recipe.training), dict(recipe.quantization or {})
    wrong, right = ("float16", "float32") if device.capability is None else ("bfloat16", "float16")
    written: list[str] = []

    def instead(key: str, value: Any) -> None:
        section, _, name = key.partition(".")
        {"training": training, "quantization": bits}[section][name] = value
        written.append(f"{key}={str(value).lower()}")

    if not device.bf16 or device.capability is None:
        if model.dtype == wrong:
            model = model.model_copy(update={"dtype": right})
            written.append(f"model.dtype={right}")
        short = {"bfloat16": "bf16", "float16": "fp16"}
        for name in (short[wrong], f"{short[wrong]}_full_eval"):
            if training.get(name):
                instead(f"training.{name}", False)
                if name == "bf16" and model.dtype == "float32":
                    instead("training.fp16", True)
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            if str(bits.get(name)).removeprefix("torch.") == wrong:
                instead(f"quantization.{name}", right)
    cpu, wanted = device.capability is None, str(model.attn_implementation)
    flash = wanted.startswith("flash_attention_") and (cpu or (device.capability or (0,)) < (8, 0))
    if flash or (cpu and wanted == "flex_attention"):
        model = model.model_copy(update={"attn_implementation": None})
        written.append("model.attn_implementation=null")
    return replace(recipe, model=model, training=training, quantization=bits or None), written
