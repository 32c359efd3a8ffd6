"""The keys of `training`, `lora` and `quantization` with the types and ranges of their values.

trl, transformers and peft check few numbers: a negative number of epochs trains nothing, a negative weight decay lets
weights grow, and no error says so. The ranges here are those in which a value does what its name says.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, PositiveInt

from finetune.recipe.foreign_keys import INSTEAD, NOT_WITH_PREFERENCES
from finetune.recipe.schema import CONFIGS
from finetune.recipe.upstream import QUANTIZATION, STRICT, XlaFsdp
from finetune.recipe.upstream_tables import tables, types_of
from finetune.recipe.yaml_tree import Section, Sections

_Count = Annotated[int, Field(ge=0)]
_Number = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no other
_Words = Annotated[list[str], Field(min_length=1)]
# The metrics that `evaluate` of trl 1.16 has for every model. Another name would raise at the first evaluation.
_Metric = Literal["loss", "eval_loss", "mean_token_accuracy", "eval_mean_token_accuracy", "entropy", "eval_entropy"]
_Reward = Literal["loss", "eval_loss", "rewards/margins", "eval_rewards/margins"]
_Accuracy = Literal[_Reward, "rewards/accuracies", "eval_rewards/accuracies"]
# The values that trl's configurations take as any text (1.16); their trainers compare with these.
DPO_LOSSES = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
DIVERGENCES = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
_UNIT = Annotated[float, Field(ge=0, le=1)]


class Checkpointing(BaseModel):
    """The keys of `training.activation_checkpointing_kwargs`: those of `torch.utils.checkpoint.checkpoint`."""

    model_config = STRICT

    use_reentrant: bool = False
    preserve_rng_state: bool = True
    determinism_check: Literal["default", "none"] = "default"
    debug: bool = False
    early_stop: bool = True
    # trl 1.16 wraps `gradient_checkpointing_enable` for it, which transformers 5.23 no longer calls.
    selective: Literal[False] = False


class Accumulation(BaseModel):
    """The keys of `training.accelerator_config.gradient_accumulation_kwargs`."""

    model_config = STRICT

    sync_each_batch: bool = False


class LigerKernels(BaseModel):
    """The keys of `training.liger_kernel_config`; each model has some of them."""

    model_config = STRICT

    rope: bool = True
    rms_norm: bool = True
    layer_norm: bool = True
    swiglu: bool = True
    geglu: bool = True
    cross_entropy: bool = False
    # True replaces the forward pass in which trl 1.16 computes the loss.
    fused_linear_cross_entropy: Literal[False] = False


class Acceleration(BaseModel):
    """The keys of `training.accelerator_config`."""

    model_config = STRICT

    # True would divide `per_device_train_batch_size` by the number of processes.
    split_batches: Literal[False] = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = True
    non_blocking: bool | None = None
    gradient_accumulation_kwargs: Accumulation | None = None
    # True needs an accelerator that the calling program has made.
    use_configured_state: Literal[False] = False


# The maps inside of `training` and `lora`, by the name of their key.
INNER: dict[str, type[BaseModel]] = {
    "fsdp_config": XlaFsdp,
    "activation_checkpointing_kwargs": Checkpointing,
    "gradient_checkpointing_kwargs": Checkpointing,
    "liger_kernel_config": LigerKernels,
    "accelerator_config": Acceleration,
    "gradient_accumulation_kwargs": Accumulation,
}


def _preference_keys(method: str) -> Section:
    """The types of those keys that the configurations of dpo, kto and orpo have beside `SFTConfig`'s, or narrower."""
    if method == "sft":
        return {}
    keys: Section = {"beta": _Positive, "metric_for_best_model": (_Reward if method == "kto" else _Accuracy) | None}
    if method == "dpo":
        keys |= {
            "loss_type": DPO_LOSSES | Annotated[list[DPO_LOSSES], Field(min_length=1)],
            "loss_weights": list[_Number] | None,
            "ld_alpha": _UNIT | None,
            "f_divergence_type": DIVERGENCES,
            "f_alpha_divergence_coef": _Positive,
            "label_smoothing": _Share,
            "discopop_tau": _Positive,
        }
    if method == "kto":
        keys |= dict.fromkeys(["desirable_weight", "undesirable_weight"], _Positive)
    return keys


# The inits that `get_peft_model` can compute alone. Without a pass over rows peft 0.21 refuses eva, corda and lora_ga,
# or leaves them at the default; loftq replaces the base's weights by rounded ones that are not saved.
_INITS = Literal["gaussian", "olora", "pissa", "orthogonal", "mica"]
# peft's hint spells this pattern as a literal.
_PISSA = Annotated[str, Field(pattern=r"^pissa_niter_[0-9]+$")]
# The keys of `lora` whose types are narrower than peft's hints.
_LORA: Section = {
    "r": PositiveInt,
    "lora_alpha": PositiveInt,
    "lora_dropout": _Share,
    "target_modules": _Words | str | None,
    "layers_to_transform": Annotated[list[_Count], Field(min_length=1)] | _Count | None,
    "rank_pattern": dict[str, PositiveInt] | None,
    "alpha_pattern": dict[str, _Positive] | None,
    "init_lora_weights": bool | _INITS | _PISSA,
    "trainable_token_indices": list[_Count] | dict[str, list[_Count]] | Literal["auto", "none"] | None,
}


def upstream_keys(method: str = "sft") -> Sections:
    """The keys of `training`, `lora` and `quantization`, and the types of their values.

    Args:
        method: The recipe's method, whose configuration has the keys of `training`.

    Raises:
        ImportError: The installed trl has no such configuration.
    """
    known = tables()
    if method not in known["training"]:
        raise ImportError(f"trl has no {CONFIGS[method]}")
    refused = INSTEAD["training"] | ({} if method == "sft" else NOT_WITH_PREFERENCES)
    taken = {name: kind for name, kind in types_of(known["training"][method]).items() if name not in refused}

    reports = Literal[("none", "all", *known["trackers"])]  # type: ignore[valid-type]
    backends = Literal[tuple(known["backends"])]  # type: ignore[valid-type]
    training: Section = {
        **taken,
        # The trainer also takes true, for the newest checkpoint.
        "resume_from_checkpoint": str | bool | None,
        "output_dir": str,
        "report_to": reports | list[reports],
        **dict.fromkeys(["per_device_train_batch_size", "per_device_eval_batch_size"], PositiveInt),
        **dict.fromkeys(["gradient_accumulation_steps", "ddp_timeout"], PositiveInt),
        **dict.fromkeys(["max_length", "eval_accumulation_steps", "dataset_num_proc"], PositiveInt | None),
        **dict.fromkeys(["dataloader_prefetch_factor", "torch_empty_cache_steps"], PositiveInt | None),
        **dict.fromkeys(["save_total_limit", "ddp_bucket_cap_mb"], PositiveInt | None),
        "pad_to_multiple_of": PositiveInt | Literal["auto"] | None,
        "dataloader_num_workers": _Count,
        "seed": _Seed,
        "data_seed": _Seed | None,
        "max_steps": Literal[-1] | PositiveInt,
        **dict.fromkeys(["num_train_epochs", "adam_epsilon", "logging_steps", "save_steps"], _Positive),
        "eval_steps": _Positive | None,
        **dict.fromkeys(["learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"], _Number),
        **dict.fromkeys(["neftune_noise_alpha", "router_aux_loss_coef"], _Number | None),
        **dict.fromkeys(["adam_beta1", "adam_beta2", "label_smoothing_factor"], _Share),
        "optim_args": Annotated[str, Field(pattern=r"^\w+=[^=,]+(,\w+=[^=,]+)*$")] | None,
        "metric_for_best_model": _Metric | None,
        "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
        "torch_compile_backend": backends | None,
        "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
        | None,
        **{name: kind | None for name, kind in INNER.items() if name != "gradient_accumulation_kwargs"},
        **_preference_keys(method),
    }
    return {
        "training": {name: kind for name, kind in training.items() if name in taken},
        "lora": {name: kind for name, kind in types_of(known["lora"]).items() if name not in INSTEAD["lora"]} | _LORA,
        "quantization": QUANTIZATION,
    }
