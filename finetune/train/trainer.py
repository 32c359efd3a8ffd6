"""The base of all trainers: one order of rows on any number of ranks, complete checkpoints, exact evaluation losses.

`sft.py` and `preference.py` put it before a trainer of trl.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import TrainerCallback, trainer, trainer_utils

from finetune.data.encoded import IGNORE
from finetune.model.saved_files import BaseFiles
from finetune.system import distributed, files
from finetune.system.errors import RunError, first_line
from finetune.system.terminal import quiet
from finetune.train import pissa
from finetune.train.checkpoint import MarkerFields, rotate, write_marker
from finetune.train.meter import Meter
from finetune.train.row_order import EpochOrder, padded
from finetune.train.state import (
    Counters,
    damage_reported,
    full_tensor,
    load_optimizer,
    load_weights,
    save_state,
    saved_tensors,
    trained_parameters,
)

# transformers 5.23 takes durations from `time.time`, which goes back when the clock is set.
trainer.time = trainer_utils.time = SimpleNamespace(time=time.monotonic)


class RunTrainer(transformers.Trainer):  # type: ignore[misc]
    """A trainer that marks complete checkpoints, writes no pickled arguments, stops at a loss that is not finite.

    It is a mixin: a class names it before a trainer of trl.
    """

    train_dataset: Any
    eval_dataset: Any
    save_total_limit: int | None = None
    # The prepared dataset, whose `row` column names each row.
    named_rows: Any = ()
    # The text of the run's `recipe.yaml`, which is written to each checkpoint.
    recipe_yaml = ""
    # The base's small files, which those that are saved continue.
    base_files = BaseFiles({}, {}, None)
    # Further fields of a checkpoint's marker.
    marker_fields: MarkerFields = {"processes": 1, "rows": None}  # noqa: RUF012 (replaced, never changed)
    # The counters of the checkpoint that the run was resumed from.
    resumed_counters: Counters | None = None
    # The adapter's initial values, if it was initialised from the base's weights (PiSSA, OLoRA).
    initial_adapter: dict[str, torch.Tensor] | None = None
    # Rows without labels at the end of the training rows.
    padding_rows = 0
    # True after a signal: the current step is the last.
    stopping = False
    # Tokens with a label that this process has trained on.
    trained_tokens = torch.tensor(0)
    meter: Meter
    # Energy of this process's GPU.
    millijoules = 0.0
    last_saved_step = -1

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        drop_last = self.args.dataloader_drop_last
        # transformers 5.23 drops the last rows of an evaluation too, whose loss would then not be that of all rows.
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(_own_process_group, inner.worker_init_fn)
        return loader

    def pad_to_ranks(self) -> None:
        """Adds rows without labels at the end of both datasets, so that all ranks have the same number.

        accelerate repeats rows from the beginning instead, so that two ranks would not train as one does.
        """
        count, args = self.accelerator.num_processes, self.args
        if count > 1 and not args.dataloader_drop_last and hasattr(self.train_dataset, "__len__"):
            rows = len(self.train_dataset)
            self.train_dataset = padded(self.train_dataset, args.per_device_train_batch_size * count)
            self.padding_rows = len(self.train_dataset) - rows
        if count > 1 and self.eval_dataset is not None:
            self.eval_dataset = padded(self.eval_dataset, args.per_device_eval_batch_size * count)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__") or self.args.train_sampling_strategy == "batch_rebalance":
            return super()._get_train_sampler(train_dataset)
        return EpochOrder(self, dataset)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            # accelerate fails on a class that the model does not have (Gemma 3 4B without images).
            plugin.transformer_cls_names_to_wrap = layer_classes(self.model)
            if (policy := plugin.mixed_precision_policy) is not None:
                # accelerate would round all outputs, also the loss, and sum gradients in the lower precision.
                plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        if not (self.is_fsdp_enabled and hasattr(self.model, "peft_config")):
            return super()._prepare_for_training(*args, **kwargs)
        # In a PEFT model accelerate 1.15 shards the output layer as a unit of its own, gathered when it is called. The
        # fused head reads its weight without a call, so a trained weight would only get its own rank's gradient. With
        # these methods hidden from accelerate, both embeddings stay in the unit of the whole model. And transformers
        # 5.23 ties weights by names that change when PEFT wraps a layer.
        hidden = {
            "get_input_embeddings": lambda: None,
            "get_output_embeddings": lambda: None,
            "tie_weights": _function_that_ties(self.model),
        }
        self.model.__dict__.update(hidden)
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            for name in hidden:
                del self.model.__dict__[name]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run writes its own model card at the end."""

    # -----------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter or model, gathered from all ranks."""
        if self.is_fsdp_enabled:
            self._save_sharded_model(output_dir)
        else:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.base_files.complete(Path(output_dir or self.args.output_dir))
            # A pickle of all arguments (access tokens too) that nothing reads, and PEFT's empty model card.
            for name in ("training_args.bin", "README.md"):
                Path(output_dir or self.args.output_dir, name).unlink(missing_ok=True)
            if self.initial_adapter is not None:
                pissa.convert_to_lora(Path(output_dir or self.args.output_dir), self.initial_adapter)

    def _save_sharded_model(self, output_dir: str | None) -> None:
        # Upstream writes nothing if ranks hold shards, or writes the frozen base with each adapter.
        wanted = set(trained_parameters(self.model)) if hasattr(self.model, "peft_config") else None
        dtype = getattr(torch, str(self.model.config.dtype).removeprefix("torch."))
        state: dict[str, torch.Tensor] = {}
        for name, tensor in saved_tensors(self.model):
            if wanted is None or name in wanted or ".lora_" in name:
                gathered = full_tensor(tensor.detach())
                if self.args.should_save:
                    # accelerate keeps weights in float32 for computation in bfloat16; files have the config's dtype.
                    casts = wanted is None and gathered.is_floating_point()
                    state[name] = gathered.to("cpu", dtype if casts else gathered.dtype)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.last_saved_step == self.state.global_step:
            return
        self.last_saved_step = self.state.global_step
        folder = Path(self.args.output_dir, f"checkpoint-{self.last_saved_step}")
        if self.args.should_save and folder.exists():
            # An incomplete one, or one from after the checkpoint that the run was resumed from.
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        with saving(folder), quiet():
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            files.sync_files(folder)  # on each machine
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                files.write_whole(folder / "recipe.yaml", self.recipe_yaml)
                write_marker(folder, self.last_saved_step, self.marker_fields)
        if self.args.should_save:
            # Older checkpoints are removed only now: without its marker, the new one would not count.
            best = self.state.best_model_checkpoint
            rotate(Path(self.args.output_dir), self.save_total_limit, Path(best) if best else None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.accelerator.wait_for_everyone()  # `save_state` does not repeat what the model's files hold
        self.millijoules += self.meter.spent_millijoules()
        counters: Counters = {
            "loss": self._tr_loss.item(),
            "total": self._total_loss_scalar,
            "step": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "tokens": self._total_train_tokens,
            "trained": int(self.trained_tokens),
            "energy": self.millijoules,
        }
        save_state(Path(output_dir), self.model, self.optimizer, self.lr_scheduler, counters)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with damage_reported(Path(resume_from_checkpoint)):
            load_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with damage_reported(Path(checkpoint)):
                counters = load_optimizer(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)
            self.resumed_counters = counters
            self._total_train_tokens = counters["tokens"]
            self.trained_tokens = torch.tensor(int(counters["trained"]))
            self.millijoules = counters.get("energy", 0.0)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with damage_reported(Path(checkpoint or ".")):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with damage_reported(Path(checkpoint or ".")):
            super()._load_scaler(checkpoint)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        best: bool = super()._determine_best_metric(*args, **kwargs)
        # With `save_strategy: best` this decides if a checkpoint is saved; a stopped run must always save one.
        return best or self.stopping

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if self.args.save_only_model:
            super()._load_best_model()
        else:
            load_weights(best, self.model)

    # -----------------------------------------------------------------------------------------------------------
    # Steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed after its last step, or after an early stop, a run would take one step more (transformers 5.23).
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = dict(inputs)
        labels = batch["labels"]
        # Summed on the GPU, without a synchronisation.
        self.trained_tokens = self.trained_tokens.to(labels.device) + (labels != IGNORE).sum()
        loss = self.uncounted_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise RunError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on the rows "
                f"{', '.join(self._row_names(batch))}. This step was not taken and checkpoints are kept. Look at these "
                "rows, lower training.learning_rate, or warm up (training.warmup_steps)"
            )
        return loss

    def uncounted_step(self, *args: Any, **kwargs: Any) -> Any:
        """A forward and a backward pass with trl's own step, which leaves this class's counters as they are."""
        return super().training_step(*args, **kwargs)

    def items_in(self, inputs: Any) -> torch.Tensor:
        """The number of items that the loss of a batch is the mean of: its tokens with a label."""
        count: torch.Tensor = (inputs["labels"][:, 1:] != IGNORE).sum()
        return count

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        count = self.items_in(inputs).to(self.args.device)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._evaluated += torch.stack([loss.float() * count, count.float()])
        return loss, logits, labels

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.millijoules += self.meter.spent_millijoules()
            counts = [int(self.trained_tokens), round(self.millijoules)]
            counted = torch.tensor(counts, device=self.args.device)
            trained, energy = self.accelerator.reduce(counted, "sum").tolist()
            logs["trained_tokens"] = trained
            if energy:
                logs["energy_wh"] = round(energy / 3.6e6, 4)
            self.meter.measure(logs, self._total_train_tokens)
        if "train_loss" in logs:
            # The mean over all steps, also those before a resume.
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
            logs["max_steps"] = self.state.max_steps
            if self.args.load_best_model_at_end and (best := self.state.best_model_checkpoint):
                logs["saved_step"] = int(best.rpartition("-")[2])  # its weights are loaded next, and saved
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # transformers averages the means of batches, which depends on the batch size; this is the mean over all items.
        self._evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        loss, count = self.accelerator.reduce(self._evaluated, reduction="sum").tolist()
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss / max(1.0, count)
        return output

    def _row_names(self, inputs: dict[str, Any]) -> list[str]:
        """The names of the rows in a batch, found by their tokens."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is None:  # packed: several rows in one, each starting at position 0
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
            rows = ids[0].tensor_split(starts[1:])
        else:
            rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
        batch = {tuple(row.tolist()) for row in rows}
        found = (row["row"] for row in self.named_rows if tuple(row["input_ids"]) in batch)
        return [name for name, _ in zip(found, batch, strict=False)]


class RestoreCounters(TrainerCallback):  # type: ignore[misc]
    """Restores a resumed run's counters, so that its next logged record covers all steps since the last one."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the counters, which transformers has just set to zero."""
        if counters := self.trainer.resumed_counters:
            self.trainer._tr_loss += counters["loss"]
            self.trainer._total_loss_scalar = counters["total"]
            self.trainer._globalstep_last_logged = counters["step"]
            self.trainer._metrics["train"].update(counters["metrics"])


