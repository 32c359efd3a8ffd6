"""Measures a model: perplexity on held-out rows, answers and their language, a judge's preference, lm-eval tasks.

>>> evaluate("runs/quickstart", compare="base")["models"]
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.evaluate.run import evaluate as evaluate

__getattr__ = lazy_names(__name__, evaluate="run")
