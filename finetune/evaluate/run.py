"""Evaluates models: loss on held-out rows, answers and their language, lm-eval's tasks, a judge's preference."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.data.chat import Chat
from finetune.data.encoded import IGNORE
from finetune.data.mixture import evaluation_rows
from finetune.data.samples import LabelledRow
from finetune.evaluate.answers import answer_prompts
from finetune.evaluate.perplexity import LossSum, row_losses
from finetune.evaluate.preference import Pair, pairs_in, score_pairs
from finetune.evaluate.prompts import Prompt, held_out_prompts, read_prompts, reference_answers, spread_evenly
from finetune.evaluate.report import HELD_OUT_ROWS, EvaluationReport, as_html, as_markdown
from finetune.evaluate.results import ModelResult, Origin, report_of
from finetune.evaluate.trained_rows import trained_sources
from finetune.model.load import load_tokenizer
from finetune.model.locate import Base, located_once
from finetune.model.provenance import BaseSections, adapter_base_sections, is_adapter, tokenizer_section
from finetune.model.resize import check_token_ids
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.schema import EvaluateSection, JudgeSection, ModelSection, ServerSection
from finetune.system.errors import EvaluateError, TemplateError
from finetune.system.files import locked_folder, run_file, write_together
from finetune.system.terminal import Say, progress_bar

if TYPE_CHECKING:
    from finetune.evaluate.judge import Judge
    from finetune.evaluate.lm_eval_tasks import Tasks
    from finetune.evaluate.served import ServedModel

# The value of `compare` for the run's own base, which answers through the run's chat template.
BASE = "base"
_REPORT = "report.json"
# The beginnings of a server's address.
_ADDRESS = ("http://", "https://")


class HeldOutRow(NamedTuple):
    """A row that the recipe evaluates on, in a model's tokens."""

    name: str
    row: LabelledRow
    origin: Origin


@dataclass(frozen=True)
class _Subject:
    """A model to evaluate and how to load it.

    `title` is its name in the report, if that differs from `model`; `base` goes before the base that its files name.
    """

    model: str
    adapter: bool = True
    sections: BaseSections | None = None
    title: str = ""
    base: str | None = None