def _own_process_group(init: Callable[[int], None] | None, worker: int) -> None:
    """Moves a dataloader worker into its own process group.

    A launcher signals the whole process group, but the step that is finished after a signal still needs the worker.
    """
    os.setpgrp()
    if init:
        init(worker)


def layer_classes(model: Any) -> list[str]:
    """The names of the layer classes that FSDP shards as a unit: those of `_no_split_modules` that the model has."""
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(model._no_split_modules or ()))


def _function_that_ties(model: Any) -> Callable[[], None]:
    """A function that ties again the parameters that are tied now."""
    places: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    groups = [group for group in places.values() if len(group) > 1 and group[0][0]._parameters[group[0][1]] is not None]

    def tie() -> None:
        for (module, name), *others in groups:
            for other, other_name in others:
                other._parameters[other_name] = module._parameters[name]

    return tie


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Removes a folder that cannot be saved completely, most often because the disk is full.

    Raises:
        RunError: It cannot be saved.
    """
    try:
        yield
    # torch and safetensors have their own errors for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        if distributed.is_lost_rank(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        if not distributed.rank():
            shutil.rmtree(folder, ignore_errors=True)
        free, cure = "", "mend that"
        if files.is_full(error):
            cure = "free some disk space"
            with contextlib.suppress(OSError):
                free = f" ({shutil.disk_usage(folder.parent).free / 2**20:,.0f} MiB free)"
        raise RunError(
            f"{folder} could not be saved: {first_line(error)}{free}. Earlier checkpoints are kept; {cure} and resume "
            "with training.resume_from_checkpoint=true"
        ) from error
