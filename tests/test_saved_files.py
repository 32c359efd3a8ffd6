"""The small files of what is saved, as transformers 4 and other readers of its keys need them; generation settings."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetune.cli.commands import main
from finetune.model.load_generator import load_generator
from finetune.model.locate import locate
from finetune.model.saved_files import (
    _ROPE_KEYS,
    BaseFiles,
    complete_config,
    complete_tokenizer_config,
    drop_refused_settings,
)

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA3: dict[str, Any] = {"rope_theta": 1e6, "rope_local_base_freq": 5e3, "rope_scaling": LINEAR}
SHAPE: dict[str, Any] = {
    **{"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
}


@pytest.mark.parametrize(
    ("kind", "older"),
    [
        ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("gemma2", {"rope_theta": 2e4}),
        ("gemma3_text", GEMMA3),
        ("gemma3n_text", GEMMA3),
        ("olmo3", {"rope_theta": 5e5, "rope_scaling": LINEAR}),
        ("stablelm", {"rope_theta": 2e4, "partial_rotary_factor": 0.25}),
    ],
)
def test_transformers_5_reads_both_forms_of_the_rotary_settings_alike(kind: str, older: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, **deepcopy(older), **(LAYERS if len(older) > 2 or kind == "olmo3" else {}))
    saved = config.to_dict()
    assert not older.keys() & saved.keys() - {"partial_rotary_factor"}
    completed = complete_config(dict(saved), {})
    assert {key: completed[key] for key in older} == older
    assert not set(_ROPE_KEYS) & completed.keys() - older.keys() - {"partial_rotary_factor"}
    # Written beside `layer_types`, from which it follows.
    read = AutoConfig.for_model(**deepcopy(completed)).to_dict() | {"_sliding_window_pattern": 6}
    assert {key: read[key] for key in saved} == saved
    assert complete_config(dict(completed), saved) == completed  # a merge into what we saved


def layers(count: int, every: int) -> list[str]:
    return ["full_attention" if number % every == 0 else "sliding_attention" for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("kind", "given", "older"),
    [
        ("gemma3_text", {"layer_types": layers(4, 2)}, {"sliding_window_pattern": 2}),
        ("gemma3_text", {"layer_types": layers(7, 6)}, {"sliding_window_pattern": 6}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"] * 2}, {}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, {}),
        ("gemma4_text", {"layer_types": layers(4, 2), "global_head_dim": 32}, {"global_head_dim": 32}),
        (
            "gemma4_text",
            {"layer_types": layers(4, 2), "num_global_key_value_heads": 1, "attention_k_eq_v": True},
            {"global_head_dim": 512, "num_global_key_value_heads": 1},
        ),
    ],
)
def test_settings_of_layers_are_saved_as_gemma_3_and_4_were_released(
    kind: str, given: dict[str, Any], older: dict[str, Any]
) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=len(given["layer_types"]), **deepcopy(given))
    saved = json.loads(config.to_json_string())
    names = {"sliding_window_pattern", "global_head_dim", "num_global_key_value_heads"}
    assert not names & saved.keys()
    completed = complete_config(deepcopy(saved), {})
    assert {key: completed[key] for key in names & completed.keys()} == older
    # As a part of a multimodal model's config, too; and the base's own value stays.
    assert complete_config({"text_config": deepcopy(saved)}, {})["text_config"] == completed
    if older:
        key = next(iter(older))
        assert complete_config(deepcopy(saved), {key: 99})[key] == 99
    # transformers reads the same model from the older keys alone, and from both.
    if older and (kind == "gemma4_text" or given["layer_types"] == layers(7, 6)):
        alone = {key: completed[key] for key in completed if key not in ("per_layer_config", "layer_types")}
        for values in (completed, alone | {"layer_types": completed["layer_types"]}):
            read = json.loads(AutoConfig.for_model(**deepcopy(values)).to_json_string())
            assert {key: read[key] for key in saved} == saved


def test_the_parts_of_a_multimodal_config_are_completed() -> None:
    config = AutoConfig.for_model("gemma3", text_config=deepcopy(GEMMA3), dtype="bfloat16").to_dict()
    text = complete_config(dict(config), {})["text_config"]
    assert {key: text[key] for key in GEMMA3} == GEMMA3
    read = AutoConfig.for_model(**complete_config(dict(config), {})).to_dict()
    assert read["text_config"].pop("sliding_window_pattern") == 6
    assert read == config


def test_a_model_that_only_transformers_5_has_gets_no_older_rotary_keys() -> None:
    saved = AutoConfig.for_model("gemma4_text").to_dict()
    assert "rope_theta" not in complete_config(dict(saved), {})


def test_keys_of_the_base_are_taken_over_as_they_are() -> None:
    """Phi 3's scaling has three keys in transformers 4, and more in `rope_parameters`."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    base = SHAPE | {"rope_theta": 1e4, "rope_scaling": scaling, "original_max_position_embeddings": 256}
    saved = AutoConfig.for_model("phi3", **base).to_dict() | {"use_cache": False}
    completed = complete_config(dict(saved), base | {"use_cache": True})
    assert (completed["rope_scaling"], completed["use_cache"]) == (scaling, True)
    assert AutoConfig.for_model(**completed).to_dict() == saved | {"use_cache": True}
    assert "use_cache" not in complete_config(dict(saved), base)  # its base had none


TOKENIZERS_BACKEND = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True}


