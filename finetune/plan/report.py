"""A plan as lines of text and as JSON."""

from __future__ import annotations

from typing import Any

from finetune.plan.run import HardwareFit, MemoryPlan
from finetune.plan.search import MOST_ROWS
from finetune.plan.step import Batch
from finetune.system.numbers import GIB, duration, memory

# The parts in the order in which they are shown. In brackets: what is not computed by running the model.
_PARTS = {
    "weights": "weights of the base",
    "adapter": "adapter",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "attention": "attention",
    "activations": "other activations",
    "head": "output layer and loss",
    "gathered": "weights gathered from other GPUs (a formula)",
    "copies": "copies of gradients to be exchanged (a formula)",
    "context": "CUDA context (assumed)",
    "fragments": "fragmentation (assumed: 5% of temporary tensors)",
    "process": "Python and its libraries (assumed)",
}
# The share of a GPU's dense matrix speed that training reaches, from and to. An assumption; dequantising takes time.
_SHARE, _SHARE_QUANTIZED = (0.25, 0.5), (0.15, 0.4)
# Seconds that launching one operator takes, from and to, which bounds the speed of small models. An assumption.
_LAUNCH = (5e-6, 25e-6)


def step_seconds(plan: MemoryPlan) -> tuple[float, float] | None:
    """Seconds of a step with all its batches, from and to; None if the speed of the hardware is not known."""
    if plan.measured:
        return min(plan.measured), max(plan.measured)
    speed = plan.fit.hardware.tflops(plan.mixed_precision) * 1e12
    if not speed:
        return None
    low, high = _SHARE if plan.recipe.quantization is None else _SHARE_QUANTIZED
    flops, batches = plan.flops * _filled(plan), plan.settings.accumulation
    fast, slow = (plan.operators * seconds for seconds in _LAUNCH)
    return batches * max(flops / (speed * high), fast), batches * max(flops / (speed * low), slow)


def _in_pairs(batch: Batch) -> str:
    return f", each side of a pair; {batch.joined:,} in both with their prompt once" if batch.joined else ""


def _filled(plan: MemoryPlan) -> float:
    """The mean length of rows as a share of the longest; 1 if the rows are not known, or packed."""
    if plan.rows is None or plan.settings.batch.packed:
        return 1.0
    return plan.rows.tokens / plan.rows.count / (plan.settings.batch.joined or plan.rows.longest)


def as_text(plan: MemoryPlan) -> list[str]:
    """The plan as lines of text: memory by part, whether it fits, what to change, time, a table of all GPUs."""
    recipe, settings, batch, fit = plan.recipe, plan.settings, plan.settings.batch, plan.fit
    assert fit.required is not None
    kind = "full fine-tuning" if recipe.lora is None else "LoRA"
    kind += "" if recipe.quantization is None else " on a quantised base"
    kind = kind if recipe.method == "sft" else f"{recipe.method.upper()}, {kind}"
    source = "its longest rows" if plan.rows is not None else "training.max_length; the rows are not on this machine"
    lines = [
        f"{recipe.model.name_or_path}: {kind}, {settings.optim}, "
        f"{'with' if settings.checkpointing else 'without'} gradient checkpointing",
        f"longest batch: {batch.rows} x {batch.length:,} tokens{_in_pairs(batch)} ({source})",
        "",
        f"{'GiB on ' + fit.hardware.name:<52}{'computed':>10}",
    ]
    sizes: list[tuple[str, float]]
    sizes = [(text, fit.required.parts[name]) for name, text in _PARTS.items() if name in fit.required.parts]
    sizes += [("total", fit.required.total), ("available", fit.hardware.memory)]
    lines += [f"  {text:<50}{size / GIB:>10.2f}" for text, size in sizes]
    if fit.required.paged:
        lines.append(f"  {memory(fit.required.paged)} of the optimizer are paged, and can leave a full GPU")
    lines += ["", *_verdict(fit, plan.gpu_count), *map(_strategy, plan.strategies)]
    if plan.advice:
        lines.append("to make it fit:")
        lines += [f"  {overrides} ({memory(size)})" for overrides, size in plan.advice]
    elif not any(each.memory_suffices for each in plan.strategies or [fit]):
        lines.append("none of the changes tried here makes it fit; take a smaller model.name_or_path")
    lines += ["", *_time(plan)]
    if plan.all_gpus:
        lines += ["", f"each of {plan.gpu_count} GPUs under FSDP:"] if plan.gpu_count > 1 else [""]
        lines.append(f"{'GPU':<10}{'GiB':>8}{'needs':>8}  {'fits':<6}{'largest batch':>14}")
        lines += map(_row, plan.all_gpus)
        overrides = dict.fromkeys(" ".join(each.overrides) for each in plan.all_gpus if each.overrides)
        lines += [f"* with {text}" for text in overrides]
    return lines


