"""The evaluation's report: what `report.json` holds, as Markdown tables and as a page with answers side by side."""

from __future__ import annotations

import re
from typing import Any, NotRequired, TypedDict

from finetune.data.turns import Message
from finetune.evaluate.shares import Share, share_text
from finetune.system.numbers import markdown_table
from finetune.system.pages import markdown, render, visible

# `prompts` in the report of an evaluation without a file of prompts.
HELD_OUT_ROWS = "the held-out rows"
# The Markdown shows this many answers, and this many characters of each; the HTML page shows everything.
_SHOWN_ANSWERS = 10
_SHOWN_CHARACTERS = 600


class LossPart(TypedDict):
    """The loss on one group of rows; `perplexity` is None if it is infinite, which JSON cannot hold."""

    tokens: int
    perplexity: float | None
    accuracy: float


class AnswerSummary(TypedDict, total=False):
    """Figures over all answers of a model; empty if there were no prompts."""

    count: int
    language: Share
    languages: dict[str, Share]
    stopped: float
    repetition: float
    tokens: float


class PreferenceReport(TypedDict):
    """The pairs whose chosen answer is likelier, over all pairs and by the language of the prompt.

    `per_token` compares the mean log-probability of a token, `whole` the log-probability of the whole answer, which
    favours short ones. `gained` compares how much the log-probability of both grew since the model that is compared
    with: DPO's implicit reward. It is empty without such a model.
    """

    per_token: dict[str, Share]
    whole: dict[str, Share]
    gained: dict[str, Share]


class ModelReport(TypedDict):
    """The figures of one model; `loss` by kind of group (all, source, language), then by the group's name.

    `equal` is a served model's share of answers that are those of the evaluated model, character for character.
    """

    name: str
    loss: dict[str, dict[str, LossPart]]
    answers: AnswerSummary
    tasks: dict[str, float]
    pairs: NotRequired[PreferenceReport]
    equal: NotRequired[Share]


class LanguageReport(TypedDict):
    """The fields of a `LanguageVerdict`."""

    right: bool | None
    wanted: str | None
    found: str | None
    why: str


class ModelAnswer(TypedDict):
    """One model's answer to one prompt."""

    text: str
    tokens: int
    stopped: bool
    language: LanguageReport


class AnswerReport(TypedDict):
    """One prompt and the answer of each model, in the order of the models."""

    prompt: str
    asked: list[Message]
    models: list[ModelAnswer]


class EvaluationReport(TypedDict):
    """`report.json` of an evaluation; the last of `models` is evaluated, any other is what it is compared with."""

    finetune: str
    recipe: str
    prompts: str
    max_new_tokens: int
    limit: int | None
    same_tokens: bool
    models: list[ModelReport]
    answers: list[AnswerReport]
    trained_on: NotRequired[list[str]]
    """The sources of the held-out rows that the evaluated run was trained on."""
    judge: NotRequired[dict[str, Any]]
    """The fields of `judge.Preference`, its notes, the judge's `model`, `cost`, and `against`: the reference's name."""


def as_markdown(report: EvaluationReport) -> str:
    """The report as Markdown: its tables and the first answers side by side."""
    lines = [f"# Evaluation of {markdown(report['models'][-1]['name'])}", "", markdown(intro(report)), ""]
    for title, rows in tables(report):
        lines += [f"## {title}", "", *markdown_table(rows), ""]
    lines += ["## Side by side", ""]
    names = [model["name"] for model in report["models"]]
    for item in report["answers"][:_SHOWN_ANSWERS]:
        turn, _, asked = _turn_parts(item["asked"])
        lines += [f"### {_escaped(item['prompt'])}{turn}", "", *_quoted(asked[-1]["content"]), ""]
        for name, model in zip(names, item["models"], strict=True):
            lines += [f"**{markdown(name)}** ({_describe(model)})", "", *_quoted(model["text"]), ""]
    if len(report["answers"]) > _SHOWN_ANSWERS:
        lines += [f"All {len(report['answers'])} are in `answers.html`.", ""]
    return "\n".join(lines)


