"""How good a model is: its loss on rows that were held out, and its answers, beside another model's."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__
from finetune.data.chat import IGNORE, Chat
from finetune.data.mixture import evaluation_rows
from finetune.data.samples import LabelledRow
from finetune.evaluate.answers import Answer, answer_prompts
from finetune.evaluate.language import LanguageVerdict, language_verdict, wilson_interval
from finetune.evaluate.perplexity import LossSum, row_losses
from finetune.evaluate.prompts import Prompt, held_out_prompts, read_prompts, reference_answers, spread_evenly
from finetune.evaluate.report import HELD_OUT_ROWS, as_html, as_markdown
from finetune.model.load import load_tokenizer
from finetune.model.provenance import adapter_base_sections
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import JudgeSection, ModelSection
from finetune.system.errors import EvaluateError, TemplateError
from finetune.system.files import ADAPTER_CONFIG, run_file, write_whole
from finetune.system.terminal import Say, progress_bar

if TYPE_CHECKING:
    from finetune.evaluate.judge import Judge

# Rows by name, and each one's source and language.
HeldOut = tuple[list[tuple[str, LabelledRow]], list[tuple[str, str]]]

# A recipe's sections on its base.
LoadOptions = tuple[ModelSection, dict[str, Any] | None]

# The word for a run's own base, answering through the run's template.
BASE = "base"


@dataclass(frozen=True)
class _Subject:
    """A model to ask, and how it is loaded; `title` is its name in the report where it has another."""

    model: str
    adapter: bool = True
    said: LoadOptions | None = None
    title: str = ""


@dataclass
class ModelResult:
    """What was found of one model."""

    name: str
    rows: list[LabelledRow] = field(default_factory=list)
    loss: dict[tuple[str, str], LossSum] = field(default_factory=dict)  # by source and language
    answers: list[Answer] = field(default_factory=list)
    verdicts: list[LanguageVerdict] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)


def evaluate(
    model: str,
    output: Path,
    recipe: str | Path | None = None,
    compare: str | None = None,
    limit: int | None = None,
    say: Say = lambda line: None,
    progress: bool = False,
) -> dict[str, Any]:
    """What is known of a model after it was asked; also as `report.json`, `report.md` and `answers.html` in `output`.

    Args:
        model: A run, a directory of weights, or a base model's name.
        output: A folder; what an earlier evaluation left there is replaced, the judge's replies are used again.
        recipe: Whose held-out rows and `evaluate` section to use; absent, the run's own.
        compare: Another model, which is shown first; `base` is the run's base.
        limit: How many rows and prompts at most, before the recipe's.
        say: Gets a line for each step.
        progress: Whether a terminal shows bars.

    Raises:
        EvaluateError: There is no recipe, or it holds nothing out and names no prompts.
        ModelError, RecipeError, DataError, JudgeError: From the rooms that raise them.
    """
    file = Path(recipe) if recipe else run_file(Path(model), "recipe.yaml")
    if file is None:
        raise EvaluateError(
            f"{model} has no recipe.yaml; write --recipe with one that holds rows out or names prompts"
        )
    loaded = load_recipe(file)
    section = loaded.evaluate
    models = [_Subject(model, said=_said(model, loaded))]
    if compare == BASE:
        models.insert(0, _base(model))
    elif compare:
        models.insert(0, _Subject(compare, said=_said(compare, loaded)))
    limit = limit or section.limit
    read: dict[str, HeldOut] = {}

    def held_out(chat: Chat) -> HeldOut:
        # A run and its base share tokenizer and template, and so the rows.
        if chat.fingerprint not in read:
            read[chat.fingerprint] = _held_out(loaded, chat)
        return read[chat.fingerprint]

    # What is wrong with the judge or the tasks is told before a model has answered for hours.
    settings = section.judge
    if settings and not (settings.reference or compare):
        raise EvaluateError(
            "evaluate.judge has nothing to compare with; write --compare, or evaluate.judge.reference"
        )
    judge = _judge(settings) if settings else None
    tasks = None
    if section.lm_eval:
        from finetune.evaluate.lm_eval_tasks import known

        tasks = known(section.lm_eval.tasks)
    asked, source = _prompts(model, loaded, held_out, limit)
    reference = reference_answers(settings.reference, asked) if settings and settings.reference else []
    found = [_measure(one, loaded, asked, held_out, tasks, limit, say, progress) for one in models]
    report = _report(found, loaded, source, limit)
    output.mkdir(parents=True, exist_ok=True)
    _write(report, output)
    if settings and judge:
        # The rest is there already, should the judge fail.
        report["judge"] = _judged(judge, found, reference, output / "judge", say, progress)
        report["judge"]["against"] = settings.reference or found[0].name
        _write(report, output)
    say(f"written: {output}")
    return report


def _write(report: dict[str, Any], output: Path) -> None:
    write_whole(output / "report.md", as_markdown(report))
    write_whole(output / "answers.html", as_html(report))
    write_whole(output / "report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n")


def _prompts(
    model: str, recipe: Recipe, held_out: Callable[[Chat], HeldOut], limit: int | None
) -> tuple[list[Prompt], str]:
    """What is asked, and words that say where it comes from."""
    if path := recipe.evaluate.prompts:
        return read_prompts(path, limit), Path(path).name
    section, _ = _said(model, recipe) or (ModelSection(name_or_path=model), None)
    chat = Chat(load_tokenizer(section))
    rows = held_out(chat)[0]
    if not rows:
        raise EvaluateError(
            f"{recipe.path}: it holds no rows out and names no prompts; add evaluate.prompts, data.eval or "
            "data.eval_fraction"
        )
    return held_out_prompts(recipe.data, {name for name, _ in rows}, limit), HELD_OUT_ROWS


def _said(model: str, recipe: Recipe) -> LoadOptions | None:
    """How a model is loaded: the recipe's own base as the recipe says, any other one as its folder does."""
    return (recipe.model, recipe.quantization) if model == recipe.model.name_or_path else None


