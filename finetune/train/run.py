"""One recipe to one run directory, through `trl.SFTTrainer`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.data.chat import Chat
from finetune.data.mixture import Prepared, build_datasets
from finetune.hub.card import model_card
from finetune.hub.run import check_access, push
from finetune.hub.uploads import CheckpointUploads
from finetune.model import flops
from finetune.model.load import eos_tokens, load_tokenizer
from finetune.model.locate import Base
from finetune.model.precision import Precision, decide_precision
from finetune.model.trainable import load_trainable
from finetune.recipe import diff
from finetune.recipe.load import Recipe
from finetune.recipe.schema import DEFAULT_MAX_LENGTH
from finetune.system import devices, distributed, files
from finetune.system.errors import PushError
from finetune.system.terminal import Say, quiet
from finetune.train import checkpoint
from finetune.train.arguments import check_base, check_launch, training_arguments
from finetune.train.callbacks.memory_check import Rehearsal
from finetune.train.callbacks.metrics import Progress, Record, draw_losses
from finetune.train.callbacks.packing import RowsApart, check_rows
from finetune.train.callbacks.signals import Stopped, stop_on_signals
from finetune.train.callbacks.trackers import (
    Documents,
    Samples,
    check_trackers,
    finish,
    identify,
    prepare,
    wanted,
)
from finetune.train.loss import use_token_head
from finetune.train.meter import Meter
from finetune.train.pissa import beginning
from finetune.train.trainer import GoOn, Trainer, layer_classes, saving


def train(
    recipe: Recipe,
    say: Say = lambda line: None,
    check: Callable[[Recipe, Any, Any, Base], None] | None = None,
) -> Path:
    """The run directory of a recipe, trained.

    Args:
        recipe: What is trained.
        say: Told what happens.
        check: Asked, with the trainer's arguments and the rows, before any weight is read whether memory will do.

    Raises:
        TrainError: The loss is no longer finite, or something cannot be saved.
        RunError: The output directory is in use, or there is nothing to go on from.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved first.
        PushError: Nobody is logged in to the Hub, where the recipe names a place on it; or the finished run cannot be
            put there.
        ModelError, TemplateError, DataError: From the rooms that raise them.
    """
    output = Path(recipe.training["output_dir"])
    resume = recipe.training.get("resume_from_checkpoint") or False
    main = distributed.rank() == 0
    streamed = any(source.streaming for source in recipe.data.train)
    precision = decide_precision(recipe)
    check_launch(recipe, precision)
    trackers = wanted(recipe.training.get("report_to"))
    check_trackers(trackers)
    if main and recipe.hub.repo_id:
        check_access()  # not after hours
    distributed.watch_other_ranks()  # before the processes wait for each other
    base = Base.of(recipe.model, say)
    # A GGUF is converted here: transformers 5.23 lets only the first of joined processes save a model.
    check_base(recipe, base, precision)
    config = training_arguments(recipe, precision, streamed)  # which joins them
    if main:
        checkpoint.check_output(output, resume)
    if distributed.world_size() == 1 and (gpus := torch.cuda.device_count()) > 1:
        say(f"one of {gpus} GPUs is used; for all, see accelerate_configs/ddp.yaml and fsdp.yaml")

    tokenizer = load_tokenizer(recipe.model, base)
    chat = Chat(tokenizer)
    chats = any(source.format != "text" and not source.raw for source in recipe.data.train)
    chats = chats and tokenizer.chat_template is not None
    data, evaluation = build_datasets(recipe.data, chat, recipe.max_length, say)
    say("data: read while training" if streamed else f"data: {data.ledger.summary()}")
    if evaluation.dataset is not None:
        say(f"evaluation: {evaluation.ledger.summary()}")
    start = distributed.broadcast_from_first(_start(recipe, output, data, say) if main else None)
    distributed.check_same(
        {
            "the recipe": recipe.to_yaml(),
            "the chat template": tokenizer.chat_template,
            "a row of data.train": data.digest,
            "a row of data.eval": evaluation.digest,
            "the release of a package": _versions(),
        }
    )
    if main and trackers:
        config.project = recipe.training.get("project", "finetune")
        config.run_name = identify(output, config.run_name, config.project, start is not None)
    config.eval_on_start = config.eval_on_start and start is None  # it was done before the first step
    if check is not None and main:
        check(recipe, config, None if streamed else data.dataset, base)

    set_seed(config.seed)
    model = load_trainable(recipe, base, precision, chat if chats else None, say)
    model.generation_config.eos_token_id = eos_tokens(model.generation_config, tokenizer)
    if config.fsdp_config and config.fsdp:
        config.fsdp_config["transformer_layer_cls_to_wrap"] = layer_classes(model)
    if config.ddp_find_unused_parameters is None:
        # Only experts can be left out of a step; looking for others costs each step a walk through the graph.
        config.ddp_find_unused_parameters = any("expert" in name for name, _ in model.named_modules())

    if main:
        output.mkdir(parents=True, exist_ok=True)
        files.write_whole(output / "recipe.yaml", recipe.to_yaml())
        files.write_whole(output / "environment.json", _json(environment(precision) | base.identity))
        _write_ledgers(output, data, evaluation)
    distributed.check_shared(output / "recipe.yaml")

    drawn = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(
        model=model,
        args=config,
        # Without an end, a stream is one long epoch: a resumed run finds its place by counting, in whichever round.
        train_dataset=data.dataset.repeat(None) if streamed and data.dataset else data.dataset,
        eval_dataset=evaluation.dataset,
        processing_class=tokenizer,
    )
    trainer.save_total_limit = recipe.training.get("save_total_limit")
    trainer.rows = [] if streamed else data.dataset
    trainer.meter = _meter(recipe, precision, model, data)
    trainer.recipe = recipe.to_yaml()
    trainer.marks = {"processes": distributed.world_size(), "rows": data.digest}
    if not streamed:
        check_rows(trainer.train_dataset, data, "train")
    if evaluation.dataset is not None:
        check_rows(trainer.eval_dataset, evaluation, "evaluate")
    trainer.fill_up()
    if recipe.lora is not None:
        # trl casts a quantised model's adapter to bfloat16 whatever the run computes in (sft_trainer.py, 1.16), which
        # also rounds its first values.
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = drawn[name]
    trainer.began = beginning(trainer.model)
    use_token_head(trainer.model.get_base_model() if recipe.lora is not None else trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(GoOn(trainer))
    if trainer.padding_free:
        trainer.add_callback(RowsApart(trainer))
    trainer.add_callback(Rehearsal(trainer, say))
    start_step = checkpoint.marks(start)["step"] if start else 0
    trainer.add_callback(Documents(output, trainer))
    if evaluation.dataset is not None and not (trainer.is_fsdp_enabled or config.fsdp):
        stop_ids = model.generation_config.eos_token_id
        trainer.add_callback(Samples(output, trainer, chat, stop_ids, start_step))
    trainer.add_callback(Record(output, start, trainer))
    asked = prepare(trainer, start_step)
    progress = Progress(say, silent=bool(recipe.training.get("disable_tqdm")))
    trainer.add_callback(progress)
    uploads = CheckpointUploads(output, recipe.hub, say)
    if recipe.hub.repo_id and recipe.hub.every_n_saves:
        trainer.add_callback(uploads)

    with stop_on_signals(trainer) as stopped, closing(progress):
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        step = trainer.state.global_step
        if stopped and step < trainer.state.max_steps:
            distributed.leave_group()
            raise Stopped(
                stopped[0],
                f"stopped at step {step} of {trainer.state.max_steps}; {output / f'checkpoint-{step}'} is saved. "
                f"Go on with: finetune train {recipe.path} training.resume_from_checkpoint=true",
            )
        if evaluation.dataset is not None and not _evaluated_now(trainer):
            trainer.evaluate()
        if streamed and main:
            _write_ledgers(output, data, evaluation)
            say(f"data: {data.ledger.summary()}")
        _finish(trainer, recipe, output)
        finish(trainer, output, asked)
    distributed.leave_group()
    say(f"saved: {output}")
    if main and recipe.hub.repo_id:
        uploads.finish()
        _push(output, say)
    return output


def _meter(recipe: Recipe, precision: Precision, model: Any, data: Prepared) -> Meter:
    """What measures the run; a card's speed is known of some."""
    speed = devices.this_machine().tflops(precision.computes) * 1e12 * distributed.world_size()
    if not speed:
        return Meter()
    ledger = data.ledger
    # Of a stream nothing is counted yet.
    lengths = ledger.lengths or {recipe.max_length or DEFAULT_MAX_LENGTH: 1}
    scored = ledger.trained_tokens / ledger.tokens if ledger.tokens else 1.0
    return Meter(flops.flops_per_token(model, lengths, scored), speed)