def as_html(report: EvaluationReport) -> str:
    """The report as one self-contained HTML page: its tables and all answers side by side."""
    return render(
        "evaluate/answers.html.jinja",
        report=report,
        intro=intro(report),
        tables=tables(report),
        describe=_describe,
        parts=_turn_parts,
    )


def _turn_parts(asked: list[Message]) -> tuple[str, list[Message], list[Message]]:
    """The user's last turn as `, turn 2`, the messages before it, and those from it on; the first turn is not named."""
    turns = [place for place, message in enumerate(asked) if message["role"] == "user"]
    if len(turns) < 2:
        return "", [], asked
    return f", turn {len(turns)}", asked[: turns[-1]], asked[turns[-1] :]


def tables(report: EvaluationReport) -> list[tuple[str, list[list[str]]]]:
    """Each table's title and its rows, of which the first is the header; empty tables are left out."""
    models = report["models"]
    every = [
        ("On held-out rows", _loss_rows([model for model in models if model["loss"].get("all")])),
        ("Pairs whose chosen answer is preferred", _pair_rows(models)),
        ("Answers", _answer_rows(models)),
        ("Preference", _judge_rows(report.get("judge"))),
        ("Tasks", _task_rows(models)),
    ]
    return [(title, rows) for title, rows in every if len(rows) > 1]


def intro(report: EvaluationReport) -> str:
    """The text above the tables: number and origin of the prompts, limits, and a note on incomparable perplexities."""
    count, limit = len(report["answers"]), report["limit"]
    text = f"Greedy answers of at most {report['max_new_tokens']} tokens to {count} prompts from {report['prompts']}"
    text += f"; recipe {report['recipe']}" + (f"; at most {limit} rows and prompts." if limit else ".")
    if sources := report.get("trained_on"):
        name = report["models"][-1]["name"]
        text += f" {name} was trained on rows of {', '.join(sources)}: they are not held out for it."
    if not report["same_tokens"]:
        text += " The models split the rows into different tokens, so perplexity and accuracy cannot be compared."
    return text


def _loss_rows(models: list[ModelReport]) -> list[list[str]]:
    """Tokens, perplexity and accuracy of each group of rows: three columns per model."""
    rows = [["rows", *(head for m in models for head in (f"{m['name']}: tokens", "perplexity", "accuracy"))]]
    groups = dict.fromkeys((kind, name) for m in models for kind, parts in m["loss"].items() for name in parts)
    # A single source or language has the figures of all rows.
    single = {kind for kind in ("source", "language") if sum(k == kind for k, _ in groups) < 2}
    for kind, name in groups:
        if kind not in single:
            parts = [m["loss"].get(kind, {}).get(name) for m in models]
            title = name if kind == "all" else f"{kind} {name}"
            rows.append([title, *(text for part in parts for text in _loss_cells(part))])
    return rows


def _loss_cells(part: LossPart | None) -> list[str]:
    if part is None:
        return ["", "", ""]
    perplexity = "not finite" if part["perplexity"] is None else f"{part['perplexity']:.4g}"
    return [f"{part['tokens']:,}", perplexity, f"{part['accuracy']:.1%}"]


def _pair_rows(models: list[ModelReport]) -> list[list[str]]:
    rows = [["", *(m["name"] for m in models)]]
    titles = {
        "per_token": "it is likelier, per token",
        "whole": "it is likelier, as a whole",
        "gained": f"it gained more than the rejected one since {models[0]['name']}",
    }
    for measure, title in titles.items():
        pairs: list[Any] = [m.get("pairs", {}) for m in models]
        parts: list[dict[str, Share]] = [found.get(measure, {}) for found in pairs]
        languages = dict.fromkeys(name for part in parts for name in part)
        for name in languages if len(languages) > 2 else list(languages)[:1]:
            place = title if name == "all" else f"{title}; prompts in {name}"
            rows.append([place, *(share_text(part[name]) if name in part else "" for part in parts)])
    return rows


