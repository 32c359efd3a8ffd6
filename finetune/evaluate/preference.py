"""Preference on held-out pairs: how often a model finds the chosen answer likelier than the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.samples import LabelledRow
from finetune.evaluate.perplexity import LossSum, row_losses
from finetune.evaluate.report import PreferenceReport
from finetune.evaluate.shares import Share, share_of


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt: the name of their row, the language of the prompt, and both sides."""

    name: str
    language: str
    chosen: LabelledRow
    rejected: LabelledRow


@dataclass(frozen=True)
class PairScore:
    """The loss on both answers of a pair."""

    language: str
    chosen: LossSum
    rejected: LossSum


def pairs_in(rows: Iterable[Mapping[str, Any]], languages: Sequence[str]) -> list[Pair]:
    """The pairs in rows that were prepared for dpo, orpo or kto; of rated answers, those to the same prompt.

    Args:
        rows: Rows as `data.mixture` prepares them.
        languages: The language of each.
    """
    pairs: list[Pair] = []
    rated: dict[tuple[int, ...], tuple[list[LabelledRow], list[LabelledRow], str, str]] = {}
    for row, language in zip(rows, languages, strict=True):
        side = LabelledRow(list(row["input_ids"]), list(row["labels"]))
        if "rejected_labels" in row:
            other = LabelledRow(list(row["rejected_input_ids"]), list(row["rejected_labels"]))
            pairs.append(Pair(row["row"], language, side, other))
        elif "desirable" in row:
            good, bad, _, _ = rated.setdefault(tuple(side.prompt), ([], [], row["row"], language))
            (good if row["desirable"] else bad).append(side)
    for good, bad, name, language in rated.values():
        every = [(one, other) for one in good for other in bad]
        pairs += [Pair(f"{name}.{i}", language, one, other) for i, (one, other) in enumerate(every)]
    return pairs


def score_pairs(model: Any, pairs: Sequence[Pair], advance: Callable[[int], None]) -> dict[str, PairScore]:
    """The loss of a model on both answers of each pair, by the pair's name.

    Args:
        model: The model.
        pairs: The pairs.
        advance: Called with 1 after each pair.
    """
    scores = {}
    losses = row_losses(model, [side for pair in pairs for side in (pair.chosen, pair.rejected)])
    for pair in pairs:
        scores[pair.name] = PairScore(pair.language, next(losses), next(losses))
        advance(1)
    return scores


def preference_report(scores: Mapping[str, PairScore], before: Mapping[str, PairScore] | None) -> PreferenceReport:
    """How often the chosen answer is preferred.

    Args:
        scores: The model's losses.
        before: The losses of the model that it is compared with, on the same pairs; None without one.
    """
    per_token: dict[str, list[bool]] = {}
    whole: dict[str, list[bool]] = {}
    gained: dict[str, list[bool]] = {}
    for name, score in scores.items():
        chosen, rejected = score.chosen, score.rejected
        for group in ("all", score.language):
            prefers = chosen.nats * rejected.tokens < rejected.nats * chosen.tokens
            per_token.setdefault(group, []).append(prefers)
            whole.setdefault(group, []).append(chosen.nats < rejected.nats)
            if before is not None:
                was = before[name]
                grew = chosen.nats - was.chosen.nats < rejected.nats - was.rejected.nats
                gained.setdefault(group, []).append(grew)
    return {"per_token": _shares(per_token), "whole": _shares(whole), "gained": _shares(gained)}


def _shares(groups: Mapping[str, list[bool]]) -> dict[str, Share]:
    return {group: share_of(prefers) for group, prefers in groups.items()}
