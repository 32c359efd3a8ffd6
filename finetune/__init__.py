"""Supervised fine-tuning of language models from one YAML recipe, with proved labels, merges and exports.

>>> from finetune.recipe import load_recipe
>>> from finetune.train import train
>>> train(load_recipe("recipes/quickstart.yaml"), say=print)
PosixPath('runs/quickstart')
"""

__version__ = "0.1.0"
