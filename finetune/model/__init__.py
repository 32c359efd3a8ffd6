"""Loads base models and tokenizers, and generates answers.

>>> recipe = load_recipe("recipes/quickstart.yaml")
>>> model, tokenizer = load_model(recipe), load_tokenizer(recipe.model)
"""

from typing import TYPE_CHECKING

from finetune.system.lazy import lazy_names

if TYPE_CHECKING:
    from finetune.model.load import load_model as load_model
    from finetune.model.load import load_tokenizer as load_tokenizer

__getattr__ = lazy_names(__name__, load_model="load", load_tokenizer="load")
