"""Names that trl, transformers, peft and people write in a recipe's sections, and what to write instead."""

LAUNCH = "choose it in the file given to `accelerate launch --config_file`"
# By section of a recipe. Several names with one answer stand in one string. Keys of another section are found without
# this table.
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
        "device_map": LAUNCH,
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
        "fsdp deepspeed local_rank parallelism_config": LAUNCH,
        "hub_token": "run `hf auth login`",
        "push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision": (
            "write the section hub: {repo_id: owner/name}"
        ),
    },
    "fsdp_config": {
        "version reshard_after_forward cpu_offload offload_params auto_wrap_policy min_num_params state_dict_type "
        "activation_checkpointing cpu_ram_efficient_loading fsdp_version fsdp_reshard_after_forward "
        "fsdp_offload_params fsdp_auto_wrap_policy fsdp_min_num_params fsdp_state_dict_type "
        "fsdp_activation_checkpointing fsdp_cpu_ram_efficient_loading": LAUNCH,
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
