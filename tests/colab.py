"""A stand-in for a Colab machine in the notebook's tests: it answers what cells ask of Colab, the Hub and pip.

The cells' `finetune` is tests/quick.py's, which runs the package that the notebook installed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import venv
from pathlib import Path
from typing import Any

import pytest
import quick
from conftest import ROOT
from hub import TOKEN, Hub

# What the notebook asks of Colab, kept in files where a test can see it.
COLAB = {
    "userdata": f"""
        class SecretNotFoundError(Exception): ...
        class NotebookAccessError(Exception): ...
        def get(name):
            if name != "HF_TOKEN":
                raise SecretNotFoundError(name)
            return {TOKEN!r}
        """,
    "drive": """
        from pathlib import Path
        def mount(place):
            Path("mounted.txt").write_text(place)
            Path("what was on Drive").rename("drive")
        """,
    "files": """
        from pathlib import Path
        def download(file):
            Path("downloaded.txt").write_text(file)
        """,
}
RECIPE = "english_quotes_colab"
NAME = f"{RECIPE}_gemma_2b"
AUTHORS = ("Ada Vale", "Tom Reed", "Mia Brook")
OPTIONS = [
    "model.name_or_path=tiny/gemma",
    "model.dtype=float32",  # float16 is a card's
    "quantization.bnb_4bit_compute_dtype=float32",
    "data.train.0.path=quotes.jsonl",
    "training.optim=adamw_torch",
    "training.max_steps=6",
    "training.warmup_steps=1",
    "training.save_steps=2",
    "training.eval_steps=3",
    "training.logging_steps=1",
    "evaluate.max_new_tokens=8",
    "export.imatrix=never",
]
PARAMETERS = f"""
SOURCE = "finetune.zip"
OPTIONS = {OPTIONS!r}
DRIVE = True
KEEP = "drive"
REPO_ID = "you/quotes"
LIMIT = 2
"""


class Machine:
    """A virtual environment like Colab's: with torch and other packages, without this project."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.content, self.hub = folder / "content", hub
        self.content.mkdir()
        venv.create(folder / "env", symlinks=True)
        site = self.site = next((folder / "env/lib").glob("python*")) / "site-packages"
        ours = Path(sys.prefix) / "lib" / site.parent.name / "site-packages"
        (site / "dependencies.pth").write_text(f"{ours}\n")
        (site / "google/colab").mkdir(parents=True)
        for name, source in ({"__init__": ""} | COLAB).items():
            (site / f"google/colab/{name}.py").write_text(textwrap.dedent(source))
        self.python = folder / "env/bin/python"
        kernel = folder / "jupyter/kernels/python3"
        kernel.mkdir(parents=True)
        argv = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (kernel / "kernel.json").write_text(
            json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"})
        )
        self.environment = (
            os.environ
            | hub.environment(folder / "home")
            | {
                "PATH": f"{folder}/quick:{folder}/env/bin:{os.environ['PATH']}",
                "PYTHONPATH": "",
                "IPYTHONDIR": str(folder / "ipython"),
                # pip builds and installs from what is there.
                "PIP_NO_INDEX": "1",
                "PIP_NO_BUILD_ISOLATION": "0",
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            }
        )
        for name in ("HF_TOKEN", "WANDB_MODE"):
            self.environment.pop(name, None)
        name = f"finetune-{os.getpid()}"
        (folder / "quick").mkdir()
        (folder / "quick/finetune").write_text(quick.CLIENT.format(python=sys.executable, name=name))
        (folder / "quick/finetune").chmod(0o755)
        command = [self.python, "-P", "-u", "-W", "ignore", quick.__file__, name]
        self.server = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL)
        source = folder / "project"
        for name in ("finetune", "data", "recipes"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        shutil.make_archive(str(self.content / "finetune"), "zip", source)
        rows = [
            {"quote": f"“The {thing} of {place} is patient.”", "author": author, "tags": []}
            for thing, author in zip(("sea", "hill", "lamp"), AUTHORS, strict=True)
            for place in ("Ayr", "Bern", "Cork", "Delft", "Esch", "Fano", "Graz", "Hull", "Ios", "Jena")
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.content / "quotes.jsonl").write_text(text, encoding="utf-8")

    def close(self) -> None:
        self.server.kill()
        self.server.wait()

    def execute(self, notebook: Any, patch: pytest.MonkeyPatch) -> None:
        """Runs a notebook, which then holds its outputs."""
        from nbclient import NotebookClient

        patch.setenv("JUPYTER_PATH", str(self.content.parent / "jupyter"))
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        place = {"metadata": {"path": str(self.content)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute(env=self.environment)

    def cut_off(self) -> None:
        """Trains until the third step and kills the process."""
        command = [self.python, "-P", "-u", "-m", "finetune", "train", ROOT / f"recipes/{RECIPE}.yaml", *OPTIONS]
        environment = self.environment | {"PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN}
        with subprocess.Popen(
            [*command, f"training.output_dir=drive/runs/{NAME}"],
            cwd=self.content,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            said = []
            for line in process.stderr or ():
                said.append(line)
                if line.startswith("step 3/"):
                    process.kill()
        assert process.returncode == -signal.SIGKILL, "".join(said)
