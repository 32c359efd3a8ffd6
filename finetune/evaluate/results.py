"""The results of evaluated models, and the report that they become."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import cast

from finetune import __version__
from finetune.data.samples import LabelledRow
from finetune.evaluate.answers import Answer
from finetune.evaluate.language import LanguageVerdict, language_verdict
from finetune.evaluate.perplexity import LossSum
from finetune.evaluate.preference import PairScore, preference_report
from finetune.evaluate.report import (
    AnswerReport,
    AnswerSummary,
    EvaluationReport,
    LanguageReport,
    LossPart,
    ModelReport,
)
from finetune.evaluate.shares import share_of
from finetune.recipe.load import Recipe

# A row's source and its language.
Origin = tuple[str, str]


@dataclass
class ModelResult:
    """The results of one model.

    Attributes:
        name: Its name in the report.
        rows: The held-out rows in its tokens; none for a served model.
        loss: The loss by source and language.
        pairs: The scores of pairs by the name of the row.
        answers: Its answers, in the order of the prompts.
        tasks: The results of lm-eval's tasks.
        served: A server answered; it tells no losses.
    """

    name: str
    rows: list[LabelledRow] = field(default_factory=list)
    loss: dict[Origin, LossSum] = field(default_factory=dict)
    pairs: dict[str, PairScore] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=dict)
    served: bool = False

    @cached_property
    def verdicts(self) -> list[LanguageVerdict]:
        """The language of each answer."""
        return [_language_verdict(answer) for answer in self.answers]


def report_of(results: list[ModelResult], recipe: Recipe, source: str, limit: int | None) -> EvaluationReport:
    """The report without the judge.

    Args:
        results: The models in the order in which they are shown; the last one is evaluated.
        recipe: The recipe with the rows and prompts.
        source: A description of the prompts' origin.
        limit: The most rows and prompts.
    """
    rows = [result.rows for result in results if not result.served]
    return {
        "finetune": __version__,
        "recipe": str(recipe.path),
        "prompts": source,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "limit": limit,
        "same_tokens": all(own == rows[0] for own in rows),
        "models": [_model_report(result, results) for result in results],
        "answers": [_answer_report(results, i) for i in range(len(results[0].answers))],
    }


def _model_report(result: ModelResult, results: list[ModelResult]) -> ModelReport:
    report: ModelReport = {
        "name": result.name,
        "loss": _loss_groups(result.loss),
        "answers": _summary(result),
        "tasks": result.tasks,
    }
    if result.pairs:
        before = results[0].pairs if result is not results[0] else {}
        report["pairs"] = preference_report(result.pairs, before or None)
    if result.served and result is not results[-1]:
        evaluated = results[-1].answers
        report["equal"] = share_of([a.text == b.text for a, b in zip(result.answers, evaluated, strict=True)])
    return report


def _language_verdict(answer: Answer) -> LanguageVerdict:
    if answer.calls:
        return LanguageVerdict(None, None, None, f"it calls {answer.calls[0]}")
    return language_verdict(answer.question, answer.text)


def _answer_report(results: list[ModelResult], i: int) -> AnswerReport:
    """One prompt and every model's answer to it."""
    answers = [(result.answers[i], asdict(result.verdicts[i])) for result in results]
    return {
        "prompt": answers[0][0].prompt.name,
        "asked": answers[0][0].asked,
        "models": [
            {"text": a.text, "tokens": a.tokens, "stopped": a.stopped, "language": cast(LanguageReport, language)}
            for a, language in answers
        ],
    }


def _loss_groups(loss: dict[Origin, LossSum]) -> dict[str, dict[str, LossPart]]:
    """The loss on all rows, on each source's and on each language's."""
    groups: dict[str, dict[str, LossSum]] = {"all": {}, "source": {}, "language": {}}
    for (source, language), part in loss.items():
        for group, name in (("all", "all"), ("source", source), ("language", language)):
            groups[group][name] = groups[group].get(name, LossSum()) + part
    return {
        group: {
            name: {
                "tokens": part.tokens,
                "perplexity": part.perplexity if math.isfinite(part.perplexity) else None,
                "accuracy": part.accuracy,
            }
            for name, part in parts.items()
            if part.tokens
        }
        for group, parts in groups.items()
    }


def _summary(result: ModelResult) -> AnswerSummary:
    """Means over all answers; language shares are over the answers whose language can be judged."""
    count = len(result.answers)
    if not count:
        return {}
    by_language: dict[str, list[bool]] = {}
    for verdict in result.verdicts:
        if verdict.right is not None:
            by_language.setdefault(verdict.wanted or "", []).append(verdict.right)
    return {
        "count": count,
        "language": share_of([right for rights in by_language.values() for right in rights]),
        "languages": {name: share_of(rights) for name, rights in by_language.items()},
        "stopped": sum(a.stopped for a in result.answers) / count,
        "repetition": sum(a.repetition for a in result.answers) / count,
        "tokens": sum(a.tokens for a in result.answers) / count,
    }
