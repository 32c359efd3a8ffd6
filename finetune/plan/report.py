"""A plan as a person reads it, and as JSON."""

from __future__ import annotations

from typing import Any

from finetune.cards import GIB
from finetune.plan.fit import Fit, Plan

# The parts in the order in which they are shown, and how each figure was found.
_PARTS = {
    "weights": "weights of the base",
    "adapter": "adapter",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "attention": "attention",
    "activations": "other activations",
    "head": "output layer and loss",
    "gathered": "weights gathered from other cards (a formula)",
    "copies": "gradients to be exchanged (a formula)",
    "context": "CUDA context (assumed)",
    "fragments": "fragmentation (assumed: 5% of what comes and goes)",
    "process": "Python and its libraries (assumed)",
}
# Shares of a card's dense matrix products that training reaches; an assumption. Unpacking 4-bit weights takes its part.
_SHARE, _SHARE_QUANTIZED = (0.25, 0.5), (0.15, 0.4)


def seconds(plan: Plan) -> tuple[float, float] | None:
    """Of a step, from and to; None where the card's speed is not known. A step has a batch for each accumulation."""
    if plan.measured:
        return min(plan.measured), max(plan.measured)
    speed = plan.fit.card.speed(plan.computes)
    if not speed:
        return None
    low, high = _SHARE if plan.recipe.quantization is None else _SHARE_QUANTIZED
    work = plan.flops * plan.setting.accumulation * _filled(plan)
    return work / (speed * 1e12 * high), work / (speed * 1e12 * low)


def _filled(plan: Plan) -> float:
    """How long a row is on average, as a share of the longest; 1 where that is not known, or where rows are packed."""
    if plan.rows is None or plan.setting.batch.packed:
        return 1.0
    return plan.rows.tokens / plan.rows.count / plan.rows.longest


def as_text(plan: Plan) -> list[str]:
    """The plan in lines."""
    setting, batch, fit = plan.setting, plan.setting.batch, plan.fit
    model = plan.recipe.model.name_or_path
    kind = "full fine-tuning" if plan.recipe.lora is None else "LoRA"
    kind += "" if plan.recipe.quantization is None else " on a quantised base"
    source = (
        "the longest of its rows" if plan.rows is not None else "training.max_length; the rows are not here"
    )
    checkpointing = "with" if setting.checkpointing else "without"
    lines = [
        f"{model}: {kind}, {setting.optim}, {checkpointing} gradient checkpointing",
        f"longest batch: {batch.rows} x {batch.length:,} tokens ({source})",
        "",
        f"{'GiB on ' + fit.card.name:<52}{'computed':>10}",
    ]
    assert fit.need is not None
    for name, text in _PARTS.items():
        if name in fit.need.parts:
            lines.append(f"  {text:<50}{fit.need.parts[name] / GIB:>10.2f}")
    lines.append(f"  {'at most':<50}{fit.need.total / GIB:>10.2f}")
    lines.append(f"  {'there':<50}{fit.card.memory / GIB:>10.2f}")
    if fit.need.paged:
        paged = f"{fit.need.paged / GIB:.2f} GiB of the optimizer are paged: they leave a card that is full"
        lines.append(f"  {paged}")
    lines += ["", _verdict(fit)]
    if plan.layout:
        for other in plan.layout:
            assert other.need is not None
            size, verdict = other.need.total / GIB, "fits" if other.fits else "does not fit"
            lines.append(
                f"{other.how}: {size:.2f} GiB on each card, {verdict} (a formula on top of the parts above)"
            )
    if plan.advice:
        lines.append("to make it fit:")
        lines += [f"  {text} ({need / GIB:.1f} GiB)" for text, need in plan.advice]
    elif not plan.fits:
        lines.append(
            "no change of settings that is tried here makes it fit; take a smaller model.name_or_path"
        )
    lines += ["", *_time(plan)]
    if plan.others:
        lines += ["", f"{'card':<10}{'GiB':>8}{'needs':>8}  {'fits':<6}{'largest batch':>14}"]
        lines += [_row(other) for other in plan.others]
    return lines


def _verdict(fit: Fit) -> str:
    if fit.fits:
        longest = f", or rows of {fit.length:,} tokens at this batch" if fit.length else ""
        return f"fits {fit.card.name}: largest batch {fit.rows}{longest}"
    return f"does not fit {fit.card.name}: {(fit.need.total - fit.card.memory) / GIB:.2f} GiB too much"  # type: ignore[union-attr]


def _time(plan: Plan) -> list[str]:
    found = seconds(plan)
    if found is None:
        return [f"time: the speed of {plan.fit.card.name} is not known; --measure takes three steps here"]
    low, high = found
    how = "measured here" if plan.measured else "computed: a quarter to a half of the card's matrix speed"
    if not plan.measured and plan.recipe.quantization is not None:
        how = "computed: 15% to 40% of the card's matrix speed"
    lines = [f"a step takes {_duration(low)} to {_duration(high)} ({how})"]
    if plan.steps is not None:
        lines.append(
            f"{plan.steps:,} steps take {_duration(low * plan.steps)} to {_duration(high * plan.steps)}"
        )
    else:
        lines.append("how many steps there are, the rows decide, which are not here")
    return lines


def _duration(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _row(fit: Fit) -> str:
    head = f"{fit.card.name:<10}{fit.card.memory / GIB:>8.1f}"
    if fit.need is None:
        return f"{head}{'':>8}  no: {fit.refused}"
    return f"{head}{fit.need.total / GIB:>8.1f}  {'yes' if fit.fits else 'no':<6}{fit.rows or '-':>14}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data; bytes and seconds."""
    batch, found = plan.setting.batch, seconds(plan)
    return {
        "recipe": str(plan.recipe.path),
        "model": plan.recipe.model.name_or_path,
        "batch": {"rows": batch.rows, "length": batch.length, "from_rows": plan.rows is not None},
        "fits": plan.fits,
        "card": _as_json(plan.fit),
        "cards": [_as_json(fit) for fit in plan.others],
        "layout": [_as_json(fit) | {"how": fit.how} for fit in plan.layout],
        "advice": [{"change": text, "total": need} for text, need in plan.advice],
        "flops_per_batch": plan.flops,
        "steps": plan.steps,
        "seconds_per_step": list(found) if found else None,
        "measured": plan.measured,
    }


def _as_json(fit: Fit) -> dict[str, Any]:
    need = fit.need
    return {
        "name": fit.card.name,
        "memory": int(fit.card.memory),
        "fits": fit.fits,
        "refused": fit.refused or None,
        "total": need.total if need else None,
        "parts": need.parts if need else {},
        "paged": need.paged if need else 0,
        "largest_batch": fit.rows,
        "longest_rows": fit.length,
    }
