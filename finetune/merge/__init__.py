"""Merges adapters into their base, one tensor in memory at a time.

>>> merge("runs/quickstart", "merged", dtype="bfloat16")
PosixPath('merged')
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.merge.run import merge as merge

__getattr__ = lazy_names(__name__, merge="run")
