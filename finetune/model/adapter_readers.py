"""Programs that load a LoRA adapter without merging it, and the parts of an adapter that each of them does not take.

The tables are from the programs' own sources, in the releases that they name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.model.attach import check_adapter_files
from finetune.model.provenance import adapter_base_sections
from finetune.system.errors import FinetuneError, ModelError, RunError, reworded
from finetune.system.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json

REFUSES, IGNORES, WRONG = "refuses it", "ignores it without a message", "computes it wrongly, without a message"


@dataclass(frozen=True)
class Reader:
    """A program that loads adapters.

    Attributes:
        name: Its name and release.
        source: The files of its source that the table was read from.
        parts: By the name of a part of an adapter: what the program does about it, and why.
        ranks: The largest ranks that it can be started for, in rising order; empty if any rank will do.
    """

    name: str
    source: str
    parts: dict[str, tuple[str, str]]
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        reader: The program's name and release.
        source: The files of its source.
        problems: A line for each part of the adapter that it does not take.
        flags: The flags with which the program takes it.
    """

    reader: str
    source: str
    problems: list[str]
    flags: tuple[str, ...] = ()


_UNSUPPORTED = (REFUSES, "a tensor with such a name is an unsupported LoRA weight")
_ONE_SCALE = (WRONG, "it scales all layers by lora_alpha / r")
_NAMED_ONLY = (IGNORES, "embeddings are read only if target_modules names them")
_MATRICES_ONLY = (REFUSES, "it takes only the matrices A and B")
READERS = {
    "vllm": Reader(
        "vLLM 0.33.0",
        "vllm/lora/peft_helper.py, lora/utils.py, lora/lora_model.py, config/lora.py",
        {
            "token rows": _UNSUPPORTED,
            "modules_to_save": (REFUSES, "it takes only heads of classifiers there"),
            "DoRA": (REFUSES, "it has no DoRA"),
            "lora_bias": (REFUSES, "it has no biases of adapters"),
            "bias": _UNSUPPORTED,
            "aLoRA": (REFUSES, "it has no aLoRA"),
            "layer_replication": (REFUSES, "it has no replicated layers"),
            "QALoRA": (REFUSES, "it has no QALoRA"),
            "BD-LoRA": (REFUSES, "it has no block-diagonal LoRA"),
            "initial weights": (REFUSES, "they change the base's weights"),
        },
        (8, 16, 32, 64, 128, 256, 320, 512),
    ),
    "sglang": Reader(
        "SGLang 0.5.23",
        "sglang/srt/lora/lora.py, lora_config.py, lora_manager.py, utils.py",
        {
            "token rows": _NAMED_ONLY,
            "modules_to_save": _NAMED_ONLY,
            "DoRA": (REFUSES, "it has no DoRA"),
            "rsLoRA": _ONE_SCALE,
            "rank_pattern": _ONE_SCALE,
            "alpha_pattern": _ONE_SCALE,
            "target_modules": (REFUSES, "it takes a list of names, and no regular expression"),
            "q_proj without v_proj": (REFUSES, "it joins both in one layer, and looks for the second"),
        },
    ),
    "llama.cpp": Reader(
        "llama.cpp (convert_lora_to_gguf.py of commit 0b03adaa)",
        "convert_lora_to_gguf.py, src/llama-adapter.h",
        {
            "token rows": _MATRICES_ONLY,
            "modules_to_save": _MATRICES_ONLY,
            "DoRA": _MATRICES_ONLY,
            "lora_bias": _MATRICES_ONLY,
            "bias": _MATRICES_ONLY,
            "per_layer_model_projection": (IGNORES, "its graph of Gemma 4 adds no LoRA there"),
            "rsLoRA": (WRONG, "it scales a layer by lora_alpha / its rank"),
            "alpha_pattern": (WRONG, "it scales all layers by the one lora_alpha"),
        },
    ),
}
# The first release of PEFT that has an option; options that 0.13 had already are not listed.
_FIRST_PEFT = {
    "lora_bias": (0, 14),
    "exclude_modules": (0, 14),
    "token rows": (0, 15),
    "QALoRA": (0, 16),
    "target_parameters": (0, 17),
    "aLoRA": (0, 18),
    "ensure_weight_tying": (0, 18),
    "BD-LoRA": (0, 19),
}
# Since this release PEFT leaves out options that it does not know; earlier ones refuse each config that has one.
_LENIENT_PEFT = (0, 14)