def _base(run: str) -> _Subject:
    """What a run was trained from, to be asked through the run's template."""
    name, folder = f"{run}, its base alone", Path(run)
    if (folder / ADAPTER_CONFIG).is_file():
        return _Subject(run, adapter=False, title=name)
    if not run_file(folder, "recipe.yaml"):
        raise EvaluateError(f"--compare {BASE}: {run} is no run; write the name of a model")
    section, quantization = adapter_base_sections(folder)
    if template := run_file(folder, "chat_template.jinja"):
        section = section.model_copy(update={"chat_template": str(template), "system_role": "template"})
    return _Subject(section.name_or_path, said=(section, quantization), title=name)


def _held_out(recipe: Recipe, chat: Chat) -> HeldOut:
    """The rows that the recipe evaluates on, by name, in a model's own tokens; and each one's source and language.

    Raises:
        TemplateError: There are conversations, and no template to render them.
    """
    evaluation = evaluation_rows(recipe.data, chat, recipe.training.get("max_length", 1024))
    if evaluation.dataset is None:
        return [], []
    rows = [
        (row["row"], LabelledRow(list(row["input_ids"]), list(row["labels"]))) for row in evaluation.dataset
    ]
    return rows, evaluation.origins


def _measure(
    asked: _Subject,
    recipe: Recipe,
    prompts: list[Prompt],
    held_out: Callable[[Chat], HeldOut],
    tasks: tuple[Any, list[str]] | None,
    limit: int | None,
    say: Say,
    progress: bool,
) -> ModelResult:
    import torch

    from finetune.model.generate import load_generator

    name = asked.model
    found = ModelResult(asked.title or name)
    say(f"{name}: loading")
    generator = load_generator(name, adapter=asked.adapter, sections=asked.said)
    try:
        rows, origins = held_out(generator.chat)
    except TemplateError as error:
        if generator.chat.tokenizer.chat_template is not None:
            raise
        raise EvaluateError(
            f"{name} has no chat template; write --recipe with one whose model.name_or_path is {name}, and whose "
            "model.chat_template names it"
        ) from error
    kept = [
        (row, origin)
        for (_, row), origin in zip(rows, origins, strict=True)
        if any(label != IGNORE for label in row.labels[1:])
    ]
    kept = spread_evenly(kept, lambda one: one[1], limit)
    found.rows = [row for row, _ in kept]
    with progress_bar(f"{name}: rows", len(kept), progress) as done:
        for (_, origin), part in zip(kept, row_losses(generator.model, found.rows), strict=True):
            found.loss[origin] = found.loss.get(origin, LossSum()) + part
            done(1)
    turns = sum(1 + len(prompt.follow_ups) for prompt in prompts)
    with progress_bar(f"{name}: answers", turns, progress) as done:
        found.answers = answer_prompts(generator, prompts, recipe.evaluate.max_new_tokens, done)
    found.verdicts = [language_verdict(a.messages[-1]["content"], a.text) for a in found.answers]
    if tasks:
        from finetune.evaluate.lm_eval_tasks import scores

        say(f"{name}: {', '.join(tasks[1])}")
        found.tasks = scores(generator, tasks, limit)
    # Two models are never held at once.
    del generator
    gc.collect()
    torch.cuda.empty_cache()
    return found


