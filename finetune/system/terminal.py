"""A progress bar, on a terminal; nothing elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Say = Callable[[str], None]


def silence_upstream() -> None:
    """Hides the warnings, log lines and bars of libraries in this process and those that it starts.

    To be called before they are imported, for they read the variables then. A variable that the user has set stays.
    """
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    for variable, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "true"),
        ("WANDB_QUIET", "true"),
    ):
        os.environ.setdefault(variable, value)


def interactive_console() -> Any:
    """The terminal that standard error is, as rich's console; None where it is none, or one that draws nothing.

    FORCE_COLOR, which notebooks and CI set to have colours, makes rich take a file or a pipe for a terminal. The
    commands of a notebook's cell have a terminal, but its page keeps all that was ever drawn there.

    Source: rich 15.0 `console.py`, `Console.is_terminal`; ipykernel 7.4 `zmqshell.py`, `init_environment`.
    """
    from rich.console import Console

    console = Console(stderr=True)
    notebook = os.environ.get("TERM") == "xterm-color" and "CLICOLOR_FORCE" in os.environ
    return console if console.is_interactive and sys.stderr.isatty() and not notebook else None


@contextmanager
def progress_bar(title: str, total: int, shown: bool, unit: str = "") -> Iterator[Callable[[int], None]]:
    """What to call with how many more are done; `unit` is "bytes" where sizes are counted."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = interactive_console() if shown and total else None
    if console is None:
        yield lambda count: None
        return
    done = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    title_column = TextColumn("{task.description}", markup=False)
    with Progress(
        title_column, BarColumn(), done, TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' own loading bars and notes from the screen; its errors still come."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