_PARTS: dict[str, Callable[[dict[str, Any], Iterable[str]], Any]] = {
    "token rows": lambda config, tensors: config.get("trainable_token_indices"),
    "modules_to_save": lambda config, tensors: config.get("modules_to_save"),
    "DoRA": lambda config, tensors: config.get("use_dora") or _ending(tensors, "lora_magnitude_vector"),
    "rsLoRA": lambda config, tensors: config.get("use_rslora"),
    "rank_pattern": lambda config, tensors: _other_than(config.get("rank_pattern"), config.get("r")),
    "alpha_pattern": lambda config, tensors: _other_than(config.get("alpha_pattern"), config.get("lora_alpha")),
    "lora_bias": lambda config, tensors: config.get("lora_bias") or _ending(tensors, ".lora_B.bias"),
    "bias": lambda config, tensors: config.get("bias", "none") != "none",
    "target_modules": lambda config, tensors: _is_pattern(config.get("target_modules")),
    "q_proj without v_proj": lambda config, tensors: (
        _ending(tensors, ".q_proj.lora_A.weight") and not _ending(tensors, ".v_proj.lora_A.weight")
    ),
    "per_layer_model_projection": lambda config, tensors: _ending(tensors, "per_layer_model_projection.lora_A.weight"),
    "exclude_modules": lambda config, tensors: config.get("exclude_modules"),
    "target_parameters": lambda config, tensors: config.get("target_parameters"),
    "ensure_weight_tying": lambda config, tensors: config.get("ensure_weight_tying"),
    "aLoRA": lambda config, tensors: config.get("alora_invocation_tokens"),
    "layer_replication": lambda config, tensors: config.get("layer_replication"),
    "QALoRA": lambda config, tensors: config.get("use_qalora"),
    "BD-LoRA": lambda config, tensors: config.get("use_bdlora"),
    "initial weights": lambda config, tensors: (
        str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq"))
    ),
}


def check_adapter(folder: Path, program: str, base: str | None = None) -> Verdict:
    """Compares an adapter with what a program takes.

    Args:
        folder: A run, or a folder with a PEFT adapter.
        program: A name in `READERS`, or `peft==` and a release.
        base: The path or id of the base, in place of the one that the adapter's files name; PEFT's releases differ in
            what they make of Gemma 3.

    Raises:
        ModelError: There is no such program, or the folder holds no adapter.
        RunError: The adapter's config is damaged.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder} holds no adapter ({ADAPTER_CONFIG})")
    check_adapter_files(folder)
    from finetune.model.shards import read_header  # imports torch, which a model card does not need

    config, tensors = read_json(folder / ADAPTER_CONFIG), read_header(folder / ADAPTER_WEIGHTS)
    reader = READERS.get(program) or _peft(folder, program, base)
    if reader is None:
        raise ModelError(f"--for {program}: write one of {', '.join(READERS)} or peft==RELEASE")
    problems = problems_of(reader, config, tensors)
    rank = max((tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key), default=0)
    flags: tuple[str, ...] = ()
    if reader.ranks and rank > reader.ranks[-1]:
        problems.append(f"{reader.name} {REFUSES}: rank {rank}: {reader.ranks[-1]} is the largest")
    elif reader.ranks:
        flags = ("--enable-lora", "--max-lora-rank", str(next(n for n in reader.ranks if n >= rank)))
    return Verdict(reader.name, reader.source, problems, flags)


def problems_of(reader: Reader, config: dict[str, Any], tensors: Iterable[str] = ()) -> list[str]:
    """A line for each part of an adapter that a program does not take.

    Args:
        reader: The program.
        config: The adapter's `adapter_config.json`.
        tensors: The names of its tensors, if they are known.

    Raises:
        RunError: A value of the config has another type than PEFT's.
    """
    if config.get("peft_type") != "LORA":
        return [f"{reader.name} is checked for LoRA only: the adapter is {config.get('peft_type')}"]
    with reworded(RunError, f"{ADAPTER_CONFIG} is damaged", AttributeError, TypeError, LookupError):
        present = [ADAPTER_CONFIG, *(name for name, has in _PARTS.items() if has(config, tensors))]
    found = [(name, reader.parts[name]) for name in present if name in reader.parts]
    return [f"{reader.name} {effect}: {name}: {why}" for name, (effect, why) in found]


def _peft(folder: Path, program: str, base: str | None) -> Reader | None:
    """The table of a release of PEFT for an adapter; None if the program names no release."""
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(program.removeprefix("peft==")).release[:2] if program.startswith("peft==") else None
    except InvalidVersion:
        return None
    if release is None:
        return None
    name = f"PEFT {program.removeprefix('peft==')}"
    source = "peft/tuners/lora/config.py and peft/config.py of 0.13.2 to 0.21.2"
    if release < _LENIENT_PEFT:
        why = "it knows none of the options that later releases write, and stops at the first"
        return Reader(name, source, {"adapter_config.json": (REFUSES, why)})
    parts = {
        part: (IGNORES, f"{'.'.join(map(str, first))} is the first release that has it")
        for part, first in _FIRST_PEFT.items()
        if release < first
    }
    if (0, 15) <= release < (0, 18) and _model_type(folder, base).startswith("gemma3"):
        parts["token rows"] = (WRONG, "before 0.18 Gemma 3's embedding is not scaled under them")
    return Reader(name, source, parts)


def _model_type(folder: Path, base: str | None) -> str:
    """The model_type of the text model of an adapter's base; empty if the base cannot be found."""
    from finetune.model.locate import Base

    try:
        config = Base.of(adapter_base_sections(folder, base)[0]).config
    except FinetuneError:
        return ""
    return str(config.get_text_config().model_type)


def _ending(tensors: Iterable[str], ending: str) -> bool:
    return any(key.endswith(ending) for key in tensors)


def _other_than(pattern: dict[str, Any] | None, default: Any) -> bool:
    """True if a pattern gives a layer another value than the default."""
    return any(value != default for value in (pattern or {}).values())


def _is_pattern(target_modules: Any) -> bool:
    return isinstance(target_modules, str) and target_modules not in ("all", "all-linear")
