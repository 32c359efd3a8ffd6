"""Configurations of other trainers: what each of their keys becomes in a recipe, or why it has no counterpart.

`finetune convert` converts by these tables, and `check` says by them what to write for a peer's key.
"""

from collections.abc import Mapping
from typing import Any

from finetune.recipe.foreign_keys import LAUNCH

_OWN_CODE = "- a model's own code runs only with model.trust_remote_code: true, if you trust it"
# Each key of a peer's configuration, and one of
#   "section.key"            the value is carried over as it is;
#   "section.key = function" a function of `convert_values.py` or `convert_rows.py` converts it;
#   "- reason"               it has no counterpart, and why.
# Keys that a peer shares with trl's configuration have no entry: they are keys of `training`.
_PEERS: dict[str, dict[str, str]] = {
    # Source: src/axolotl/utils/schemas, 2026.
    "axolotl": {
        "base_model": "model.name_or_path = model",
        "trust_remote_code": _OWN_CODE,
        "datasets": "data.train = axolotl_sources",
        "test_datasets": "data.eval = axolotl_sources",
        "pretraining_dataset": "data.train = axolotl_sources",
        "val_set_size": "data.eval_fraction = fraction",
        "train_on_inputs": "data.train_on = train_on_inputs",
        "dataset_exact_deduplication": "data.deduplicate",
        "chat_template": "model.chat_template = template",
        "chat_template_kwargs": "model.chat_template_kwargs",
        "adapter": "lora = adapter",
        "lora_model_dir": "model.adapter",
        "lora_r": "lora.r",
        "lora_alpha": "lora.lora_alpha",
        "lora_dropout": "lora.lora_dropout",
        "lora_target_modules": "lora.target_modules = targets",
        "lora_target_linear": "lora.target_modules = all_linear",
        "lora_modules_to_save": "lora.modules_to_save",
        "lora_rank_pattern": "lora.rank_pattern",
        "lora_alpha_pattern": "lora.alpha_pattern",
        "peft_use_dora": "lora.use_dora",
        "peft_use_rslora": "lora.use_rslora",
        "peft_layers_to_transform": "lora.layers_to_transform",
        "peft_init_lora_weights": "lora.init_lora_weights",
        "load_in_4bit": "quantization.load_in_4bit = four_bit",
        "load_in_8bit": "quantization.load_in_8bit = eight_bit",
        "sequence_len": "training.max_length",
        "sample_packing": "training.packing",
        "eval_sample_packing": "training.eval_packing",
        "micro_batch_size": "training.per_device_train_batch_size",
        "eval_batch_size": "training.per_device_eval_batch_size",
        "num_epochs": "training.num_train_epochs",
        "optimizer": "training.optim",
        "lr_scheduler": "training.lr_scheduler_type",
        "warmup_ratio": "training.warmup_steps = warmup_ratio",
        "evals_per_epoch": "training.eval_steps = evals_per_epoch",
        "saves_per_epoch": "training.save_steps = saves_per_epoch",
        "bf16 bfloat16": "model.dtype = bf16",
        "fp16 float16": "model.dtype = fp16",
        "gradient_checkpointing": "training.gradient_checkpointing = checkpointing",
        "group_by_length": "training.train_sampling_strategy = group_by_length",
        "flash_attention xformers_attention sdp_attention flex_attention eager_attention": (
            "model.attn_implementation = attention"
        ),
        "attn_implementation": "model.attn_implementation",
        "liger_rope liger_rms_norm liger_glu_activation liger_swiglu liger_layer_norm "
        "liger_fused_linear_cross_entropy": "training.use_liger_kernel = liger",
        "rl": "method = method",
        "rl_beta": "training.beta",
        "orpo_alpha": "training.beta",
        "dpo_loss_type": "training.loss_type",
        "dpo_loss_weights": "training.loss_weights",
        "dpo_label_smoothing": "training.label_smoothing",
        "dpo_use_weighting": "training.use_weighting",
        "kto_desirable_weight": "training.desirable_weight",
        "kto_undesirable_weight": "training.undesirable_weight",
        "early_stopping_patience": "early_stopping.patience",
        "wandb_project": "training.project = wandb",
        "wandb_name": "training.run_name",
        "use_tensorboard": "training.report_to = tensorboard",
        "hub_model_id": "hub.repo_id",
        "wandb_entity wandb_watch wandb_log_model wandb_run_id": "- wandb reads it from the environment",
        "model_type tokenizer_type processor_type tokenizer_use_fast tokenizer_legacy is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model cls_model_config": "- the classes are those of the config",
        "special_tokens tokens eot_tokens added_tokens_overrides": (
            "- the tokenizer's own tokens and those of the chat template are used"
        ),
        "dataset_prepared_path dataset_processes dataset_keep_in_memory skip_prepare_dataset dataset_num_proc": (
            "- prepared rows are cached, and prepared by threads"
        ),
        "pad_to_sequence_len": "- rows of a batch are padded to the longest; packing fills them",
        "plugins": "- it has no plugins; liger's kernels are training.use_liger_kernel",
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel": "- kernels of axolotl, same result",
        "strict": "- a key that is unknown is always an error",
        "remove_unused_columns": "- rows have no other columns",
        "save_safetensors": "- safetensors is the only format",
        "unfrozen_parameters": "- write lora.target_modules, or lora: null to train all weights",
        "lora_target_parameters": "- experts are found by target_modules: all-linear",
        "loss_watchdog_threshold loss_watchdog_patience": "- a loss that is not finite stops the run",
        "fsdp_version": "- " + LAUNCH,
        "default_system_message": "- write it into the rows, in their column system",
        "cut_cross_entropy": "- the loss is computed in pieces, without the logits of all tokens",
        "activation_offloading": "training.activation_offloading = truth",
    },
    # Source: src/llamafactory/hparams, 2026.
    "LLaMA-Factory": {
        "stage": "method = method",
        "finetuning_type": "lora = adapter",
        "model_name_or_path": "model.name_or_path = model",
        "model_revision": "model.revision",
        "adapter_name_or_path": "model.adapter",
        "trust_remote_code": _OWN_CODE,
        "template": "model.chat_template = template",
        "enable_thinking": "model.chat_template_kwargs = thinking",
        "resize_vocab": "model.resize_embeddings",
        "flash_attn": "model.attn_implementation = flash_attn",
        "dataset": "data.train = factory_sources",
        "eval_dataset": "data.eval = factory_sources",
        "val_size": "data.eval_fraction = fraction",
        "train_on_prompt": "data.train_on = train_on_inputs",
        "mask_history": "data.train_on = last_answer",
        "dataset_dir": "- the paths of its datasets are written out",
        "cutoff_len": "training.max_length",
        "packing neat_packing": "training.packing",
        "lora_rank": "lora.r",
        "lora_alpha": "lora.lora_alpha",
        "lora_dropout": "lora.lora_dropout",
        "lora_target": "lora.target_modules = targets",
        "additional_target": "lora.modules_to_save = words",
        "use_rslora": "lora.use_rslora",
        "use_dora": "lora.use_dora",
        "pissa_init": "lora.init_lora_weights = pissa",
        "quantization_bit": "quantization.load_in_4bit = bits",
        "quantization_type": "quantization.bnb_4bit_quant_type",
        "double_quantization": "quantization.bnb_4bit_use_double_quant",
        "quantization_method": "quantization = bitsandbytes",
        "bf16 pure_bf16": "training.bf16",
        "warmup_ratio": "training.warmup_steps = warmup_ratio",
        "disable_gradient_checkpointing": "training.gradient_checkpointing = negation",
        "enable_liger_kernel": "training.use_liger_kernel",
        "pref_beta": "training.beta",
        "pref_loss": "training.loss_type = pref_loss",
        "dpo_label_smoothing": "training.label_smoothing",
        "kto_chosen_weight": "training.desirable_weight",
        "kto_rejected_weight": "training.undesirable_weight",
        "use_dft_loss": "training.loss_type = dft",
        "pref_ftx": "- write training.loss_type: [sigmoid, sft] and training.loss_weights: [1.0, N]",
        "mix_strategy interleave_probs": "- write `weight: N` in each source of data.train",
        "max_samples": "- all rows are used; `samples: N` in a source draws N rows, some twice if there are fewer",
        "preprocessing_num_workers overwrite_cache preprocessing_batch_size tokenized_path": (
            "- prepared rows are cached, and prepared by threads"
        ),
        "early_stopping_steps": "early_stopping.patience",
        "plot_loss": "- loss.png is always drawn",
        "do_train do_eval": "- a recipe trains; data.eval or data.eval_fraction evaluates",
        "default_system": "- write it into the rows, in their column system",
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model image_max_pixels image_min_pixels "
        "video_max_pixels video_min_pixels video_fps video_maxlen": "- the language model alone is trained, on text",
        "use_unsloth use_unsloth_gc use_reentrant_gc upcast_layernorm low_cpu_mem_usage use_fast_tokenizer": (
            "- it has no counterpart, and changes no result"
        ),
        "ref_model": "- the reference is the model as the run begins",
        "ray_num_workers ray_run_name resources_per_worker placement_strategy": "- " + LAUNCH,
    },
    # Source: swift/arguments, 2026.
    "ms-swift": {
        "model": "model.name_or_path = model",
        "model_revision": "model.revision",
        "adapters": "model.adapter = first",
        "tuner_type train_type sft_type": "lora = adapter",
        "rlhf_type": "method = method",
        "torch_dtype": "model.dtype",
        "attn_impl": "model.attn_implementation = flash_attn",
        "template": "model.chat_template = template",
        "enable_thinking": "model.chat_template_kwargs = thinking",
        "dataset": "data.train = swift_sources",
        "val_dataset": "data.eval = swift_sources",
        "split_dataset_ratio": "data.eval_fraction = fraction",
        "truncation_strategy": "data.on_overflow = truncation",
        "columns": "- write it in the source, the other way round: {our column: theirs}",
        "lora_rank": "lora.r",
        "lora_alpha": "lora.lora_alpha",
        "lora_dropout": "lora.lora_dropout",
        "lora_bias": "lora.bias",
        "target_modules": "lora.target_modules = targets",
        "modules_to_save": "lora.modules_to_save",
        "use_rslora": "lora.use_rslora",
        "use_dora": "lora.use_dora",
        "init_weights": "lora.init_lora_weights = init_weights",
        "quant_bits": "quantization.load_in_4bit = bits",
        "quant_method": "quantization = bitsandbytes",
        "bnb_4bit_compute_dtype": "quantization.bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant": "quantization.bnb_4bit_use_double_quant",
        "warmup_ratio": "training.warmup_steps = warmup_ratio",
        "early_stop_interval": "early_stopping.patience",
        "use_hf": "- datasets and models are those of the Hub",
        "system": "- write it into the rows, in their column system",
        "task_type": "- models are causal language models",
        "load_from_cache_file lazy_tokenize dataset_num_proc cached_dataset": "- prepared rows are cached",
        "model_author model_name": "- write it into the rows, which say who speaks",
        "freeze_vit freeze_aligner freeze_llm max_pixels": "- the language model alone is trained, on text",
        "loss_scale": "data.train_on = loss_scale",
        "agent_template use_chat_template add_version create_checkpoint_symlink": "- it has no counterpart",
        "ref_model": "- the reference is the model as the run begins",
    },
    # Source: trl 1.16, `ModelConfig`, `ScriptArguments` and `DatasetMixtureConfig`.
    "trl": {
        "model_name_or_path": "model.name_or_path = model",
        "model_revision": "model.revision",
        "torch_dtype dtype": "model.dtype",
        "attn_implementation": "model.attn_implementation",
        "trust_remote_code": _OWN_CODE,
        "use_peft": "lora = use_peft",
        "lora_r": "lora.r",
        "lora_alpha": "lora.lora_alpha",
        "lora_dropout": "lora.lora_dropout",
        "lora_target_modules": "lora.target_modules = targets",
        "lora_modules_to_save": "lora.modules_to_save",
        "lora_task_type": "- models are causal language models",
        "use_rslora": "lora.use_rslora",
        "use_dora": "lora.use_dora",
        "load_in_4bit": "quantization.load_in_4bit = four_bit",
        "load_in_8bit": "quantization.load_in_8bit = eight_bit",
        "bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type",
        "use_bnb_nested_quant": "quantization.bnb_4bit_use_double_quant",
        "dataset_name": "data.train = hub_source",
        "dataset_config": "data.train = source_config",
        "dataset_train_split": "data.train = source_split",
        "dataset_test_split": "data.eval = test_split",
        "dataset_streaming": "data.train = source_streaming",
        "datasets": "data.train = mixture",
        "warmup_ratio": "training.warmup_steps = warmup_ratio",
        "max_seq_length": "training.max_length",
        "do_eval": "- it follows from eval_strategy",
        "chat_template": "- write it into a .jinja file, and that file's path as model.chat_template",
        "log_level overwrite_output_dir logging_first_step logging_strategy": "- it changes no result",
        "ignore_bias_buffers gradient_checkpointing_use_reentrant": "- it has no counterpart",
    },
    "alignment-handbook": {
        "dataset_mixture": "data.train = handbook_mixture",
        "dataset_mixer": "data.train = mixer",
        "dataset_splits": "data.eval = mixer_splits",
        "hub_model_revision": "- a push takes it: finetune push --revision",
        "preprocessing_num_workers dataset_num_proc auto_insert_empty_system_msg": "- data prepares the rows",
    },
    # The arguments of `from_pretrained`, `get_peft_model`, `load_dataset` and trl's configurations and trainers.
    # Source: unslothai/notebooks, 2026.
    "unsloth": {
        "model_name": "model.name_or_path = model",
        "max_seq_length": "training.max_length",
        "dtype": "model.dtype",
        "load_in_4bit": "quantization.load_in_4bit = four_bit",
        "load_in_8bit": "quantization.load_in_8bit = eight_bit",
        "full_finetuning": "lora = full_finetuning",
        "r": "lora.r",
        "lora_alpha": "lora.lora_alpha",
        "lora_dropout": "lora.lora_dropout",
        "target_modules": "lora.target_modules = targets",
        "modules_to_save": "lora.modules_to_save",
        "bias": "lora.bias",
        "use_rslora": "lora.use_rslora",
        "use_gradient_checkpointing": "training.gradient_checkpointing = checkpointing",
        "random_state": "- training.seed is the seed of the adapter, too",
        "loftq_config": "- LoftQ changes the base's weights, which an adapter's files do not hold",
        "finetune_vision_layers finetune_language_layers finetune_attention_modules finetune_mlp_modules": (
            "- attention and MLP of the language model are what all-linear trains"
        ),
        "dataset": "data.train = hub_source",
        "dataset_config": "data.train = source_config",
        "split": "data.train = source_split",
        "chat_template": "model.chat_template = template",
        "train_on_responses_only": "- the answers alone are trained on, in every recipe",
        "warmup_ratio": "training.warmup_steps = warmup_ratio",
        "early_stopping_patience": "early_stopping.patience",
        "early_stopping_threshold": "early_stopping.min_delta",
        "dataset_text_field dataset_num_proc": "- the data section reads and prepares the rows",
        "token": "- run `hf auth login`",
        "trainer": "- the method follows from it",
        "trust_remote_code": _OWN_CODE,
        "instruction_part response_part": "- the parts of a turn are found in the chat template",
        "bf16": "training.bf16",
        "fp16": "training.fp16",
    },
}
PEERS = {
    peer: {"fsdp_config": f"- {LAUNCH}"} | {name: target for names, target in table.items() for name in names.split()}
    for peer, table in _PEERS.items()
}
PEERS["alignment-handbook"] = PEERS["trl"] | PEERS["alignment-handbook"]
# A configuration is a peer's if it has the first key and one of the others.
_MARKS = {
    "axolotl": ("base_model", {"datasets", "micro_batch_size", "sequence_len", "num_epochs", "adapter", "lora_r"}),
    "alignment-handbook": ("model_name_or_path", {"dataset_mixture", "dataset_mixer"}),
    "LLaMA-Factory": ("model_name_or_path", {"stage", "finetuning_type", "cutoff_len", "template", "lora_rank"}),
    "trl": ("model_name_or_path", {"dataset_name", "datasets", "use_peft", "output_dir", "lora_r"}),
    "ms-swift": ("model", {"dataset", "tuner_type", "train_type", "rlhf_type", "lora_rank"}),
}
# Values that a peer takes where its configuration does not say, and that differ from a recipe's.
# Those of `lora.` and `quantization.` apply only if the recipe gets that section. Sources: as above.
PEER_DEFAULTS: dict[str, dict[str, object]] = {
    "axolotl": {"training.lr_scheduler_type": "cosine", "training.num_train_epochs": 1},
    "LLaMA-Factory": {
        "training.max_length": 2048,
        "training.learning_rate": 5e-5,
        "lora.r": 8,
        "lora.lora_alpha": "twice r",
    },
    "ms-swift": {
        "training.learning_rate": 1e-4,
        "training.lr_scheduler_type": "cosine",
        "training.weight_decay": 0.1,
        "training.adam_beta2": 0.95,
        "training.per_device_train_batch_size": 1,
        "lora.r": 8,
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.05,
    },
    # peft's default modules of Gemma, Llama and Qwen.
    "trl": {
        "lora.r": 16,
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.05,
        "lora.target_modules": ["q_proj", "v_proj"],
    },
    "unsloth": {"lora.r": 16, "lora.lora_alpha": 16, "quantization.load_in_4bit": True},
}
PEER_DEFAULTS["alignment-handbook"] = PEER_DEFAULTS["trl"]
# Names of chat templates at other trainers, and the shipped template that renders the same.
TEMPLATES = {
    **dict.fromkeys(["gemma", "gemma2", "gemma-2"], "gemma"),
    **dict.fromkeys(["gemma3", "gemma-3", "gemma3n", "gemma-3n"], "gemma3"),
    **dict.fromkeys(["gemma4", "gemma-4"], "gemma4"),
    **dict.fromkeys(["llama3", "llama-3", "llama-3.1", "llama-3.2", "llama-3.3"], "llama3"),
    **dict.fromkeys(["chatml"], "chatml"),
}


def peer_of(names: Mapping[str, Any]) -> str | None:
    """The trainer whose configuration has these keys; None if it is no such configuration.

    Args:
        names: The keys at the top of a file, with their values.
    """
    if any(isinstance(names.get(section), dict) for section in ("model", "data", "training", "lora")):
        return None
    for peer, (first, others) in _MARKS.items():
        if isinstance(names.get(first), str) and others & names.keys():
            return peer
    return None


def target_of(name: str) -> str | None:
    """The key of a recipe that a peer's key becomes; None for other names, and for keys without a counterpart."""
    for table in PEERS.values():
        if (target := table.get(name, "-").partition(" = ")[0])[0] != "-":
            return target
    return None
