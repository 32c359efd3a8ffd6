"""Perplexity on held-out rows, answers to prompts, the language of answers, a judge's preference.

>>> evaluate("runs/quickstart", compare="base")["models"]
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.evaluate.run import evaluate as evaluate

__getattr__ = lazy_names(__name__, evaluate="run")
