"""Keys of other trainers: what they become in a recipe, or why they are not needed or not possible.

`INSTEAD` answers for names inside of a recipe's sections, `PEERS` for the flat configurations of other trainers.
`check` reads both for its messages, `finetune convert` for its conversions.
"""

from collections.abc import Mapping
from typing import Any

_LAUNCH = "choose it in the file given to `accelerate launch --config_file`"
# The names in a section of a recipe that trl, transformers, peft and people use, and what to write instead of them.
# Several names with one answer stand in one string. Keys of another section are found without this table.
_IN_SECTIONS: dict[str, dict[str, str]] = {
    "": {
        "peft": "write lora",
        "dataset": "write data",
        "bnb": "write quantization",
        "adapter": "write lora: {...} for a new adapter, model.adapter to continue one",
        "rl stage rlhf_type": "write method: dpo, kto or orpo",
    },
    "model": {
        "name path model base_model model_name_or_path id": "write name_or_path",
        "torch_dtype precision": "write dtype",
        "use_flash_attention_2": "write attn_implementation: flash_attention_2",
        "device_map": _LAUNCH,
        "adapter_name_or_path lora_model_dir": "write adapter",
        "token": "run `hf auth login`",
    },
    "data": {
        "path dataset datasets train_file": "write train: [{path: ...}]",
        "test validation eval_file": "write eval: [{path: ...}]",
        "test_size val_size validation_split": "write eval_fraction",
        "train_on_inputs": "write train_on: all, or assistant",
    },
    "source": {"file dataset data_files": "write path", "name subset": "write config", "type": "write format"},
    "export": {"format types": "write formats", "max_kl max_kl_p99 min_top1 max_perplexity_ratio": "write gate: {...}"},
    "evaluate": {
        "questions prompt_file": "write prompts",
        "max_tokens max_length": "write max_new_tokens",
        "max_samples": "write limit",
    },
    "judge": {
        "api_key key token": "set OPENAI_API_KEY in the environment",
        "url api_base endpoint": "write base_url",
        "name": "write model",
    },
    "lm_eval": {"task": "write tasks: [...]"},
    "prices": {"prompt_tokens": "write input", "completion_tokens": "write output"},
    "training": {
        "max_seq_length": "write max_length",
        "evaluation_strategy do_eval": "write eval_strategy",
        "per_gpu_train_batch_size batch_size": "write per_device_train_batch_size",
        "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
        "no_cuda": "write use_cpu",
        "lr": "write learning_rate",
        "epochs": "write num_train_epochs",
        "lr_scheduler": "write lr_scheduler_type",
        "use_liger": "write use_liger_kernel",
        "warmup_ratio": "write warmup_steps; below 1 it is a share of all steps",
        "group_by_length": "write train_sampling_strategy: group_by_length",
        "adafactor": "write optim: adafactor",
        "include_inputs_for_metrics": "write include_for_metrics: [inputs]",
        "torchdynamo": "write torch_compile_backend",
        "overwrite_output_dir": "write another output_dir, or remove that folder",
        "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
        "save_safetensors": "remove it; safetensors is the only format",
        "half_precision_backend fp16_backend fp16_opt_level": "remove it; torch's autocast is the only one",
        "dataset_batch_size dataset_kwargs num_of_sequences": "remove it; the data section prepares the rows",
        "use_mps_device use_ipex jit_mode_eval tpu_num_cores": "remove it; the device is found",
        "dataset_text_field": "write columns: {text: COLUMN} in the source",
        "truncation_mode": "write data.on_overflow",
        "completion_only_loss assistant_only_loss": "write data.train_on",
        "chat_template_path": "write model.chat_template",
        "eos_token": "write model.chat_template, which ends the turns",
        "pad_token": "remove it; the tokenizer's is used",
        "model_init_kwargs": "write the sections model and quantization",
        "early_stopping_patience": "write the section early_stopping: {patience: ...}",
        "early_stopping_threshold": "write the section early_stopping: {min_delta: ...}",
        "do_train do_predict": "remove it; a recipe trains",
        "trust_remote_code": "write model.trust_remote_code",
        "optim_target_modules": "remove it; only GaLore and APOLLO read it, whose state cannot be saved",
        "bf16_full_eval fp16_full_eval": "remove it; it would round the weights, which are saved after the evaluation",
        "enable_jit_checkpoint": "remove it; on SIGTERM a run always saves a checkpoint",
        "label_names": "remove it; rows have labels",
        "length_column_name": "remove it; the length of a row is that of its tokens",
        "remove_unused_columns": "remove it; rows have no other columns",
        "max_prompt_length max_completion_length": "write max_length, the limit of a prompt and its answer",
        "precompute_ref_log_probs precompute_ref_batch_size": "remove it; the reference is computed once, and kept",
        "ref_model ref_model_init_kwargs ref_adapter_name model_adapter_name force_use_ref_model": (
            "remove it; the reference is the model as the run begins"
        ),
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps": (
            "remove it; the reference is the model as the run begins, and stays"
        ),
        "rpo_alpha": "write loss_type: [sigmoid, sft] and loss_weights: [1, ...]",
        "pref_beta": "write beta",
        "pref_loss": "write loss_type",
        "generate_during_eval": "remove it; `finetune evaluate` answers the prompts of the evaluation rows",
        "padding_value label_pad_token_id": "remove it; padding is masked",
        "is_encoder_decoder": "remove it; models are decoders",
        "fsdp deepspeed local_rank parallelism_config": _LAUNCH,
        "hub_token": "run `hf auth login`",
        "push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision": (
            "write the section hub: {repo_id: owner/name}"
        ),
    },
    "fsdp_config": {
        "version reshard_after_forward cpu_offload offload_params auto_wrap_policy min_num_params state_dict_type "
        "activation_checkpointing cpu_ram_efficient_loading fsdp_version fsdp_reshard_after_forward "
        "fsdp_offload_params fsdp_auto_wrap_policy fsdp_min_num_params fsdp_state_dict_type "
        "fsdp_activation_checkpointing fsdp_cpu_ram_efficient_loading": _LAUNCH,
        "transformer_layer_cls_to_wrap fsdp_transformer_layer_cls_to_wrap": (
            "remove it; the layer is found from the model"
        ),
        "xla_fsdp_settings": "remove it; it has no effect with xla_fsdp_v2",
    },
    "lora": {
        "rank lora_r": "write r",
        "alpha": "write lora_alpha",
        "dropout": "write lora_dropout",
        "target lora_target target_linear": "write target_modules",
        "base_model_name_or_path": "write model.name_or_path",
        "revision": "write model.revision",
        "peft_type task_type": "remove it; it is LoRA on a causal language model",
        "inference_mode": "remove it; a recipe trains",
        "loftq_config": "remove it; LoftQ changes the base's weights, which an adapter's files do not hold",
        "auto_mapping peft_version": "remove it; peft writes it",
        "eva_config corda_config lora_ga_config": "remove it; inits that need a pass over the rows are not supported",
        "runtime_config": "remove it; it has no form in YAML",
        "megatron_config megatron_core": "remove it; models are loaded by transformers, not by Megatron",
    },
    "quantization": {
        "load_4bit bits quant_method": "write load_in_4bit: true or load_in_8bit: true",
        "load_8bit": "write load_in_8bit",
    },
}
# Keys of trl's other configurations that would do nothing, or harm, in a run on preferences.
NOT_WITH_PREFERENCES = {
    "dataset_num_proc": "remove it; the data section prepares the rows",
    "padding_free": "remove it; both answers of a row are packed behind one prompt",
    "label_smoothing_factor": "remove it; it is for the loss of sft",
    "neftune_noise_alpha": "remove it; noise would change what the answers are compared by",
}
INSTEAD = {
    section: {name: instead for names, instead in table.items() for name in names.split()}
    for section, table in _IN_SECTIONS.items()
}

