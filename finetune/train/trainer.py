"""SFTTrainer with what it lacks: one order on any number of ranks, whole checkpoints, an exact account of the loss."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer

from finetune.data.chat import IGNORE
from finetune.system import distributed, files
from finetune.system.errors import RunError
from finetune.system.terminal import quiet
from finetune.train import pissa
from finetune.train.checkpoint import complete, rotate
from finetune.train.meter import Meter
from finetune.train.state import damage, load_optimizer, load_weights, save, tensors, trained, whole


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that marks whole checkpoints, keeps no pickled arguments, and stops at a loss that is not finite."""

    train_dataset: Any
    eval_dataset: Any
    save_total_limit: int | None = None
    rows: Any = ()  # the dataset that was prepared, with the names of its rows
    recipe = ""  # as the run's `recipe.yaml` has it; each checkpoint has its own
    marks: dict[str, Any] = {}  # what a checkpoint's marker says besides  # noqa: RUF012 (set anew, never changed)
    logged: dict[str, Any] | None = None  # what a resumed run had counted since it last logged
    began: dict[str, torch.Tensor] | None = None  # what the adapter took out of its base, where it did
    fillers = 0  # rows without labels at the end of the training rows
    stopping = False  # a signal came: the step at hand is the last
    trained = torch.tensor(0)  # tokens with a label that this process has taken a step on
    meter: Meter
    energy = 0.0  # millijoules of this process's card
    saved = -1  # the step of the last checkpoint

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(_apart, inner.worker_init_fn)
        return loader

    def fill_up(self) -> None:
        """Adds rows without labels at the datasets' ends, so that all ranks have as many.

        Upstream takes rows of the beginning a second time instead, so that a run on two ranks is not that on one.
        """
        count, args = self.accelerator.num_processes, self.args
        if count > 1 and not args.dataloader_drop_last and hasattr(self.train_dataset, "__len__"):
            rows = len(self.train_dataset)
            self.train_dataset = _filled(self.train_dataset, args.per_device_train_batch_size * count)
            self.fillers = len(self.train_dataset) - rows
        if count > 1 and self.eval_dataset is not None:
            self.eval_dataset = _filled(self.eval_dataset, args.per_device_eval_batch_size * count)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__") or self.args.train_sampling_strategy == "batch_rebalance":
            return super()._get_train_sampler(train_dataset)
        return _Order(self, dataset)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            # accelerate asks for all of them, and a model of text and images has not all (Gemma 3 4B).
            plugin.transformer_cls_names_to_wrap = layer_classes(self.model)
            if (policy := plugin.mixed_precision_policy) is not None:
                # accelerate rounds outputs too, the loss among them, and sums gradients in the lower type.
                plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        if not (self.is_fsdp_enabled and hasattr(self.model, "peft_config")):
            return super()._prepare_for_training(*args, **kwargs)
        # Beneath an adapter accelerate 1.15 gives the output layer a group of its own, gathered when it is called.
        # The fused head reads the weight without a call: trained, it would get the gradient of its own rank alone.
        # Unknown to accelerate, both embeddings stay in the group of the whole model. And transformers 5.23 ties by
        # names that a layer has no longer once PEFT has wrapped it.
        ours = {
            "get_input_embeddings": lambda: None,
            "get_output_embeddings": lambda: None,
            "tie_weights": _tie(self.model),
        }
        self.model.__dict__.update(ours)
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            for name in ours:
                del self.model.__dict__[name]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run writes its own card, at the end."""

    # -----------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter or model, whole, from the parts of all ranks."""
        if self.is_fsdp_enabled:
            self._save_parts(output_dir)
        else:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            # A pickle of all arguments, any token among them, that nothing reads; PEFT's empty card.
            for name in ("training_args.bin", "README.md"):
                Path(output_dir or self.args.output_dir, name).unlink(missing_ok=True)
            if self.began is not None:
                pissa.convert(Path(output_dir or self.args.output_dir), self.began)

    def _save_parts(self, output_dir: str | None) -> None:
        # Upstream writes nothing where ranks hold parts, or the frozen base again with each adapter.
        wanted = set(trained(self.model)) if hasattr(self.model, "peft_config") else None
        dtype = getattr(torch, str(self.model.config.dtype).removeprefix("torch."))
        state: dict[str, torch.Tensor] = {}
        for name, tensor in tensors(self.model):
            if wanted is None or name in wanted or ".lora_" in name:
                gathered = whole(tensor.detach())
                if self.args.should_save:
                    # accelerate trains in float32 what is computed in bfloat16; the files are as the config says.
                    casts = wanted is None and gathered.is_floating_point()
                    state[name] = gathered.to("cpu", dtype if casts else gathered.dtype)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.saved == self.state.global_step:
            return
        self.saved = self.state.global_step
        folder = Path(self.args.output_dir, f"checkpoint-{self.saved}")
        if self.args.should_save and folder.exists():
            shutil.rmtree(
                folder
            )  # one that was not finished, or that comes after the one which was gone on from
        self.accelerator.wait_for_everyone()
        with saving(folder), quiet():
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            files.sync_files(folder)  # each machine its own
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                files.write_whole(folder / "recipe.yaml", self.recipe)
                complete(folder, self.saved, self.marks)
        if self.args.should_save:
            # Older ones go only now: until the marker is written this one does not count.
            best = self.state.best_model_checkpoint
            rotate(Path(self.args.output_dir), self.save_total_limit, Path(best) if best else None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.accelerator.wait_for_everyone()  # the model's files, which are not written twice, are there
        self.energy += self.meter.spent()
        logged = {
            "loss": self._tr_loss.item(),
            "total": self._total_loss_scalar,
            "step": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "tokens": self._total_train_tokens,
            "trained": int(self.trained),
            "energy": self.energy,
        }
        save(Path(output_dir), self.model, self.optimizer, self.lr_scheduler, logged)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.logged = load_optimizer(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)
            self._total_train_tokens = self.logged["tokens"]
            self.trained = torch.tensor(int(self.logged["trained"]))
            self.energy = self.logged.get("energy", 0.0)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with damage(Path(checkpoint or ".")):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with damage(Path(checkpoint or ".")):
            super()._load_scaler(checkpoint)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        best: bool = super()._determine_best_metric(*args, **kwargs)
        # With `save_strategy: best` this decides what is saved, and a run that is stopped always is.
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
        # Of a run that was stopped between its last checkpoint and its end, transformers 5.23 would take a step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = dict(inputs)
        labels = batch["labels"]
        self.trained = self.trained.to(labels.device) + (labels != IGNORE).sum()  # nobody waits for it yet
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise RunError(
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

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.energy += self.meter.spent()
            counted = torch.tensor([int(self.trained), round(self.energy)], device=self.args.device)
            trained, energy = self.accelerator.reduce(counted, "sum").tolist()
            logs["trained_tokens"] = trained
            if energy:
                logs["energy_wh"] = round(energy / 3.6e6, 4)
            self.meter.measure(logs, self._total_train_tokens)
        if "train_loss" in logs:
            # The mean over all steps, also those before this process went on.
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
        super().log(logs, *args, **kwargs)

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


class GoOn(TrainerCallback):  # type: ignore[misc]
    """Gives a resumed run what it had counted since it last logged, so that its next record is complete."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upstream has just set all of it to nothing."""
        if logged := self.trainer.logged:
            self.trainer._tr_loss += logged["loss"]
            self.trainer._total_loss_scalar = logged["total"]
            self.trainer._globalstep_last_logged = logged["step"]
            self.trainer._metrics["train"].update(logged["metrics"])


class _Order(torch.utils.data.Sampler[int]):
    """The rows of an epoch in an order that seed and epoch alone decide; rows that fill up stand at the end.

    The epoch is the trainer's, which a resumed run has too: upstream's sampler is not told of it on several ranks
    (accelerate 1.15 `DataLoaderShard.set_epoch`, through `SkipBatchSampler`).
    """

    def __init__(self, trainer: Trainer, dataset: Any) -> None:
        self.trainer, self.dataset = trainer, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        args, state = self.trainer.args, self.trainer.state
        count = len(self.dataset) - self.trainer.fillers
        seed = args.seed if args.data_seed is None else args.data_seed
        generator = torch.Generator().manual_seed(seed + int(state.epoch or 0))
        if args.train_sampling_strategy == "sequential":
            yield from range(count)
        elif args.train_sampling_strategy == "group_by_length":
            lengths = pc.list_value_length(self.dataset.with_format("arrow")[:count]["input_ids"]).to_pylist()
            size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            yield from get_length_grouped_indices(lengths, size, generator=generator)
        else:
            yield from torch.randperm(count, generator=generator).tolist()
        yield from range(count, len(self.dataset))


def _apart(init: Callable[[int], None] | None, worker: int) -> None:
    """Puts a worker into a process group of its own: a launcher signals whole groups, and the last step needs rows."""
    os.setpgrp()
    if init:
        init(worker)


def _filled(dataset: Any, multiple: int) -> Any:
    """The dataset with rows without labels at its end, up to a multiple."""
    import datasets

    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    filler = dataset[0]
    filler["labels"] = [IGNORE] * len(filler["labels"])
    fillers = datasets.Dataset.from_list([filler] * missing, features=dataset.features)
    return datasets.concatenate_datasets([dataset, fillers])


def layer_classes(model: Any) -> list[str]:
    """The classes of the layers that are a unit of sharding each: those named by its class that the model has."""
    there = {type(module).__name__ for module in model.modules()}
    return sorted(there & set(model._no_split_modules or ()))


def _tie(model: Any) -> Callable[[], None]:
    """What makes parameters that are one now one again."""
    places: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append((module, name))
    groups = [
        group
        for group in places.values()
        if len(group) > 1 and group[0][0]._parameters[group[0][1]] is not None
    ]

    def tie() -> None:
        for (module, name), *others in groups:
            for other, other_name in others:
                other._parameters[other_name] = module._parameters[name]

    return tie


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """A folder that cannot be saved (most often: a full disk) is removed again, and told in one line."""
    try:
        yield
    # torch and safetensors tell a full disk by their own errors.
    except (OSError, RuntimeError, SafetensorError) as error:
        if distributed.is_lost_rank(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        if not distributed.rank():
            shutil.rmtree(folder, ignore_errors=True)
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(folder.parent).free / 2**20:,.0f} MiB free)"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(
            f"{folder} could not be saved: {reason}{free}. What was saved before is untouched; make room and go on "
            "with training.resume_from_checkpoint=true"
        ) from error
