"""The `finetune` command.

>>> main(["check", "recipes/quickstart.yaml"])
0
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.cli.commands import main as main

__getattr__ = lazy_names(__name__, main="commands")
