"""Prints pip constraints: each dependency of pyproject.toml at its lower bound."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    name, lowest = re.fullmatch(r"([\w.-]+)>=([\w.]+),<.*", requirement).groups()
    if name != "torch":  # its oldest release is for whoever has it
        print(f"{name}=={lowest}" if lowest.count(".") > 1 else f"{name}=={lowest}.*")
