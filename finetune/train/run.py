"""Trains one recipe into one run directory, through trl's trainers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.data.mixture import Prepared
from finetune.hub.card import model_card
from finetune.hub.run import check_access, push
from finetune.hub.uploads import CheckpointUploads
from finetune.model.load import eos_tokens
from finetune.model.locate import Base
from finetune.model.precision import Precision, decide_precision
from finetune.model.saved_files import BaseFiles, drop_refused_settings
from finetune.model.trainable import load_trainable
from finetune.recipe import diff
from finetune.recipe.load import Recipe
from finetune.recipe.yaml_tree import Section
from finetune.system import distributed, files
from finetune.system.errors import PushError, RunError, Stopped, reworded
from finetune.system.terminal import Say, quiet
from finetune.train import checkpoint
from finetune.train.arguments import check_base, check_launch, training_arguments
from finetune.train.callbacks import trackers
from finetune.train.callbacks.early_stopping import EarlyStopping
from finetune.train.callbacks.memory_check import MemoryCheck
from finetune.train.callbacks.metrics import EachStepLogged, MetricsLog, ProgressDisplay, draw_losses
from finetune.train.callbacks.packing import PackedRowsCheck, check_row_counts
from finetune.train.callbacks.signals import stop_on_signals
from finetune.train.callbacks.soft import soft, softly
from finetune.train.divergence import AdapterAtStart
from finetune.train.dpo import DpoTrainer, OrpoTrainer
from finetune.train.environment import environment, versions
from finetune.train.kto import KtoTrainer
from finetune.train.meter import Meter
from finetune.train.pissa import initial_adapter
from finetune.train.preference import PreferenceTrainer
from finetune.train.reference import ReferenceLogProbs, SharedPromptsCheck
from finetune.train.rows import TrainingRows, read_training_rows
from finetune.train.sft import SftTrainer
from finetune.train.trainer import RestoreCounters, RunTrainer, layer_classes, saving

# Called with the recipe, the trainer's arguments, the training rows (None for a stream), the base, and a `say`.
MemoryForecast = Callable[[Recipe, Any, Any, Base, Say], None]
_TRAINERS: dict[str, type[RunTrainer]] = {"sft": SftTrainer, "dpo": DpoTrainer, "orpo": OrpoTrainer, "kto": KtoTrainer}


@dataclass(frozen=True)
class _Run:
    """A run that is about to load its model.

    Attributes:
        recipe: The recipe.
        output: The run's directory.
        precision: The dtypes of the run.
        base: The base model.
        config: The trainer's arguments.
        start: The checkpoint to resume from; None to start at step 0.
        rows: The rows and the tokenizer.
        say: Takes lines about the run.
    """

    recipe: Recipe
    output: Path
    precision: Precision
    base: Base
    config: Any
    start: Path | None
    rows: TrainingRows
    say: Say


def train(recipe: Recipe, say: Say = lambda line: None, check: MemoryForecast | None = None) -> Path:
    """Trains a recipe; returns its run directory.

    Args:
        recipe: The recipe.
        say: Called with a line for each stage of the run.
        check: Called before any weight is read; it raises if memory cannot suffice.

    Raises:
        RunError: The output directory is in use, there is no checkpoint to resume, the longest batch does not fit into
            memory, the loss is no longer finite, or something cannot be saved.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved first.
        PushError: The recipe names a repository on the Hub, and nobody is logged in, or the run cannot be pushed.
        ModelError, TemplateError, DataError, LabelError: The base, its chat template or the rows cannot be used.
    """
    output = Path(recipe.training["output_dir"])
    if not distributed.rank():
        checkpoint.check_output(output, recipe.training.get("resume_from_checkpoint") or False)
    with ExitStack() as held:
        return _train(recipe, output, say, check, held)


def _comparable(recipe: Recipe) -> tuple[Section, Section]:
    """The recipe's values, and those from the environment by key, without secrets.

    Of paths they have the names alone, since each machine may have its files in another folder. Rows and the chat
    template are compared themselves.
    """
    sections, values = recipe.shown_sections(), recipe.environment_values()
    for key, value in values.items():
        if key.endswith((".path", ".name_or_path", ".adapter", ".chat_template")):
            values[key] = os.path.basename(os.path.normpath(value))
    model, data = dict(sections["model"]), dict(sections["data"])
    for name in ("name_or_path", "adapter", "chat_template"):
        if model[name] and os.path.exists(model[name]):
            model[name] = os.path.basename(os.path.normpath(model[name]))
    for name in ("train", "eval"):
        data[name] = [source | {"path": os.path.basename(source["path"])} for source in data[name]]
    return sections | {"model": model, "data": data}, values


def _train(recipe: Recipe, output: Path, say: Say, check: MemoryForecast | None, held: ExitStack) -> Path:
    """The body of `train`; `held` gets the lock of the output directory, which the caller releases."""
    main = distributed.rank() == 0
    run = _prepared_run(recipe, output, say, held)
    rows, config, resumed = run.rows, run.config, run.start is not None
    if main and trackers.tracker_names(recipe.training.get("report_to")):
        config.project = recipe.training.get("project", "finetune")
        config.run_name = trackers.set_run_identity(output, config.run_name, config.project, resumed)
    config.eval_on_start = config.eval_on_start and not resumed  # it was done before the first step
    if check is not None and main:
        check(recipe, config, None if rows.streamed else rows.train.dataset, run.base, say)

    set_seed(config.seed)
    model = _load_model(run)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        files.write_whole(output / "recipe.yaml", recipe.to_yaml())
        files.write_json(output / "environment.json", environment(run.precision, run.base))
        rows.write_ledgers(output)
    distributed.check_shared(output / "recipe.yaml")

    trainer = _make_trainer(run, model)
    progress = ProgressDisplay(say, silent=bool(recipe.training.get("disable_tqdm")))
    uploads = CheckpointUploads(output, recipe.hub, say)
    wants_artifact = _add_callbacks(run, trainer, progress, uploads)
    with stop_on_signals(trainer) as signals, closing(progress):
        trainer.train(resume_from_checkpoint=str(run.start) if run.start else None)
        step = trainer.state.global_step
        if signals and step < trainer.state.max_steps:
            distributed.leave_group()
            raise Stopped(
                signals[0],
                f"stopped at step {step} of {trainer.state.max_steps}; {output / f'checkpoint-{step}'} is saved. "
                f"Go on with: finetune train {recipe.path} training.resume_from_checkpoint=true",
            )
        if rows.evaluation.dataset is not None and not _just_evaluated(trainer):
            # With several processes, a rank that goes on alone would wait for the others without end.
            alone = distributed.world_size() == 1
            with softly("the last evaluation", say) if alone else nullcontext():
                trainer.evaluate()
        if rows.streamed and main:
            rows.write_ledgers(output)
            say(f"data: {rows.train.ledger.summary()}")
        _save_finished_run(trainer, output, say)
        with softly("the end of the trackers' runs", say):
            trackers.close_trackers(trainer, output, wants_artifact)
    distributed.leave_group()
    say(f"saved: {output}")
    if main and recipe.hub.repo_id:
        uploads.finish()
        _push_run(output, say)
    return output


# ---------------------------------------------------------------------------------------------------------------
# Before the first weight is read


def _prepared_run(recipe: Recipe, output: Path, say: Say, held: ExitStack) -> _Run:
    """The run with its rows, once the processes have joined and agree on it; `held` takes the directory's lock."""
    main = distributed.rank() == 0
    precision, base = decide_precision(recipe), Base.of(recipe.model, say)
    config = _check_and_join(recipe, precision, base, output, say)
    if main:  # after all have joined: a rank that fails earlier ends this process, which would leave an empty folder
        held.enter_context(files.locked_folder(output, "training.output_dir"))
    start = distributed.broadcast_from_first(_checkpoint_to_resume(recipe, output, say) if main else None)
    day = distributed.broadcast_from_first(checkpoint.first_day(start) if main else None)
    rows = read_training_rows(recipe, base, day, say)
    if main and start is not None:
        _check_changes(recipe, start, rows.train, say)
    distributed.check_same(
        {
            "the recipe": _comparable(recipe),
            "the chat template": rows.tokenizer.chat_template,
            "a row of data.train": rows.train.digest,
            "a row of data.eval": rows.evaluation.digest,
            "the release of a package": versions(),
        }
    )
    return _Run(recipe, output, precision, base, config, start, rows, say)


