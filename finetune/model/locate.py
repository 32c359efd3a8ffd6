"""Locates a base model: a Hub id, a directory, or a source that is converted into a directory once.

A `.gguf` file, `package:MODULE` (a GGUF inside a Python package) and `random:ARCH` (a tiny seeded model for tests and
smoke runs) become safetensors directories under the user's cache directory, and are then used like any other. So does,
with `model.resize_embeddings`, a model whose tokenizer has more tokens than its embeddings have rows.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import json
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, TypedDict

from finetune.model.compatibility import check_writes_text
from finetune.model.resize import check_cache_space, needed_rows, write_dequantised, write_resized
from finetune.model.tiny import make_random, random_fingerprint
from finetune.recipe.checks import RANDOM_ARCHITECTURES
from finetune.recipe.schema import ModelSection
from finetune.system import hub_errors
from finetune.system.cache import made_once
from finetune.system.errors import FinetuneError, ModelError, RunError, first_line
from finetune.system.extras import install_command
from finetune.system.files import WEIGHTS_INDEX, git_lfs_pointer, read_json, sha256
from finetune.system.terminal import Say, quiet

# The version of the converted directories; raised with each change of their contents, so that old ones are not used.
_CACHE_VERSION = 1
# The most layers of a model; the largest published have about 130, and transformers builds 100 in a second.
_MAX_LAYERS = 2000
# Flags of a config, and their values.
_FLAGS = dict.fromkeys(["output_attentions", "output_hidden_states", "is_encoder_decoder"], "true or false")
_FLAGS["return_dict"] = "true"
# The names that a package with a GGUF model has: a function that writes the file, its name and its hash.
_PACKAGE_MARKER = {"assemble", "MODEL_NAME", "EXPECTED_SHA256"}


class BaseIdentity(TypedDict, total=False):
    """The part of `environment.json` by which a merge recognises the base; it has one of the two keys."""

    base_fingerprint: str
    base_commit: str


@dataclass(frozen=True)
class Base:
    """A base model. It is located, its config loaded and its weights hashed at first use, once each.

    Raises:
        ModelError: From the properties: the model does not exist, or cannot be read.
    """

    name: str  # `model.name_or_path`
    revision: str | None = None
    trust_remote_code: bool = False
    say: Say = field(default=lambda line: None, compare=False)
    resize_embeddings: bool = False

    @classmethod
    def of(cls, section: ModelSection, say: Say = lambda line: None) -> Base:
        """The base of a recipe; `say` is called before a model is converted or copied, which takes a minute."""
        return cls(section.name_or_path, section.revision, section.trust_remote_code, say, section.resize_embeddings)

    @cached_property
    def original(self) -> Base:
        """The base as it is stored, whose embeddings are not resized; it has the tokenizer."""
        return replace(self, resize_embeddings=False) if self.resize_embeddings else self

    @cached_property
    def path(self) -> str:
        """The Hub id or directory that `from_pretrained` takes.

        Raises:
            ModelError: The base does not exist, or cannot be converted or resized.
        """
        return self._resized_path() if self.resize_embeddings else locate(self.name, self.say)

    def _resized_path(self) -> str:
        """The copy with a row for each token of the tokenizer; the base itself where it has these rows."""
        from transformers import AutoTokenizer

        path, trust = self.original.path, self.trust_remote_code
        with load_errors(self.name), quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, revision=self.revision, trust_remote_code=trust)
        rows = needed_rows(tokenizer)
        if rows <= self.original.config.get_text_config().vocab_size:
            return path

        def write(into: Path) -> None:
            self.say(f"{self.name}: copying it with {rows:,} embedding rows, once")
            write_resized(path, self.revision, trust, rows, into)

        return self.original._copy("resized", str(rows), write)

    def dequantised(self) -> Base:
        """A copy of a base that is stored quantised, with the weights that it computes with; it is written once.

        Raises:
            ModelError: The base does not exist, or transformers cannot dequantise it.
        """

        def write(into: Path) -> None:
            self.say(f"{self.name}: copying it with dequantised weights, once")
            write_dequantised(self.path, self.revision, self.trust_remote_code, into)

        folder = self._copy("dequantised", str(getattr(self.config, "quantization_config", "")), write)
        return Base(folder, None, self.trust_remote_code, self.say)

    def _copy(self, kind: str, version: str, write: Callable[[Path], None]) -> str:
        """The folder of a changed copy in the cache, which `write` fills once for each base and `version`."""
        _ = self.config  # once it is read, the commit of a model on the Hub is known
        [identity] = self.identity.values() or [f"{self.path} {self.revision}"]
        key = hashlib.sha256(f"{identity} {version}".encode()).hexdigest()[:16]

        def fill(into: Path) -> None:
            with load_errors(self.name):
                write(into)

        return str(made_once(f"{kind}-{Path(self.path).name}-{key}-v{_CACHE_VERSION}", fill))

    @cached_property
    def config(self) -> Any:
        """The model's `PretrainedConfig`, shared by all callers; do not change it.

        Raises:
            ModelError: The config cannot be loaded.
        """
        return read_config(self.path, self.revision, self.trust_remote_code)

    @cached_property
    def fingerprint(self) -> str | None:
        """A hash of all weights of a base in a local directory; None for one on the Hub.

        Raises:
            ModelError: The base does not exist.
        """
        from finetune.model.shards import fingerprint

        return fingerprint(Path(self.path)) if Path(self.path).is_dir() else None

    @property
    def identity(self) -> BaseIdentity:
        """The fingerprint of a local base, or the commit of one on the Hub; empty if neither is known."""
        if self.fingerprint is not None:
            return {"base_fingerprint": self.fingerprint}
        from huggingface_hub import try_to_load_from_cache

        # A config no longer holds its commit (transformers 5.23), but its folder in the cache is named after it.
        config = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        return {"base_commit": Path(config).parent.name} if isinstance(config, str) else {}


def located_once(say: Say) -> Callable[[ModelSection], Base]:
    """A function like `Base.of` that returns the same object for all sections with the same base."""
    known: dict[Base, Base] = {}

    def locate_base(section: ModelSection) -> Base:
        base = Base.of(section, say)
        return known.setdefault(base, base)

    return locate_base


def read_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of the model in a directory or on the Hub.

    Raises:
        ModelError: The model has no config, it cannot be read, or the model is no causal language model.
    """
    from transformers import AutoConfig

    with load_errors(path), quiet():
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        config.get_text_config()
    for part in (config, config.get_text_config()):
        if "/" in str(part._attn_implementation):
            raise ModelError(
                f"model.name_or_path: the config.json of {path} names the attention kernel {part._attn_implementation} "
                "of the Hub, which is code; remove attn_implementation from it"
            )
    check_writes_text(config)
    _check_config(path, config)
    return config


