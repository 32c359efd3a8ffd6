"""Loads a recipe's base model and its tokenizer."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.chat import Chat
from finetune.data.template import load_template, set_system_role
from finetune.data.template_trial import try_template
from finetune.data.template_variables import set_default_variables
from finetune.model import precision
from finetune.model.compatibility import check_fp8_blocks, dequantised_when_loaded, stored_quantisation
from finetune.model.generation_settings import check_generation_config
from finetune.model.locate import Base, load_errors
from finetune.model.precision import resolve_dtype
from finetune.recipe.load import Recipe
from finetune.recipe.schema import ModelSection
from finetune.system.errors import ModelError, TemplateError
from finetune.system.terminal import quiet

if TYPE_CHECKING:
    import torch

# So many weights, 256 MiB in float32, may be missing before it is known which.
_FEW = 1 << 26


def load_tokenizer(section: ModelSection, base: Base | None = None) -> Any:
    """The base's tokenizer, with the recipe's chat template and its variables, and a padding token.

    Args:
        section: The recipe's `model` section.
        base: The base of `section`, if it is located already.

    Raises:
        ModelError: The base has no tokenizer that can be loaded.
        TemplateError: The template file cannot be read, reaches a limit of time or memory (`try_template`), or takes
            no such system role or variable.
    """
    from transformers import AutoTokenizer

    path = (base or Base.of(section)).original.path
    with load_errors(section.name_or_path), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    template_from = section.name_or_path
    adapter_template = Path(section.adapter or "", "chat_template.jinja").expanduser()
    if section.chat_template:
        tokenizer.chat_template, template_from = load_template(section.chat_template), section.chat_template
    elif section.adapter and adapter_template.is_file():
        tokenizer.chat_template, template_from = load_template(str(adapter_template)), str(adapter_template)
    try_template(tokenizer.chat_template, template_from)
    set_system_role(tokenizer, section.system_role)
    set_default_variables(tokenizer, section.chat_template_kwargs)
    if tokenizer.pad_token is None:
        # Padding is masked in attention and labels, so the choice of the token changes nothing.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(recipe: Recipe, dtype: torch.dtype | None = None, base: Base | None = None) -> Any:
    """The recipe's base model, quantised if the recipe says so, without an adapter.

    Args:
        recipe: The recipe; only its sections `model` and `quantization` are read.
        dtype: The dtype of the weights; by default that of `model.dtype`.
        base: The recipe's base, if it is located already.

    Raises:
        ModelError: The base has no safetensors weights, or they cannot be loaded.
    """
    section, base = recipe.model, base or Base.of(recipe.model)
    return load_base(
        base.path,
        dtype or resolve_dtype(section),
        recipe.quantization,
        config=dequantised_when_loaded(base.config),
        revision=section.revision,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
    )


def quantization_config(quantization: dict[str, Any], dtype: torch.dtype) -> Any:
    """The recipe's `quantization` section as transformers takes it, for a model of `dtype`."""
    from transformers import BitsAndBytesConfig

    # Computing in another dtype than the adapter's would cast at each layer; upstream's default is float32.
    compute = {"bnb_4bit_compute_dtype": dtype} if quantization.get("load_in_4bit") else {}
    return BitsAndBytesConfig(**compute | quantization)


def load_base(
    path: str,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    as_is: bool = False,
    config: Any = None,
    **arguments: Any,
) -> Any:
    """A causal language model from a directory or the Hub.

    Args:
        path: The directory, or the model's id.
        dtype: The dtype of its weights.
        quantization: The arguments of `transformers.BitsAndBytesConfig`.
        as_is: Leaves a Gemma in float16 as it is, as other programs do, without a residual stream in float32.
        config: The model's config, if it is loaded already.
        **arguments: Other arguments of `from_pretrained`.

    Raises:
        ModelError: It cannot be loaded, weights are missing, or a setting of its generation config cannot be used.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if quantization is not None:
        arguments["quantization_config"] = quantization_config(quantization, dtype)
        # Quantised weights cannot be moved later: each rank loads onto its own GPU.
        rank = int(os.environ.get("LOCAL_RANK", 0))
        arguments.setdefault("device_map", {"": rank if torch.cuda.is_available() else "cpu"})
    if config is not None:
        arguments["config"] = copy.deepcopy(config)
    with load_errors(path), quiet(), _weights_in_files(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **arguments
        )
    # transformers only warns, and initialises missing weights at random.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model.name_or_path: {path} does not hold {missing[0]} (and {len(missing) - 1} more of its weights)"
        )
    check_generation_config(path, model.generation_config, model.config.get_text_config())
    if getattr(model, "is_quantized", False):
        keep_4bit_weights(model)
    elif config is not None and stored_quantisation(config):
        check_fp8_blocks(model, config)
        # transformers 5.23 leaves the weights that were not quantised (norms, embeddings) in the type of the file.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    if dtype == torch.float16 and not as_is:
        precision.keep_residual_in_float32(model)
    return model


@contextlib.contextmanager
def _weights_in_files(path: str) -> Iterator[None]:
    """Refuses a model most of whose weights transformers would make at random, before it takes the memory for them.

    Raises:
        ModelError: The config describes more than twice the weights of the files.

    Source: transformers 5.23 `modeling_utils.py`, `_finalize_model_loading`.
    """
    from transformers import PreTrainedModel

    make, refused = PreTrainedModel._move_missing_keys_from_meta_to_device, []

    def checked(model: Any, missing: set[str], *arguments: Any, **more: Any) -> None:
        sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        absent = sum(sizes.pop(name, 0) for name in missing - model.all_tied_weights_keys.keys())
        held = sum(sizes.values())
        if absent > max(held, _FEW):
            refused.append(
                f"model.name_or_path: {path}: its config.json describes {absent + held:,} weights, and its files hold "
                f"{held:,} of them; is the config that of another model?"
            )
            raise ModelError(refused[0])
        make(model, missing, *arguments, **more)

    PreTrainedModel._move_missing_keys_from_meta_to_device = checked
    try:
        yield
    except RuntimeError as error:  # of the report of mismatched shapes, which upstream makes last
        if not refused:
            raise
        raise ModelError(refused[0]) from error
    finally:
        PreTrainedModel._move_missing_keys_from_meta_to_device = make


def eos_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """The tokens at which an answer ends: those of the generation config, the tokenizer's, the end of a turn."""
    known = generation_config.eos_token_id
    stops = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
    if tokenizer.chat_template is not None:
        with contextlib.suppress(TemplateError):  # no end-of-turn token can be found in this template
            stops.append(Chat(tokenizer).end_of_turn_id)
    return [i for i in dict.fromkeys(stops) if i is not None]


def keep_4bit_weights(model: Any) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    It does so at the first forward pass without gradients, irreversibly: afterwards there is no gradient of the input,
    and saved weights are garbage.

    Source: bitsandbytes 0.50 `nn/modules.py`, `Linear4bit.forward`; still there in 0.50.2.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