@pytest.mark.parametrize(
    ("saved", "base", "expected"),
    [
        (TOKENIZERS_BACKEND, {}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        # transformers 5 loads Llama's class with byte-level pieces as TokenizersBackend: so may readers of a run.
        (TOKENIZERS_BACKEND, {"tokenizer_class": "LlamaTokenizerFast"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (
            {"tokenizer_class": "GemmaTokenizer"},
            {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": True, "chat_template": "old"},
            {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": True},
        ),
        (
            TOKENIZERS_BACKEND | {"extra_special_tokens": ["<a>", "<b>"]},
            {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]},
            {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>", "<b>"]},
        ),
        (
            {"tokenizer_class": "GemmaTokenizer", "model_specific_special_tokens": {"boi_token": "<a>"}},
            {},
            {"tokenizer_class": "GemmaTokenizer", "extra_special_tokens": {"boi_token": "<a>"}},
        ),
    ],
)
def test_a_tokenizers_config_is_that_of_the_base_with_what_was_changed(
    saved: dict[str, Any], base: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert complete_tokenizer_config(saved, base) == expected
    assert complete_tokenizer_config(expected, base) == expected


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "max_length": 4096}, ["temperature: 0.9", "top_p: 0.6"]),
        ({"temperature": 0.9, "do_sample": True}, []),
        ({"min_p": 0.1}, ["min_p: 0.1"]),
        ({"length_penalty": 2.0}, ["length_penalty: 2.0"]),
        ({"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0}, []),
        ({"pad_token_id": -1}, ["pad_token_id: -1"]),
        ({"repetition_penalty": 1.1, "output_scores": True}, ["output_scores: True"]),
    ],
)
def test_settings_that_transformers_refuses_to_save_are_left_out(
    settings: dict[str, Any], refused: list[str], tmp_path: Path
) -> None:
    config = GenerationConfig(**settings)
    line = drop_refused_settings(config)
    end = " left out: transformers ignores it, and refuses to save it"
    assert line == (f"generation_config.json: {', '.join(refused)}{end}" if refused else "")
    config.eos_token_id = 1  # a changed one is checked
    config.save_pretrained(tmp_path)
    kept = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    assert kept.items() >= {key: value for key, value in settings.items() if f"{key}: {value}" not in refused}.items()


def older_base(folder: Path, kind: str = "llama", **older: Any) -> Path:
    """A base as transformers 4 saved it, with a tokenizer.model and settings that greedy decoding makes no use of."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, **older)).save_pretrained(folder)
    config = SHAPE | older | {"model_type": kind, "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(Path(locate("random:llama")) / name, folder)
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "model_max_length": 2048}
    tokenizer |= {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | tokenizer))
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    settings = {"eos_token_id": 1, "temperature": 0.9, "num_beams": 2, "num_return_sequences": 2}
    settings |= {"return_dict_in_generate": True, "stop_strings": ["e"], "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.slow
def test_every_folder_of_a_run_has_the_files_that_older_readers_need(
    lora: bool, write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = older_base(tmp_path / "base", rope_theta=5e5, rope_scaling=LLAMA3)
    recipe = write_recipe(
        model={"name_or_path": str(base), "dtype": "float32"},
        data={"train": [{"path": str(Path(__file__).parents[1] / "data/chat_sample.jsonl")}], "eval_fraction": 0.02},
        training={"max_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **({} if lora else {"lora": None}),
    )
    assert main(["train", str(recipe)]) == 0
    said = capsys.readouterr().err
    assert said.count("generation_config.json: temperature: 0.9 left out: transformers ignores it, and refuses") == 1
    [sample, *_] = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    assert json.loads(sample)["answer"]  # with beams and stop strings in the base's settings
    folders = [tmp_path / "run", tmp_path / "run/checkpoint-1"]
    if lora:
        assert main(["merge", "run", "--output", "merged"]) == 0
        folders.append(tmp_path / "merged")
    for folder in folders:
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer == json.loads((base / "tokenizer_config.json").read_text())
        assert (folder / "tokenizer.model").read_bytes() == b"sentencepiece"
        assert (
            AutoTokenizer.from_pretrained(folder)("Hi")["input_ids"]
            == AutoTokenizer.from_pretrained(base)("Hi").input_ids
        )
        if folder.name == "merged" or not lora:
            config = json.loads((folder / "config.json").read_text())
            assert (config["rope_theta"], config["rope_scaling"]) == (5e5, LLAMA3)
            assert (config["torch_dtype"], config["dtype"], "use_cache" in config) == ("float32", "float32", False)
    settings = json.loads((folders[-1] / "generation_config.json").read_text())
    assert (settings["num_beams"], "temperature" in settings) == (2, False)
    generator = load_generator(str(folders[-1] if not lora else tmp_path / "run"))
    assert len(generator.answers([[2, 5, 9], [2, 5]], 4)) == 2
    assert generator.model.generation_config.num_beams == 2  # as it was


def test_a_tokenizer_with_other_tokens_does_not_get_the_bases_files(tmp_path: Path) -> None:
    base = older_base(tmp_path / "base")
    for same, name in ((True, "same"), (False, "other")):
        folder = tmp_path / name
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        BaseFiles.of(str(base)).complete(folder, same_tokens=same)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert ((folder / "tokenizer.model").exists(), "add_bos_token" in config) == (same, same)
        assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