def _check_and_join(recipe: Recipe, precision: Precision, base: Base, output: Path, say: Say) -> Any:
    """The trainer's arguments, once everything that can be refused early has been; joins the processes of the run."""
    main = distributed.rank() == 0
    check_launch(recipe, precision)
    trackers.check_trackers(trackers.tracker_names(recipe.training.get("report_to")))
    if main and recipe.hub.repo_id:
        check_access()  # now, not after hours of training
    distributed.watch_other_ranks()  # before the processes wait for each other
    # A GGUF is converted here: transformers 5.23 lets only the first of joined processes save a model.
    check_base(recipe, base, precision)
    config = training_arguments(recipe, precision)  # this call also joins the processes
    if main:
        checkpoint.check_output(output, recipe.training.get("resume_from_checkpoint") or False)
    if distributed.world_size() == 1 and (gpus := torch.cuda.device_count()) > 1:
        say(f"one of {gpus} GPUs is used; for all, see accelerate_configs/ddp.yaml and fsdp.yaml")
    return config


def _checkpoint_to_resume(recipe: Recipe, output: Path, say: Say) -> Path | None:
    """The checkpoint to resume from; None to start at step 0."""
    wanted = recipe.training.get("resume_from_checkpoint") or False
    return checkpoint.checkpoint_to_resume(output, wanted, say)