# Each key of a peer's configuration, and one of
#   "section.key"            the value is carried over as it is;
#   "section.key = function" the function of `convert.py` converts it;
#   "- reason"               it has no counterpart, and why.
# Keys that a peer shares with trl's configuration have no entry: they are keys of `training`.
_PEERS: dict[str, dict[str, str]] = {
    # Source: src/axolotl/utils/schemas, 2026.
    "axolotl": {
        "base_model": "model.name_or_path = model",
        "trust_remote_code": "- a model's own code runs only by model.trust_remote_code: true, if you trust it",
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
        "fsdp_version": "- " + _LAUNCH,
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
        "trust_remote_code": "- a model's own code runs only by model.trust_remote_code: true, if you trust it",
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
        "ray_num_workers ray_run_name resources_per_worker placement_strategy": "- " + _LAUNCH,
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
        "trust_remote_code": "- a model's own code runs only by model.trust_remote_code: true, if you trust it",
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
        "trust_remote_code": "- a model's own code runs only by model.trust_remote_code: true, if you trust it",
        "instruction_part response_part": "- the parts of a turn are found in the chat template",
        "bf16": "training.bf16",
        "fp16": "training.fp16",
    },
}
PEERS = {
    peer: {"fsdp_config": f"- {_LAUNCH}"} | {name: target for names, target in table.items() for name in names.split()}
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
# `lora.` and `quantization.` count only with these sections. Sources: as above.
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
