"""Sizes, durations and tables as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.system.pages import table_cell

GIB = 2**30


def memory(count: float) -> str:
    """Bytes of memory or disk room: `12.3 GiB`, or `350 MiB` below one GiB."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{max(1, round(count / 2**20))} MiB"


def file_size(count: float) -> str:
    """Bytes of files, in decimal units as the Hub shows them: `1.07 GB`, or `536.3 MB` below one GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """An estimate of a time: `0.35 s`, `42 s`, `3.5 min`, `12 h`, `1.5 days`."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    unit, name = next((u, n) for u, n in ((60, "min"), (3600, "h"), (86400, "days")) if seconds < 120 * u or u == 86400)
    return f"{seconds / unit:.1f} {name}" if seconds < 10 * unit else f"{seconds / unit:,.0f} {name}"


def clock(seconds: float) -> str:
    """A time that was measured: `3:05`, `1:02:33`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def markdown_table(rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table, in which no cell is markup; the first row is its header."""
    lines = [f"| {' | '.join(map(table_cell, row))} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