def _check_changes(recipe: Recipe, start: Path, rows: Prepared, say: Say) -> None:
    """Checks that a checkpoint belongs to this recipe and these rows."""
    if saved := files.run_file(start, "recipe.yaml"):
        marker = checkpoint.read_marker(start)
        same_rows = marker.get("rows") == rows.digest
        processes = (int(marker.get("processes", 1)), distributed.world_size())
        diff.check_changes(saved, recipe, say, same_rows, processes, marker.get("environment"))


# ---------------------------------------------------------------------------------------------------------------
# Model, trainer and callbacks


def _load_model(run: _Run) -> Any:
    """The model to train; sets those of the trainer's arguments that depend on it."""
    rows, config = run.rows, run.config
    chat = rows.chat if rows.has_conversations else None
    model = load_trainable(run.recipe, run.base, run.precision, chat, run.say)
    if line := drop_refused_settings(model.generation_config):
        run.say(line)
    stops = eos_tokens(model.generation_config, rows.tokenizer)
    model.generation_config.eos_token_id = [*stops, *(i for i in rows.ends_of_turns() if i not in stops)]
    if config.fsdp_config and config.fsdp:
        config.fsdp_config["transformer_layer_cls_to_wrap"] = layer_classes(model)
    if config.ddp_find_unused_parameters is None:
        # Only experts can be left out of a step; looking for others costs each step a walk through the graph.
        config.ddp_find_unused_parameters = any("expert" in name for name, _ in model.named_modules())
    return model


def _make_trainer(run: _Run, model: Any) -> RunTrainer:
    recipe, rows, config = run.recipe, run.rows, run.config
    data, evaluation = rows.train, rows.evaluation
    with reworded(RunError, "training", ValueError, ImportError):  # a setting that does not fit this model or machine
        trainer: RunTrainer = _TRAINERS[recipe.method](
            model=model,
            args=config,
            # An endless stream is one long epoch, in which a resumed run finds its place by counting rows.
            train_dataset=data.dataset.repeat(None) if rows.streamed and data.dataset else data.dataset,
            eval_dataset=evaluation.dataset,
            processing_class=rows.tokenizer,
        )
    trainer.save_total_limit = recipe.training.get("save_total_limit")
    trainer.named_rows = [] if rows.streamed else data.dataset
    trainer.meter = Meter.of(recipe, run.precision, model, data)
    trainer.base_files = BaseFiles.of(run.base.original.path, run.base.revision)
    trainer.recipe_yaml = recipe.to_yaml()
    trainer.marker_fields = {"processes": distributed.world_size(), "rows": data.digest}
    if recipe.templates:
        trainer.marker_fields["environment"] = diff.digests(recipe)
    if rows.chat.day is not None:
        trainer.marker_fields["day"] = rows.chat.day.isoformat()
    if not rows.streamed:
        check_row_counts(trainer.train_dataset, data, "train")
    if evaluation.dataset is not None:
        check_row_counts(trainer.eval_dataset, evaluation, "evaluate")
    trainer.pad_to_ranks()
    batch = config.per_device_train_batch_size * distributed.world_size()
    if config.dataloader_drop_last and not rows.streamed and len(trainer.train_dataset) < batch:
        count = len(trainer.train_dataset)
        raise RunError(
            f"training.dataloader_drop_last: is true, and {count} rows are fewer than a batch of {batch}, so that all "
            "are dropped; write false, or lower training.per_device_train_batch_size"
        )
    trainer.initial_adapter = initial_adapter(trainer.model)
    return trainer


