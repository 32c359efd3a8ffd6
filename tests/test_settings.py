"""Every key of `trl.SFTConfig`: a senseless value is one line with its key, or it trains all the same."""

# ruff: noqa: E501 (a fault is one line, and easier to read as one)

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl import SFTConfig

from finetune.cli.commands import main
from finetune.recipe.foreign_keys import INSTEAD
from finetune.recipe.load import load_recipe
from finetune.system.errors import RecipeError

Write = Callable[..., Path]
ROWS = Path(__file__).parents[1] / "data" / "chat_sample.jsonl"

_ABOVE_0, _FROM_0 = "write a number greater than 0", "write a number greater than or equal to 0"
_BOOL = "write true or false"
# A value that no run could mean, and the end of its fault. A text stands for a key whose type takes any number or name.
SENSELESS: dict[str, tuple[Any, str]] = {
    "per_device_train_batch_size": (0, _ABOVE_0),
    "per_device_eval_batch_size": (-1, _ABOVE_0),
    "gradient_accumulation_steps": (0, _ABOVE_0),
    "num_train_epochs": (-1.0, _ABOVE_0),
    "max_steps": (0, "write -1 or a number greater than 0"),
    "learning_rate": (-1e-4, _FROM_0),
    "weight_decay": (-0.1, _FROM_0),
    "adam_beta1": (1.0, "write a number less than 1"),
    "adam_beta2": (-0.5, _FROM_0),
    "adam_epsilon": (0.0, _ABOVE_0),
    "max_grad_norm": (-1.0, _FROM_0),
    "label_smoothing_factor": (1.5, "write a number less than 1"),
    "neftune_noise_alpha": (-5.0, _FROM_0),
    "router_aux_loss_coef": (-0.1, _FROM_0),
    "warmup_steps": (-1, _FROM_0),
    "lr_scheduler_type": ("cosine_with_min_lr", "transformers says: One of min_lr or min_lr_rate should be set through the `lr_scheduler_kwargs`"),
    "lr_scheduler_kwargs": ({"foo": 1}, "is unknown to the schedule linear; remove it"),
    "optim": ("galore_adamw", "is galore_adamw, whose state cannot be saved; write adamw_torch_fused, or adamw_8bit"),
    "optim_args": ("foo=1", "but adamw_torch_fused reads no foo; remove it"),
    "logging_steps": (0, _ABOVE_0),
    "save_steps": (-5, _ABOVE_0),
    "eval_steps": (0, _ABOVE_0),
    "eval_delay": (-1, _FROM_0),
    "save_total_limit": (0, _ABOVE_0),
    "eval_accumulation_steps": (0, _ABOVE_0),
    "torch_empty_cache_steps": (0, _ABOVE_0),
    "seed": (-1, _FROM_0),
    "data_seed": (2**32, "write a number less than 4294967296"),
    "max_length": (0, _ABOVE_0),
    "pad_to_multiple_of": (0, "write a number greater than 0 or 'auto'"),
    "dataset_num_proc": (0, _ABOVE_0),
    "dataloader_num_workers": (-1, _FROM_0),
    "dataloader_prefetch_factor": (0, _ABOVE_0),
    "dataloader_persistent_workers": (True, "torch says: persistent_workers option needs num_workers > 0"),
    "dataloader_multiprocessing_context": ("spawn", "torch says: multiprocessing_context can only be used with multi-process loading (num_workers > 0), but got num_workers=0"),
    "ddp_bucket_cap_mb": (0, _ABOVE_0),
    "ddp_timeout": (0, _ABOVE_0),
    "ddp_backend": ("smoke", "write 'nccl', 'gloo', 'mpi', 'xccl', 'hccl', 'cncl' or 'mccl'"),
    "accelerator_config": ({"gradient_accumulation_kwargs": {"num_steps": 8}}, "is unknown; write one of sync_each_batch"),
    "activation_checkpointing_kwargs": ({"use_reentrant": True, "debug": True}, "torch says: Passing `context_fn` or `debug` is only supported when use_reentrant=False."),
    "gradient_checkpointing_kwargs": ({"selective": True}, "write false"),
    "torch_compile_backend": ("smoke", "write 'no', 'eager'"),
    "torch_compile_mode": ("fast", "write 'default', 'reduce-overhead', 'max-autotune' or 'max-autotune-no-cudagraphs'"),
    "use_liger_kernel": (True, "is true, which needs the package liger-kernel; remove it, or run pip install liger-kernel"),
    "liger_kernel_config": ({"fused_linear_cross_entropy": True}, "write false"),
    "include_num_input_tokens_seen": ("some", "write true or false or 'all', 'non_padding' or 'no'"),
    "logging_strategy": ("best", "write 'no', 'steps' or 'epoch'"),
    "eval_strategy": ("best", "write 'no', 'steps' or 'epoch'"),
    "save_strategy": ("best", "is best, and nothing says by which metric; add metric_for_best_model: loss"),
    "metric_for_best_model": ("accuracy", "write 'loss', 'eval_loss', 'mean_token_accuracy', 'eval_mean_token_accuracy', 'entropy' or 'eval_entropy'"),
    "load_best_model_at_end": (True, '--load_best_model_at_end requires the save and eval strategy to match'),
    "log_level": ("loud", "write 'detail', 'debug', 'info', 'warning', 'error', 'critical' or 'passive'"),
    "log_level_replica": ("loud", "write 'detail', 'debug', 'info', 'warning', 'error', 'critical' or 'passive'"),
    "report_to": ("paper", "write "),
    "trackio_static_space_id": (True, "write text or false"),
    "train_sampling_strategy": ("sorted", "write 'random', 'sequential', 'group_by_length' or 'batch_rebalance'"),
    "packing_strategy": ("first_fit", "write 'bfd', 'bfd_split' or 'wrapped'"),
    "eval_packing": (True, "is true without packing, so rows would attend to one another; add packing: true"),
    "loss_type": ("mse", "write 'nll', 'dft' or 'chunked_nll'"),
    "fsdp_config": ({}, "write {xla: true, xla_fsdp_v2: true} on a TPU"),
    "debug": ("foo", "foo is not a valid DebugOption"),
    "output_dir": (3, "write text"),
    "resume_from_checkpoint": (3, "write text or true or false"),
    "run_name": (3, "write text"),
    "project": (3, "write text"),
    "trackio_space_id": (3, "write text"),
    "trackio_bucket_id": (3, "write text"),
    "include_for_metrics": ("loss", "write a list"),
    "greater_is_better": ("loss", _BOOL),
}  # fmt: skip
# Keys whose every value trains, each with one that is not the default: the runs of this file have them.
TRAINS: dict[str, Any] = {
    "average_tokens_across_devices": False,
    "logging_first_step": True,
    "log_on_each_node": False,
    "logging_nan_inf_filter": False,
    "prediction_loss_only": True,
    "eval_on_start": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "batch_eval_metrics": True,
    "save_only_model": True,
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True,
    "use_cpu": True,
    "dataloader_drop_last": True,
    "dataloader_pin_memory": False,
    "dataloader_in_order": False,
    "ddp_find_unused_parameters": True,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "use_cache": True,
    "disable_tqdm": True,
    "activation_checkpointing": True,
    "shuffle_dataset": True,
    "bf16": True,
    "auto_find_batch_size": True,
    "save_on_each_node": True,
    "full_determinism": True,
}
# Tested elsewhere, or seen to train by hand: they need other rows or a GPU, or take long (a thread that polls memory).
ELSEWHERE = {"gradient_checkpointing", "packing", "padding_free", "skip_memory_metrics", "activation_offloading"}
ELSEWHERE |= {"fp16", "tf32", "torch_compile"}


