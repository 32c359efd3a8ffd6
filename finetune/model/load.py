"""The base model and its tokenizer, loaded as a recipe says; and the tokens that a base never learned."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.chat import Chat
from finetune.data.template import load_template, set_system_role
from finetune.model import precision
from finetune.model.locate import locate
from finetune.model.precision import resolve_dtype
from finetune.recipe.load import Recipe
from finetune.recipe.schema import ModelSection
from finetune.system import hub_errors
from finetune.system.errors import LabelError, ModelError
from finetune.system.terminal import quiet

if TYPE_CHECKING:
    import torch


def load_tokenizer(section: ModelSection) -> Any:
    """The base's tokenizer, with the recipe's chat template where it names one, and a padding token.

    Raises:
        ModelError: There is none to load.
        TemplateError: The template file cannot be read.
    """
    from transformers import AutoTokenizer

    path = locate(section.name_or_path)
    with _told(section.name_or_path), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    brought = Path(section.adapter or "", "chat_template.jinja").expanduser()
    if section.chat_template:
        tokenizer.chat_template = load_template(section.chat_template)
    elif section.adapter and brought.is_file():
        tokenizer.chat_template = load_template(str(brought))
    set_system_role(tokenizer, section.system_role)
    if tokenizer.pad_token is None:
        # Padding is masked in attention and labels; which token it is never shows.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(section: ModelSection) -> Any:
    """The base's config, without its weights.

    Raises:
        ModelError: There is none to load.
    """
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    return _config(locate(section.name_or_path), options)


def load_model(recipe: Recipe, dtype: torch.dtype | None = None) -> Any:
    """The recipe's base model, quantised if the recipe says so, without an adapter.

    Args:
        recipe: Its `model` and `quantization` sections are read.
        dtype: In place of `model.dtype`.

    Raises:
        ModelError: There are no weights, only pickled ones, or they cannot be loaded.
    """
    section = recipe.model
    return load_base(
        locate(section.name_or_path),
        dtype or resolve_dtype(section),
        quantization=recipe.quantization,
        revision=section.revision,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
    )


def load_base(
    path: str,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    as_is: bool = False,
    **arguments: Any,
) -> Any:
    """A causal language model from a directory or the Hub; `arguments` are `from_pretrained`'s.

    Args:
        path: The directory, or the model's id.
        dtype: Of its weights.
        quantization: `transformers.BitsAndBytesConfig`'s.
        as_is: Also a Gemma in float16 is computed in it throughout, as another program would.
        **arguments: The rest.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if quantization is not None:
        # Computing in another dtype than the adapter's would cast at each layer; upstream's default is float32.
        config = {"bnb_4bit_compute_dtype": dtype} if quantization.get("load_in_4bit") else {}
        arguments["quantization_config"] = BitsAndBytesConfig(**config | quantization)
        # Quantised weights cannot be moved later: each rank loads onto its own card.
        rank = int(os.environ.get("LOCAL_RANK", 0))
        arguments.setdefault("device_map", {"": rank if torch.cuda.is_available() else "cpu"})
    with _told(path), quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **arguments
        )
    # Upstream only warns, and fills them at random.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model.name_or_path: {path} does not hold {missing[0]} (and {len(missing) - 1} more of its weights)"
        )
    if getattr(model, "is_quantized", False):
        keep_4bit_weights(model)
    if dtype == torch.float16 and not as_is:
        precision.keep_residual_in_float32(model)
    return model


def _config(path: str, options: dict[str, Any]) -> Any:
    """A base's config; of `options` its place on the Hub is read."""
    from transformers import AutoConfig

    known = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    with _told(path), quiet():
        return AutoConfig.from_pretrained(path, **known)


def eos_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """The tokens at which an answer ends: those of the generation config, the tokenizer's, the end of a turn."""
    known = generation_config.eos_token_id
    stops = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
    if tokenizer.chat_template is not None:
        with contextlib.suppress(LabelError):  # a template whose turns cannot be told ends none
            stops.append(Chat(tokenizer).end_of_turn_id)
    return [i for i in dict.fromkeys(stops) if i is not None]


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Upstream's failures to load, told in one line that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if words := hub_errors.hub_problem(name, error):
            raise ModelError(f"model.name_or_path: {name} {words}") from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else repr(error)
        raise ModelError(f"model.name_or_path: {name} cannot be loaded: {reason}") from error
    except Exception as error:
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError):
            raise ModelError(f"model.name_or_path: {name}: a weight file is damaged: {error}") from error
        raise


def keep_4bit_weights(model: Any) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    It does so for good at the first forward without gradients; from then on training gets no input gradient and saved
    weights are garbage.

    Source: bitsandbytes 0.50 `nn/modules.py`, `Linear4bit.forward`; still there in 0.50.2.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


# ---------------------------------------------------------------------------------------------------------------
# Tokens that the base never learned