def _origin(run: _Run) -> dict[str, Any]:
    """All that the log-probabilities of the model at the start depend on."""
    recipe, precision, base = run.recipe, run.precision, run.base
    adapter = Path(recipe.model.adapter).expanduser() if recipe.model.adapter else None
    keys = ("seed", "per_device_eval_batch_size", "ld_alpha", "loss_type", "max_length", "fp16", "bf16")
    return {
        "method": recipe.method,
        "rows": [run.rows.train.digest, run.rows.evaluation.digest],
        "base": base.identity or base.name,
        "adapter": [files.sha256(file) for file in sorted(adapter.glob("*.safetensors"))] if adapter else [],
        "lora": recipe.lora,
        "quantization": recipe.quantization,
        "training": {key: recipe.training.get(key) for key in keys},
        "dtype": [str(precision.loaded), precision.computes, recipe.model.attn_implementation],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
    }


def _add_callbacks(run: _Run, trainer: RunTrainer, progress: ProgressDisplay, uploads: CheckpointUploads) -> bool:
    """Adds the callbacks in the order in which they act.

    Returns:
        True if wandb is to get the finished run as an artifact.
    """
    recipe, output, start, say = run.recipe, run.output, run.start, run.say
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RestoreCounters(trainer))
    if "logging_steps" not in recipe.training:
        trainer.add_callback(EachStepLogged())
    if trainer.padding_free:
        trainer.add_callback(PackedRowsCheck(trainer))
    preferences = trainer if isinstance(trainer, PreferenceTrainer) else None
    if preferences and trainer.args.disable_dropout and (recipe.lora or {}).get("lora_dropout"):
        say("lora.lora_dropout has no effect: training.disable_dropout, true by default with this method, is on")
    if preferences:
        trainer.add_callback(SharedPromptsCheck(preferences, say))
    trainer.add_callback(MemoryCheck(trainer, say))
    if preferences and preferences.needs_reference:
        trainer.add_callback(ReferenceLogProbs(preferences, output, _origin(run), start is not None, say))
    if recipe.early_stopping:
        trainer.add_callback(EarlyStopping(recipe.early_stopping.patience, recipe.early_stopping.min_delta))
    start_step = checkpoint.read_marker(start)["step"] if start else 0
    trainer.add_callback(soft(trackers.RunDocuments(output, trainer), "the documents for trackers", say))
    if run.rows.evaluation.dataset is not None and not (trainer.is_fsdp_enabled or trainer.args.fsdp):
        stop_ids = trainer.model.generation_config.eos_token_id
        compared = AdapterAtStart.of(trainer.model) if preferences and preferences.needs_reference else None
        samples = trackers.Samples(output, trainer, run.rows.chat, stop_ids, start_step, compared)
        trainer.add_callback(soft(samples, "samples", say))
    trainer.add_callback(soft(MetricsLog(output, start_step, trainer), "metrics.jsonl", say))
    if recipe.templates:
        trackers.show_templates(trainer.args, recipe)
    wants_artifact = trackers.configure_trackers(trainer, start_step, say)
    trainer.add_callback(soft(progress, "the progress display", say))
    if recipe.hub.repo_id and recipe.hub.every_n_saves:
        trainer.add_callback(soft(uploads, "hub: the push of a checkpoint", say))
    return wants_artifact


# ---------------------------------------------------------------------------------------------------------------
# Files of the run


def _just_evaluated(trainer: RunTrainer) -> bool:
    """True if an evaluation was logged at the last step."""
    return any("eval_loss" in r and r["step"] == trainer.state.global_step for r in trainer.state.log_history)


def _save_finished_run(trainer: RunTrainer, output: Path, say: Say) -> None:
    """Writes the finished run's files. The weights are moved last: a run that has them has all else."""
    part = output / ".finished"
    with saving(part), quiet():
        trainer.save_model(str(part))
        if trainer.args.should_save:
            trainer.model.generation_config.save_pretrained(part)
    if not trainer.args.should_save:
        return
    with softly("loss.png", say):
        draw_losses(output / "metrics.jsonl", output / "loss.png")
    for path in sorted(part.iterdir()):
        files.sync(path)
        if path.name not in checkpoint.WEIGHTS:
            path.replace(output / path.name)
    with softly("README.md", say):
        files.write_whole(output / "README.md", model_card(output))
    for path in sorted(part.iterdir()):
        path.replace(output / path.name)
    shutil.rmtree(part)
    files.sync(output)


def _push_run(output: Path, say: Say) -> None:
    try:
        say(f"pushed: {push(output, say=say)}")
    except PushError as error:
        raise PushError(f"{error}. The run is complete; push it with: finetune push {output}") from error
