"""Loads a run, a merged model or any base model to answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.chat import Chat
from finetune.model import compatibility, precision
from finetune.model.attach import attach_adapter
from finetune.model.generate import Generator
from finetune.model.load import eos_tokens, load_base, load_tokenizer
from finetune.model.locate import Base
from finetune.model.provenance import (
    BaseSections,
    adapter_base_sections,
    adapter_below,
    environment_of,
    has_tokenizer,
    is_adapter,
)
from finetune.model.quantization import INT8, NF4
from finetune.model.token_rows import lighten_trainable_tokens
from finetune.recipe.schema import ModelSection
from finetune.system import devices
from finetune.system.errors import ModelError


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded to answer; by default as it was trained.

    Attributes:
        dtype: `float32`, `bfloat16` or `float16`.
        quantize: `int8` or `nf4`, by bitsandbytes.
        attn: `attn_implementation`.
        device: The device to load the model on; by default a GPU if there is one; `auto` spreads it over all GPUs.
        compiled: Compiles the model with torch, for a cache of fixed size: slow first answers, faster later ones.
        as_is: Computes in `dtype` throughout, as other programs do, even if the device only emulates that dtype.
    """

    dtype: str | None = None
    quantize: str | None = None
    attn: str | None = None
    device: str | None = None
    compiled: bool = False
    as_is: bool = False


def load_generator(
    name: str,
    options: LoadOptions = LoadOptions(),
    adapter: bool = True,
    base_model: str | None = None,
    sections: BaseSections | None = None,
    locate_base: Callable[[ModelSection], Base] = Base.of,
    trust_remote_code: bool = False,
) -> Generator:
    """Loads a run (its adapter on its base, as it was trained), a directory of full weights, or a base model.

    Args:
        name: A run or model directory, or what `model.name_or_path` takes.
        options: How it is loaded, where that is not as it was trained.
        adapter: False answers with the run's base alone, through the run's chat template.
        base_model: The path or id of a run's base, in place of the one that its files name.
        sections: For a model without an adapter: the sections of the recipe that says how to load it and which chat
            template to use.
        locate_base: Locates a base; a caller that loads several models passes one that keeps those located before.
        trust_remote_code: True if the user lets Python files of the model's repository run.

    Raises:
        ModelError: The run or model does not exist or cannot be loaded, or this device cannot compute in the dtype or
            attention.
        RunError: A file of the run is damaged.
        TemplateError: The chat template cannot be used.
    """
    if options.device:
        compatibility.check_device(options.device)
    folder, adapted = Path(name), is_adapter(Path(name))
    section, quantization = _sections_of(name, base_model, sections, trust_remote_code)
    base = locate_base(section)
    model = _load_model(name, base, section, quantization, options, adapter)
    own_tokenizer = folder.is_dir() and (has_tokenizer(folder) if adapted else sections is None)
    own_section = ModelSection(name_or_path=name, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(own_section) if own_tokenizer else load_tokenizer(section, base)
    stop_ids = tuple(eos_tokens(model.generation_config, tokenizer))
    return Generator(model, Chat(tokenizer), stop_ids, options.compiled)


def _load_model(
    name: str,
    base: Base,
    section: ModelSection,
    quantization: dict[str, Any] | None,
    options: LoadOptions,
    adapter: bool,
) -> Any:
    """The model of `load_generator`, on its device."""
    import torch

    folder, adapted = Path(name), is_adapter(Path(name))
    device = devices.device_of(options.device)
    key = "--dtype" if options.dtype else f"{name}: model.dtype"
    dtype = precision.choose_dtype(options.dtype or section.dtype, devices.Device() if options.as_is else device, key)
    key = "--attn" if options.attn else f"{name}: model.attn_implementation"
    attn = options.attn or section.attn_implementation
    in_float32 = dtype == torch.float32
    compatibility.check_attention(attn, base.config, device, in_float32, training=False, key=key)
    stored_quantised = getattr(base.config, "quantization_config", None) is not None
    if options.quantize:
        if stored_quantised:
            raise ModelError(f"{name} is quantised already; leave out --quantize")
        quantization = {"int8": INT8, "nf4": NF4}[options.quantize]
    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Quantised weights cannot be moved to another device later.
    placed_when_loaded = place == "auto" or quantization or stored_quantised
    device_map = place if place == "auto" else {"": place}
    model = load_base(
        base.path,
        dtype,
        quantization,
        config=compatibility.dequantised_when_loaded(base.config) if adapted else base.config,
        revision=section.revision,
        as_is=options.as_is and not adapted,
        attn_implementation=attn,
        trust_remote_code=section.trust_remote_code,
        **({"device_map": device_map} if placed_when_loaded else {}),
    )
    if adapted and adapter:
        model = attach_adapter(model, folder)
        lighten_trainable_tokens(model)
    if not placed_when_loaded:
        model = model.to(place)
    model.eval()
    if options.compiled and not getattr(getattr(model, "hf_quantizer", None), "is_compileable", True):
        raise ModelError(f"--compile: {name} is quantised in a way that torch cannot compile; leave out --compile")
    return model


def _sections_of(
    name: str, base_model: str | None, sections: BaseSections | None, trust_remote_code: bool
) -> BaseSections:
    """The sections that a model is loaded by; the arguments are those of `load_generator`.

    Raises:
        ModelError: It is neither a run nor a model, or a whole model and `base_model` is given.
        RunError: A file of the run is damaged.
    """
    folder = Path(name)
    if not is_adapter(folder):
        if folder.is_dir() and not (folder / "config.json").exists():
            raise ModelError(
                f"{name}: neither a finished run (adapter_config.json) nor a model (config.json){adapter_below(folder)}"
            )
        if base_model:
            raise ModelError(f"--base {base_model}: {name} is no run, but a whole model; leave out --base")
        return sections or (ModelSection(name_or_path=name, trust_remote_code=trust_remote_code), None)
    section, quantization = adapter_base_sections(folder, base_model, trust_remote_code)
    if not base_model and (commit := environment_of(folder).get("base_commit")):
        section = section.model_copy(update={"revision": commit})
    return section, quantization
