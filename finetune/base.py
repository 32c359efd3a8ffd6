"""Where a base model is: a Hub id, a directory, or what is made into a directory once.

A `.gguf` file, `package:MODULE` (a GGUF inside a Python package) and `random:ARCH` (a tiny seeded model for tests and
smoke runs) become plain safetensors directories under the user's cache directory, and from then on are like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune.template import load_template

RANDOM_ARCHITECTURES = ("gemma", "gemma2", "gemma3", "llama")
# Raised when what a made directory holds changes, so that an old one is not used again.
_CACHE_VERSION = 1


class ModelError(ValueError):
    """The base model or its tokenizer cannot be used as the recipe asks."""


def child_environment() -> dict[str, str]:
    """The environment of a further process, which finds this very package."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' own loading bars and notes from the screen; its errors still come."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def cache_dir() -> Path:
    """The folder for converted bases: `$XDG_CACHE_HOME/finetune`, by default `~/.cache/finetune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def locate(name_or_path: str, say: Callable[[str], None] = lambda line: None) -> str:
    """The Hub id or directory that `from_pretrained` takes; converts a GGUF or makes a random model the first time.

    Raises:
        ModelError: A file or package is missing, or a directory holds no safetensors weights.
    """
    kind, _, rest = name_or_path.partition(":")
    if kind == "random":
        if rest not in RANDOM_ARCHITECTURES:
            known = ", ".join(f"random:{name}" for name in RANDOM_ARCHITECTURES)
            raise ModelError(f"model.name_or_path: is {name_or_path}; write one of {known}")
        sample = sample_rows().read_bytes()
        name = f"random-{rest}-{_digest(sample)}"
        return str(_made_once(name, lambda into: _make_random(rest, into)))
    if kind == "package":
        package = _import_gguf_package(rest)
        name = f"{Path(package.MODEL_NAME).stem}-{package.EXPECTED_SHA256[:16]}"

        def convert_package(into: Path) -> None:
            say(f"{rest}: converting {package.MODEL_NAME} to safetensors, once (about a minute)")
            with tempfile.TemporaryDirectory(dir=into.parent) as folder:
                _convert_gguf(package.assemble(Path(folder) / package.MODEL_NAME), into)

        return str(_made_once(name, convert_package))
    path = Path(name_or_path).expanduser()
    if name_or_path.endswith(".gguf"):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()

        def convert_file(into: Path) -> None:
            say(f"{path}: converting to safetensors, once (about a minute)")
            _convert_gguf(path, into)

        return str(_made_once(f"{path.stem}-{digest[:16]}", convert_file))
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            found = (
                f"only {pickles[0]}, a pickle, which can run code when it is read"
                if pickles
                else "no weights"
            )
            raise ModelError(
                f"model.name_or_path: {name_or_path} holds {found}; weights must be .safetensors"
            )
        return str(path)
    return name_or_path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data + str(_CACHE_VERSION).encode()).hexdigest()[:16]


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The cached directory `name`; made beside and renamed, so it is whole wherever it exists; others wait for it."""
    from filelock import FileLock

    target = cache_dir() / f"{name}-v{_CACHE_VERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
            try:
                made = beside / "model"
                made.mkdir()
                make(made)
                made.rename(target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return target


def _import_gguf_package(module: str) -> Any:
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f"model.name_or_path: the package {module} is not installed; pip install 'finetune[quickstart]'"
        ) from error
    if not all(hasattr(package, name) for name in ("assemble", "MODEL_NAME", "EXPECTED_SHA256")):
        raise ModelError(
            f"model.name_or_path: the package {module} carries no GGUF model (it has no `assemble`)"
        )
    return package


def _convert_gguf(file: Path, into: Path) -> None:
    """A GGUF's weights in bfloat16, its config and its tokenizer, as a plain directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "model.name_or_path: reading a .gguf needs the gguf package; pip install 'finetune[quickstart]'"
        )
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # Without `dequantize` the model counts as quantised and can be neither saved nor trained (transformers 5.23).
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


# ---------------------------------------------------------------------------------------------------------------
# Tiny random models


def sample_rows() -> Path:
    """The project's sample conversations: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "sample" / "chat_sample.jsonl"
    return inside if inside.exists() else Path(__file__).parents[1] / "data" / "chat_sample.jsonl"


def _make_random(architecture: str, into: Path) -> None:
    """A seeded model of two layers or four and a byte-level BPE tokenizer trained on the sample rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in sample_rows().read_text(encoding="utf-8").splitlines()]
    backend = _train_tokenizer([m["content"] for row in rows for m in row["messages"]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = load_template(
        "chatml" if architecture == "llama" else architecture.replace("2", "")
    )
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture in ("gemma2", "gemma3"):
        # Both kinds of attention layer, and a window short enough that ordinary rows reach beyond it.
        shape |= {"query_pre_attn_scalar": 16, "sliding_window": 32, "num_hidden_layers": 4}
        shape["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = AutoConfig.for_model("gemma3_text" if architecture == "gemma3" else architecture, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Trained norms are not 1, and one that is forgotten must show.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, 0.0 if "gemma" in architecture else 1.0, 0.1)
    with quiet():
        model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _train_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer
