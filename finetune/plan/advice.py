"""Changes of a recipe, as overrides, with which it fits the memory or computes in types that the hardware supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from finetune.model import compatibility
from finetune.model.precision import decide_precision
from finetune.model.quantization import NF4
from finetune.plan.predict import Predictor
from finetune.plan.search import STRIDE
from finetune.plan.settings import StepSettings, with_length, with_rows
from finetune.recipe.load import Recipe
from finetune.system.devices import Device, Hardware
from finetune.system.errors import ModelError

# Optimizers, apart from those in 8 bit, that cannot step on sharded weights (`train.arguments.check_launch`).
_NOT_SHARDED = ("adafactor", "lion", "ademamix", "paged")
_LORA = {"target_modules": "all-linear", "trainable_token_indices": "auto", "r": 16, "lora_alpha": 16}
_LORA_OVERRIDES = ["lora.r=16", "lora.lora_alpha=16"]
# Overrides, and a function that applies them to settings.
_Change = tuple[list[str], Callable[[StepSettings], StepSettings]]


def changes_that_fit(predictor: Predictor, settings: StepSettings, hardware: Hardware) -> list[tuple[str, int]]:
    """Up to three changes, each of which makes a recipe fit, with the bytes that each GPU then needs.

    Changes that alter the trained model least come first.

    Args:
        predictor: The predictor of the recipe's memory.
        settings: The settings that do not fit.
        hardware: The GPU or CPU to fit into.
    """
    fitting: dict[str, int] = {}
    for text, changed in _changes(predictor, settings, hardware):
        required = predictor.required_memory(changed).total
        if required <= hardware.memory:
            fitting.setdefault(text, required)
        if len(fitting) == 3:
            break
    return list(fitting.items())


def _changes(predictor: Predictor, settings: StepSettings, hardware: Hardware) -> Iterator[tuple[str, StepSettings]]:
    """Changes to try, with the changed settings: single ones, combined ones, shorter rows, more GPUs."""
    changes = list(_single_changes(predictor, settings, hardware))
    if not settings.checkpointing:
        yield _joined(changes[0][0]), changes[0][1](settings)
    yield from _smaller_batch(predictor, settings, hardware)
    for overrides, change in changes:
        yield _joined(overrides), change(settings)
    combined: list[str] = []
    changed = settings
    for overrides, change in changes:
        changed, combined = change(changed), [*combined, *overrides]
        yield _joined(combined), changed
        for text, smaller in _smaller_batch(predictor, changed, hardware):
            yield _joined([*combined, text]), smaller
    for length in _shorter(settings.batch.length):
        yield f"training.max_length={length}", with_length(settings, length)
    if hardware.is_gpu and settings.recipe.model.adapter is None:
        yield from _more_gpus(settings, hardware)
    for length in _shorter(settings.batch.length):
        overrides = [*combined, "training.per_device_train_batch_size=1", f"training.max_length={length}"]
        yield _joined(overrides), with_length(with_rows(changed, 1), length)


def _single_changes(predictor: Predictor, settings: StepSettings, hardware: Hardware) -> Iterator[_Change]:
    recipe = settings.recipe
    if not settings.checkpointing:
        yield ["training.gradient_checkpointing=true"], lambda s: replace(s, checkpointing=True)
    if "8bit" not in settings.optim and not settings.fsdp:
        optim = "adamw_8bit" if predictor.step(settings).paged or not hardware.is_gpu else "paged_adamw_8bit"
        yield [f"training.optim={optim}"], lambda s: replace(s, optim=optim)
    if recipe.lora is None:
        yield _LORA_OVERRIDES, lambda s: replace(s, recipe=replace(s.recipe, lora=_LORA))
    if recipe.quantization is not None:
        return
    nf4 = NF4 | ({"bnb_4bit_quant_storage": _storage(recipe, hardware)} if settings.fsdp else {})
    overrides = [f"quantization.{name}={str(value).lower()}" for name, value in nf4.items()]
    lora = recipe.lora or _LORA
    yield (
        overrides if recipe.lora is not None else [*_LORA_OVERRIDES, *overrides],
        lambda s: replace(s, recipe=replace(s.recipe, lora=lora, quantization=nf4)),
    )


def _smaller_batch(
    predictor: Predictor, settings: StepSettings, hardware: Hardware
) -> Iterator[tuple[str, StepSettings]]:
    """The largest fraction of the batch that fits, with more batches per step, which trains the same model."""
    rows = settings.batch.rows
    for divisor in (n for n in range(2, rows + 1) if rows % n == 0):
        accumulation = settings.accumulation * divisor
        changed = replace(with_rows(settings, rows // divisor), accumulation=accumulation)
        if predictor.required_memory(changed).total <= hardware.memory:
            yield (
                f"training.per_device_train_batch_size={rows // divisor} "
                f"training.gradient_accumulation_steps={accumulation}",
                changed,
            )
            return


def _more_gpus(settings: StepSettings, hardware: Hardware) -> Iterator[tuple[str, StepSettings]]:
    """More GPUs, or as many, under FSDP."""
    if (variant := with_fsdp(settings, hardware)) is None:
        return
    sharded, overrides = variant
    for count in (2, 4, 8, 16):
        if count > settings.gpus or (count == settings.gpus and not settings.fsdp):
            head = f"{count} GPUs with accelerate_configs/fsdp.yaml"
            yield _joined([head, *(["and", *overrides] if overrides else [])]), replace(sharded, gpus=count)


def with_fsdp(settings: StepSettings, hardware: Hardware) -> tuple[StepSettings, list[str]] | None:
    """The settings under FSDP, and the overrides that FSDP needs; None if it cannot shard the weights."""
    recipe, overrides = settings.recipe, list[str]()
    if settings.optim.startswith(_NOT_SHARDED) or "8bit" in settings.optim or "bnb" in settings.optim:
        overrides.append("training.optim=adamw_torch_fused")
        settings = replace(settings, optim="adamw_torch_fused")
    if recipe.quantization is not None:
        if recipe.quantization.get("load_in_8bit"):
            return None
        storage = _storage(recipe, hardware)
        if recipe.quantization.get("bnb_4bit_quant_storage") != storage:
            overrides.append(f"quantization.bnb_4bit_quant_storage={storage}")
        recipe = replace(recipe, quantization=recipe.quantization | {"bnb_4bit_quant_storage": storage})
    return replace(settings, recipe=recipe, fsdp=True), overrides


def _storage(recipe: Recipe, hardware: Hardware) -> str:
    return str(decide_precision(recipe, hardware.device).asked).removeprefix("torch.")


def _shorter(length: int) -> list[int]:
    return [shorter for shorter in (length * 3 // 4, length // 2, length // 4) if shorter >= STRIDE]


def _joined(overrides: list[str]) -> str:
    return " ".join(dict.fromkeys(overrides))


# ---------------------------------------------------------------------------------------------------------------
# Types


def why_unsupported(recipe: Recipe, config: Any, device: Device) -> str:
    """Why a recipe as it is written cannot be trained on a device, in one line; empty if it can."""
    try:
        precision = decide_precision(recipe, device)
        compatibility.check_attention(recipe.model.attn_implementation, config, device, precision.in_float32)
    except ModelError as error:
        return str(error)
    if precision.computes == "fp16" and device.capability is None:
        return "model.dtype, training.fp16: float16 is trained on a GPU only; on a CPU write float32"
    return ""


def supported_variant(recipe: Recipe, device: Device) -> tuple[Recipe, list[str]]:
    """The recipe with dtypes and attention that a device supports, and the overrides that make it so."""
    model, training, bits = recipe.model, dict(recipe.training), dict(recipe.quantization or {})
    cpu = device.capability is None
    wrong, right = ("float16", "float32") if cpu else ("bfloat16", "float16")
    overrides: list[str] = []

    def override(key: str, value: Any) -> None:
        section, _, name = key.partition(".")
        {"training": training, "quantization": bits}[section][name] = value
        overrides.append(f"{key}={str(value).lower()}")

    if cpu or not device.bf16:
        if model.dtype == wrong:
            model = model.model_copy(update={"dtype": right})
            overrides.append(f"model.dtype={right}")
        short = {"bfloat16": "bf16", "float16": "fp16"}[wrong]
        if training.get(short):
            override(f"training.{short}", False)
            if short == "bf16" and model.dtype == "float32":
                override("training.fp16", True)
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            if str(bits.get(name)).removeprefix("torch.") == wrong:
                override(f"quantization.{name}", right)
    attention = str(model.attn_implementation)
    flash = attention.startswith("flash_attention_") and (device.capability or (0, 0)) < (8, 0)
    if flash or (cpu and attention == "flex_attention"):
        model = model.model_copy(update={"attn_implementation": None})
        overrides.append("model.attn_implementation=null")
    return replace(recipe, model=model, training=training, quantization=bits or None), overrides
