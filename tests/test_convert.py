"""`finetune convert`: configurations as each trainer's users write them, to recipes that pass `check`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli.commands import main
from finetune.recipe.convert import CONVERTERS, convert
from finetune.recipe.load import load_recipe
from finetune.recipe.peers import PEERS

AXOLOTL = """
base_model: meta-llama/Llama-3.2-1B
datasets:
  - {path: tatsu-lab/alpaca, type: alpaca}
  - path: owner/talks
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
  - {path: json, data_files: rows.jsonl, type: completion, field: story, shards: 3}
val_set_size: 0.05
adapter: qlora
load_in_4bit: true
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
early_stopping_patience: 3
special_tokens: {bos_token: "<s>", pad_token: "<|end_of_text|>"}
"""
AXOLOTL_RECIPE = {
    "model": {"name_or_path": "meta-llama/Llama-3.2-1B", "attn_implementation": "flash_attention_2"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "lora": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"},
    "data": {
        "train": [
            {"path": "tatsu-lab/alpaca", "format": "alpaca"},
            {"path": "owner/talks", "split": "train[:20%]", "format": "sharegpt"},
            {"path": "rows.jsonl", "format": "text", "columns": {"text": "story"}},
        ],
        "eval_fraction": 0.05,
    },
    "training": {
        "max_length": 2048,
        "packing": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "optim": "adamw_bnb_8bit",
        "lr_scheduler_type": "cosine",
        "learning_rate": 0.0002,
        "gradient_checkpointing": True,
        "warmup_steps": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 0.125,
        "save_strategy": "epoch",
    },
    "early_stopping": {"patience": 3},
}
FULL = """
base_model: Qwen/Qwen2.5-0.5B
rl: dpo
rl_beta: 0.1
datasets: [{path: owner/pairs, split: train, type: chatml.argilla}]
adapter:
lora_r:
bf16: true
micro_batch_size: 1
learning_rate: 1.0e-6
fsdp_config: {fsdp_version: 2}
val_set_size: 0
"""
FULL_RECIPE = {
    "method": "dpo",
    "model": {"name_or_path": "Qwen/Qwen2.5-0.5B", "dtype": "bfloat16"},
    "lora": None,
    "data": {
        "train": [
            {
                "path": "owner/pairs",
                "split": "train",
                "format": "preference",
                "columns": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
            }
        ]
    },
    "training": {
        "beta": 0.1,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
    },
}
FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
pref_ftx: 0.1
interleave_probs: 0.7,0.3
dataset: own_pairs, hub_pairs
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_output_dir: true
per_device_train_batch_size: 1
learning_rate: 5.0e-6
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: epoch
early_stopping_steps: 2
"""
FACTORY_RECIPE = {
    "method": "dpo",
    "model": {"name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "chat_template": "llama3"},
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "data": {
        "train": [
            {"path": "data/pairs.json", "format": "preference", "columns": {"prompt": "asked"}},
            {"path": "owner/pairs", "config": "en", "format": "preference"},
        ],
        "eval_fraction": 0.1,
    },
    "early_stopping": {"patience": 2},
    "training": {
        "beta": 0.1,
        "loss_type": "sigmoid",
        "eval_strategy": "epoch",
        "max_length": 2048,
        "per_device_train_batch_size": 1,
        "learning_rate": 5e-6,
        "warmup_steps": 0.1,
        "bf16": True,
    },
}
SWIFT = """
model: Qwen/Qwen3-4B-Base
tuner_type: lora
dataset: ["owner/talks#500", "owner/sums:en"]
torch_dtype: bfloat16
target_modules: all-linear
gradient_accumulation_steps: 16
split_dataset_ratio: 0.01
eval_steps: 50
eval_strategy: steps
early_stop_interval: 4
attn_impl: flash_attn
load_from_cache_file: true
system: You are brief.
quant_bits: 4
quant_method: bnb
"""
SWIFT_RECIPE = {
    "model": {"name_or_path": "Qwen/Qwen3-4B-Base", "dtype": "bfloat16", "attn_implementation": "flash_attention_2"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "lora": {"target_modules": "all-linear", "r": 8, "lora_alpha": 32, "lora_dropout": 0.05},
    "data": {
        "train": [{"path": "owner/talks", "samples": 500}, {"path": "owner/sums", "config": "en"}],
        "eval_fraction": 0.01,
    },
    "early_stopping": {"patience": 4},
    "training": {
        "gradient_accumulation_steps": 16,
        "eval_steps": 50,
        "eval_strategy": "steps",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": 1,
    },
}
TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: owner/talks
dataset_train_split: train_sft
learning_rate: 2.0e-4
packing: true
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
push_to_hub: true
no_such_key: 1
"""
TRL_RECIPE = {
    "model": {"name_or_path": "Qwen/Qwen2.5-0.5B"},
    "lora": {"r": 32, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    "data": {
        "train": [{"path": "owner/talks", "split": "train_sft"}],
        "eval": [{"path": "owner/talks", "split": "test"}],
    },
    "training": {"learning_rate": 2e-4, "packing": True, "eval_strategy": "steps", "eval_steps": 100},
}
HANDBOOK = """
model_name_or_path: google/gemma-2-2b-it
torch_dtype: bfloat16
dataset_mixture:
  datasets:
    - {id: owner/pairs, config: default, split: train_prefs, columns: [chosen, rejected], weight: 0.5}
  seed: 7
  test_split_size: 1000
beta: 0.05
max_prompt_length: 512
max_length: 1024
chat_template: "{% for message in messages %}"
gradient_checkpointing_kwargs: {use_reentrant: false}
"""
HANDBOOK_RECIPE = {
    "method": "dpo",
    "model": {"name_or_path": "google/gemma-2-2b-it", "dtype": "bfloat16"},
    "lora": None,
    "data": {"train": [{"path": "owner/pairs", "split": "train_prefs", "weight": 0.5}], "seed": 7},
    "training": {"beta": 0.05, "max_length": 1024, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
CELL = """
!pip install unsloth
from unsloth import FastModel
length = 2048
if False:
    import os
    %env A=1
model, tokenizer = FastModel.from_pretrained(
    model_name = "unsloth/gemma-3-4b-it-unsloth-bnb-4bit", max_seq_length = length)
model = FastModel.get_peft_model(model, finetune_vision_layers = False, r = 8, lora_alpha = 8,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
tokenizer = get_chat_template(tokenizer, chat_template = "gemma-3")
dataset = load_dataset("owner/talks", split = "train")
trainer = SFTTrainer(model = model, tokenizer = tokenizer, train_dataset = dataset, args = SFTConfig(
    per_device_train_batch_size = 2, warmup_steps = 5, max_steps = 30, learning_rate = 2e-4, optim = "adamw_8bit",
    dataset_text_field = "text", seed = 3407, output_dir = folder()))
trainer = train_on_responses_only(trainer, instruction_part = "<start_of_turn>user")
if False:
    model, tokenizer = FastModel.from_pretrained(model_name = "lora_model", load_in_4bit = False)
__import__("pathlib").Path("was_run").touch()
"""
CELL_RECIPE = {
    "model": {"name_or_path": "unsloth/gemma-3-4b-it", "chat_template": "gemma3"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "lora": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    "data": {"train": [{"path": "owner/talks"}]},
    "training": {
        "max_length": 2048,
        "per_device_train_batch_size": 2,
        "warmup_steps": 5,
        "max_steps": 30,
        "learning_rate": 2e-4,
        "optim": "adamw_8bit",
        "seed": 3407,
    },
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "axolotl": ("qlora.yml", AXOLOTL, AXOLOTL_RECIPE),
    "axolotl, all weights": ("full.yml", FULL, FULL_RECIPE),
    "LLaMA-Factory": ("dpo.yaml", FACTORY, FACTORY_RECIPE),
    "ms-swift": ("lora.yaml", SWIFT, SWIFT_RECIPE),
    "trl": ("sft.yaml", TRL, TRL_RECIPE),
    "alignment-handbook": ("config_full.yaml", HANDBOOK, HANDBOOK_RECIPE),
    "unsloth": ("cell.txt", CELL, CELL_RECIPE),
    "unsloth, a notebook": (
        "chat.ipynb",
        json.dumps({"cells": [{"cell_type": "code", "source": CELL.splitlines(keepends=True)}]}),
        CELL_RECIPE,
    ),
}


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"story": "a"}\n')
    Path("data").mkdir()
    Path("data/pairs.json").write_text("[]")
    info = {
        "own_pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "asked", "chosen": "chosen"}},
        "hub_pairs": {"hf_hub_url": "owner/pairs", "subset": "en", "ranking": True},
    }
    Path("data/dataset_info.json").write_text(json.dumps(info))
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_becomes_a_recipe(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, text, expected = CASES[case]
    Path(name).write_text(text)
    assert main(["convert", name]) == 0
    said = capsys.readouterr()
    assert yaml.safe_load(re.sub(r"(\d)e-", r"\1.0e-", said.out)) == expected  # YAML 1.1 takes 1e-6 for text
    assert f"{name}: {case.split(',')[0]}, " in said.err
    Path("recipe.yaml").write_text(said.out)
    load_recipe("recipe.yaml")
    # Each key of the configuration is in the recipe as a comment, under its own name, or among those left out.
    conversion = convert(Path(name))
    used = {word for origin in conversion.origins.values() for word in origin.split(", ")}
    answered = used | {word.split(".")[0] for word in (*used, *conversion.left)}
    assert conversion.given.keys() <= answered
    assert not Path("was_run").exists()


def test_the_recipe_goes_to_a_file_that_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    Path("axolotl.yaml").write_text(AXOLOTL)
    assert main(["convert", "axolotl.yaml"]) == 0
    text = capsys.readouterr().out
    assert "\n#   null, the default: wandb_project" in text
    assert "None" not in text
    assert main(["convert", "axolotl.yaml", "--output", "own.yaml"]) == 0
    said = capsys.readouterr()
    assert (said.out, Path("own.yaml").read_text()) == ("", text)
    assert said.err.endswith("; next: finetune check own.yaml\n")
    assert main(["convert", "axolotl.yaml", "--output", "own.yaml"]) == 2
    assert capsys.readouterr().err == "error: --output: own.yaml exists; write another\n"


@pytest.mark.slow
def test_what_is_left_out_has_its_reason() -> None:
    Path("sft.yaml").write_text(TRL)
    assert convert(Path("sft.yaml")).left == {
        "push_to_hub": "write the section hub: {repo_id: owner/name}",
        "no_such_key": "a recipe has no such key of trl",
    }
    Path("qlora.yml").write_text(AXOLOTL)
    left = convert(Path("qlora.yml")).left
    assert left["datasets.2.shards"] == "a source has no such key"
    assert left["wandb_project"] == "null: the default"
    # A value that trl's configuration refuses.
    Path("sft.yaml").write_text(TRL + "optim: no_such_optimizer\n")
    assert convert(Path("sft.yaml")).left["optim"].startswith('is "no_such_optimizer"; write ')


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            *("a.yaml", "lr: 3\n"),
            "a.yaml: is for none of axolotl, LLaMA-Factory, ms-swift, trl, alignment-handbook and unsloth",
        ),
        (
            *("a.yaml", "model: {name_or_path: a}\n"),
            "a.yaml: is for none of axolotl, LLaMA-Factory, ms-swift, trl, alignment-handbook and unsloth (it is a "
            "recipe already)",
        ),
        ("a.py", "x = from_pretrained(\n", "a.py:1: is not Python: '(' was never closed (<unknown>, line 1)"),
        ("a.ipynb", "{}", "a.ipynb: is not a notebook"),
        ("a.txt", None, "a.txt: can't be read (No such file or directory)"),
    ],
)
def test_other_files(name: str, text: str | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        Path(name).write_text(text)
    assert main(["convert", name]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.slow
def test_check_names_the_trainer_of_a_whole_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, _ in list(CASES.values())[:6]:
        Path(name).write_text(text)
        peer = convert(Path(name)).peer
        assert main(["check", name]) == 2
        assert capsys.readouterr().err == (
            f"error: {name}: looks like a configuration of {peer}, not a recipe; write finetune convert {name} > "
            "recipe.yaml\n"
        )


def test_the_table_names_functions_and_keys_that_there_are() -> None:
    entries = {entry for table in PEERS.values() for entry in table.values() if not entry.startswith("- ")}
    functions = {entry.partition(" = ")[2] for entry in entries} - {""}
    assert functions == CONVERTERS.keys()


def test_early_stopping_of_a_notebook() -> None:
    stopping = "EarlyStoppingCallback(early_stopping_patience = 2, early_stopping_threshold = 0.01)"
    evaluated = 'eval_strategy = "steps", learning_rate'
    text = CELL.replace("learning_rate", evaluated).replace("output_dir = folder()))", f"), callbacks = [{stopping}])")
    Path("cell.py").write_text(text)
    conversion = convert(Path("cell.py"))
    made = {key: value for key, value in conversion.recipe.items() if key.startswith("early_stopping")}
    assert made == {"early_stopping.patience": 2, "early_stopping.min_delta": 0.01}
    assert "callbacks" not in conversion.left
