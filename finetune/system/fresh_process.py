"""Functions called in a fresh Python process, which leaves nothing in this one's memory.

    >>> found = call(measure_folder, Job(folder="exports/bf16", dtype="bfloat16"))

Argument and result pass as JSON, by the function's type hints: dataclasses, lists, dicts, numbers and texts.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar, get_type_hints

from finetune.system import errors

Argument = TypeVar("Argument")
Result = TypeVar("Result")
# In the fresh process: where `report` writes, which is this process's standard output.
_parent: IO[str] | None = None


class ProcessFailed(Exception):
    """The function raised an error that is not the user's, or its process ended before it returned.

    `str()` is one line that says why; `code` is the process's exit code, minus the number of a signal that ended it.
    """

    def __init__(self, why: str, code: int, stderr: str) -> None:
        super().__init__(why)
        self.code, self.stderr = code, stderr


def call(
    function: Callable[[Argument], Result],
    argument: Argument,
    on_line: Callable[[str], object] = lambda line: None,
    environment: Mapping[str, str] | None = None,
    keep_stderr: bool = True,
) -> Result:
    """The result of `function(argument)`, computed in a fresh process.

    Args:
        function: A function at the top level of a module, with hints for its argument and its result.
        argument: Its one argument.
        on_line: Called with each line that the function sends with `report`.
        environment: Variables that are added to this process's environment.
        keep_stderr: Keeps what the process writes to standard error for `ProcessFailed`; else the user sees it.

    Raises:
        FinetuneError, OSError: As the function raised it.
        ProcessFailed: The function raised anything else, or its process was ended.
    """
    hints = get_type_hints(function)
    taken = next(hint for name, hint in hints.items() if name != "return")
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
    ):
        asked, answered = Path(folder, "argument.json"), Path(folder, "result.json")
        asked.write_text(_encoded(taken, argument), encoding="utf-8")
        names = (function.__module__, function.__qualname__, str(asked), str(answered))
        process = _start(names, child_environment() | dict(environment or {}), said if keep_stderr else None)
        try:
            for line in process.stdout or ():
                on_line(line.rstrip("\n"))
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        said.seek(0)
        stderr = said.read()
        if not answered.exists():
            raise ProcessFailed(_why(code, stderr), code, stderr)
        answer = json.loads(answered.read_text(encoding="utf-8"))
    if "value" in answer:
        value: Result = _adapter(hints["return"]).validate_python(answer["value"])
        return value
    if "os_error" in answer:
        raise OSError(*answer["os_error"])
    if "error" in answer:
        name, arguments = answer["error"]
        # The cause holds what the process wrote to standard error.
        raise getattr(errors, name)(*arguments) from ProcessFailed(name, code, stderr)
    raise ProcessFailed(answer["failed"], code, stderr)


def report(line: str) -> None:
    """In a function that `call` runs: sends a line to `on_line`; elsewhere does nothing."""
    if _parent is not None:
        print(line, file=_parent, flush=True)


def _start(
    names: tuple[str, ...], environment: dict[str, str], stderr: IO[str] | None
) -> subprocess.Popen[str]:
    code = f"import sys; from {__name__} import answer; answer(*sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", code, *names]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


def answer(module: str, name: str, asked: str, answered: str) -> None:
    """In the fresh process: calls the function and writes what it returned or raised.

    Args:
        module: The function's module.
        name: The function's name in it.
        asked: The file with the argument.
        answered: The file for the result.
    """
    global _parent
    logging.basicConfig(level=logging.ERROR)
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    # What upstream prints must not reach `on_line`.
    _parent, sys.stdout = sys.stdout, sys.stderr
    function = getattr(importlib.import_module(module), name)
    hints = get_type_hints(function)
    taken = next(hint for key, hint in hints.items() if key != "return")
    found: dict[str, Any]
    try:
        argument = _adapter(taken).validate_python(json.loads(Path(asked).read_text(encoding="utf-8")))
        text = f'{{"value": {_encoded(hints["return"], function(argument))}}}'
    except (Exception, SystemExit) as error:
        if isinstance(error, errors.FinetuneError):
            faults = getattr(error, "faults", None)
            found = {"error": (type(error).__name__, [faults] if faults else [str(error)])}
        elif isinstance(error, OSError) and error.errno is not None:
            found = {"os_error": (error.errno, error.strerror, str(error.filename or "") or None)}
        else:
            found = {"failed": f"{type(error).__name__}: {errors.first_line(error)}"}
        text = json.dumps(found)
    beside = Path(f"{answered}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(answered)


def _why(code: int, stderr: str) -> str:
    """One line about a process that ended without an answer."""
    last = next(iter(stderr.strip().splitlines()[-1:]), "it wrote nothing to standard error")
    reason = "it was killed, most likely for want of memory" if code == -9 else last
    return f"its process ended with code {code}: {reason}"


def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _encoded(hint: Any, value: Any) -> str:
    return json.dumps(_adapter(hint).dump_python(value, mode="json"), ensure_ascii=False)


def child_environment() -> dict[str, str]:
    """The environment of the fresh process, which finds this package even where it is not installed."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
