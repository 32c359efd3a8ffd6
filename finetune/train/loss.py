"""A loss head that computes logits only for trained tokens.

trl's fused head is used where it is fast: on a GPU it scores only trained positions, in tiles. On a CPU it scores all
positions, and it cannot read an output layer whose rows PEFT trains. There, `use_token_head` replaces it by this head.
Both give the same numbers, which tests check.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

# The most logits in memory at once, in two buffers: 2^26 float32 are 256 MiB. With fewer rows the matrix products would
# read the weight too often: with a weight of 262,144 x 640, 256 rows were 1.2 times as fast per row as 128.
_TILE = 2**26
# The columns of the product that are computed at once, so that its tiles stay in cache (1.2 times as fast as all).
_COLUMNS = 2**13


class _TokenLogProbs(torch.autograd.Function):
    """`log p(target | hidden)` for each row of `hidden`, its entropy, and whether the target is the likeliest token.

    With `mean_logits` also the mean of its scores.

    The forward pass also computes the gradient of each row's log-probability, so that scores are neither kept nor
    computed twice; `backward` multiplies it with the gradient of the loss.

    Shapes are suffixes: N trained tokens, H hidden size, V vocabulary, K trained rows. `weight_VH` is frozen; `rows_KH`
    are trained in place of its rows at `index_K`. `scale` and `softcap` change the scores as the model's config says.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        rows_KH: torch.Tensor | None,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        index_K: torch.Tensor | None,
        targets_N: torch.Tensor,
        scale: float,
        softcap: float | None,
        buffers: list[torch.Tensor],
        mean_logits: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        need_hidden, need_rows = ctx.needs_input_grad[:2]
        count, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
        log_probs_N = hidden_NH.new_empty(count, dtype=torch.float32)
        entropy_N = torch.empty_like(log_probs_N)
        mean_N = torch.zeros_like(log_probs_N)
        is_top1_N = torch.empty_like(log_probs_N, dtype=torch.bool)
        grad_hidden_NH = torch.empty_like(hidden_NH) if need_hidden else None
        grad_rows_NK = (
            hidden_NH.new_empty(count, len(rows_KH), dtype=torch.float32) if rows_KH is not None and need_rows else None
        )
        step = max(1, _TILE // vocabulary)
        product, scratch = _two_buffers(buffers, step, weight_VH)
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            size = part.stop - start
            h, target = hidden_NH[part].to(weight_VH.dtype), targets_N[part].unsqueeze(1)
            for column in range(0, vocabulary, _COLUMNS):
                tile = slice(column, column + _COLUMNS)
                torch.mm(h, weight_VH[tile].t(), out=product[:size, tile])
            scores = product[:size].float()  # itself, where it is float32 already
            if rows_KH is not None and index_K is not None:
                scores.index_copy_(1, index_K, (h @ rows_KH.to(h.dtype).t()).float())
            if bias_V is not None:
                scores += bias_V
            if scale != 1.0:
                scores *= scale
            slope = None
            if softcap is not None:
                scores.div_(softcap).tanh_()
                slope = 1 - scores.square() if need_hidden or need_rows else None
                scores *= softcap
            if mean_logits:
                mean_N[part] = scores.mean(dim=1)
            logs = torch.log_softmax(scores, dim=1, out=scratch[:size])
            probs = torch.exp(logs, out=scores)
            chosen = logs.gather(1, target)
            log_probs_N[part] = chosen.squeeze(1)
            is_top1_N[part] = (logs.argmax(dim=1, keepdim=True) == target).squeeze(1)
            entropy_N[part] = -torch.bmm(probs.unsqueeze(1), logs.unsqueeze(2)).view(-1)
            if not (need_hidden or need_rows):
                continue
            # d -log p / d scores = p - [token is the target]
            gradient = probs.scatter_add_(1, target, torch.full_like(chosen, -1.0))
            if slope is not None:
                gradient *= slope
            if scale != 1.0:
                gradient *= scale
            own = None
            if rows_KH is not None:
                # The trained rows get these gradients, not the frozen rows in whose place they stand.
                own = gradient[:, index_K]
                gradient[:, index_K] = 0
                if grad_rows_NK is not None:
                    grad_rows_NK[part] = own
            if grad_hidden_NH is not None:
                passed = gradient.to(h.dtype) @ weight_VH
                if own is not None and rows_KH is not None:
                    passed += own.to(h.dtype) @ rows_KH.to(h.dtype)
                grad_hidden_NH[part] = passed
        ctx.save_for_backward(hidden_NH, grad_hidden_NH, grad_rows_NK)
        ctx.rows_dtype = None if rows_KH is None else rows_KH.dtype
        ctx.mark_non_differentiable(entropy_N, mean_N, is_top1_N)
        return log_probs_N, entropy_N, mean_N, is_top1_N

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, grad_hidden, grad_rows = ctx.saved_tensors
        weights = -grad.unsqueeze(1)
        return (
            None if grad_hidden is None else (grad_hidden * weights).to(hidden.dtype),
            None if grad_rows is None else ((grad_rows * weights).t() @ hidden.float()).to(ctx.rows_dtype),
            *(None,) * 8,
        )


def _two_buffers(buffers: list[torch.Tensor], step: int, weight: torch.Tensor) -> list[torch.Tensor]:
    """Two buffers for `step` rows of scores, in the weight's type and in float32, kept in `buffers` between calls.

    The allocator returns memory of this size to the system after each use; to allocate it anew took a tenth of a step.
    """
    if not buffers:
        shape = (step, weight.shape[0])
        buffers += [weight.new_empty(shape), weight.new_empty(shape, dtype=torch.float32)]
    return buffers


def use_token_head(model: Any, mean_logits: bool = False, compiled: bool = False) -> bool:
    """Replaces trl's fused head of `model` (a causal LM that trl has patched) if this one is faster or required.

    Args:
        model: The causal LM.
        mean_logits: True if the mean of each position's logits is asked for, which trl's preference trainers log.
        compiled: True if `model` will be compiled. This head is not: torch 2.13 would keep the graph of a step for the
            next one, whose backward pass then fails.

    Returns:
        True if it did: the output layer is frozen except for token rows, there is no router loss, and the model is on a
        CPU or PEFT trains rows of its output layer.
    """
    from peft.utils.other import TrainableTokensWrapper

    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    wrapped = isinstance(head, TrainableTokensWrapper)
    base = head.token_adapter.get_base_layer() if wrapped else head
    if (
        not isinstance(base, torch.nn.Linear)
        or base.weight.requires_grad
        or getattr(config, "output_router_logits", False)
    ):
        return False
    if not wrapped and base.weight.device.type != "cpu":
        return False
    softcap = getattr(config, "final_logit_softcapping", None)
    score: Any = _TokenLogProbs.apply
    if compiled:
        score = torch.compiler.disable(score)  # type: ignore[no-untyped-call]
    model.forward = MethodType(_forward_with(model.forward, score, _scale(config), softcap, mean_logits), model)
    return True


def _scale(config: Any) -> float:
    """The factor that the model multiplies its logits with.

    Source: trl 1.16 `trainer/utils.py`, `add_fused_lm_head`.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor if config.model_type == "hyperclovax" else 1 / divisor)


def _forward_with(trl_forward: Any, score: Any, scale: float, softcap: float | None, mean_logits: bool) -> Any:
    buffers: list[torch.Tensor] = []

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return trl_forward(*args, labels=labels, **kwargs) if labels is not None else trl_forward(*args, **kwargs)
        from trl.trainer.utils import FusedCausalLMOutput

        items = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        weight, bias, rows, index = _output_layer(self.get_output_embeddings())
        if rows is not None and not torch.is_grad_enabled():
            rows = rows.detach()  # else a gradient would be computed also where none is needed
        per_token = score(
            hidden[mask], rows, weight, bias, index, labels[:, 1:][mask], scale, softcap, buffers, mean_logits
        )
        # Scattering keeps a batch without trained tokens connected to the model, with a loss of zero.
        log_probs, entropy, mean, is_top1 = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in per_token)
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if items is None else items)
        return FusedCausalLMOutput(
            loss=loss, log_probs=log_probs, entropy=entropy, mean_logits=mean, is_top1=is_top1, label_mask=mask
        )

    # `generate` checks its arguments against the signature that trl copied from the model's own class.
    forward.__wrapped__ = trl_forward.__func__  # type: ignore[attr-defined]
    return forward


def _output_layer(head: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The weight, the bias, the trained rows, and the indices of those in the weight."""
    adapter = getattr(head, "token_adapter", None)
    if adapter is None:
        return head.weight, head.bias, None, None
    base, active = adapter.get_base_layer(), adapter.active_adapters
    if adapter.disable_adapters or adapter.merged or not active:
        return base.weight, base.bias, None, None
    rows = adapter.trainable_tokens_delta[active[0]]
    return base.weight, base.bias, rows, torch.tensor(adapter.token_indices[active[0]], device=rows.device)