def evaluate(
    model: str,
    output: Path,
    recipe: str | Path | None = None,
    compare: str | None = None,
    limit: int | None = None,
    server: str | None = None,
    server_model: str | None = None,
    base: str | None = None,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> EvaluationReport:
    """The evaluation's report; it is also written to `output` as `report.json`, `report.md` and `answers.html`.

    Args:
        model: A run, a directory of weights, a base model's name, or the address of a server, which answers the prompts
            alone.
        output: A folder. An earlier report in it is replaced; the judge's replies there are used again.
        recipe: The recipe with the held-out rows and the `evaluate` section; by default the run's own.
        compare: Another model, shown first in the report; `base` is the run's base.
        limit: The most rows and the most prompts; it overrides the recipe's `evaluate.limit`.
        server: The address of an OpenAI-compatible server that serves the model: it answers the prompts too. It
            overrides the recipe's `evaluate.server.base_url`.
        server_model: The model's name at that server; it overrides the recipe's `evaluate.server.model`.
        base: The path or id of the run's base, in place of the one that its files name.
        overrides: `section.key=value`, in place of the recipe's values.
        trust_remote_code: True if the user lets Python files of models and of lm-eval's tasks run; `recipe` may say so
            of its own base and tasks.
        say: Called with a line for each step.
        progress: Shows progress bars on a terminal.

    Raises:
        EvaluateError: The model has no recipe, the recipe holds out no rows and names no prompts, or the judge, the
            server or lm-eval cannot be used.
        ModelError: A model cannot be found or loaded.
        RecipeError: The recipe has faults.
        DataError: Rows or prompts cannot be read.
        LabelError, TemplateError: A chat template refuses a conversation.
        RunError: Another process evaluates into `output`.
    """
    if recipe:
        loaded = load_recipe(recipe, overrides)
        if loaded.model.trust_remote_code:
            say(f"{recipe}: model.trust_remote_code: Python files that come with {loaded.model.name_or_path} may run")
    else:
        loaded = _recipe_of_run(model, overrides, server, trust_remote_code)
    section, limit = loaded.evaluate, limit or loaded.evaluate.limit
    served = _served(section, model, server, server_model, say)
    alone = model.startswith(_ADDRESS)
    subjects = [] if alone else [replace(_subject(model, loaded), base=base)]
    if compare:
        subjects.insert(0, _base_of(model, base, trust_remote_code) if compare == BASE else _subject(compare, loaded))
    # Errors in the settings of the judge and the tasks must show before hours of generation.
    settings = section.judge
    if settings and not (settings.reference or len(subjects) + bool(served) > 1):
        raise EvaluateError("evaluate.judge has nothing to compare with; write --compare, or evaluate.judge.reference")
    judge = _judge(settings) if settings else None
    evaluation = _Evaluation(loaded, _tasks(loaded), limit, say, progress, located_once(say), trust_remote_code)
    trained_on = [] if alone else trained_sources(model, loaded)
    if trained_on:
        say(f"{model} was trained on rows that this evaluation takes for held-out ones: {', '.join(trained_on)}")
    own = subjects[-1] if subjects else _Subject(model, sections=(loaded.model, loaded.quantization))
    prompts, source = evaluation.prompts(own)
    reference = reference_answers(settings.reference, prompts) if settings and settings.reference else []
    with locked_folder(output, "--output", "evaluating"):
        if (output / _REPORT).is_file():
            say(f"{output}: the earlier evaluation there will be replaced (--output DIR keeps both)")
        answered = [evaluation.ask(served, prompts, own)] if served else []
        results = [evaluation.evaluate(subject, prompts) for subject in subjects]
        # The model that is evaluated is the last one.
        results[-1:-1] = answered
        report = report_of(results, loaded, source, limit)
        if trained_on:
            report["trained_on"] = trained_on
        _write(report, output)
        if settings and judge:
            # The report is written a second time: its first form stays if the judge fails.
            preference = _preference(judge, results, reference, output / "judge", say, progress)
            report["judge"] = preference | {"against": settings.reference or results[0].name}
            _write(report, output)
    say(f"written: {output}")
    return report


def _recipe_of_run(model: str, overrides: Sequence[str], server: str | None, trust_remote_code: bool) -> Recipe:
    """A run's own recipe. The run may be somebody else's: its recipe runs no code and sends nothing to a server."""
    file = run_file(Path(model), "recipe.yaml")
    if file is None:
        raise EvaluateError(f"{model} has no recipe.yaml; write --recipe with one that holds rows out or names prompts")
    loaded = load_recipe(file, overrides)
    loaded = replace(loaded, model=loaded.model.model_copy(update={"trust_remote_code": trust_remote_code}))
    _check_tasks_are_names(loaded, file, trust_remote_code)
    _check_nothing_is_sent(loaded, file, server)
    return loaded


def _write(report: EvaluationReport, output: Path) -> None:
    texts = {
        "report.md": as_markdown(report),
        "answers.html": as_html(report),
        _REPORT: json.dumps(report, ensure_ascii=False, indent=1) + "\n",
    }
    write_together(output, texts)


def _subject(model: str, recipe: Recipe) -> _Subject:
    """A model as it is loaded: the recipe's base by the recipe's sections, any other one as its folder says."""
    own = model == recipe.model.name_or_path
    return _Subject(model, sections=(recipe.model, recipe.quantization) if own else None)


def _base_of(run: str, base: str | None, trust_remote_code: bool) -> _Subject:
    """The base that a run was trained from, with the run's chat template."""
    title, folder = f"base of {run}", Path(run)
    if is_adapter(folder):
        return _Subject(run, adapter=False, title=title, base=base)
    if not run_file(folder, "recipe.yaml"):
        raise EvaluateError(f"--compare {BASE}: {run} is not a run; write the name of a model")
    section, quantization = adapter_base_sections(folder, trust_remote_code=trust_remote_code)
    if template := run_file(folder, "chat_template.jinja"):
        # The saved template holds both choices already.
        saved = {"chat_template": str(template), "system_role": "template", "chat_template_kwargs": {}}
        section = section.model_copy(update=saved)
    return _Subject(section.name_or_path, sections=(section, quantization), title=title)


def _check_tasks_are_names(recipe: Recipe, file: Path, trust_remote_code: bool) -> None:
    """Refuses tasks in files, which may name Python functions, where a run's own recipe names them."""
    names = recipe.evaluate.lm_eval.tasks if recipe.evaluate.lm_eval else []
    if not trust_remote_code and (files := [name for name in names if name.endswith((".yaml", ".yml"))]):
        raise EvaluateError(
            f"evaluate.lm_eval.tasks: {file} names {files[0]}, and a task in a file may run Python; read it, then "
            "write --trust-remote-code, or --recipe with a recipe that names it"
        )


def _check_nothing_is_sent(recipe: Recipe, file: Path, server: str | None) -> None:
    """Refuses a judge and a server in a run's own recipe, which may be somebody else's: they get the user's key."""
    addresses = {"judge": recipe.evaluate.judge, "server": None if server else recipe.evaluate.server}
    for name, section in addresses.items():
        if section:
            raise EvaluateError(
                f"evaluate.{name}: {file} names {section.base_url}, to which answers and your key would be sent; write "
                f"--recipe {file} if they may"
            )


def _served(
    section: EvaluateSection, model: str, server: str | None, server_model: str | None, say: Say
) -> ServedModel | None:
    """The server of the recipe, of `--server`, or that is evaluated alone."""
    address = model if model.startswith(_ADDRESS) else server
    given = {"base_url": address, "model": server_model}
    keys = section.server.model_dump() if section.server else {}
    keys |= {key: value for key, value in given.items() if value}
    if not keys:
        return None
    if "base_url" not in keys:
        raise EvaluateError(f"--server-model {server_model}: write --server with the server's address, too")
    settings = ServerSection.model_validate(keys)
    from finetune.evaluate.served import KEY_VARIABLE, ServedModel

    return ServedModel(settings, os.environ.get(KEY_VARIABLE, ""), model, section.max_new_tokens, say)


def _tasks(recipe: Recipe) -> Tasks | None:
    """The recipe's lm-eval tasks."""
    if not recipe.evaluate.lm_eval:
        return None
    from finetune.evaluate.lm_eval_tasks import find_tasks

    return find_tasks(recipe.evaluate.lm_eval.tasks)


@dataclass
class _Evaluation:
    """Evaluates models one after another, on the same rows and prompts."""

    recipe: Recipe
    tasks: Tasks | None
    limit: int | None
    say: Say
    progress: bool
    locate_base: Callable[[ModelSection], Base]
    trust_remote_code: bool = False
    _rows: dict[str, list[HeldOutRow]] = field(default_factory=dict)
    _pairs: dict[str, list[Pair]] = field(default_factory=dict)

    def prompts(self, subject: _Subject) -> tuple[list[Prompt], str]:
        """The prompts, and a description of their origin for the report."""
        if path := self.recipe.evaluate.prompts:
            return read_prompts(path, self.limit), Path(path).name
        rows = self.held_out(Chat(self._tokenizer(subject)))
        if not rows:
            raise EvaluateError(
                f"{self.recipe.path}: it holds no rows out and names no prompts; write --recipe with one that has "
                "evaluate.prompts or data.eval, or train again with data.eval_fraction=0.1"
            )
        names = {row.name for row in rows}
        return held_out_prompts(self.recipe.data, names, self.limit, self.recipe.method), HELD_OUT_ROWS

    def _tokenizer(self, subject: _Subject) -> Any:
        section = (
            subject.sections[0]
            if subject.sections
            else tokenizer_section(Path(subject.model), subject.base, self.trust_remote_code)
        )
        return load_tokenizer(section, self.locate_base(section))

    def ask(self, served: ServedModel, prompts: list[Prompt], subject: _Subject) -> ModelResult:
        """A served model's answers; `subject` is what it serves, or what has its tokenizer."""
        self.say(f"{served.name}: {len(prompts):,} prompts")
        tokenizer = self._tokenizer(subject)
        turns = sum(1 + len(prompt.follow_ups) for prompt in prompts)
        with progress_bar(f"{served.name}: answers", turns, self.progress) as advance:
            answers = served.answers(prompts, partial(tokenizer.encode, add_special_tokens=False), advance)
        return ModelResult(served.name, answers=answers, served=True)

    def held_out(self, chat: Chat) -> list[HeldOutRow]:
        """The rows that the recipe evaluates on; they are built once per tokenizer and chat template.

        Raises:
            TemplateError: The rows are conversations, and the model has no chat template.
            DataError: A source cannot be read.
        """
        if chat.fingerprint not in self._rows:
            found = evaluation_rows(self.recipe.data, chat, self.recipe.max_length, self.recipe.method)
            self._rows[chat.fingerprint] = [
                HeldOutRow(row["row"], LabelledRow(list(row["input_ids"]), list(row["labels"])), origin)
                for row, origin in zip(found.dataset or (), found.origins, strict=True)
            ]
            languages = [language for _, language in found.origins]
            self._pairs[chat.fingerprint] = pairs_in(found.dataset or (), languages)
        return self._rows[chat.fingerprint]

    def evaluate(self, subject: _Subject, prompts: list[Prompt]) -> ModelResult:
        """Loads a model, evaluates it and frees its memory, so that two models are never held at once."""
        import torch

        from finetune.model.load_generator import load_generator

        name = subject.model
        result = ModelResult(subject.title or name)
        self.say(f"{name}: loading")
        generator = load_generator(
            name,
            adapter=subject.adapter,
            base_model=subject.base,
            sections=subject.sections,
            locate_base=self.locate_base,
            trust_remote_code=self.trust_remote_code,
        )
        try:
            rows = self.held_out(generator.chat)
        except TemplateError as error:
            if generator.chat.tokenizer.chat_template is not None:
                raise
            raise EvaluateError(
                f"{name} has no chat template; write --recipe with a recipe that has model.name_or_path: {name} and "
                "model.chat_template"
            ) from error
        check_token_ids(
            [max(row.row.input_ids, default=0) for row in rows], generator.chat.tokenizer, generator.model.config
        )
        labelled = [row for row in rows if any(label != IGNORE for label in row.row.labels[1:])]
        chosen = spread_evenly(labelled, lambda row: row.origin, self.limit)
        result.rows = [row.row for row in chosen]
        with progress_bar(f"{name}: rows", len(chosen), self.progress) as advance:
            for row, loss in zip(chosen, row_losses(generator.model, result.rows), strict=True):
                result.loss[row.origin] = result.loss.get(row.origin, LossSum()) + loss
                advance(1)
        pairs = spread_evenly(self._pairs[generator.chat.fingerprint], lambda pair: pair.language, self.limit)
        with progress_bar(f"{name}: pairs", len(pairs), self.progress) as advance:
            result.pairs = score_pairs(generator.model, pairs, advance)
        turns = sum(1 + len(prompt.follow_ups) for prompt in prompts)
        with progress_bar(f"{name}: answers", turns, self.progress) as advance:
            result.answers = answer_prompts(generator, prompts, self.recipe.evaluate.max_new_tokens, advance)
        if self.tasks:
            from finetune.evaluate.lm_eval_tasks import run_tasks

            self.say(f"{name}: {', '.join(self.tasks.names)}")
            result.tasks = run_tasks(generator, self.tasks, self.limit)
        del generator
        gc.collect()
        torch.cuda.empty_cache()
        return result


def _judge(settings: JudgeSection) -> Judge:
    """The judge of the recipe. Raises EvaluateError for settings that cannot be used."""
    from finetune.evaluate.judge import Judge

    same = settings.model_dump(exclude={"reference", "prices"})
    prices = (settings.prices.input, settings.prices.output) if settings.prices else None
    return Judge(**same, key=os.environ.get("OPENAI_API_KEY", ""), prices=prices)


def _preference(
    judge: Judge, results: list[ModelResult], reference: list[str], cache: Path, say: Say, progress: bool
) -> dict[str, Any]:
    """The judge's preference for the last model's answers over the reference's, or else over the first model's."""
    from finetune.evaluate.judge import Pair, compare

    others = reference or [answer.text for answer in results[0].answers]
    pairs = [
        Pair(answer.asked, answer.text, other, f"{answer.prompt.name}.{i}")
        for i, (answer, other) in enumerate(zip(results[-1].answers, others, strict=True))
    ]
    preference = compare(pairs, judge, cache, say, progress)
    say(f"{judge.model}: {preference.summary()}")
    return preference.as_dict() | {"model": judge.model, "cost": str(preference.sent)}
