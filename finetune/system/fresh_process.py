"""Calls functions in a fresh Python process, so that their imports and data leave nothing in this one's memory.

    >>> result = call(measure_folder, Job(folder="exports/bf16", dtype="bfloat16"))

Argument and result pass as JSON, by the function's type hints: dataclasses, lists, dicts, numbers and texts. A
`TypedDict` must be that of `typing_extensions` (pydantic, before Python 3.12).
"""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar, get_type_hints, overload

from pydantic import TypeAdapter

from finetune.system import errors
from finetune.system.before_torch import prepare_imports
from finetune.system.files import write_whole
from finetune.system.terminal import silence_upstream

Argument = TypeVar("Argument")
Result = TypeVar("Result")
# In the fresh process: the stream that `report` writes to, the original standard output.
_parent: IO[str] | None = None


class ProcessFailed(Exception):
    """The function raised an error that the user cannot mend, or its process ended before it returned.

    Attributes:
        code: The process's exit code, or minus the number of the signal that ended it.
        stderr: What the process wrote to standard error, if it was kept.

    `str()` is one line that says why.
    """

    def __init__(self, why: str, code: int, stderr: str) -> None:
        super().__init__(why)
        self.code, self.stderr = code, stderr


@overload
def call(
    function: Callable[[Argument], Result],
    argument: Argument,
    on_line: Callable[[str], object] = ...,
    environment: Mapping[str, str] | None = None,
    keep_stderr: bool = True,
) -> Result: ...


@overload
def call(
    function: str,
    argument: object,
    on_line: Callable[[str], object] = ...,
    environment: Mapping[str, str] | None = None,
    keep_stderr: bool = True,
) -> Any: ...


def call(
    function: Callable[[Any], Any] | str,
    argument: Any,
    on_line: Callable[[str], object] = lambda line: None,
    environment: Mapping[str, str] | None = None,
    keep_stderr: bool = True,
) -> Any:
    """The result of `function(argument)`, computed in a fresh process.

    Args:
        function: A function at the top level of a module, with hints for its argument and its result; or its place,
            `module:name`, if this process shall import the module while the other one starts.
        argument: Its one argument.
        on_line: Called with each line that the function sends with `report`.
        environment: Variables that are added to this process's environment.
        keep_stderr: Keeps what the process writes to standard error for `ProcessFailed`; else the user sees it.

    Raises:
        FinetuneError, OSError: As the function raised it.
        ProcessFailed: The function raised anything else, or its process ended without an answer.
    """
    if isinstance(function, str):
        module, _, name = function.partition(":")
        argument_type = TypeAdapter(type(argument))
    else:
        module, name = function.__module__, function.__qualname__
        argument_type = _argument_type(function)
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr_file,
    ):
        argument_file, answer_file = Path(folder, "argument.json"), Path(folder, "answer.json")
        argument_file.write_text(_encoded(argument_type, argument), encoding="utf-8")
        names = (module, name, str(argument_file), str(answer_file))
        variables = child_environment() | dict(environment or {})
        process = _start(names, variables, stderr_file if keep_stderr else None)
        try:
            result_type = _result_type(getattr(importlib.import_module(module), name))
            for line in process.stdout or ():
                on_line(line.rstrip("\n"))
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        stderr_file.seek(0)
        stderr = stderr_file.read()
        if not answer_file.exists():
            raise ProcessFailed(_why(code, stderr), code, stderr)
        answered = json.loads(answer_file.read_text(encoding="utf-8"))
    if "value" in answered:
        return result_type.validate_python(answered["value"])
    if "os_error" in answered:
        raise OSError(*answered["os_error"])
    if "error" in answered:
        # The cause holds what the process wrote to standard error.
        raise _rebuilt(*answered["error"]) from ProcessFailed(answered["error"][0], code, stderr)
    raise ProcessFailed(answered["failed"], code, stderr)


def report(line: str) -> None:
    """In a function that `call` runs: sends a line to `on_line`; elsewhere does nothing."""
    if _parent is not None:
        print(line, file=_parent, flush=True)


