"""Makes what other programs read: two bases, and runs, merged models and exports of them, by the command line.

Both bases have rotary settings that are not their class's defaults, and weights so large that a setting that is left
out changes the predictions. The Llama's files are as transformers 5 saves them, the Gemma's as those on the Hub.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.cli.commands import main
from finetune.data.template import load_template
from finetune.model.saved_files import BaseFiles
from finetune.system.terminal import quiet

ROOT = Path(__file__).parents[2]
BASES = ("llama", "gemma3")
FOLDERS = ("bf16", "fp16", "int8", "nf4", "fp8", "w4a16")
MLX = ("mlx-bf16", "mlx-8bit", "mlx-4bit")
QUANTISED = ("int8", "nf4", "fp8", "w4a16")
ADAPTERS = ("run", "run with token rows", "adapter")
GGUF = ("gguf:F32", "gguf:Q8_0", "gguf:adapter", "ollama")
ARTEFACTS = (*ADAPTERS, "full run", "merged", *FOLDERS, *MLX, *GGUF)

_SHAPE: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 64, "max_position_embeddings": 4096},
}
_LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
_LLAMA: dict[str, Any] = {"num_hidden_layers": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
# As Gemma 3's config.json has them on the Hub.
_GEMMA3_ROPE: dict[str, Any] = {
    **{"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "sliding_window_pattern": 6,
}
_GEMMA3: dict[str, Any] = {"num_hidden_layers": 7, "sliding_window": 32, "query_pre_attn_scalar": 64}
_TURNS = ("<start_of_turn>", "<end_of_turn>")
# Ids of tokens whose rows a run trains.
_ROWS = {"llama": "[1501, 1502]", "gemma3": "[4, 5]"}


@dataclass(frozen=True)
class Artefact:
    """The files that a program reads.

    Attributes:
        path: A model's folder, or a GGUF file.
        adapter: The adapter on it, if there is one.
        reference: The artefact that our own transformers reads for comparison.
        quantised: Its weights are not floating point numbers that can be read as float32.
    """

    path: Path
    adapter: Path | None
    reference: str
    quantised: bool


def artefact(folder: Path, name: str, base: str) -> Artefact:
    """An artefact of a base in the folder that `make` filled."""
    run, exports = folder / "runs" / base, folder / "exports" / base
    adapters = {"run": run, "run with token rows": Path(f"{run}-rows"), "adapter": exports / "adapter"}
    if name in adapters:
        return Artefact(folder / "bases" / base, adapters[name], name, False)
    files = {
        "gguf:F32": exports / "gguf" / f"{base}-F32.gguf",
        "gguf:Q8_0": exports / "gguf" / f"{base}-Q8_0.gguf",
        "gguf:adapter": exports / "base.gguf",
        "ollama": exports / "ollama" / f"{base}-F32.gguf",
    }
    if name in files:
        added = exports / "gguf" / f"{base}-adapter.gguf" if name == "gguf:adapter" else None
        return Artefact(files[name], added, "merged", False)
    if name in MLX:
        return Artefact(exports / name, None, "bf16" if name == "mlx-bf16" else "merged", False)
    folders = {"full run": Path(f"{run}-full"), "merged": folder / "merged" / base}
    return Artefact(folders.get(name, exports / name), None, name, name in QUANTISED)


def make(folder: Path) -> None:
    """Fills an empty folder with the artefacts of both bases."""
    for base in BASES:
        _make_base(base, folder / "bases" / base)
        run, common = folder / "runs" / base, _recipe(base, folder)
        _call("train", *common, f"training.output_dir={run}", "lora.trainable_token_indices=none")
        rows = f"lora.trainable_token_indices={_ROWS[base]}"
        _call("train", *common, f"training.output_dir={run}-rows", rows)
        _call("train", *common, f"training.output_dir={run}-full", "lora=null", "training.learning_rate=1e-3")
        _call("merge", run, "--output", folder / "merged" / base)
        formats = [f"--format={name}" for name in (*FOLDERS, *MLX, "adapter", *GGUF)]
        # 3: float16 or 4 bit loses more than the report allows, which is no matter of the reader's.
        _call("export", run, "--output", folder / "exports" / base, *formats, codes=(0, 3))
        # The adapter's base as a file, which a user has from elsewhere.
        _call("export", folder / "bases" / base, "--output", folder / "exports" / f"{base}-base", "--format=gguf:F32")
        [file] = (folder / "exports" / f"{base}-base" / "gguf").glob("*-F32.gguf")
        file.rename(folder / "exports" / base / "base.gguf")
        # Adapters are read on a base that each program reads rightly: its files are not ours.
        BaseFiles.of(str(folder / "bases" / base)).complete(folder / "bases" / base)


def _call(*arguments: str | Path, codes: tuple[int, ...] = (0,)) -> None:
    line = [str(argument) for argument in arguments]
    assert (code := main(line)) in codes, f"finetune {' '.join(line)}: exit code {code}"


def _recipe(base: str, folder: Path) -> list[str]:
    return [
        str(ROOT / "recipes" / "cpu_smoke.yaml"),
        f"model.name_or_path={folder / 'bases' / base}",
        f"data.train=[{{path: {ROOT / 'data' / 'chat_sample.jsonl'}}}]",
        "data.on_bad_row=skip",
        "data.eval_fraction=null",
        "training.max_steps=4",
        "training.learning_rate=5e-3",
        "training.save_strategy=no",
    ]


def _make_base(name: str, folder: Path) -> None:
    if name == "llama":
        special = [*tiny_tokenizers.THREE, "<|pad|>"]
        backend = tiny_tokenizers.bytelevel(special, tiny_tokenizers.regex(tiny_tokenizers.LLAMA3))
        names = tiny_tokenizers.T | {"pad_token": "<|pad|>"}
        tokenizer, template, bos = backend, "llama3", "<|begin_of_text|>"
        config = AutoConfig.for_model("llama", **_SHAPE, **_LLAMA, rope_theta=5e5, rope_scaling=_LLAMA3)
    else:
        split = tiny_tokenizers.pre.Split(" ", "merged_with_previous")
        tokenizer = tiny_tokenizers.sentencepiece([*tiny_tokenizers.GEMMA, *_TURNS], split=split)
        names, template, bos = tiny_tokenizers.G, "gemma3", "<bos>"
        rope = {key: value for key, value in _GEMMA3_ROPE.items() if key != "sliding_window_pattern"}
        config = AutoConfig.for_model("gemma3_text", **_SHAPE, **_GEMMA3, **rope)
    tokenizer = tiny_tokenizers.begin(tokenizer, bos)
    tiny_tokenizers.save(folder, tokenizer, names, load_template(template))
    ids = {key: tokenizer.token_to_id(names[key]) for key in ("bos_token", "eos_token", "pad_token")}
    config.update({f"{key}_id": value for key, value in ids.items()})
    # No rows that fill the vocabulary up: an untrained model would predict them, and lm-eval cuts them off.
    config.vocab_size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                torch.nn.init.normal_(weight, 0.0 if name == "gemma3" else 1.0, 0.1)
            else:
                weight.mul_(4)
    with quiet():
        model.bfloat16().save_pretrained(folder)
    if name == "gemma3":
        _as_on_the_hub(folder)


def _as_on_the_hub(folder: Path) -> None:
    """Gives a Gemma 3 the small files that transformers 4 saved."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = config.pop("dtype")
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | _GEMMA3_ROPE, indent=2), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: saved[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    of_the_hub = {
        **{"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False},
        **{"additional_special_tokens": list(_TURNS), "clean_up_tokenization_spaces": False},
    }
    file.write_text(json.dumps(kept | of_the_hub, indent=2), encoding="utf-8")
