"""Instead of the processes of `fresh_process.call`: a call in this process, or a process that ends without a result."""

import io
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from finetune.system import fresh_process
from finetune.system.terminal import quiet


class Ended:
    """A process that has ended."""

    def __init__(self, code: int = 0, lines: str = "") -> None:
        self.code, self.stdout = code, io.StringIO(lines)

    def wait(self) -> int:
        return self.code

    def kill(self) -> None:
        pass


def start(names: tuple[str, ...], environment: dict[str, str], stderr: IO[str] | None) -> Ended:
    """In place of `fresh_process._start`: argument, result and errors pass as JSON all the same."""
    stdout, sys.stdout = sys.stdout, io.StringIO()
    lines = sys.stdout
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            fresh_process.answer(*names)
    finally:
        sys.stdout, fresh_process._parent = stdout, None
    return Ended(lines=lines.getvalue())


def dies(
    code: int, stderr_text: str, when: Callable[[Any], bool] = lambda argument: True, late: bool = False
) -> Callable[..., Any]:
    """In place of `fresh_process._start`: ends without a result where `when(argument)`, before it runs or after."""
    start = fresh_process._start

    def start_or_die(names: tuple[str, ...], environment: dict[str, str], stderr: IO[str] | None) -> Any:
        argument, result = (Path(name) for name in names[2:])
        if not when(json.loads(argument.read_text(encoding="utf-8"))):
            return start(names, environment, stderr)
        if late:
            process = start(names, environment, stderr)
            process.stdout.read()
            process.wait()
            process.stdout.close()
            result.unlink()
        if stderr:
            stderr.write(stderr_text)
            stderr.flush()
        return Ended(code)

    return start_or_die
