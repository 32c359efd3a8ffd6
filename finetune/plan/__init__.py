"""What a recipe will need before it is run: memory by part, whether it fits, what to change, how long it takes."""

from finetune.cards import CARDS, Card, here
from finetune.plan.facts import PlanError, card_of
from finetune.plan.fit import Plan, plan
from finetune.plan.measure import measure
from finetune.plan.report import as_json, as_text
from finetune.plan.start import check

__all__ = [
    "CARDS",
    "Card",
    "Plan",
    "PlanError",
    "as_json",
    "as_text",
    "card_of",
    "check",
    "here",
    "measure",
    "plan",
]
