"""Tasks of the Language Model Evaluation Harness, run through the model's own chat template."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from finetune.data.turns import without_whitespace
from finetune.model.generation_settings import one_answer_settings
from finetune.system.errors import EvaluateError, LabelError
from finetune.system.extras import install_command
from finetune.system.terminal import quiet

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from finetune.data.rendering import Renderer
    from finetune.model.generate import Generator


class Tasks(NamedTuple):
    """Tasks that the harness has, and the manager that loads them."""

    manager: TaskManager
    names: list[str]


def find_tasks(tasks: Sequence[str]) -> Tasks:
    """The tasks, found in the harness before a model is loaded.

    Args:
        tasks: Names of the harness's tasks, or paths of `.yaml` files that define a task.

    Raises:
        EvaluateError: The harness is not installed or has no task of that name, or a file does not define a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluateError(
            f"evaluate.lm_eval: {error.name} is not installed; run {install_command('lm-eval')}"
        ) from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with quiet():
        # Reading the harness's own 14,000 files takes seconds.
        include_defaults = len(files) < len(tasks)
        manager = TaskManager(include_path=[str(f.parent) for f in files] or None, include_defaults=include_defaults)
        if missing := [name for name in names if not manager.match_tasks([name])]:
            raise EvaluateError(f"evaluate.lm_eval.tasks: there is no task {missing[0]}; `lm-eval ls tasks` lists them")
    return Tasks(manager, names)


def run_tasks(generator: Generator, tasks: Tasks, limit: int | None = None) -> dict[str, float]:
    """The harness's results for a model, by `task, metric`.

    Args:
        generator: The model.
        tasks: The tasks that `find_tasks` returned.
        limit: The most questions of each task.
    """
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # The harness would run git in the current folder, which prints an error outside a repository.
    evaluator.get_git_commit_hash = lambda: None
    chat = generator.chat

    class Model(HFLM):  # type: ignore[misc]
        """The harness's model, whose prompts keep a task's description."""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            folded = fold_description(chat.render, chat_history)
            text: str = super().apply_chat_template(folded, add_generation_prompt)
            return text

    tokenizer = chat.tokenizer
    with quiet(), one_answer_settings(generator.model):
        output = simple_evaluate(
            model=Model(pretrained=generator.model, tokenizer=tokenizer, batch_size=1),
            tasks=tasks.names,
            limit=limit,
            apply_chat_template=tokenizer.chat_template is not None,
            task_manager=tasks.manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    # Only the first of several processes gets results.
    results: dict[str, dict[str, Any]] = output["results"] if output else {}
    return {
        f"{task}, {metric.removesuffix(',none').replace(',', ' ')}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and "," in metric
    }


def fold_description(render: Renderer, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages, with a leading system message put before the first question if the template does not write it.

    The harness gives a task's description as a system message, and leaves it out where the template refuses that
    (lm-eval 0.4.13, `HFLM.apply_chat_template`).

    Args:
        render: Renders with the chat template.
        messages: The conversation that the harness asks with.
    """
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, question, *rest = messages
    try:
        if without_whitespace(system["content"]) in without_whitespace(render([system, question])):
            return messages
    except LabelError:
        pass  # the template refuses a system message
    text = system["content"]
    gap = "" if text.endswith("\n") else "\n\n"
    return [question | {"content": f"{text}{gap}{question['content']}"}, *rest]


def _task_name(file: Path) -> str:
    """The name of the task that a file defines."""
    try:
        return str(yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["task"])
    except OSError as error:
        raise EvaluateError(f"evaluate.lm_eval.tasks: {file}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        reason = "it has no `task: NAME`"
        if isinstance(error, yaml.YAMLError):
            reason = textwrap.shorten(str(error), 100, placeholder=" ...")
        raise EvaluateError(f"evaluate.lm_eval.tasks: {file} does not define a task: {reason}") from error
