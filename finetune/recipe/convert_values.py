"""Converts values of other trainers: each function is named by `peers` and takes one key of a configuration.

Their arguments are the conversion so far, the recipe's key, the peer's key and its value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

from finetune.recipe.conversion import Conversion, Converter
from finetune.recipe.peers import TEMPLATES
from finetune.recipe.schema import CONFIGS

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# Reasons for which several keys are left out.
_OWN_ATTENTION = "the attention is chosen for the model and the device"
_OWN_DTYPE = "the dtype is that of the model and the device"


def _converted(function: Callable[[Any], Any]) -> Converter:
    """Writes what a function makes of each value."""
    return lambda c, target, key, value: c.put(target, function(value), key)


def _if_true(written: Any, otherwise: str) -> Converter:
    """Converts a switch: true is written as `written`, false is left out for the reason `otherwise`."""
    return lambda c, target, key, value: c.put(target, written, key) if value else c.leave(key, otherwise)


def _by_name(names: Mapping[Any, Any], otherwise: str) -> Converter:
    """Writes what a table has for a value; values that it lacks are left out for the reason `otherwise`."""

    def convert(c: Conversion, target: str, key: str, value: Any) -> None:
        if isinstance(value, Hashable) and value in names:
            c.put(target, names[value], key)
        else:
            c.leave(key, otherwise.format(value=value))

    return convert


def _model(c: Conversion, target: str, key: str, value: Any) -> None:
    # unsloth's models in 4 bit are rounded copies, from which no merge gives back the 16-bit weights.
    plain = str(value).removesuffix("-bnb-4bit").removesuffix("-unsloth")
    if plain != value:
        _four_bit(c, "quantization.load_in_4bit", key, True)
    c.put(target, plain, key)


def _method(c: Conversion, target: str, key: str, value: Any) -> None:
    if value in ("ipo", "simpo"):
        c.put("method", "dpo", key)
        if value == "ipo":
            c.put("training.loss_type", "ipo", key)
        else:
            c.leave(key, "SimPO has no counterpart; dpo was written")
    elif value in CONFIGS:
        c.put("method", value, key)
    elif value == "pt":
        c.leave(key, "text rows are trained on as they are: format: text")
    else:
        c.leave(key, f"{value} is not one of sft, dpo, kto, orpo")


def _adapter(c: Conversion, target: str, key: str, value: Any) -> None:
    if value in ("lora", "qlora"):
        c.put("lora", {}, key)
        if value == "qlora":
            _four_bit(c, "quantization.load_in_4bit", key, True)
    elif value in ("full", "none", False):
        c.put("lora", None, key)
    else:
        c.leave(key, f"{value} is neither LoRA nor the training of all weights")


def _four_bit(c: Conversion, target: str, key: str, value: Any) -> None:
    if not value:
        c.leave(key, "nothing is quantised to 4 bit")
        return
    for name, bit in _NF4.items():
        c.recipe.setdefault(f"quantization.{name}", bit)
    c.came_from("quantization.load_in_4bit", key)
    if c.peer in ("axolotl", "unsloth"):
        c.recipe.setdefault("quantization.bnb_4bit_use_double_quant", True)


_eight_bit = _if_true(True, "nothing is quantised to 8 bit")


def _bits(c: Conversion, target: str, key: str, value: Any) -> None:
    if value in (4, 8):
        (_four_bit if value == 4 else _eight_bit)(c, f"quantization.load_in_{value}bit", key, True)
    else:
        c.leave(key, f"{value} bits; bitsandbytes has 4 and 8")


def _bitsandbytes(c: Conversion, target: str, key: str, value: Any) -> None:
    same = value in ("bnb", "bitsandbytes")
    c.leave(key, "bitsandbytes quantises" if same else f"{value} has no counterpart; bitsandbytes quantises")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _targets(c: Conversion, target: str, key: str, value: Any) -> None:
    names = _words(value) if isinstance(value, str) and "," in value else value
    # The seven projections are all linear layers of Gemma, Llama and Qwen.
    seven = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    every = names in ("all", "all-linear", ["all-linear"], ["all"]) or (isinstance(names, list) and set(names) == seven)
    c.put(target, "all-linear" if every else names, key)


def _fraction(c: Conversion, target: str, key: str, value: Any) -> None:
    share = float(value)
    if 0 < share < 1:
        c.put(target, share, key)
    else:
        c.leave(key, "no rows are held out" if not share else f"a share of the rows is held out, not {value} rows")


def _attention(c: Conversion, target: str, key: str, value: Any) -> None:
    names = {"flash": "flash_attention_2", "sdp": "sdpa", "flex": "flex_attention", "eager": "eager"}
    name = names.get(key.partition("_")[0])
    if value and name:
        c.put(target, name, key)
    else:
        c.leave(key, _OWN_ATTENTION)


def _flash_attn(c: Conversion, target: str, key: str, value: Any) -> None:
    names = {"fa2": "flash_attention_2", "flash_attn": "flash_attention_2", "fa3": "flash_attention_3"}
    if value in ("auto", "disabled"):
        c.leave(key, _OWN_ATTENTION)
    else:
        c.put(target, names.get(value, value), key)


def _liger(c: Conversion, target: str, key: str, value: Any) -> None:
    if value:
        c.put(target, True, key)
        c.origins[target] = ", ".join(name for name in c.given if name.startswith("liger_") and c.given[name])
    else:
        c.leave(key, "liger's kernels are used together")


def _warmup_ratio(c: Conversion, target: str, key: str, value: Any) -> None:
    if c.given.get("warmup_steps"):
        c.leave(key, "warmup_steps is given")
    else:
        c.put(target, value, key)


def _per_epoch(name: str, c: Conversion, target: str, key: str, value: Any) -> None:
    """Converts a number of evaluations or saves in an epoch; `name` is `eval` or `save`."""
    epochs = c.given.get("num_epochs", 1)
    if value == 1:
        c.put(f"training.{name}_strategy", "epoch", key)
    elif value and epochs:
        c.put(f"training.{name}_strategy", "steps", key)
        # Below 1 it is a share of all steps.
        c.put(f"training.{name}_steps", round(1 / (value * epochs), 4), key)
    else:
        c.put(f"training.{name}_strategy", "no", key)


def _wandb(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put("training.report_to", "wandb", key)
    c.put(target, value, key)


def _pref_loss(c: Conversion, target: str, key: str, value: Any) -> None:
    if value == "orpo":
        c.put("method", "orpo", key)
    elif value in ("simpo", "kto_pair"):
        c.leave(key, f"{value} has no counterpart")
    else:
        c.put(target, value, key)


VALUES: dict[str, Converter] = {
    "model": _model,
    "method": _method,
    "adapter": _adapter,
    "use_peft": _converted(lambda value: {} if value else None),
    "full_finetuning": _if_true(None, "an adapter is trained"),
    "four_bit": _four_bit,
    "eight_bit": _eight_bit,
    "bits": _bits,
    "bitsandbytes": _bitsandbytes,
    "targets": _targets,
    "all_linear": _if_true("all-linear", "the modules are listed"),
    "fraction": _fraction,
    "train_on_inputs": _if_true("all", "the answers alone are trained on, in every recipe"),
    "last_answer": _if_true("last_assistant", "all answers of a conversation are trained on, in every recipe"),
    "loss_scale": _by_name(
        {"last_round": "last_assistant", "all": "all"}, "{value} has no counterpart; the answers are trained on"
    ),
    "template": _by_name(
        TEMPLATES, "the model's own chat template is used; for a base without one write model.chat_template"
    ),
    "thinking": _converted(lambda value: {"enable_thinking": value}),
    "bf16": _by_name({True: "bfloat16", "full": "bfloat16"}, _OWN_DTYPE),
    "fp16": _if_true("float16", _OWN_DTYPE),
    "checkpointing": _converted(lambda value: bool(value) and value != "none"),
    "truth": _converted(bool),
    "negation": _converted(lambda value: not value),
    "group_by_length": _if_true("group_by_length", "rows are drawn at random"),
    "attention": _attention,
    "flash_attn": _flash_attn,
    "liger": _liger,
    "warmup_ratio": _warmup_ratio,
    "evals_per_epoch": partial(_per_epoch, "eval"),
    "saves_per_epoch": partial(_per_epoch, "save"),
    "wandb": _wandb,
    "tensorboard": _if_true("tensorboard", "no tracker is used unless it is named"),
    "pissa": _if_true("pissa", "the usual init"),
    "init_weights": _converted(lambda value: {"true": True, "false": False}.get(str(value).lower(), value)),
    "pref_loss": _pref_loss,
    "dft": _if_true("dft", "the usual loss"),
    "words": _converted(lambda value: _words(value) if isinstance(value, str) else value),
    "first": _converted(lambda value: value[0] if isinstance(value, list) and value else value),
    "truncation": _by_name(
        {"delete": "drop", "right": "truncate_turns", "split": "split", "raise": "error"},
        "{value} would cut the prompt; rows are shortened by whole turns",
    ),
}
