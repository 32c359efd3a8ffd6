"""Experiment trackers: a resumed run continues its curve, and each evaluation logs answers to the same prompts.

Upstream's callbacks log the numbers (transformers 5.23 `integrations/integration_utils.py`). This module adds the run's
name and id, its recipe, ledger and environment, its samples and its finished files.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import netrc
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import TrainerCallback
from transformers.integrations import integration_utils as upstream

from finetune.data.chat import Chat
from finetune.data.samples import LabelledRow
from finetune.model.generate import Generator
from finetune.recipe.load import Recipe
from finetune.system import files
from finetune.system.errors import RunError
from finetune.system.terminal import Say, quiet
from finetune.train.callbacks.soft import soft
from finetune.train.divergence import AdapterAtStart
from finetune.train.trainer import RunTrainer

_TRACKING = "tracking.json"
_PROMPTS = 4
_NEW_TOKENS = 96
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "trackio": ("trackio",)}


def tracker_names(report_to: Any) -> list[str]:
    """The trackers of `training.report_to`, as a list."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [] if "none" in names else names


def check_trackers(names: Sequence[str]) -> None:
    """Checks that each tracker is installed and would not ask for a key.

    Raises:
        RunError: The message says what to install or set.
    """
    for name in names:
        packages = _PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise RunError(f"training.report_to: is {name}, which is not installed; run pip install {packages[0]}")
    online = os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun")
    if "wandb" in names and online and not _wandb_has_key():
        raise RunError(
            "training.report_to: is wandb, and nobody is logged in; run wandb login, or set WANDB_MODE=offline"
        )
    if os.environ.get("WANDB_LOG_MODEL") == "checkpoint" and "wandb" in names:
        raise RunError("WANDB_LOG_MODEL: is checkpoint; write end: only the finished run is uploaded")


def _wandb_has_key() -> bool:
    """True if wandb finds a key in the places that it documents."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
    return False


# The ids that earlier runs of this process have put into the environment.
_IDS_SET_HERE: set[str] = set()


def set_run_identity(output: Path, name: str | None, project: str, resumed: bool) -> str:
    """Sets the run's id for trackers that accept one, and returns the run's name. A resumed run keeps both.

    They are passed in environment variables, which upstream's callbacks read.

    Args:
        output: The run directory.
        name: `training.run_name`; by default the directory's name and the id.
        project: `training.project`.
        resumed: True if the run is resumed from a checkpoint.
    """
    file = output / _TRACKING
    known = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    own = secrets.token_hex(4)
    # A sweep's agent sets the id; one that an earlier run of this process has set does not count.
    given = os.environ.get("WANDB_RUN_ID", "")
    own = given if given and given not in _IDS_SET_HERE else own
    # trackio treats runs of one name as one run.
    known = {"name": name or f"{output.resolve().name}-{own}", "id": own} | known
    output.mkdir(parents=True, exist_ok=True)
    files.write_whole(file, json.dumps(known) + "\n")
    _IDS_SET_HERE.add(known["id"])
    chosen = {
        "WANDB_RUN_ID": known["id"],
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(output.resolve()),
        "WANDB_PROJECT": project,
        "MLFLOW_EXPERIMENT_NAME": project,
        "TENSORBOARD_LOGGING_DIR": str(output.resolve() / "tensorboard"),
    }
    for key, value in chosen.items():
        # A user may have set the others.
        if key == "WANDB_RUN_ID" or key not in os.environ:
            os.environ[key] = value
    os.environ.pop("MLFLOW_RUN_ID", None)
    if "mlflow" in known:
        os.environ["MLFLOW_RUN_ID"] = known["mlflow"]
    return str(known["name"])


class Samples(TrainerCallback):  # type: ignore[misc]
    """Writes greedy answers to the first held-out prompts at each evaluation to `samples.jsonl` and to trackers.

    Args:
        output: The run's folder.
        trainer: The trainer.
        chat: The tokenizer and chat template.
        stop_ids: The tokens at which an answer ends.
        start_step: The step that the run is resumed from; 0 for a new run.
        start: The adapter that answers are compared with; None: they are not.
    """

    def __init__(
        self,
        output: Path,
        trainer: RunTrainer,
        chat: Chat,
        stop_ids: Sequence[int],
        start_step: int,
        start: AdapterAtStart | None = None,
    ) -> None:
        self.path, self.trainer, self.chat, self.stop_ids = output / "samples.jsonl", trainer, chat, stop_ids
        self.start_step, self.start = start_step, start
        self.prompts: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Chooses the prompts; removes samples of steps that a resumed run repeats."""
        for row in self.trainer.eval_dataset.select(range(min(_PROMPTS, len(self.trainer.eval_dataset)))):
            prompt = LabelledRow(list(row["input_ids"]), list(row["labels"])).prompt
            if prompt not in self.prompts:
                self.prompts.append(prompt)
        if state.is_world_process_zero:
            old = files.read_records(self.path) if self.start_step else []
            kept = [json.dumps(one, ensure_ascii=False) for one in old if one["step"] <= self.start_step]
            files.write_whole(self.path, "".join(f"{line}\n" for line in kept))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answers the prompts on the first process."""
        if not state.is_world_process_zero:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        with _answering(model):
            generator = Generator(model, self.chat, tuple(self.stop_ids), False)
            answers = generator.answers(self.prompts, _NEW_TOKENS)
            both = list(zip(self.prompts, answers, strict=True))
            divergences = [{"kl": self.start.divergence(*pair)} if self.start else {} for pair in both]
        tokenizer = self.chat.tokenizer
        samples = [
            {
                "step": state.global_step,
                "prompt": tokenizer.decode(prompt),
                "answer": generator.text(answer),
                "stopped": bool(answer) and answer[-1] in self.stop_ids,
                "tokens": len(answer),
                **divergence,
            }
            for (prompt, answer), divergence in zip(both, divergences, strict=True)
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        _log_samples(self.trainer, state.global_step, files.read_records(self.path))


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Puts a model that is being trained into evaluation mode, with a cache."""
    training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = cached
        model.train(training)


class RunDocuments(TrainerCallback):  # type: ignore[misc]
    """Gives each tracker the resolved recipe, the ledger and the environment when training begins."""

    def __init__(self, output: Path, trainer: RunTrainer) -> None:
        self.output, self.trainer = output, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Acts after the trackers' own callbacks, which open the run."""
        if not state.is_world_process_zero:
            return
        texts = {
            name: (self.output / name).read_text(encoding="utf-8")
            for name in ("recipe.yaml", "ledger.json", "environment.json")
        }
        for tracker in self.trainer.callback_handler.callbacks:
            if isinstance(tracker, upstream.WandbCallback):
                tracker._wandb.config.update(texts, allow_val_change=True)
            elif isinstance(tracker, upstream.TensorBoardCallback) and tracker.tb_writer:
                for name, text in texts.items():
                    tracker.tb_writer.add_text(name, _as_code(text))
            elif isinstance(tracker, upstream.TrackioCallback):
                tracker._trackio.config.update(texts, allow_val_change=True)
            elif isinstance(tracker, upstream.MLflowCallback):
                for name, text in texts.items():
                    tracker._ml_flow.log_text(text, name)
                file = self.output / _TRACKING
                known = json.loads(file.read_text(encoding="utf-8"))
                known["mlflow"] = tracker._ml_flow.active_run().info.run_id
                files.write_whole(file, json.dumps(known) + "\n")


def _log_samples(trainer: RunTrainer, step: int, every: list[dict[str, Any]]) -> None:
    columns = ["step", "prompt", "answer", "stopped"]
    rows = [[sample[name] for name in columns] for sample in every]
    now = [sample for sample in every if sample["step"] == step]
    for tracker in trainer.callback_handler.callbacks:
        if isinstance(tracker, upstream.WandbCallback) and tracker._wandb.run is not None:
            table = tracker._wandb.Table(columns=columns, data=rows)
            tracker._wandb.log({"samples": table, "train/global_step": step})
        elif isinstance(tracker, upstream.TensorBoardCallback) and tracker.tb_writer:
            for i, sample in enumerate(now):
                text = f"{_as_code(sample['prompt'])}\n\n{_as_code(sample['answer'])}"
                tracker.tb_writer.add_text(f"samples/{i}", text, step)
        elif isinstance(tracker, upstream.TrackioCallback):
            tracker._trackio.log({"samples": tracker._trackio.Table(columns=columns, data=rows)})
        elif isinstance(tracker, upstream.MLflowCallback) and tracker._initialized:
            text = "\n\n".join(f"{_as_code(s['prompt'])}\n\n{_as_code(s['answer'])}" for s in now)
            tracker._ml_flow.log_text(text, f"samples/step-{step}.md")


def _as_code(text: str) -> str:
    """A text as a Markdown code block."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def show_templates(config: Any, recipe: Recipe) -> None:
    """Lets trackers log the recipe's `${NAME}` in place of values from the environment in the trainer's arguments."""
    names = {key.split(".")[1] for key in recipe.templates if key.startswith("training.")}
    written = {name: value for name, value in recipe.shown_sections()["training"].items() if name in names}
    # Not a lambda, with which the arguments could not be copied.
    config.to_dict = functools.partial(_with_templates, config, written)


def _with_templates(config: Any, written: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = type(config).to_dict(config)
    return values | written


def configure_trackers(trainer: RunTrainer, start_step: int, say: Say) -> bool:
    """Configures the trackers before training; returns whether wandb is to get the finished run as an artifact."""
    wants_artifact = False
    names = {kind: name for name, kind in upstream.INTEGRATION_TO_CALLBACK.items()}
    for tracker in list(trainer.callback_handler.callbacks):
        if name := names.get(type(tracker)):
            soft(tracker, name, say, retried=False)
        if isinstance(tracker, upstream.WandbCallback):
            # transformers would make another trainer to save the model, and write a pickle of its arguments.
            wants_artifact = tracker._log_model.is_enabled
            tracker._log_model = upstream.WandbLogModel.FALSE
        elif isinstance(tracker, upstream.TensorBoardCallback) and trainer.is_world_process_zero():
            # Steps that a resumed run repeats are logged once.
            purge = start_step + 1 if start_step else None
            tracker.tb_writer = tracker._SummaryWriter(log_dir=tracker.logging_dir, purge_step=purge)
    return wants_artifact


def close_trackers(trainer: RunTrainer, output: Path, wants_artifact: bool) -> None:
    """Uploads the finished run to wandb as an artifact where that is wanted, and closes wandb's run."""
    for tracker in trainer.callback_handler.callbacks:
        run = tracker._wandb.run if isinstance(tracker, upstream.WandbCallback) else None
        if run is None:
            continue
        if wants_artifact:
            artifact = tracker._wandb.Artifact(name=f"run-{run.id}", type="model")
            for file in sorted(output.iterdir()):
                if file.is_file() and file.name not in (_TRACKING, files.LOCK):
                    artifact.add_file(str(file), name=file.name)
            run.log_artifact(artifact, aliases=["final"])
        with quiet():
            run.finish()