def test_the_tables_have_every_key_of_upstream() -> None:
    """A key that a new release of trl or transformers brings is put into one of them."""
    names = {field.name for field in dataclasses.fields(SFTConfig)} - INSTEAD["training"].keys()
    assert SENSELESS.keys() | TRAINS.keys() | ELSEWHERE == names
    assert len(SENSELESS) + len(TRAINS) + len(ELSEWHERE) == len(names)


@pytest.mark.parametrize("key", SENSELESS)
def test_a_senseless_value_is_one_line(key: str, write_recipe: Write) -> None:
    value, end = SENSELESS[key]
    data = {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.5}
    Path("rows.jsonl").touch()
    path = write_recipe(data=data, training={"eval_strategy": "steps", key: value})
    lines = path.read_text().splitlines()
    [number] = [i for i, line in enumerate(lines, 1) if line.startswith(f"  {key}:")]
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    [fault] = caught.value.faults
    at, _, message = fault.partition(": ")
    # A value within a map has its own line below the key.
    assert number <= int(at.rpartition(":")[2]) <= number + 2
    assert message.startswith(f"training.{key}")
    assert end in message


# Unusual values of keys that have senseless ones, too.
UNUSUAL: dict[str, Any] = {
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "optim": "sgd",
    "optim_args": "momentum=0.9,nesterov=true",
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 1, "decay_type": "1-sqrt"},
    "warmup_steps": 0.5,
    "accelerator_config": {"even_batches": False, "gradient_accumulation_kwargs": {"sync_each_batch": True}},
    "activation_checkpointing_kwargs": {"early_stop": False, "preserve_rng_state": False},
    "metric_for_best_model": "mean_token_accuracy",
    "save_strategy": "best",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "include_num_input_tokens_seen": "non_padding",
    "include_for_metrics": ["inputs"],
    "log_level": "error",
    "torch_empty_cache_steps": 1,
    "eval_accumulation_steps": 1,
    "train_sampling_strategy": "batch_rebalance",
    "pad_to_multiple_of": 8,
}


