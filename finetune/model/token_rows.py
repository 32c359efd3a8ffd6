"""Embedding rows of single tokens: finds tokens that the base never learned, and trains their rows.

Suffixes name the dimensions of a tensor: B rows of the batch, L tokens, D hidden size, V vocabulary, R trained rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

from finetune.system.errors import ModelError

if TYPE_CHECKING:
    import torch


def unlearned_tokens(model: Any, token_ids: Sequence[int]) -> list[int]:
    """The tokens whose embedding was never trained.

    Rows of tokens that do not occur in the training data stay near their initial value: they are nearly one vector
    (Gemma 3 270M: cosine 0.99 to dozens of others; learned tokens have none above 0.75), or nearly zero.

    Args:
        model: A causal model with its weights.
        token_ids: The tokens to look at.
    """
    weight_VD = model.get_input_embeddings().weight.detach()
    norm_V = weight_VD.float().norm(dim=-1)
    floor = norm_V.median() * 0.1
    unlearned = []
    for token in token_ids:
        cosine_V = (weight_VD @ weight_VD[token]).float() / (norm_V * norm_V[token]).clamp(min=1e-12)
        near_duplicates = int((cosine_V > 0.9).sum()) - 1
        if bool(norm_V[token] < floor) or near_duplicates >= 4:
            unlearned.append(token)
    return unlearned


def trainable_token_indices(model: Any, token_ids: list[int]) -> list[int] | dict[str, list[int]]:
    """The `peft.LoraConfig.trainable_token_indices` that trains the tokens' rows in both embeddings of a model.

    Args:
        model: A causal model, without an adapter.
        token_ids: The tokens.
    """
    if model.config.get_text_config().tie_word_embeddings:
        return token_ids
    return dict.fromkeys(_names_of_embeddings(model), token_ids)


def _names_of_embeddings(model: Any) -> list[str]:
    """The names of the input and the output embedding in their parents."""
    names = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [names[id(module)].rsplit(".", 1)[-1] for module in ends]


def with_new_tokens(model: Any, options: dict[str, Any], new: Sequence[int]) -> list[int] | dict[str, list[int]] | None:
    """The `peft.LoraConfig.trainable_token_indices` that trains the rows of new tokens, too.

    Args:
        model: A causal model, without an adapter.
        options: The arguments of `LoraConfig`, with the `trainable_token_indices` to add to.
        new: The tokens whose rows were added to both embeddings; at least one.

    Returns:
        What was to be trained already, if `modules_to_save` trains both embeddings whole.

    Raises:
        ModelError: `modules_to_save` trains one of the two embeddings whole.
    """
    given = options.get("trainable_token_indices")
    names = _names_of_embeddings(model)
    whole = [name for name in names if name in (options.get("modules_to_save") or ())]
    if len(whole) == 1:
        raise ModelError(
            f"lora.modules_to_save: trains {whole[0]} and not the other embedding; with model.resize_embeddings write "
            f"both ({', '.join(names)}), or none"
        )
    if whole:
        return given
    indices = trainable_token_indices(model, [*new])
    if isinstance(indices, list) and not isinstance(given, dict):
        return sorted({*(given or ()), *new})
    # PEFT takes a list for rows of the input embedding.
    chosen = given if isinstance(given, dict) else {names[0]: given or []}
    return {name: sorted({*chosen.get(name, ()), *new}) for name in dict.fromkeys([*chosen, *names])}


def lighten_trainable_tokens(model: Any) -> None:
    """Replaces the forward pass of PEFT's trainable tokens by one that does not copy the embedding; same numbers.

    PEFT copies the whole matrix (262,144 x 640 for Gemma 3 270M) at each use to insert the trained rows. Here the
    frozen matrix is used as it is, and the trained rows are looked up, or multiplied, separately.

    Args:
        model: A model of PEFT, which is changed.

    Source: peft 0.21 `tuners/trainable_tokens/layer.py`, `forward_adapters`.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.forward_adapters = MethodType(_token_rows_forward, module)


def _token_rows_forward(layer: Any, x: torch.Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """In place of `TrainableTokensLayer.forward_adapters`.

    Args:
        layer: The layer, around an embedding or a linear output layer.
        x: Token ids, (B, L), of an embedding; hidden states, (..., D), of an output layer.
        active_adapters: The adapters' names.
        *args: Further arguments of PEFT's.
        **kwargs: Further arguments of PEFT's.
    """
    import torch
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if layer.disable_adapters or layer.merged or len(active_adapters) != 1:
        return TrainableTokensLayer.forward_adapters(layer, x, active_adapters, *args, **kwargs)
    base = layer.base_layer
    rows_RD = layer.trainable_tokens_delta[active_adapters[0]]
    ids_R = torch.tensor(layer.token_indices[active_adapters[0]], device=x.device)
    out = base(x)
    if isinstance(base, torch.nn.Embedding):
        # Gemma's embedding multiplies the rows that it looks up.
        scale = layer._get_embed_scale()
        rows_RD = rows_RD.to(base.weight.dtype)
        if scale is not None:
            rows_RD = rows_RD * scale.to(rows_RD.dtype)
        matches_BLR = x.unsqueeze(-1) == ids_R
        trained_BLD = rows_RD[matches_BLR.int().argmax(-1)].to(out.dtype)
        return torch.where(matches_BLR.any(-1, keepdim=True), trained_BLD, out)
    scores = torch.nn.functional.linear(x, rows_RD.to(x.dtype))
    return out.index_copy_(-1, ids_R, scores.to(out.dtype))
