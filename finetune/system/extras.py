"""The packages that parts of this project need beyond its own dependencies: the extras of its metadata."""

from __future__ import annotations

import importlib.metadata
import shlex

from packaging.requirements import Requirement

# The name of this project as a package to install. On PyPI, `finetune` is another project.
DISTRIBUTION = "finetune-recipes"


def requirements(extra: str = "") -> list[Requirement]:
    """The packages that this project requires; with `extra`, those that it adds.

    Raises:
        importlib.metadata.PackageNotFoundError: The project is not installed.
    """
    required = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    basic = [r for r in required if not r.marker or r.marker.evaluate({"extra": ""})]
    if not extra:
        return basic
    return [r for r in required if r not in basic and r.marker and r.marker.evaluate({"extra": extra})]


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra, wherever this project was installed from."""
    try:
        wanted = requirements(extra)
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    if not wanted:  # not installed, or installed from a tree of which the extra is newer
        return f"pip install -e '.[{extra}]'"
    for requirement in wanted:
        requirement.marker = None
    return f"pip install {' '.join(shlex.quote(str(requirement)) for requirement in wanted)}"
