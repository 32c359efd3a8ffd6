"""Prints text that a terminal does not interpret, shows progress bars, and hides upstream's bars and log lines."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from finetune.system.pages import one_line, visible

# The longest line, in characters: a part of it may come from a file.
_LONGEST = 2000
# Takes one line of the log.
Say = Callable[[str], None]


def print_line(text: str) -> None:
    """Prints one line of at most `_LONGEST` characters to standard error; control characters in it are written out."""
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    print(one_line(shown), file=sys.stderr, flush=True)


def print_text(text: str = "", end: str = "\n") -> None:
    """Prints to standard output; on a terminal control characters are written out, elsewhere nothing is changed."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    print(visible(text) if terminal else text, end=end, flush=True)


def silence_upstream() -> None:
    """Hides the warnings, log lines and bars of libraries in this process and those that it starts.

    Call it before they are imported, because they read the variables then. Variables that the user has set are kept.
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
    """Standard error as a rich `Console`; None if it is not a terminal that can redraw a line.

    `FORCE_COLOR`, which notebooks and CI set, makes rich take a file or a pipe for a terminal. A command in a cell of a
    notebook has a terminal, but the cell keeps every line that was ever drawn.

    Source: rich 15.0 `console.py`, `Console.is_terminal`; ipykernel 7.4 `zmqshell.py`, `init_environment`.
    """
    from rich.console import Console

    # datasets 5.2 replaces `os.environ` by a copy in a `map` with several processes; rich would read the first one.
    console = Console(stderr=True, _environ=os.environ)
    notebook = os.environ.get("TERM") == "xterm-color" and "CLICOLOR_FORCE" in os.environ
    return console if console.is_interactive and sys.stderr.isatty() and not notebook else None


@contextmanager
def progress_bar(title: str, total: int, shown: bool, unit: str = "") -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields a function that takes how many more are done.

    Args:
        title: The text before the bar.
        total: The number of steps.
        shown: False hides the bar.
        unit: "bytes" shows sizes and speed.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = interactive_console() if shown and total else None
    if console is None:
        yield lambda count: None
        return
    done = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    title_column = TextColumn("{task.description}", markup=False)
    with Progress(title_column, BarColumn(), done, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' loading bars and log lines, except errors."""
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
