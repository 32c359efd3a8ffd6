"""Shares of yes and no, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class Share(TypedDict):
    """How many of those judged are right, and the 95% confidence interval of that share."""

    right: int
    judged: int
    low: float
    high: float


def share_of(rights: Sequence[bool]) -> Share:
    """The share of true values."""
    low, high = wilson_interval(sum(rights), len(rights)) if rights else (0.0, 1.0)
    return {"right": sum(rights), "judged": len(rights), "low": low, "high": high}


def share_text(share: Share) -> str:
    """The share as people read it: `75.0% (3 of 4; 95%: 30.1% to 95.4%)`."""
    if not share["judged"]:
        return "none to judge"
    part = share["right"] / share["judged"]
    interval = f"95%: {share['low']:.1%} to {share['high']:.1%}"
    return f"{part:.1%} ({share['right']} of {share['judged']}; {interval})"


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share: its lower and its upper bound.

    Args:
        right: How many of `count` are right.
        count: How many there are.
        z: The quantile of the normal distribution; 1.96 for 95%.

    Raises:
        ValueError: `right` is not between 0 and `count`, or `count` is 0.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if not 0 <= right <= count or not count:
        raise ValueError(f"{right} of {count} is not a share")
    share, square = right / count, z * z
    middle = share + square / (2 * count)
    half = z * (share * (1 - share) / count + square / (4 * count * count)) ** 0.5
    whole = 1 + square / count
    # At 0 and 1 the formula gives the bound up to rounding.
    return (middle - half) / whole if right else 0.0, (middle + half) / whole if right < count else 1.0
