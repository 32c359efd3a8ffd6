"""Where a base model is: a Hub id, a directory, or what is made into a directory once.

A `.gguf` file, `package:MODULE` (a GGUF inside a Python package) and `random:ARCH` (a tiny seeded model for tests and
smoke runs) become plain safetensors directories under the user's cache directory, and from then on are like any other.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.data.samples import sample_rows
from finetune.model.tiny import RANDOM_ARCHITECTURES, make_random
from finetune.system.errors import ModelError
from finetune.system.files import made_once, sha256
from finetune.system.terminal import quiet

# Raised when what a made directory holds changes, so that an old one is not used again.
_CACHE_VERSION = 1


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
        name = f"random-{rest}-{hashlib.sha256(sample).hexdigest()[:16]}-v{_CACHE_VERSION}"
        return str(made_once(name, lambda into: make_random(rest, into)))
    if kind == "package":
        package = _import_gguf_package(rest)
        name = f"{Path(package.MODEL_NAME).stem}-{package.EXPECTED_SHA256[:16]}-v{_CACHE_VERSION}"

        def convert_package(into: Path) -> None:
            say(f"{rest}: converting {package.MODEL_NAME} to safetensors, once (about a minute)")
            with tempfile.TemporaryDirectory(dir=into.parent) as folder:
                _convert_gguf(package.assemble(Path(folder) / package.MODEL_NAME), into)

        return str(made_once(name, convert_package))
    path = Path(name_or_path).expanduser()
    if name_or_path.endswith(".gguf"):
        name = f"{path.stem}-{sha256(path)[:16]}-v{_CACHE_VERSION}"

        def convert_file(into: Path) -> None:
            say(f"{path}: converting to safetensors, once (about a minute)")
            _convert_gguf(path, into)

        return str(made_once(name, convert_file))
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
