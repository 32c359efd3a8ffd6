"""Virtual environments for other programs, made once under the cache directory, and scripts run in them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.system.cache import made_once

HERE = Path(__file__).parent


class NotInstalled(Exception):
    """The packages of an environment cannot be installed."""


def python_with(packages: Sequence[str]) -> Path:
    """The Python of an environment with these packages, installed by pip if it is not there yet.

    Raises:
        NotInstalled: pip fails; the message is its last line.
    """
    name = sha256("\n".join([sys.version, *packages]).encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        line = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise NotInstalled(done.stderr.strip().splitlines()[-1])

    return made_once(f"clients/{name}", make) / "bin" / "python"


def ask(python: str | Path, probe: str, jobs: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    """A probe's answers to jobs, by the jobs' names.

    Args:
        python: The Python to run it with.
        probe: A script in this folder.
        jobs: See `protocol.answer`.
        work: A folder for the job file.
    """
    file = work / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    line = [python, HERE / probe, file]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answers
