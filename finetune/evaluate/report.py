"""An evaluation as tables, and its answers side by side."""

from __future__ import annotations

import re
from typing import Any

from finetune.system.pages import render

# Where prompts come from that no file holds.
HELD_OUT_ROWS = "the held-out rows"
# Answers that stand in the Markdown; the page has all.
_SHOWN = 10
_CUT = 600


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables, and the first answers side by side."""
    lines = [f"# Evaluation of {report['models'][-1]['name']}", "", intro(report), ""]
    for title, rows in tables(report):
        lines += [f"## {title}", "", *_table(rows), ""]
    lines += ["## Side by side", ""]
    names = [model["name"] for model in report["models"]]
    for item in report["answers"][:_SHOWN]:
        lines += [f"### {_plain(item['prompt'])}", "", *_quoted(item["asked"][-1]["content"]), ""]
        for name, model in zip(names, item["models"], strict=True):
            lines += [f"**{name}** ({_told(model)})", "", *_quoted(model["text"]), ""]
    if len(report["answers"]) > _SHOWN:
        lines += [f"All {len(report['answers'])} are in `answers.html`.", ""]
    return "\n".join(lines)


def as_html(report: dict[str, Any]) -> str:
    """One page that needs nothing else: the tables, and all answers side by side."""
    return render(
        "evaluate/answers.html.jinja", report=report, intro=intro(report), tables=tables(report), told=_told
    )


def tables(report: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Each table's title and its rows, the head first; tables of nothing are left out."""
    models = report["models"]
    every = [
        ("On held-out rows", _loss_rows(models)),
        ("Answers", _answer_rows(models)),
        ("Preference", _judge_rows(report.get("judge"))),
        ("Tasks", _task_rows(models)),
    ]
    return [(title, rows) for title, rows in every if len(rows) > 1]


def intro(report: dict[str, Any]) -> str:
    """What was asked, in a sentence."""
    count, limit = len(report["answers"]), report["limit"]
    first = f"Greedy answers of at most {report['max_new_tokens']} tokens to {count} questions from {report['prompts']}"
    told = f"{first}; recipe {report['recipe']}" + (f"; at most {limit} rows and prompts." if limit else ".")
    other = " The rows are other tokens to each model, so perplexity and accuracy cannot be compared."
    return told if report["same_tokens"] else told + other


def _loss_rows(models: list[dict[str, Any]]) -> list[list[str]]:
    """Perplexity and accuracy of each group of rows, a pair of columns a model."""
    rows = [["rows", *(head for m in models for head in (f"{m['name']}: tokens", "perplexity", "accuracy"))]]
    groups = dict.fromkeys(
        (group, name) for m in models for group, parts in m["loss"].items() for name in parts
    )
    alone = {group for group in ("source", "language") if sum(g == group for g, _ in groups) < 2}
    for group, name in groups:
        if group not in alone:
            cells = [m["loss"].get(group, {}).get(name) for m in models]
            rows.append(
                [name if group == "all" else f"{group} {name}", *(text for c in cells for text in _loss(c))]
            )
    return rows


def _loss(part: dict[str, Any] | None) -> list[str]:
    if part is None:
        return ["", "", ""]
    perplexity = "not finite" if part["perplexity"] is None else f"{part['perplexity']:.4g}"
    return [f"{part['tokens']:,}", perplexity, f"{part['accuracy']:.1%}"]


def _answer_rows(models: list[dict[str, Any]]) -> list[list[str]]:
    answered = [m for m in models if m["answers"]]
    rows = [["", *(m["name"] for m in answered)]]
    if not answered:
        return rows
    rows.append(["in the language of the prompt", *(_share(m["answers"]["language"]) for m in answered)])
    languages = dict.fromkeys(name for m in answered for name in m["answers"]["languages"])
    if len(languages) > 1:
        for name in languages:
            shares = [m["answers"]["languages"].get(name) for m in answered]
            rows.append(
                [f"asked for in {name or '?'}", *(_share(share) if share else "" for share in shares)]
            )
    rows.append(["end by themselves", *(_ended(m["answers"]) for m in answered)])
    rows.append(["said before (runs of 4 tokens)", *(f"{m['answers']['repetition']:.1%}" for m in answered)])
    rows.append(["tokens, mean", *(f"{m['answers']['tokens']:.1f}" for m in answered)])
    return rows


def _ended(answers: dict[str, Any]) -> str:
    count = answers["count"]
    return f"{answers['stopped']:.1%} ({round(answers['stopped'] * count)} of {count})"


def _share(share: dict[str, Any]) -> str:
    if not share["judged"]:
        return "none to judge"
    part = share["right"] / share["judged"]
    return (
        f"{part:.1%} ({share['right']} of {share['judged']}; 95%: {share['low']:.1%} to {share['high']:.1%})"
    )


def _judge_rows(judge: dict[str, Any] | None) -> list[list[str]]:
    if judge is None:
        return []
    error = "" if judge["standard_error"] is None else f" ± {judge['standard_error']:.2f}"
    rows = [
        ["", f"against {judge['against']}, by {judge['model']}"],
        ["from -1.5 (much worse) to 1.5 (much better)", f"{judge['mean']:+.2f}{error}"],
        ["pairs", f"{judge['pairs']:,}"],
        ["left out", f"{judge['malformed']:,} malformed, {judge['refused']:,} refused"],
        ["the two orders disagree", f"{judge['disagreements']:,}"],
        ["asked now", judge["cost"]],
    ]
    return rows + [["note", note] for note in judge["notes"]]


def _task_rows(models: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["task", *(m["name"] for m in models)]]
    names = dict.fromkeys(name for m in models for name in m["tasks"])
    return rows + [
        [name, *(f"{m['tasks'][name]:.4g}" if name in m["tasks"] else "" for m in models)] for name in names
    ]


def _told(model: dict[str, Any]) -> str:
    """What is known of an answer, in words."""
    language = model["language"]
    found, wanted = language["found"], language["wanted"]
    wrong = f"not all in {wanted}" if found == wanted else f"in {found or '?'} and not in {wanted}"
    right = {True: f"in {found}", None: "no language to judge"}.get(language["right"], wrong)
    return f"{model['tokens']} tokens, {'ended' if model['stopped'] else 'cut off'}, {right}"


def _table(rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _quoted(text: str) -> list[str]:
    """A text as a quotation in which nothing is Markdown but line breaks; cut where it is long."""
    shown = text if len(text) <= _CUT else f"{text[:_CUT]} ..."
    return [f"> {_plain(line)}  " if line.strip() else ">" for line in shown.splitlines()] or [">"]


def _plain(line: str) -> str:
    """A line that Markdown shows as it is: no emphasis, tag, character reference, list, heading or code."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", line)
    escaped = re.sub(r"^(\s*)([-+=]|\d+(?=[.)]))", _begun, escaped)
    # Four spaces would begin code.
    return re.sub(r"^\s+", lambda spaces: "\u00a0" * len(spaces[0].expandtabs(4)), escaped)


def _begun(start: re.Match[str]) -> str:
    """What would begin a list, or end a heading, with a backslash where one helps: a number's stands behind it."""
    return f"{start[1]}{start[2]}\\" if start[2].isdecimal() else f"{start[1]}\\{start[2]}"
