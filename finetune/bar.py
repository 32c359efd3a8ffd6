"""A progress bar, on a terminal; nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, total: int, shown: bool, unit: str = "") -> Iterator[Callable[[int], None]]:
    """What to call with how many more are done; `unit` is "bytes" where sizes are counted."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not (shown and total and console.is_terminal):
        yield lambda count: None
        return
    done = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    title_column = TextColumn("{task.description}", markup=False)
    with Progress(
        title_column, BarColumn(), done, TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
