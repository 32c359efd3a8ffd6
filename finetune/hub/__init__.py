"""Writes model cards; pushes runs, merged models and exports to the Hub.

>>> push("runs/quickstart", repo_id="you/quickstart", private=True)
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.hub.run import push as push

__getattr__ = lazy_names(__name__, push="run")