def _push(output: Path, say: Say) -> None:
    try:
        say(f"pushed: {push(output, say=say)}")
    except PushError as error:
        raise PushError(f"{error}. The run is whole; put it there with: finetune push {output}") from error


def _start(recipe: Recipe, output: Path, data: Prepared, say: Say) -> Path | None:
    """The checkpoint to go on from, which must belong to this recipe and these rows."""
    start = checkpoint.to_resume(output, recipe.training.get("resume_from_checkpoint") or False, say)
    if start is not None and (saved := files.run_file(start, "recipe.yaml")):
        marks = checkpoint.marks(start)
        same_rows = marks.get("rows") == data.digest
        diff.check_changes(
            saved, recipe, say, same_rows, (int(marks.get("processes", 1)), distributed.world_size())
        )
    return start


def environment(precision: Precision) -> dict[str, Any]:
    """Versions, device and commit of this run."""
    clone = Path(__file__).parents[2]
    commit = None
    if (clone / ".git").exists():  # an installed package may lie inside somebody else's repository
        git = ["git", "-C", str(clone), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "device": device,
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.system(),
        "commit": commit,
        "base_commit": None,
        "dtype": str(precision.loaded).removeprefix("torch."),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    names = ("finetune", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
    return {name: importlib.metadata.version(name) for name in names}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _write_ledgers(output: Path, data: Prepared, evaluation: Prepared) -> None:
    ledgers = {"train": data.ledger.as_dict(), "eval": evaluation.ledger.as_dict()}
    files.write_whole(output / "ledger.json", _json(ledgers))


def _evaluated_now(trainer: Trainer) -> bool:
    """Whether the last record is an evaluation at the last step."""
    return any("eval_loss" in r and r["step"] == trainer.state.global_step for r in trainer.state.log_history)


def _finish(trainer: Trainer, recipe: Recipe, output: Path) -> None:
    """The finished run's files, the weights last: where they are, all else is."""
    beside = output / ".finished"
    with saving(beside), quiet():
        trainer.save_model(str(beside))
        if trainer.args.should_save:
            trainer.model.generation_config.save_pretrained(beside)
    if not trainer.args.should_save:
        return
    draw_losses(output / "metrics.jsonl", output / "loss.png")
    for path in sorted(beside.iterdir()):
        files.sync(path)
        if path.name not in checkpoint.WEIGHTS:
            path.replace(output / path.name)
    files.write_whole(output / "README.md", model_card(output))
    for path in sorted(beside.iterdir()):
        path.replace(output / path.name)
    shutil.rmtree(beside)
    files.sync(output)