def _check_config(path: str, config: Any) -> None:
    """Refuses values that transformers 5.23 takes, and with which it builds without end or fails at the first answer.

    Raises:
        ModelError: The config has too many layers, or a value that no model can have.
    """
    text = config.get_text_config()
    parts = [getattr(config, name, None) for name in config.sub_configs]
    for part in (config, text, *parts):
        layers = getattr(part, "num_hidden_layers", None)
        if layers is not None and not (type(layers) is int and 0 <= layers <= _MAX_LAYERS):
            _refuse(path, "num_hidden_layers", layers, f"a number of at most {_MAX_LAYERS:,}")
    window, types = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    slides = "sliding_attention" in (types or ())
    if (slides or (window and types is None)) and not (type(window) is int and 0 < window < 1 << 31):
        _refuse(path, "sliding_window", window, "a number of tokens above 0")
    if (scalar := getattr(text, "query_pre_attn_scalar", 1)) is not None and not scalar > 0:
        _refuse(path, "query_pre_attn_scalar", scalar, "a number above 0")
    for part in (config, text):
        for name, cure in _FLAGS.items():
            flag = getattr(part, name, None)
            if not (flag is None or flag is True or (flag is False and "false" in cure)):
                _refuse(path, name, flag, cure)


def _refuse(path: str, name: str, value: object, cure: str) -> None:
    raise ModelError(
        f"model.name_or_path: {path}: the {name} of its config.json is {json.dumps(value)[:40]}; write {cure}"
    )


