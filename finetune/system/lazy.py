"""Public names of a package that are imported at their first use, so that `finetune --help` loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str, **modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package (PEP 562).

    Args:
        package: The package's `__name__`.
        **modules: Each public name and the module in the package that defines it.
    """

    def __getattr__(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
