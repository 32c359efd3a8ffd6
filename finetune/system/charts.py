"""What a run logged, as curves: points, a smooth line through them, and a drawing for a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Points = list[tuple[float, float]]

# A page of a million records still opens: more of them than pixels are drawn by their extremes.
_MOST = 800
# Of a drawing, in its own units; a letter is 12 high.
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 26


def points(records: Iterable[dict[str, Any]], key: str) -> Points:
    """Step and value of the records that have a finite one."""
    return [(r["step"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours, a tenth of all.

    At the beginning, where a loss falls steeply, with as many on either side, which bends no slope; at the end with
    those before. Fewer than five values stay as they are.
    """
    reach = max(1, len(values) // 20) if len(values) >= 5 else 0
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    found = []
    for i in range(len(values)):
        near = min(reach, i)
        first, last = i - near, min(i + near, len(values) - 1)
        found.append((sums[last + 1] - sums[first]) / (last - first + 1))
    return found


def thinned(line: Points, most: int = _MOST) -> Points:
    """At most so many of the points: both ends, and the lowest and highest of each stretch between."""
    if len(line) <= most:
        return line
    first, *between, last = line
    width = math.ceil(len(between) / ((most - 2) // 2))
    kept = [first]
    for at in range(0, len(between), width):
        stretch = between[at : at + width]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, last]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, which is greater; at most `about` + 1 of them."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(n for n in (1, 2, 5, 10) if n * unit >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A value as a person reads it, four digits of it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Line:
    """A line to draw: `smooth` has the values faint and their mean strong, `dots` a dot at each value."""

    name: str
    points: Points
    smooth: bool = False
    dots: bool = False


def chart(title: str, lines: Sequence[Line], size: tuple[int, int] = (480, 240)) -> dict[str, Any] | None:
    """A drawing as its Jinja macro takes it: places on an area of `size`; None where there is nothing to draw."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    last = max(1.0, *(line.points[-1][0] for line in lines))
    every = [value for line in lines for _, value in line.points]
    low, high = min(every), max(every)
    # A line that never moves lies in the middle.
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (low if low == 0 else low - room), high + room
    width, height = size

    def x(step: float) -> float:
        return round(_LEFT + step / last * (width - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_TOP + (high - value) / (high - low) * (height - _TOP - _BOTTOM), 1)

    def path(line: Points) -> str:
        # The empty stroke at the end shows a single point.
        return "M" + "L".join(f"{x(step)} {y(value)}" for step, value in line) + "h0"

    drawn, told = [], dict[float, list[str]]()
    for line in lines:
        strong = line.points
        if line.smooth:
            means = smoothed([value for _, value in line.points])
            strong = [(step, mean) for (step, _), mean in zip(line.points, means, strict=True)]
        means_at = dict(strong)
        shown = thinned(line.points)
        for step, value in shown:
            mean = f", smoothed {number(means_at[step])}" if line.smooth else ""
            told.setdefault(step, []).append(f"{line.name} {number(value)}{mean}")
        drawn.append(
            {
                "name": line.name,
                "faint": path(shown) if line.smooth else "",
                "strong": path(thinned(strong)),
                "dots": [(x(step), y(value)) for step, value in shown] if line.dots else [],
            }
        )
    across = [t for t in ticks(0, last, 10 if width > 600 else 6) if t == int(t)]
    up = ticks(low, high, 8 if height > 300 else 6)
    readings = [(x(step), f"step {step:,.0f}: {'; '.join(told[step])}") for step in sorted(told)]
    return {
        "title": title,
        "size": size,
        "lines": drawn,
        "frame": (_LEFT, width - _RIGHT, _TOP, height - _BOTTOM),
        "across": [(x(step), f"{step:,.0f}") for step in across],
        "up": [(y(value), text) for value, text in zip(up, _labels(up), strict=True)],
        "readings": json.dumps(readings),
        "last": readings[-1][1],
    }


def _labels(values: Sequence[float]) -> list[str]:
    """Ticks with as many decimals as tell them apart."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    if max(map(abs, values)) < 0.001:
        return [f"{value:.2g}" if value else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]
