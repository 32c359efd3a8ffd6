"""One recipe to one run directory, through `trl.SFTTrainer`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from finetune import checkpoint, hub
from finetune.base import locate, quiet
from finetune.chat import IGNORE, Chat
from finetune.data import Prepared, build
from finetune.loss import use_token_head
from finetune.model import (
    eos_tokens,
    lighten_trainable_tokens,
    load_model,
    load_tokenizer,
    resolve_dtype,
    trainable_token_indices,
    unlearned_tokens,
)
from finetune.packing import RowsApart, check_rows
from finetune.recipe import Recipe
from finetune.record import Progress, Record, draw_losses
from finetune.shards import fingerprint

Say = Callable[[str], None]


class TrainError(ValueError):
    """The run cannot go on."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; everything is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def train(recipe: Recipe, say: Say = lambda line: None) -> Path:
    """The run directory of a recipe, trained.

    Raises:
        TrainError: The loss is no longer finite, or something cannot be saved.
        RunError: The output directory is in use, or there is nothing to go on from.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved first.
        ModelError, TemplateError, DataError: From the rooms that raise them.
    """
    output = Path(recipe.training["output_dir"])
    resume = recipe.training.get("resume_from_checkpoint") or False
    checkpoint.check_output(output, resume)
    main = _is_main()

    tokenizer = load_tokenizer(recipe.model)
    chat = Chat(tokenizer)
    chats = any(source.format != "text" and not source.raw for source in recipe.data.train)
    chats = chats and tokenizer.chat_template is not None
    data, evaluation = build(recipe.data, chat, recipe.training.get("max_length", 1024), say)
    streamed = any(source.streaming for source in recipe.data.train)
    say("data: read while training" if streamed else f"data: {data.ledger.summary()}")
    if evaluation.dataset is not None:
        say(f"evaluation: {evaluation.ledger.summary()}")

    config = _training_arguments(recipe, packs=bool(recipe.training.get("packing")))
    set_seed(config.seed)
    model = _model(recipe, chat if chats else None, say)
    model.generation_config.eos_token_id = eos_tokens(model.generation_config, tokenizer)

    start = checkpoint.to_resume(output, resume, say)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(output / "recipe.yaml", recipe.to_yaml())
        checkpoint.write_whole(output / "environment.json", _json(environment(model) | _base(recipe)))
        _write_ledgers(output, data, evaluation)

    trainer = _Trainer(
        model=model,
        args=config,
        train_dataset=data.dataset,
        eval_dataset=evaluation.dataset,
        processing_class=tokenizer,
    )
    trainer.save_total_limit = recipe.training.get("save_total_limit")
    trainer.rows = [] if streamed else data.dataset
    if not streamed:
        check_rows(trainer.train_dataset, data, "train")
    if evaluation.dataset is not None:
        check_rows(trainer.eval_dataset, evaluation, "evaluate")
    if recipe.lora is not None:
        # trl casts a quantised model's adapter to bfloat16 whatever the run computes in (sft_trainer.py, 1.16), and
        # PEFT gives token rows the base's dtype (0.21), in which small steps are rounded away.
        everything = resolve_dtype(recipe.model) != torch.bfloat16
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and (everything or "trainable_tokens" in name):
                parameter.data = parameter.data.float()
    use_token_head(trainer.model.get_base_model() if recipe.lora is not None else trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.padding_free:
        trainer.add_callback(RowsApart(trainer))
    trainer.add_callback(Record(output, start))
    trainer.add_callback(Progress(say, silent=bool(recipe.training.get("disable_tqdm"))))

    with _stop_on_signals(trainer) as stopped:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        step = trainer.state.global_step
        if stopped and step < trainer.state.max_steps:
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
    say(f"saved: {output}")
    return output


def environment(model: Any) -> dict[str, Any]:
    """Versions, device and commit of this run."""
    names = ("finetune", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
    clone = Path(__file__).parents[1]
    commit = None
    if (clone / ".git").exists():  # an installed package may lie inside somebody else's repository
        git = ["git", "-C", str(clone), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.system(),
        "commit": commit,
        "base_commit": getattr(model.config, "_commit_hash", None),
        "dtype": str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix(
            "torch."
        ),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _base(recipe: Recipe) -> dict[str, str]:
    """What a merge knows the base by; one on the Hub is known by its commit."""
    path = Path(locate(recipe.model.name_or_path))
    return {"base_fingerprint": fingerprint(path)} if path.is_dir() else {}


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _write_ledgers(output: Path, data: Prepared, evaluation: Prepared) -> None:
    ledgers = {"train": data.ledger.as_dict(), "eval": evaluation.ledger.as_dict()}
    checkpoint.write_whole(output / "ledger.json", _json(ledgers))


def _training_arguments(recipe: Recipe, packs: bool) -> SFTConfig:
    values = dict(recipe.training)
    for ours in ("resume_from_checkpoint", "save_total_limit", "disable_tqdm"):
        values.pop(ours, None)
    dtype = resolve_dtype(recipe.model)
    # SFTConfig sets bf16 unless it is told otherwise.
    values["bf16"] = bool(values.get("bf16", dtype == torch.bfloat16 and not values.get("fp16")))
    values["fp16"] = bool(values.get("fp16", dtype == torch.float16 and not values["bf16"]))
    if not torch.accelerator.is_available():
        if values["fp16"]:
            raise TrainError(
                "model.dtype, training.fp16: float16 is trained on a GPU only; on a CPU write float32"
            )
        values = {"dataloader_pin_memory": False, "use_cpu": True} | values
    if values.get("padding_free") and not packs:
        # Our rows fit already; trl 1.16 refuses a length that it would not hold them to.
        values["max_length"] = None
    if not (packs or values.get("eval_packing") or values.get("shuffle_dataset")):
        # Our rows fit already; trl's preparation would go over each once more.
        values["dataset_kwargs"] = {"skip_prepare_dataset": True}
    return SFTConfig(**values, disable_tqdm=True)


def _model(recipe: Recipe, chat: Chat | None, say: Say) -> Any:
    """The model to train, its adapter on it."""
    dtype = resolve_dtype(recipe.model)
    if recipe.lora is None:
        # float16 weights cannot be trained themselves: the gradient scaler needs float32 ones.
        model = load_model(recipe, torch.float32 if dtype == torch.float16 else dtype)
        count = sum(p.numel() for p in model.parameters())
        say(f"model: {recipe.model.name_or_path}, full fine-tuning of {count:,} parameters")
        return model
    model = load_model(recipe, dtype)
    model.config.use_cache = False
    options = dict(recipe.lora)
    if options.get("trainable_token_indices") == "auto":
        del options["trainable_token_indices"]
        unlearned = unlearned_tokens(model, chat.turn_token_ids) if chat else []
        if chat and unlearned:
            options["trainable_token_indices"] = trainable_token_indices(model, unlearned)
            names = ", ".join(chat.tokenizer.convert_ids_to_tokens(unlearned))
            say(f"turn tokens that the base never learned, their embedding rows are trained too: {names}")
    try:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as error:
        raise TrainError(f"lora: {str(error).splitlines()[0]}") from error
    lighten_trainable_tokens(model)
    trained, total = model.get_nb_trainable_parameters()
    kind = "" if recipe.quantization is None else " on a quantised base"
    say(f"model: {recipe.model.name_or_path}, LoRA{kind}: {trained:,} of {total:,} parameters are trained")
    return model


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that marks whole checkpoints, keeps no pickled arguments, and stops at a loss that is not finite."""

    save_total_limit: int | None = None
    rows: Any  # the dataset that was prepared, with the names of its rows

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run writes its own card, at the end."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of all arguments, the output path and any token among them, that nothing reads.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        with _saving(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.complete(folder, self.state.global_step)
        if self.args.should_save:
            # Older ones go only now: until the marker is written this one does not count.
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = dict(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on the rows "
                f"{', '.join(self._rows(batch))}. This step was not taken and checkpoints are kept. Look at these "
                "rows, lower training.learning_rate, or warm up (training.warmup_steps)"
            )
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        count = (inputs["labels"][:, 1:] != IGNORE).sum().to(self.args.device)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._evaluated += torch.stack([loss.float() * count, count.float()])
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Upstream's is the mean of batch means, which changes with the batch size; ours is over all trained tokens.
        self._evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        loss, count = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / max(1.0, count)
        return output

    def _rows(self, inputs: dict[str, Any]) -> list[str]:
        """The names of the rows of a batch, found again by their tokens."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is None:  # packed: one row of rows, each beginning at position 0
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
            rows = ids[0].tensor_split(starts[1:])
        else:
            rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
        batch = {tuple(row.tolist()) for row in rows}
        found = (row["row"] for row in self.rows if tuple(row["input_ids"]) in batch)
        return [name for name, _ in zip(found, batch, strict=False)]


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """A folder that cannot be saved (most often: a full disk) is removed again, and told in one line."""
    try:
        yield
    # torch and safetensors tell a full disk by their own errors.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 2**20
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainError(
            f"{folder} could not be saved: {reason} ({free:,.0f} MiB free). What was saved before is untouched; make "
            "room and go on with training.resume_from_checkpoint=true"
        ) from error


@contextmanager
def _stop_on_signals(trainer: _Trainer) -> Iterator[list[int]]:
    """SIGINT and SIGTERM let the step at hand finish, save, and stop; a second one stops at once."""
    stopped: list[int] = []

    def on_signal(signum: int, frame: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(signum)

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            # The last step ends the run anyway.
            if stopped and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True
            return control

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    trainer.add_callback(Stop())
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _evaluated_now(trainer: _Trainer) -> bool:
    """Whether the last record is an evaluation at the last step."""
    return any("eval_loss" in r and r["step"] == trainer.state.global_step for r in trainer.state.log_history)


def _finish(trainer: _Trainer, recipe: Recipe, output: Path) -> None:
    """The finished run's files, the weights last: where they are, all else is."""
    beside = output / ".finished"
    with _saving(beside), quiet():
        trainer.save_model(str(beside))
        if trainer.args.should_save:
            trainer.model.generation_config.save_pretrained(beside)
    if not trainer.args.should_save:
        return
    (beside / "README.md").unlink(missing_ok=True)  # PEFT's empty form
    draw_losses(output / "metrics.jsonl", output / "loss.png")
    for path in sorted(beside.iterdir()):
        checkpoint.sync(path)
        if path.name not in checkpoint.WEIGHTS:
            path.replace(output / path.name)
    checkpoint.write_whole(output / "README.md", hub.model_card(output, recipe))
    for path in sorted(beside.iterdir()):
        path.replace(output / path.name)
    shutil.rmtree(beside)
    checkpoint.sync(output)