# ---------------------------------------------------------------------------------------------------------------
# The report


def _report(found: list[ModelResult], recipe: Recipe, source: str, limit: int | None) -> dict[str, Any]:
    """Plain data; models in the order in which they are shown."""
    return {
        "finetune": __version__,
        "recipe": str(recipe.path),
        "prompts": source,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "limit": limit,
        "same_tokens": all(one.rows == found[0].rows for one in found),
        "models": [
            {
                "name": one.name,
                "loss": _losses(one.loss),
                "answers": _summary(one),
                "tasks": one.tasks,
            }
            for one in found
        ],
        "answers": [
            {
                "prompt": answers[0].prompt,
                "asked": list(answers[0].messages),
                "models": [
                    {
                        "text": a.text,
                        "tokens": a.tokens,
                        "stopped": a.stopped,
                        "language": asdict(one.verdicts[i]),
                    }
                    for a, one in zip(answers, found, strict=True)
                ],
            }
            for i, answers in enumerate(zip(*(one.answers for one in found), strict=True))
        ],
    }


def _losses(loss: dict[tuple[str, str], LossSum]) -> dict[str, Any]:
    """Of all rows, and of each source and language where there are several."""
    groups: dict[str, dict[str, LossSum]] = {
        "all": {"all": sum(loss.values(), LossSum())},
        "source": {},
        "language": {},
    }
    for (source, language), part in loss.items():
        for group, name in (("source", source), ("language", language)):
            groups[group][name] = groups[group].get(name, LossSum()) + part
    return {
        group: {
            name: {
                "tokens": part.tokens,
                # JSON knows no infinity.
                "perplexity": part.perplexity if math.isfinite(part.perplexity) else None,
                "accuracy": part.accuracy,
            }
            for name, part in parts.items()
            if part.tokens
        }
        for group, parts in groups.items()
    }


def _summary(found: ModelResult) -> dict[str, Any]:
    """Shares over all answers; the language's over those that hold something to judge."""
    count = len(found.answers)
    if not count:
        return {}
    by_language: dict[str, list[bool]] = {}
    for one in found.verdicts:
        if one.right is not None:
            by_language.setdefault(one.wanted or "", []).append(one.right)
    every = [right for rights in by_language.values() for right in rights]
    return {
        "count": count,
        "language": _share(every),
        "languages": {name: _share(rights) for name, rights in by_language.items()},
        "stopped": sum(a.stopped for a in found.answers) / count,
        "repetition": sum(a.repeated for a in found.answers) / count,
        "tokens": sum(a.tokens for a in found.answers) / count,
    }


def _share(rights: list[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(rights), len(rights)) if rights else (0.0, 1.0)
    return {"right": sum(rights), "judged": len(rights), "low": low, "high": high}


def _judge(settings: JudgeSection) -> Judge:
    """Who judges; what no request can be sent with is refused here."""
    from finetune.evaluate.judge import Judge

    prices = settings.prices
    return Judge(
        base_url=settings.base_url,
        model=settings.model,
        language=settings.language,
        key=os.environ.get("OPENAI_API_KEY", ""),
        workers=settings.workers,
        max_tokens=settings.max_tokens,
        prices=(prices.input, prices.output) if prices else None,
    )


def _judged(
    judge: Judge, found: list[ModelResult], reference: list[str], cache: Path, say: Say, progress: bool
) -> dict[str, Any]:
    """The judge's preference of the last model's answers to the reference's, or else to the first model's."""
    from finetune.evaluate.judge import Pair, compare

    ours = found[-1].answers
    theirs = reference or [a.text for a in found[0].answers]
    pairs = [
        Pair(a.messages, a.text, text, f"{a.prompt}.{i}")
        for i, (a, text) in enumerate(zip(ours, theirs, strict=True))
    ]
    preference = compare(pairs, judge, cache, say, progress)
    say(f"{judge.model}: {preference.summary()}")
    return preference.as_dict() | {"model": judge.model, "cost": str(preference.sent)}
