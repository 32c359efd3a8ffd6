"""A plan as a person reads it, and as JSON."""

from __future__ import annotations

from typing import Any

from finetune.plan.run import MOST_ROWS, HardwareFit, MemoryPlan
from finetune.system.numbers import GIB

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
# Seconds that Python takes to ask a card for an operator, which no small model gets below; an assumption.
_ASKED = (5e-6, 25e-6)


def seconds(plan: MemoryPlan) -> tuple[float, float] | None:
    """Of a step, from and to; None where the card's speed is not known. A step has a batch for each accumulation."""
    if plan.measured:
        return min(plan.measured), max(plan.measured)
    speed = plan.fit.hardware.tflops(plan.computes)
    if not speed:
        return None
    low, high = _SHARE if plan.recipe.quantization is None else _SHARE_QUANTIZED
    work, batches = plan.flops * _filled(plan), plan.setting.accumulation
    quick, slow = (plan.operators * each for each in _ASKED)
    return batches * max(work / (speed * 1e12 * high), quick), batches * max(
        work / (speed * 1e12 * low), slow
    )


def _filled(plan: MemoryPlan) -> float:
    """How long a row is on average, as a share of the longest; 1 where that is not known, or where rows are packed."""
    if plan.rows is None or plan.setting.batch.packed:
        return 1.0
    return plan.rows.tokens / plan.rows.count / plan.rows.longest


def as_text(plan: MemoryPlan) -> list[str]:
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
        f"{'GiB on ' + fit.hardware.name:<52}{'computed':>10}",
    ]
    assert fit.required is not None
    for name, text in _PARTS.items():
        if name in fit.required.parts:
            lines.append(f"  {text:<50}{fit.required.parts[name] / GIB:>10.2f}")
    lines.append(f"  {'at most':<50}{fit.required.total / GIB:>10.2f}")
    lines.append(f"  {'there':<50}{fit.hardware.memory / GIB:>10.2f}")
    if fit.required.paged:
        paged = (
            f"{fit.required.paged / GIB:.2f} GiB of the optimizer are paged: they leave a card that is full"
        )
        lines.append(f"  {paged}")
    lines += ["", *_verdict(fit, plan.cards)]
    lines += [_of_several(other) for other in plan.layout]
    if plan.advice:
        lines.append("to make it fit:")
        lines += [f"  {text} ({need / GIB:.1f} GiB)" for text, need in plan.advice]
    elif not any(each.holds for each in plan.layout or [fit]):
        lines.append(
            "no change of settings that is tried here makes it fit; take a smaller model.name_or_path"
        )
    lines += ["", *_time(plan)]
    if plan.others:
        if plan.cards > 1:
            lines += ["", f"each of {plan.cards} cards, in parts (fsdp):"]
        lines += ["", f"{'card':<10}{'GiB':>8}{'needs':>8}  {'fits':<6}{'largest batch':>14}"][
            plan.cards > 1 :
        ]
        lines += [_row(other) for other in plan.others]
        notes = dict.fromkeys(" ".join(other.instead) for other in plan.others if other.instead)
        lines += [f"* with {note}" for note in notes]
    return lines


def _verdict(fit: HardwareFit, cards: int) -> list[str]:
    assert fit.required is not None
    name, lines = fit.hardware.name if cards == 1 else f"one {fit.hardware.name} alone", []
    if fit.refused:
        lines.append(f"does not run on {fit.hardware.name} as it is written: {fit.refused}")
        lines.append(f"with {' '.join(fit.instead)} (the figures above) it")
    if fit.holds:
        most = f": largest batch {_batch(fit.rows)}" if fit.rows else ""
        most += f", or rows of {fit.length:,} tokens at this batch" if fit.length else ""
        lines.append(f"fits {name}{most}")
    else:
        lines.append(
            f"does not fit {name}: {(fit.required.total - fit.hardware.memory) / GIB:.2f} GiB too much"
        )
    return lines if len(lines) == 1 else [lines[0], " ".join(lines[1:])]


def _of_several(fit: HardwareFit) -> str:
    if fit.required is None:
        return f"{fit.how}: no, {fit.refused}"
    size, verdict = fit.required.total / GIB, "fits" if fit.holds else "does not fit"
    written = f" with {' '.join(fit.instead)}" if fit.instead else ""
    return f"{fit.how}: {size:.2f} GiB on each card, {verdict}{written} (a formula on top of the parts above)"


def _batch(rows: int) -> str:
    return f"{rows:,}" if rows < MOST_ROWS else f"{rows:,} or more"


def _time(plan: MemoryPlan) -> list[str]:
    found = seconds(plan)
    if found is None:
        return [f"time: the speed of {plan.fit.hardware.name} is not known; --measure takes three steps here"]
    low, high = found
    how = "measured here" if plan.measured else "computed: a quarter to a half of the card's matrix speed"
    if not plan.measured and plan.recipe.quantization is not None:
        how = "computed: 15% to 40% of the card's matrix speed"
    batches = plan.setting.accumulation
    if not plan.measured and high <= batches * plan.operators * _ASKED[1]:
        how = f"computed: 5 to 25 microseconds for each of {plan.operators:,} operators a batch, more than their work"
    tokens = plan.setting.batch.rows * plan.setting.batch.length * batches * plan.cards * _filled(plan)
    count = "one batch" if batches == 1 else f"{batches} batches"
    count += f" on each of {plan.cards} cards" if plan.cards > 1 else ""
    lines = [
        f"a step of {count}, {tokens:,.0f} tokens, takes {_span(low, high)} ({how})",
    ]
    if plan.steps is not None:
        lines.append(f"{plan.steps:,} steps take {_span(low * plan.steps, high * plan.steps)}")
    else:
        lines.append("how many steps there are, the rows decide, which are not here")
    return lines


def _span(low: float, high: float) -> str:
    if high < 0.1:
        return "less than 0.1 s"
    first, last = _duration(low), _duration(high)
    return first if first == last else f"{first} to {last}"


def _duration(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    for unit, name in ((60, "min"), (3600, "h"), (86400, "days")):
        if value < 120 * unit or name == "days":
            break
    return f"{value / unit:.1f} {name}" if value < 10 * unit else f"{value / unit:,.0f} {name}"


def _row(fit: HardwareFit) -> str:
    head = f"{fit.hardware.name:<10}{fit.hardware.memory / GIB:>8.1f}"
    if fit.required is None:
        return f"{head}{'':>8}  no: {fit.refused}"
    mark = "*" if fit.instead else ""
    fits = ("yes" if fit.holds else "no") + mark
    return f"{head}{fit.required.total / GIB:>8.1f}  {fits:<6}{_batch(fit.rows) if fit.rows else '-':>14}"


def as_json(plan: MemoryPlan) -> dict[str, Any]:
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


def _as_json(fit: HardwareFit) -> dict[str, Any]:
    need = fit.required
    return {
        "name": fit.hardware.name,
        "memory": int(fit.hardware.memory),
        "fits": fit.fits,
        "refused": fit.refused or None,
        "instead": fit.instead,
        "total": need.total if need else None,
        "parts": need.parts if need else {},
        "paged": need.paged if need else 0,
        "largest_batch": fit.rows,
        "longest_rows": fit.length,
    }