def child_environment() -> dict[str, str]:
    """The environment of a fresh process, which can import this package even if it is not installed.

    Nothing is imported from the working directory, which may be a folder of somebody else's files.
    """
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    safe = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONSAFEPATH": "1"}
    return os.environ | safe


def serve(*names: str) -> None:
    """In the fresh process: `answer(*names)`, for as long as the parent lives."""
    threading.Thread(target=_end_with_parent, args=(sys.stdout.fileno(),), daemon=True).start()
    answer(*names)


def answer(module: str, name: str, argument_file: str, answer_file: str) -> None:
    """In the fresh process: calls a function and writes what it returned or raised.

    Args:
        module: The function's module.
        name: The function's name in it.
        argument_file: The path of the argument, in JSON.
        answer_file: The path to write the answer to, in JSON.
    """
    global _parent
    silence_upstream()
    prepare_imports()
    # Upstream's own prints must not reach `on_line`.
    _parent, sys.stdout = sys.stdout, sys.stderr
    function = getattr(importlib.import_module(module), name)
    argument_type, result_type = _argument_type(function), _result_type(function)
    try:
        argument = argument_type.validate_json(Path(argument_file).read_bytes())
        text = f'{{"value": {_encoded(result_type, function(argument))}}}'
    except (Exception, SystemExit) as error:
        text = json.dumps(_described(error))
    write_whole(Path(answer_file), text)


def _end_with_parent(descriptor: int) -> None:
    """Ends this process once nobody reads its pipe: the parent was killed, and cannot end it any more."""
    poll = select.poll()
    poll.register(descriptor, 0)  # an error alone, which the last reader's end is
    poll.poll()
    os._exit(1)


def _start(names: tuple[str, ...], environment: dict[str, str], stderr: IO[str] | None) -> subprocess.Popen[str]:
    """The process that runs `serve(*names)`; tests replace this function to fork one that has done the imports."""
    code = f"import sys; from {__name__} import serve; serve(*sys.argv[1:])"
    # `-P`: without it Python imports modules of the working directory first, which may be somebody else's folder.
    command = [sys.executable, "-P", "-W", "ignore", "-c", code, *names]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


def _argument_type(function: Callable[[Any], Any]) -> TypeAdapter[Any]:
    """An adapter for a function's one argument."""
    return TypeAdapter(next(hint for name, hint in get_type_hints(function).items() if name != "return"))


def _result_type(function: Callable[[Any], Any]) -> TypeAdapter[Any]:
    """An adapter for a function's result."""
    return TypeAdapter(get_type_hints(function)["return"])


def _encoded(adapter: TypeAdapter[Any], value: Any) -> str:
    # Not `dump_json`, which writes null for a number that is not finite.
    return json.dumps(adapter.dump_python(value, mode="json"), ensure_ascii=False)


def _described(error: BaseException) -> dict[str, Any]:
    """An error as JSON, from which `call` raises it again."""
    if isinstance(error, errors.FinetuneError):
        return {"error": (type(error).__name__, error.args, vars(error))}
    if isinstance(error, OSError) and error.errno is not None:
        return {"os_error": (error.errno, error.strerror, str(error.filename or "") or None)}
    return {"failed": f"{type(error).__name__}: {errors.first_line(error)}"}


def _rebuilt(name: str, arguments: list[Any], fields: dict[str, Any]) -> errors.FinetuneError:
    """The error of ours that `_described` wrote."""
    kind: type[errors.FinetuneError] = getattr(errors, name)
    error = kind.__new__(kind, *arguments)
    vars(error).update(fields)
    return error


def _why(code: int, stderr: str) -> str:
    """One line about a process that ended without an answer."""
    last = next(iter(stderr.strip().splitlines()[-1:]), "it wrote nothing to standard error")
    reason = "it was killed, most likely because memory ran out" if code == -9 else last
    return f"its process ended with code {code}: {reason}"
