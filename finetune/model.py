"""The base model and its tokenizer, loaded as a recipe says; and the tokens that a base never learned."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import yaml

from finetune import hub, rules
from finetune.base import ModelError, locate, quiet
from finetune.chat import Chat, LabelError
from finetune.checkpoint import file_of
from finetune.recipe import Recipe
from finetune.sections import ModelSection
from finetune.template import load_template, set_system_role

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


def resolve_dtype(section: ModelSection) -> torch.dtype:
    """`model.dtype` as a torch dtype.

    `auto` is bfloat16 where the card computes in it, float16 on older cards, float32 on a CPU.

    Raises:
        ModelError: It is bfloat16, and the card does not compute in it.
    """
    return rules.dtype_for(section.dtype, rules.device_of())


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
    base = _config(path, arguments)
    arguments["attn_implementation"] = rules.attention_for(arguments.get("attn_implementation"), base)
    arguments |= rules.corrections(base)
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
        rules.widen(model)
    return model


def _config(path: str, options: dict[str, Any]) -> Any:
    """A base's config; of `options` its place on the Hub is read."""
    from transformers import AutoConfig

    known = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    with _told(path), quiet():
        return AutoConfig.from_pretrained(path, **known)


def base_of(folder: Path) -> tuple[ModelSection, dict[str, Any] | None]:
    """An adapter's base and its quantisation: from its run's recipe, or, for somebody else's adapter, from PEFT's file.

    The recipe is not checked again: its data may be elsewhere by now.

    Raises:
        ModelError: Neither can be read.
    """
    if path := file_of(folder, "recipe.yaml"):
        try:
            saved = yaml.safe_load(path.read_text(encoding="utf-8"))
            return ModelSection(**saved["model"]), saved.get("quantization")
        except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is damaged: it names no base model") from error
    from peft import PeftConfig

    try:
        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} is damaged: {error}") from error
    if not name:
        raise ModelError(f"{folder / 'adapter_config.json'} names no base (base_model_name_or_path)")
    return ModelSection(name_or_path=str(name)), None


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
        if words := hub.trouble(name, error):
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


def unlearned_tokens(model: Any, token_ids: Sequence[int]) -> list[int]:
    """Those of `token_ids` whose embedding was never trained.

    A token that training never met keeps its initial vector, as do all others that it never met: such rows are nearly
    one vector (Gemma 3 270M: cosine 0.99 to dozens of others; learned tokens have none above 0.75), or nearly zero.
    """
    weight = model.get_input_embeddings().weight.detach()
    norms = weight.float().norm(dim=-1)
    floor = norms.median() * 0.1
    found = []
    for token in token_ids:
        cosine = (weight @ weight[token]).float() / (norms * norms[token]).clamp(min=1e-12)
        twins = int((cosine > 0.9).sum()) - 1
        if bool(norms[token] < floor) or twins >= 4:
            found.append(token)
    return found


def trainable_token_indices(model: Any, token_ids: list[int]) -> list[int] | dict[str, list[int]]:
    """The `peft.LoraConfig.trainable_token_indices` that trains the tokens' rows at the model's input and output."""
    if model.config.get_text_config().tie_word_embeddings:
        return token_ids
    names = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {names[id(module)].rsplit(".", 1)[-1]: token_ids for module in ends}


def lighten_trainable_tokens(model: Any) -> None:
    """Makes PEFT's trainable tokens cost rows instead of matrices; same names, same numbers.

    PEFT copies the whole embedding (262,144 x 640 for Gemma 3 270M) at each use to put the trained rows in. Here the
    frozen matrix is used as it is and only the trained rows are looked up, or scored, apart.

    Source: peft 0.21 `tuners/trainable_tokens/layer.py`, `forward_adapters`.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.forward_adapters = MethodType(_token_rows_forward, module)


def _token_rows_forward(
    layer: Any, x: torch.Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
) -> Any:
    import torch
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if layer.disable_adapters or layer.merged or len(active_adapters) != 1:
        return TrainableTokensLayer.forward_adapters(layer, x, active_adapters, *args, **kwargs)
    base = layer.base_layer
    rows = layer.trainable_tokens_delta[active_adapters[0]]
    index = torch.tensor(layer.token_indices[active_adapters[0]], device=x.device)
    out = base(x)
    if isinstance(base, torch.nn.Embedding):
        # A scaled embedding (Gemma's) multiplies what it looks up.
        scale = layer._get_embed_scale()
        rows = rows.to(base.weight.dtype)
        if scale is not None:
            rows = rows * scale.to(rows.dtype)
        place = x.unsqueeze(-1) == index
        return torch.where(place.any(-1, keepdim=True), rows[place.int().argmax(-1)].to(out.dtype), out)
    scores = torch.nn.functional.linear(x, rows.to(x.dtype))
    return out.index_copy_(-1, index, scores.to(out.dtype))
