"""Tasks of the Language Model Evaluation Harness, asked through the model's own chat template."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.system.errors import EvaluateError
from finetune.system.terminal import quiet


def known(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's own list of tasks, and the names that these have there; what is not there is told before it costs.

    Args:
        tasks: Names of its tasks, or `.yaml` files of own ones.

    Raises:
        EvaluateError: It is not installed, or has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluateError(
            f"evaluate.lm_eval: {error.name} is not installed; run pip install 'finetune[lm-eval]'"
        ) from error
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_name(Path(task)) if Path(task) in files else task for task in tasks]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with quiet():
        manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
        if missing := [name for name in names if not manager.match_tasks([name])]:
            raise EvaluateError(
                f"evaluate.lm_eval.tasks: there is no task {missing[0]}; `lm-eval ls tasks` lists them"
            )
    return manager, names


def scores(generator: Any, tasks: tuple[Any, list[str]], limit: int | None = None) -> dict[str, float]:
    """What the harness measures of a model, by task and metric.

    Args:
        generator: A `finetune.generate.Generator`.
        tasks: As `known` gives them.
        limit: How many questions of each task at most.
    """
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # Of the folder at hand: git complains where it is no repository.
    evaluator.get_git_commit_hash = lambda: None
    manager, names = tasks
    tokenizer = generator.chat.tokenizer
    with quiet():
        found = simple_evaluate(
            model=HFLM(pretrained=generator.model, tokenizer=tokenizer, batch_size=1),
            tasks=names,
            limit=limit,
            apply_chat_template=tokenizer.chat_template is not None,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    # Only the first of several processes gets them.
    results: dict[str, dict[str, Any]] = found["results"] if found else {}
    return {
        f"{task}, {metric.removesuffix(',none').replace(',', ' ')}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and "," in metric
    }


def _name(file: Path) -> str:
    try:
        return str(yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["task"])
    except OSError as error:
        raise EvaluateError(f"evaluate.lm_eval.tasks: {file}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        reason = (
            textwrap.shorten(str(error), 100, placeholder=" ...")
            if isinstance(error, yaml.YAMLError)
            else "no task: NAME"
        )
        raise EvaluateError(f"evaluate.lm_eval.tasks: {file} is no task: {reason}") from error