@pytest.mark.slow
def test_every_other_value_trains(write_recipe: Write) -> None:
    """All of them in one run, which ends with its weights."""
    data = {"train": [{"path": str(ROWS)}], "eval_fraction": 0.1}
    training = (
        TRAINS | UNUSUAL | {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 128, "output_dir": "run"}
    )
    path = write_recipe(data=data)
    recipe = yaml.safe_load(path.read_text()) | {"training": training}
    path.write_text(yaml.safe_dump(recipe))
    try:
        assert main(["train", str(path)]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert Path("run/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({"layers_to_transform": [0, 9]}, "lora.layers_to_transform: names layer 9, but the base has layers 0 to 3"),
        ({"target_modules": ["q_proj", "w1"]}, "lora.target_modules: names w1, which the base does not have"),
        ({"modules_to_save": ["score"]}, "lora.modules_to_save: names score, which the base does not have"),
        ({"target_parameters": ["w1"]}, "lora.target_parameters: names w1, which the base does not have"),
        ({"rank_pattern": {"w1": 4}}, "lora.rank_pattern: w1 matches no module of the base"),
        ({"exclude_modules": "["}, "lora: unterminated character set at position 0"),
        ({"layer_replication": [[0, 9]]}, "lora: index 4 is out of range"),
        ({"arrow_config": {}}, "lora: 'NoneType' object has no attribute 'copy'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_does_not_fit_its_base_is_one_line(
    lora: dict[str, Any], line: str, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_recipe(lora=lora)), "--quiet"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line}"]


@pytest.mark.parametrize("modules", [{}, {"target_modules": "all-linear"}], ids=["default", "written"])
def test_all_linear_layers_of_some_blocks(modules: dict[str, Any], write_recipe: Write) -> None:
    path = write_recipe(lora={"layers_to_transform": [0, 2], **modules}, training={"max_steps": 1})
    assert main(["train", str(path)]) == 0
    names = {
        name.split(".lora_")[0].removeprefix("base_model.model.model.")
        for name in load_file("run/adapter_model.safetensors")
    }
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert names == {
        f"layers.{i}.{name}" for i in (0, 2) for name in [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    }


@pytest.mark.parametrize(
    ("training", "fault"),
    [
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -0.1}},
            'training.lr_scheduler_kwargs: is {"lr_end": -0.1}, which gives the learning rate ',
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}},
            "training.lr_scheduler_kwargs.num_cycle: is unknown to the schedule cosine; write num_cycles",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "two"}},
            'training.lr_scheduler_kwargs: is {"power": "two"}; transformers says: unsupported operand',
        ),
        ({"optim": "sgd", "optim_args": "momentum=fast"}, 'training.optim_args: is "momentum=fast"; transformers says: '),
        ({"optim": "stable_adamw"}, 'training.optim: is "stable_adamw"; transformers says: You need to install'),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": 1}}, "training.gradient_checkpointing_kwargs.use_reentrant: is 1; write true or false"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_upstream_would_refuse_later(training: dict[str, Any], fault: str, write_recipe: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(training=training))
    assert len(caught.value.faults) == 1
    assert fault in caught.value.faults[0]


@pytest.mark.parametrize(
    ("training", "line"),
    [
        (
            {"router_aux_loss_coef": 0.01},
            "training.router_aux_loss_coef: is 0.01, but random:gemma3 has no experts to balance; remove it",
        ),
        ({"activation_offloading": True}, "training.activation_offloading: is true, but no GPU holds activations; remove it"),
        ({"tf32": True}, "training: --tf32 requires Ampere or a newer GPU arch, cuda>=11 and torch>=1.7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU may do what these ask for")
def test_what_this_base_or_machine_cannot_do_is_refused_before_a_row_is_read(
    training: dict[str, Any], line: str, write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write_recipe(training=training)), "--quiet"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line}"]
    assert not Path("run").exists()
