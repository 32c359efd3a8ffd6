"""The base model and its tokenizer, as a recipe names them.

A base is a Hub id, a directory, a `.gguf` file, `package:MODULE` (a GGUF inside a Python package) or `random:ARCH` (a
tiny seeded model for tests and smoke runs). The last three are made into a plain safetensors directory once, under the
user's cache directory, and from then on are directories like any other.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from finetune.chat import load_template
from finetune.recipe import ModelSection, Recipe

if TYPE_CHECKING:
    import torch

RANDOM_ARCHITECTURES = ("gemma", "gemma2", "gemma3", "llama")
# Raised when what a made directory holds changes, so that an old one is not used again.
_CACHE_VERSION = 1


class ModelError(ValueError):
    """The base model or its tokenizer cannot be used as the recipe asks."""


# ---------------------------------------------------------------------------------------------------------------
# Where the base is


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
    """The cached directory `name`; made beside and renamed, so it is whole wherever it exists."""
    target = cache_dir() / f"{name}-v{_CACHE_VERSION}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            made = beside / "model"
            made.mkdir()
            make(made)
            # Another process may have been first; its directory holds the same.
            with contextlib.suppress(OSError):
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


# ---------------------------------------------------------------------------------------------------------------
# Loading


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


def load_tokenizer(section: ModelSection) -> Any:
    """The base's tokenizer, with the recipe's chat template where it names one, and a padding token.

    Raises:
        ModelError: There is none to load, or the template file cannot be read.
    """
    from transformers import AutoTokenizer

    path = locate(section.name_or_path)
    with _told(section.name_or_path), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    if section.chat_template:
        tokenizer.chat_template = load_template(section.chat_template)
    if tokenizer.pad_token is None:
        # Padding is masked in attention and labels; which token it is never shows.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_dtype(section: ModelSection) -> torch.dtype:
    """`model.dtype` as a torch dtype.

    `auto` is bfloat16 where the card computes in it, float16 on older cards, float32 on a CPU.
    """
    import torch

    if section.dtype != "auto":
        dtype: torch.dtype = getattr(torch, section.dtype)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_model(recipe: Recipe, dtype: torch.dtype | None = None) -> Any:
    """The recipe's base model, quantised if the recipe says so, without an adapter.

    Args:
        recipe: Its `model` and `quantization` sections are read.
        dtype: In place of `model.dtype`.

    Raises:
        ModelError: There are no weights, only pickled ones, or they cannot be loaded.
    """
    section = recipe.model
    return load_base(
        locate(section.name_or_path),
        dtype or resolve_dtype(section),
        quantization=recipe.quantization,
        revision=section.revision,
        attn_implementation=section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
    )


def load_base(
    path: str,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """A causal language model from a directory or the Hub; `arguments` are `from_pretrained`'s."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if quantization is not None:
        # Computing in another dtype than the adapter's would cast at each layer; upstream's default is float32.
        config = {"bnb_4bit_compute_dtype": dtype} if quantization.get("load_in_4bit") else {}
        arguments["quantization_config"] = BitsAndBytesConfig(**config | quantization)
        # Quantised weights cannot be moved later: each rank loads onto its own card.
        rank = int(os.environ.get("LOCAL_RANK", 0))
        arguments["device_map"] = {"": rank if torch.cuda.is_available() else "cpu"}
    with _told(path), quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **arguments)
    if quantization is not None:
        keep_4bit_weights(model)
    return model


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Upstream's failures to load, told in one line that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ModelError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if isinstance(error, KeyError | ImportError) and not lines:
            reason = repr(error)
        raise ModelError(f"model.name_or_path: {name} cannot be loaded: {reason}") from error
    except Exception as error:
        from safetensors import SafetensorError

        if isinstance(error, SafetensorError):
            raise ModelError(f"model.name_or_path: {name}: a weight file is damaged: {error}") from error
        raise


def keep_4bit_weights(model: Any) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    It does so for good at the first forward without gradients; from then on training gets no input gradient and saved
    weights are garbage.

    Source: bitsandbytes 0.50 `nn/modules.py`, `Linear4bit.forward`; still there in 0.50.2.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


# ---------------------------------------------------------------------------------------------------------------
# Tokens that the base never learned


def unlearned_tokens(model: Any, token_ids: Sequence[int]) -> list[int]:
    """Those of `token_ids` whose embedding was never trained.

    A token that training never met keeps its initial vector, as do all others that it never met: such rows are nearly
    one vector (Gemma 3 270M: cosine 0.99 to dozens of others; learned tokens have none above 0.75), or nearly zero.
    """
    weight = model.get_input_embeddings().weight.detach()
    norms = weight.float().norm(dim=-1)
    floor = norms.median() * 0.1
    found = []
    for token in token_ids:
        cosine = (weight @ weight[token]).float() / (norms * norms[token]).clamp(min=1e-12)
        twins = int((cosine > 0.9).sum()) - 1
        if bool(norms[token] < floor) or twins >= 4:
            found.append(token)
    return found


def trainable_token_indices(model: Any, token_ids: list[int]) -> list[int] | dict[str, list[int]]:
    """The `peft.LoraConfig.trainable_token_indices` that trains the tokens' rows at the model's input and output."""
    if model.config.get_text_config().tie_word_embeddings:
        return token_ids
    names = {id(module): name for name, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {names[id(module)].rsplit(".", 1)[-1]: token_ids for module in ends}


def lighten_trainable_tokens(model: Any) -> None:
    """Makes PEFT's trainable tokens cost rows instead of matrices; same names, same numbers.

    PEFT copies the whole embedding (262,144 x 640 for Gemma 3 270M) at each use to put the trained rows in. Here the
    frozen matrix is used as it is and only the trained rows are looked up, or scored, apart.

    Source: peft 0.21 `tuners/trainable_tokens/layer.py`, `forward_adapters`.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.forward_adapters = MethodType(_token_rows_forward, module)


def _token_rows_forward(
    layer: Any, x: torch.Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
) -> Any:
    import torch
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if layer.disable_adapters or layer.merged or len(active_adapters) != 1:
        return TrainableTokensLayer.forward_adapters(layer, x, active_adapters, *args, **kwargs)
    base = layer.base_layer
    rows = layer.trainable_tokens_delta[active_adapters[0]]
    index = torch.tensor(layer.token_indices[active_adapters[0]], device=x.device)
    out = base(x)
    if isinstance(base, torch.nn.Embedding):
        # A scaled embedding (Gemma's) multiplies what it looks up.
        scale = layer._get_embed_scale()
        rows = (
            rows.to(base.weight.dtype)
            if scale is None
            else rows.to(base.weight.dtype) * scale.to(base.weight.dtype)
        )
        place = x.unsqueeze(-1) == index
        return torch.where(place.any(-1, keepdim=True), rows[place.int().argmax(-1)].to(out.dtype), out)
    scores = torch.nn.functional.linear(x, rows.to(x.dtype))
    return (
        out.index_copy_(-1, index, scores.to(out.dtype))
        if not out.requires_grad
        else out.index_copy(-1, index, scores.to(out.dtype))
    )
