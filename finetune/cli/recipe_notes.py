"""Notes and warnings about a valid recipe: what is trained, the learning rate, the template, the next command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.recipe.load import Recipe

# Ten times the highest rate that is in use for adapters.
_HIGHEST_RATE = 0.01


def notes(recipe: Recipe) -> Iterator[str]:
    """The lines that `check` prints after a recipe's values."""
    from finetune.recipe.checks import base_template

    yield from what_is_trained(recipe)
    name = recipe.model.name_or_path
    template = base_template(name)
    texts = all(source.format == "text" or source.raw for source in recipe.data.train)
    if template and not (recipe.model.chat_template or recipe.model.adapter or texts):
        yield f"{name} is a base without a chat template; for conversations write model.chat_template: {template}"
    if recipe.early_stopping:
        best = recipe.training.get("load_best_model_at_end")
        saved = "best weights are saved" if best else "last weights are saved (load_best_model_at_end: true: the best)"
        patience = recipe.early_stopping.patience
        yield f"early stopping: after {patience} evaluations without an improvement; the {saved}"
    yield f"next: finetune inspect {recipe.path} shows the tokens that are trained on; --all prints the defaults, too"


def what_is_trained(recipe: Recipe) -> Iterator[str]:
    """Lines on whether an adapter or all weights are trained, and on a learning rate above 0.01 with Adam."""
    rate, optimizer = recipe.training.get("learning_rate"), str(recipe.training.get("optim", "adamw"))
    if isinstance(rate, int | float) and rate > _HIGHEST_RATE and "adam" in optimizer:
        yield f"training.learning_rate is {rate:g}: with Adam 1e-5 to 1e-3 is usual, and far more ruins a model"
    if recipe.lora is None:
        yield "all weights are trained (lora: null)"
    elif recipe.model.adapter:
        yield f"the adapter {recipe.model.adapter} is trained on"
    else:
        absent = (
            "" if any(key.split(".")[0] == "lora" for key in recipe.origins) else "; the recipe has no section lora"
        )
        yield f"a LoRA adapter is trained{absent} (lora: null trains all weights)"
        if recipe.method == "sft" and "training.learning_rate" not in recipe.origins:
            yield (
                "training.learning_rate is not set: trl's default suits the training of all "
                "weights; for LoRA 2e-4 is usual"
            )