def _verdict(fit: HardwareFit, gpu_count: int) -> list[str]:
    assert fit.required is not None
    name = fit.hardware.name if gpu_count == 1 else f"one {fit.hardware.name} alone"
    if fit.memory_suffices:
        line = f"fits {name}"
        line += f": largest batch {_batch(fit.largest_batch)}" if fit.largest_batch else ""
        line += f", or rows of {fit.longest_rows:,} tokens at this batch" if fit.longest_rows else ""
    else:
        line = f"does not fit {name}: {memory(fit.required.total - fit.hardware.memory)} too much"
    if not fit.unsupported:
        return [line]
    return [
        f"does not run on {fit.hardware.name} as it is written: {fit.unsupported}",
        f"with {' '.join(fit.overrides)} (the figures above) it {line}",
    ]


def _strategy(fit: HardwareFit) -> str:
    if fit.required is None:
        return f"{fit.strategy}: no, {fit.unsupported}"
    verdict = "fits" if fit.memory_suffices else "does not fit"
    changed = f" with {' '.join(fit.overrides)}" if fit.overrides else ""
    return f"{fit.strategy}: {memory(fit.required.total)} on each GPU, {verdict}{changed} (partly by a formula)"


def _batch(rows: int) -> str:
    return f"{rows:,}" if rows < MOST_ROWS else f"{rows:,} or more"


def _time(plan: MemoryPlan) -> list[str]:
    times = step_seconds(plan)
    if times is None:
        return [f"time: the speed of {plan.fit.hardware.name} is not known; --measure times three real steps"]
    low, high = times
    batches = plan.settings.accumulation
    if plan.measured:
        how = "measured here"
    elif high <= batches * plan.operators * _LAUNCH[1]:
        how = f"computed: launching {plan.operators:,} operators per batch takes longest, at 5 to 25 microseconds each"
    else:
        share = "25% to 50%" if plan.recipe.quantization is None else "15% to 40%"
        how = f"computed: {share} of the GPU's matrix speed"
    batch = plan.settings.batch
    tokens = batch.rows * (batch.joined or batch.length) * batches * plan.gpu_count * _filled(plan)
    count = "one batch" if batches == 1 else f"{batches} batches"
    count += f" on each of {plan.gpu_count} GPUs" if plan.gpu_count > 1 else ""
    lines = [f"a step of {count}, {tokens:,.0f} tokens, takes {_range(low, high)} ({how})"]
    if plan.steps is not None:
        most = ", or fewer with early_stopping," if plan.recipe.early_stopping else ""
        lines.append(f"{plan.steps:,} steps{most} take {_range(low * plan.steps, high * plan.steps)}")
    else:
        lines.append("the number of steps depends on the rows, which are not on this machine")
    return lines


def _range(low: float, high: float) -> str:
    if high < 0.1:
        return "less than 0.1 s"
    first, last = duration(low), duration(high)
    return first if first == last else f"{first} to {last}"


def _row(fit: HardwareFit) -> str:
    head = f"{fit.hardware.name:<10}{fit.hardware.memory / GIB:>8.1f}"
    if fit.required is None:
        return f"{head}{'':>8}  no: {fit.unsupported}"
    fits = ("yes" if fit.memory_suffices else "no") + "*" * bool(fit.overrides)
    batch = _batch(fit.largest_batch) if fit.largest_batch else "-"
    return f"{head}{fit.required.total / GIB:>8.1f}  {fits:<6}{batch:>14}"


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as plain data, with sizes in bytes and times in seconds."""
    batch, times = plan.settings.batch, step_seconds(plan)
    return {
        "recipe": str(plan.recipe.path),
        "model": plan.recipe.model.name_or_path,
        "batch": {"rows": batch.rows, "length": batch.length, "from_rows": plan.rows is not None},
        "fits": plan.fits,
        "card": _as_json(plan.fit),
        "cards": [_as_json(fit) for fit in plan.all_gpus],
        "layout": [_as_json(fit) | {"how": fit.strategy} for fit in plan.strategies],
        "advice": [{"change": overrides, "total": size} for overrides, size in plan.advice],
        "flops_per_batch": plan.flops,
        "steps": plan.steps,
        "seconds_per_step": list(times) if times else None,
        "measured": plan.measured,
    }


def _as_json(fit: HardwareFit) -> dict[str, Any]:
    required = fit.required
    return {
        "name": fit.hardware.name,
        "memory": int(fit.hardware.memory),
        "fits": fit.fits,
        "refused": fit.unsupported or None,
        "instead": fit.overrides,
        "total": required.total if required else None,
        "parts": required.parts if required else {},
        "paged": required.paged if required else 0,
        "largest_batch": fit.largest_batch,
        "longest_rows": fit.longest_rows,
    }