def _answer_rows(models: list[ModelReport]) -> list[list[str]]:
    summaries = [m["answers"] for m in models if m["answers"]]
    rows = [["", *(m["name"] for m in models if m["answers"])]]
    if not summaries:
        return rows
    rows.append(["in the language of the prompt", *(share_text(s["language"]) for s in summaries)])
    languages = dict.fromkeys(name for s in summaries for name in s["languages"])
    if len(languages) > 1:
        for name in languages:
            shares = [s["languages"].get(name) for s in summaries]
            rows.append([f"prompts for {name or '?'}", *(share_text(share) if share else "" for share in shares)])
    ended = [(s["stopped"], s["count"]) for s in summaries]
    rows.append(["ended by a stop token", *(f"{p:.1%} ({round(p * n)} of {n})" for p, n in ended)])
    rows.append(["repeated 4-grams", *(f"{s['repetition']:.1%}" for s in summaries)])
    rows.append(["tokens, mean", *(f"{s['tokens']:.1f}" for s in summaries)])
    if any("equal" in m for m in models):
        equal = (share_text(m["equal"]) if "equal" in m else "" for m in models if m["answers"])
        rows.append([f"equal to the answer of {models[-1]['name']}", *equal])
    return rows


def _judge_rows(judge: dict[str, Any] | None) -> list[list[str]]:
    if judge is None:
        return []
    error = "" if judge["standard_error"] is None else f" ± {judge['standard_error']:.2f}"
    rows = [
        ["", f"against {judge['against']}, by {judge['model']}"],
        ["from -1.5 (much worse) to 1.5 (much better)", f"{judge['mean']:+.2f}{error}"],
        ["pairs", f"{judge['pairs']:,}"],
        ["left out", f"{judge['malformed']:,} malformed, {judge['refused']:,} refused"],
        ["pairs whose two orders disagree", f"{judge['disagreements']:,}"],
        ["cost of new requests", judge["cost"]],
    ]
    return rows + [["note", note] for note in judge["notes"]]


def _task_rows(models: list[ModelReport]) -> list[list[str]]:
    rows = [["task", *(m["name"] for m in models)]]
    names = dict.fromkeys(name for m in models for name in m["tasks"])
    return rows + [[name, *(f"{m['tasks'][name]:.4g}" if name in m["tasks"] else "" for m in models)] for name in names]


def _describe(answer: ModelAnswer) -> str:
    """An answer's length, how it ended and its language: `31 tokens, ended, in ja`."""
    language = answer["language"]
    found, wanted = language["found"], language["wanted"]
    wrong = f"not all in {wanted}" if found == wanted else f"in {found or '?'} and not in {wanted}"
    right = {True: f"in {found}", None: "no language to judge"}.get(language["right"], wrong)
    return f"{answer['tokens']} tokens, {'ended' if answer['stopped'] else 'cut off'}, {right}"


def _quoted(text: str) -> list[str]:
    """A text as a Markdown quotation in which nothing but its line breaks is Markdown; long texts are cut."""
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
    return [f"> {_escaped(line)}  " if line.strip() else ">" for line in shown.splitlines()] or [">"]


def _escaped(line: str) -> str:
    """A line that Markdown shows as it is: no emphasis, tag, character reference, list, heading or code."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", visible(line))
    # Characters that begin a list or underline a heading. In `1.` the backslash goes after the number.
    escaped = re.sub(r"^(\s*)(?:([-+=])|(\d+)(?=[.)]))", lambda m: f"{m[1]}{m[3] or ''}\\{m[2] or ''}", escaped)
    # Four spaces would begin a block of code.
    return re.sub(r"^\s+", lambda spaces: "\u00a0" * len(spaces[0].expandtabs(4)), escaped)