@contextlib.contextmanager
def load_errors(name: str) -> Iterator[None]:
    """Turns transformers' errors at loading `name` into one line: of any type, where a file of the model is damaged.

    Raises:
        ModelError: In place of such an error; a lack of memory and errors of ours stay.
    """
    try:
        yield
    except FinetuneError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        # transformers 5.23 `dynamic_module_utils.py`, `resolve_trust_remote_code`
        if isinstance(error, ValueError) and "custom code" in str(error):
            raise ModelError(
                f"model.name_or_path: {name} brings Python files, which are not run unless you say so; read them, then "
                "write --trust-remote-code (in a recipe: model.trust_remote_code: true)"
            ) from error
        if words := hub_errors.hub_problem(name, error):
            raise ModelError(f"model.name_or_path: {name} {words}") from error
        raise ModelError(f"model.name_or_path: {name} cannot be loaded: {first_line(error)}") from error
    except Exception as error:
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError):
            raise ModelError(f"model.name_or_path: {name}: a weight file is damaged: {error}") from error
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise
        words = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise ModelError(f"model.name_or_path: {name} cannot be loaded; is a file of it damaged? {words}") from error


def locate(name_or_path: str, say: Say = lambda line: None) -> str:
    """The Hub id or directory that `from_pretrained` takes; converts a GGUF or makes a random model the first time.

    Args:
        name_or_path: `model.name_or_path`.
        say: Called with a line before a conversion, which takes about a minute.

    Raises:
        ModelError: A file or package is missing, or a directory holds no safetensors weights, or MLX's.
    """
    kind, _, rest = name_or_path.partition(":")
    if kind == "random":
        if rest not in RANDOM_ARCHITECTURES:
            known = ", ".join(f"random:{name}" for name in RANDOM_ARCHITECTURES)
            raise ModelError(f"model.name_or_path: is {name_or_path}; write one of {known}")
        name = f"random-{rest}-{random_fingerprint(rest)[:16]}-v{_CACHE_VERSION}"
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
    if path.is_file():
        raise ModelError(
            f"model.name_or_path: {name_or_path} is a file; write a model's folder, its id on the Hub or a .gguf file"
        )
    if path.is_dir():
        _check_folder(path, name_or_path)
        return str(path)
    return name_or_path


def _check_folder(path: Path, name: str) -> None:
    """Refuses a folder of a model whose weights transformers would not load, or only with a risk.

    Raises:
        ModelError: It holds no safetensors weights, a pointer of Git LFS, or MLX's weights; `name` names the folder.
    """
    if pointer := git_lfs_pointer(path):
        raise ModelError(f"model.name_or_path: {pointer} is a pointer of Git LFS; run git lfs pull beside it")
    if (path / WEIGHTS_INDEX).exists():
        from finetune.model.shards import weight_files

        weight_files(path)  # transformers 5.23 follows names that lead out of the folder
    quantization = None
    with contextlib.suppress(RunError):  # transformers names a config that is damaged
        quantization = read_json(path / "config.json").get("quantization_config")
    if isinstance(quantization, dict) and "group_size" in quantization and "quant_method" not in quantization:
        raise ModelError(
            f"model.name_or_path: the weights of {name} are quantised by MLX, which only MLX reads; name "
            "the model that it was made from"
        )
    if not any(path.glob("*.safetensors")):
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        pickle = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else ""
        raise ModelError(f"model.name_or_path: {name} holds {pickle or 'no weights'}; weights must be .safetensors")


def _import_gguf_package(module: str) -> Any:
    """The module of a package with a GGUF model.

    The name may come from somebody else's file, and an import runs code: the source is looked at first.
    """
    spec = importlib.util.find_spec(module) if module.isidentifier() and module not in sys.modules else None
    if spec is None and module not in sys.modules:
        raise ModelError(
            f"model.name_or_path: the package {module} is not installed; run {install_command('quickstart')}"
        )
    names = _top_level_names(spec) if spec else set(dir(sys.modules[module]))
    if not names.issuperset(_PACKAGE_MARKER):
        raise ModelError(f"model.name_or_path: the package {module} holds no GGUF model (no function `assemble`)")
    return importlib.import_module(module)


def _top_level_names(spec: ModuleSpec) -> set[str]:
    """The names that a module's source assigns, defines or imports at its top level; none if it has no source."""
    try:
        tree = ast.parse(Path(spec.origin or "").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()
    names = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
        names |= {alias.asname or alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
        names |= {node.name} if isinstance(node, ast.FunctionDef) else set()
    return names


def _convert_gguf(file: Path, into: Path) -> None:
    """Writes a GGUF's weights in bfloat16, its config and its tokenizer into a directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model.name_or_path: reading a .gguf needs the gguf package; run {install_command('gguf')}")
    with load_errors(str(file)), quiet():
        _check_config(str(file), AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # Without `dequantize` the model counts as quantised and can be neither saved nor trained (transformers 5.23).
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        check_cache_space(model, into)
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)
