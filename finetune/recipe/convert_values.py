"""Converts values of other trainers: each function is named by `foreign_keys` and takes one key of a configuration.

Their arguments are the conversion so far, the recipe's key, the peer's key and its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.recipe.conversion import Conversion
from finetune.recipe.foreign_keys import TEMPLATES
from finetune.recipe.schema import CONFIGS

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


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


def _use_peft(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put("lora", {} if value else None, key)


def _full_finetuning(c: Conversion, target: str, key: str, value: Any) -> None:
    if value:
        c.put("lora", None, key)
    else:
        c.leave(key, "an adapter is trained")


def _four_bit(c: Conversion, target: str, key: str, value: Any) -> None:
    if not value:
        c.leave(key, "nothing is quantised to 4 bit")
        return
    for name, bit in _NF4.items():
        c.recipe.setdefault(f"quantization.{name}", bit)
    c.came_from("quantization.load_in_4bit", key)
    if c.peer in ("axolotl", "unsloth"):
        c.recipe.setdefault("quantization.bnb_4bit_use_double_quant", True)


def _eight_bit(c: Conversion, target: str, key: str, value: Any) -> None:
    if value:
        c.put(target, True, key)
    else:
        c.leave(key, "nothing is quantised to 8 bit")


def _bits(c: Conversion, target: str, key: str, value: Any) -> None:
    if value in (4, 8):
        (_four_bit if value == 4 else _eight_bit)(c, f"quantization.load_in_{value}bit", key, True)
    else:
        c.leave(key, f"{value} bits; bitsandbytes has 4 and 8")


def _bitsandbytes(c: Conversion, target: str, key: str, value: Any) -> None:
    same = value in ("bnb", "bitsandbytes")
    c.leave(key, "bitsandbytes quantises" if same else f"{value} has no counterpart; bitsandbytes quantises")


def _targets(c: Conversion, target: str, key: str, value: Any) -> None:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) and "," in value else value
    # The seven projections are all linear layers of Gemma, Llama and Qwen.
    seven = {*("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
    every = names in ("all", "all-linear", ["all-linear"], ["all"]) or (isinstance(names, list) and set(names) == seven)
    c.put(target, "all-linear" if every else names, key)


def _all_linear(c: Conversion, target: str, key: str, value: Any) -> None:
    if value:
        c.put(target, "all-linear", key)
    else:
        c.leave(key, "the modules are listed")


def _fraction(c: Conversion, target: str, key: str, value: Any) -> None:
    share = float(value)
    if 0 < share < 1:
        c.put(target, share, key)
    else:
        c.leave(key, "no rows are held out" if not share else f"a share of the rows is held out, not {value} rows")


def _train_on_inputs(c: Conversion, target: str, key: str, value: Any) -> None:
    if value:
        c.put(target, "all", key)
    else:
        c.leave(key, "the answers alone are trained on, in every recipe")


def _last_answer(c: Conversion, target: str, key: str, value: Any) -> None:
    if value:
        c.put(target, "last_assistant", key)
    else:
        c.leave(key, "all answers of a conversation are trained on, in every recipe")


def _loss_scale(c: Conversion, target: str, key: str, value: Any) -> None:
    if value in ("last_round", "all"):
        c.put(target, "last_assistant" if value == "last_round" else "all", key)
    else:
        c.leave(key, f"{value} has no counterpart; the answers are trained on")


def _template(c: Conversion, target: str, key: str, value: Any) -> None:
    if value in TEMPLATES:
        c.put(target, TEMPLATES[value], key)
    else:
        c.leave(key, "the model's own chat template is used; for a base without one write model.chat_template")


def _thinking(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put(target, {"enable_thinking": value}, key)


def _bf16(c: Conversion, target: str, key: str, value: Any) -> None:
    if value in (True, "full"):
        c.put(target, "bfloat16", key)
    else:
        c.leave(key, "the dtype is that of the model and the device")


def _fp16(c: Conversion, target: str, key: str, value: Any) -> None:
    if value:
        c.put(target, "float16", key)
    else:
        c.leave(key, "the dtype is that of the model and the device")


def _checkpointing(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put(target, bool(value) and value != "none", key)


def _truth(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put(target, bool(value), key)


def _negation(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put(target, not value, key)


def _group_by_length(c: Conversion, target: str, key: str, value: Any) -> None:
    if value:
        c.put(target, "group_by_length", key)
    else:
        c.leave(key, "rows are drawn at random")


def _attention(c: Conversion, target: str, key: str, value: Any) -> None:
    names = {"flash": "flash_attention_2", "sdp": "sdpa", "flex": "flex_attention", "eager": "eager"}
    name = names.get(key.partition("_")[0])
    if value and name:
        c.put(target, name, key)
    else:
        c.leave(key, "the attention is chosen for the model and the device")


def _flash_attn(c: Conversion, target: str, key: str, value: Any) -> None:
    names = {"fa2": "flash_attention_2", "flash_attn": "flash_attention_2", "fa3": "flash_attention_3"}
    if value in ("auto", "disabled"):
        c.leave(key, "the attention is chosen for the model and the device")
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


def _per_epoch(c: Conversion, name: str, key: str, value: Any) -> None:
    epochs = c.given.get("num_epochs", 1)
    if value == 1:
        c.put(f"training.{name}_strategy", "epoch", key)
    elif value and epochs:
        c.put(f"training.{name}_strategy", "steps", key)
        # Below 1 it is a share of all steps.
        c.put(f"training.{name}_steps", round(1 / (value * epochs), 4), key)
    else:
        c.put(f"training.{name}_strategy", "no", key)


def _evals_per_epoch(c: Conversion, target: str, key: str, value: Any) -> None:
    _per_epoch(c, "eval", key, value)


def _saves_per_epoch(c: Conversion, target: str, key: str, value: Any) -> None:
    _per_epoch(c, "save", key, value)


def _wandb(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put("training.report_to", "wandb", key)
    c.put(target, value, key)


def _if_true(written: str, otherwise: str) -> Callable[[Conversion, str, str, Any], None]:
    """Converts a switch: true is written as the value `written`, false is left out for the reason `otherwise`."""

    def convert(c: Conversion, target: str, key: str, value: Any) -> None:
        if value:
            c.put(target, written, key)
        else:
            c.leave(key, otherwise)

    return convert


_tensorboard = _if_true("tensorboard", "no tracker is used unless it is named")
_pissa = _if_true("pissa", "the usual init")
_dft = _if_true("dft", "the usual loss")


def _init_weights(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put(target, {"true": True, "false": False}.get(str(value).lower(), value), key)


def _pref_loss(c: Conversion, target: str, key: str, value: Any) -> None:
    if value in ("orpo", "simpo", "kto_pair"):
        if value == "orpo":
            c.put("method", "orpo", key)
        else:
            c.leave(key, f"{value} has no counterpart")
    else:
        c.put(target, value, key)


def _words(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put(target, [word.strip() for word in value.split(",")] if isinstance(value, str) else value, key)


def _first(c: Conversion, target: str, key: str, value: Any) -> None:
    c.put(target, value[0] if isinstance(value, list) and value else value, key)


def _truncation(c: Conversion, target: str, key: str, value: Any) -> None:
    names = {"delete": "drop", "right": "truncate_turns", "split": "split", "raise": "error"}
    if value in names:
        c.put(target, names[value], key)
    else:
        c.leave(key, f"{value} would cut the prompt; rows are shortened by whole turns")


VALUES: dict[str, Callable[[Conversion, str, str, Any], None]] = {
    "model": _model,
    "method": _method,
    "adapter": _adapter,
    "use_peft": _use_peft,
    "full_finetuning": _full_finetuning,
    "four_bit": _four_bit,
    "eight_bit": _eight_bit,
    "bits": _bits,
    "bitsandbytes": _bitsandbytes,
    "targets": _targets,
    "all_linear": _all_linear,
    "fraction": _fraction,
    "train_on_inputs": _train_on_inputs,
    "last_answer": _last_answer,
    "loss_scale": _loss_scale,
    "template": _template,
    "thinking": _thinking,
    "bf16": _bf16,
    "fp16": _fp16,
    "checkpointing": _checkpointing,
    "truth": _truth,
    "negation": _negation,
    "group_by_length": _group_by_length,
    "attention": _attention,
    "flash_attn": _flash_attn,
    "liger": _liger,
    "warmup_ratio": _warmup_ratio,
    "evals_per_epoch": _evals_per_epoch,
    "saves_per_epoch": _saves_per_epoch,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "pissa": _pissa,
    "init_weights": _init_weights,
    "pref_loss": _pref_loss,
    "dft": _dft,
    "words": _words,
    "first": _first,
    "truncation": _truncation,
}
