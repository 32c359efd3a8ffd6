"""Line charts of what a run logged: points, smoothing, thinning, and an SVG drawing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Points = list[tuple[float, float]]

# More points than pixels are drawn by their extremes, so that a page of a million records still opens.
_MOST = 800
# Margins, in the units of the drawing's size; a letter is 12 high.
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 26


def points(records: Iterable[dict[str, Any]], key: str) -> Points:
    """`(step, value)` of the records whose `key` is a finite number."""
    return [(r["step"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]


def smoothed(values: Sequence[float]) -> list[float]:
    """The moving average over a tenth of all values; fewer than five stay as they are.

    At the beginning, where a loss falls steeply, the window shrinks but stays centred, which keeps the slope. At the
    end it only loses what is missing.
    """
    half_width = max(1, len(values) // 20) if len(values) >= 5 else 0
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        width = min(half_width, i)
        first, last = i - width, min(i + width, len(values) - 1)
        means.append((sums[last + 1] - sums[first]) / (last - first + 1))
    return means


def thinned(line: Points, most: int = _MOST) -> Points:
    """At most `most` of the points: both ends, and the lowest and highest of each stretch between."""
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
    """At most `about` + 1 round numbers from `low` to the greater `high`."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(n for n in (1, 2, 5, 10) if n * unit >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A value with four digits, or whole with thousands separators from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Line:
    """A line to draw; `smooth` draws the values faint and their moving average strong, `dots` a dot at each value."""

    name: str
    points: Points
    smooth: bool = False
    dots: bool = False


def chart(title: str, lines: Sequence[Line], size: tuple[int, int] = (480, 240)) -> dict[str, Any] | None:
    """A chart's coordinates on an area of `size`, for the Jinja macro that draws it; None without any point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    last = max(1.0, *(line.points[-1][0] for line in lines))
    values = [value for line in lines for _, value in line.points]
    low, high = min(values), max(values)
    # A constant line lies in the middle.
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = (low if low == 0 else low - margin), high + margin
    width, height = size

    def x(step: float) -> float:
        return round(_LEFT + step / last * (width - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_TOP + (high - value) / (high - low) * (height - _TOP - _BOTTOM), 1)

    def path(line: Points) -> str:
        # The empty stroke at the end makes a single point visible.
        return "M" + "L".join(f"{x(step)} {y(value)}" for step, value in line) + "h0"

    drawn, texts_at = [], dict[float, list[str]]()
    for line in lines:
        strong = line.points
        if line.smooth:
            means = smoothed([value for _, value in line.points])
            strong = [(step, mean) for (step, _), mean in zip(line.points, means, strict=True)]
        means_at = dict(strong)
        shown = thinned(line.points)
        for step, value in shown:
            mean = f", smoothed {number(means_at[step])}" if line.smooth else ""
            texts_at.setdefault(step, []).append(f"{line.name} {number(value)}{mean}")
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
    readings = [(x(step), f"step {step:,.0f}: {'; '.join(texts_at[step])}") for step in sorted(texts_at)]
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
    """Labels of ticks, with enough decimals to tell them apart."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    if max(map(abs, values)) < 0.001:
        return [f"{value:.2g}" if value else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]
