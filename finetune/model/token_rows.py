"""Embedding rows of a chat template's tokens: which the base never learned, and training them."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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
