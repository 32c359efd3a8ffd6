"""The command line: parses it, runs its verb, prints errors, and returns the exit code."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.cli.arguments import ExitCode, parser
from finetune.cli.mistakes import mistake
from finetune.cli.verbs import VERBS
from finetune.system import distributed
from finetune.system.before_torch import prepare_imports
from finetune.system.errors import FinetuneError, RecipeError, RunError, Stopped, first_line
from finetune.system.files import is_full
from finetune.system.terminal import print_line, silence_upstream


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, see `ExitCode`.

    Args:
        argv: The words after `finetune`; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in VERBS and words[0].endswith((".yaml", ".yml")):
        words.insert(0, "train")
    if line := mistake(words, VERBS):
        print_line(f"error: {line}")
        return ExitCode.USER_ERROR
    args = _parse(words)
    if not args.traceback:
        silence_upstream()
        prepare_imports()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that the encoding lacks are printed as escapes.
        sys.stdout.reconfigure(errors="backslashreplace")
    if distributed.world_size() > 1 and args.verb != "train":
        # Every process would do all of the work and write the same files.
        if not distributed.rank():
            print_line(
                f"error: {distributed.world_size()} processes were launched, and only train shares its work; "
                f"write python -m finetune {shlex.join(words)}"
            )
        return ExitCode.USER_ERROR
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        for name in _named_runs(args):
            _check_run(name)
        return int(VERBS[args.verb](args) or ExitCode.OK)
    except KeyboardInterrupt as stop:
        if not distributed.rank():
            print_line(str(stop) or "stopped")
        return stop.exit_code if isinstance(stop, Stopped) else ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as head, has closed it. At exit Python flushes standard output once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except Exception as error:
        code = ExitCode.USER_ERROR if _user_lines(error) else ExitCode.INTERNAL_ERROR
        if args.traceback:
            distributed.end_all_ranks(traceback.format_exception(error), code)
            raise
        lines = [f"error: {line}" for line in _error_lines(error)]
        distributed.end_all_ranks(lines, code)
        for line in lines:
            print_line(line)
        return code


def _parse(words: list[str]) -> argparse.Namespace:
    """The parsed command line; a recipe's overrides may come after options, too."""
    command_line = parser()
    args, rest = command_line.parse_known_args(words)
    if any(word.startswith("-") or "=" not in word or "overrides" not in args for word in rest):
        command_line.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _on_sigterm(signum: int, frame: Any) -> None:
    """Ends a verb as Ctrl-C does, so that unfinished output is removed; `train` installs a handler of its own."""
    raise Stopped(signum, "terminated")


def _error_lines(error: Exception) -> list[str]:
    """The lines to print for any error."""
    if distributed.is_lost_rank(error):
        return [f"{distributed.LOST_RANK} ({textwrap.shorten(str(error), 100, placeholder=' ...')})"]
    bug = f"{type(error).__name__}: {error} (a bug in finetune; --traceback shows where)"
    return _user_lines(error) or [bug]


def _user_lines(error: Exception) -> list[str]:
    """The lines to print for an error that the user can mend; empty for a bug in finetune."""
    if isinstance(error, FinetuneError):
        return list(error.faults) if isinstance(error, RecipeError) else str(error).split("\n")
    if isinstance(error, OSError):
        return [f"{error.filename or 'input or output'}: {error.strerror or error}"]
    if is_full(error):
        return [f"a disk is full: {first_line(error)}; free some space, or write to another disk"]
    return []


def _named_runs(args: argparse.Namespace) -> list[str]:
    """The runs and models that a command names, as they are written."""
    given = vars(args)
    first = next((given[key] for key in ("model", "folder", "run") if given.get(key)), "")
    return [str(first), *([given["compare"]] if given.get("compare") not in (None, "base") else [])]


def _check_run(name: str) -> None:
    """Refuses a sweep, and the name of a run that does not exist, before it is taken for a model on the Hub."""
    if os.path.isfile(os.path.join(name, "sweep.json")):
        from finetune.cli.sweep_report import read_sweep

        best = (read_sweep(Path(name, "sweep.json")) or {}).get("best")
        cure = f"write one of its runs, such as {os.path.join(name, str(best))}" if best else "write one of its runs"
        raise RunError(f"{name} is the folder of a sweep (its page: {os.path.join(name, 'sweep.html')}); {cure}")
    if not name or ":" in name or os.path.exists(os.path.expanduser(name)):
        return
    from finetune.recipe.paths import is_local, near_path

    in_runs = os.path.join("runs", name)
    if is_local(name) or os.path.isdir(in_runs):
        near = in_runs if os.path.isdir(in_runs) else near_path(name)
        cure = f"perhaps {near}" if near else "write the folder of a run or of a model"
        raise RunError(f"{name}: there is no such file or folder; {cure}")
