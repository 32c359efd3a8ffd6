"""Tokenizers with more tokens than the embedding has rows: refused by name, or the embeddings grow and train."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune.cli.commands import main
from finetune.data.chat import Chat
from finetune.model.load import load_base, load_tokenizer
from finetune.model.load_generator import load_generator
from finetune.model.locate import Base, locate
from finetune.model.resize import check_token_ids, tokens_of_any_row, write_resized
from finetune.model.token_rows import with_new_tokens
from finetune.recipe.schema import ModelSection
from finetune.system.errors import ModelError
from finetune.system.terminal import quiet

ROWS, NEW = 1024, [1024, 1025]
FAULT = (
    "error: model.name_or_path: the tokenizer has 1,026 tokens, the model's embedding 1,024 rows, and none for "
    "<|done|> (token 1025), which occurs; write model.resize_embeddings: true in the recipe, or use the model's own "
    "tokenizer and chat template\n"
)
EMBEDDINGS = {"gemma2": ["model.embed_tokens.weight"], "llama": ["lm_head.weight", "model.embed_tokens.weight"]}


def enlarged(architecture: str, template: str = "<|done|>") -> Path:
    """A model whose tokenizer has two more tokens, with the second of which its chat template ends turns."""
    source, folder = locate(f"random:{architecture}"), Path(architecture)
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|done|>"]})
    for end in ("<|im_end|>", "<end_of_turn>"):
        tokenizer.chat_template = tokenizer.chat_template.replace(end, template)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "Rye?"}, {"role": "assistant", "content": "Dry."}]}
    Path("rows.jsonl").write_text(json.dumps(row), encoding="utf-8")

    def write(name: str, **model: Any) -> str:
        sections = {
            "model": {"name_or_path": name, **model},
            "lora": {"r": 4},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "training": {"max_steps": 2, "output_dir": "run", "learning_rate": 0.01, "save_strategy": "no"},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
        return "recipe.yaml"

    return write


@pytest.mark.parametrize("architecture", EMBEDDINGS)
def test_new_rows_are_the_mean_of_the_old_ones(architecture: str, recipe: Any) -> None:
    folder = enlarged(architecture)
    base = Base.of(ModelSection(name_or_path=str(folder), resize_embeddings=True))
    old, grown = load_file(folder / "model.safetensors"), load_file(Path(base.path, "model.safetensors"))
    assert grown.keys() == old.keys()
    for name, tensor in grown.items():
        if name in EMBEDDINGS[architecture]:
            assert torch.equal(tensor[ROWS:], old[name].double().mean(0).float().expand(2, -1))
            tensor = tensor[:ROWS]
        assert torch.equal(tensor, old[name])
    assert base.config.vocab_size == 1026
    assert base.original.path == str(folder)
    assert Base.of(ModelSection(name_or_path=str(folder), resize_embeddings=True)).path == base.path


def test_embeddings_that_have_all_rows_stay_where_they_are() -> None:
    section = ModelSection(name_or_path="random:llama", resize_embeddings=True)
    assert Base.of(section).path == locate("random:llama")


@pytest.mark.parametrize("architecture", EMBEDDINGS)
@pytest.mark.slow
def test_new_rows_are_trained_and_merged(architecture: str, recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole run and its merge: about four seconds."""
    path = recipe(str(enlarged(architecture)), resize_embeddings=True)
    assert main(["train", path]) == 0
    assert "embeddings: 2 new rows, which are trained too\n" in capsys.readouterr().err
    assert main(["merge", "--quiet", "run", "--output", "merged"]) == 0
    run, merged = load_generator("run"), load_generator("merged")
    ids = torch.tensor([run.prompt_ids([{"role": "user", "content": "Rye?"}])])
    assert 1025 in ids
    with torch.inference_mode():
        torch.testing.assert_close(merged.model(ids).logits, run.model(ids).logits, rtol=1e-5, atol=1e-5)
    tensors = load_file("merged/model.safetensors")
    start = load_file(
        Path(Base.of(ModelSection(name_or_path=architecture, resize_embeddings=True)).path, "model.safetensors")
    )
    for name in EMBEDDINGS[architecture]:
        # Rows of tokens that occur have moved, no other one has.
        assert torch.equal(tensors[name][:ROWS], start[name][:ROWS])
        assert not torch.equal(tensors[name][1025], start[name][1025])
    config = json.loads(Path("merged/config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == 1026
    assert "finetune_resized_from" not in config


@pytest.mark.slow
def test_a_whole_model_is_saved_without_a_trace(recipe: Any) -> None:
    path = recipe(str(enlarged("llama")), resize_embeddings=True)
    Path(path).write_text(
        Path(path).read_text(encoding="utf-8").replace("lora:\n  r: 4\n", "lora: null\n"), encoding="utf-8"
    )
    assert main(["train", "--quiet", path]) == 0
    assert "finetune_resized_from" not in Path("run/config.json").read_text(encoding="utf-8")
    assert load_file("run/model.safetensors")["lm_head.weight"].shape == (1026, 64)


@pytest.mark.parametrize(
    "argv", [["train", "recipe.yaml"], ["plan", "recipe.yaml"], ["generate", "llama", "--prompt", "a"]]
)
def test_a_token_without_a_row(argv: list[str], recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(str(enlarged("llama")))
    assert main([argv[0], "--quiet", *argv[1:]] if argv[0] == "train" else argv) == 2
    assert capsys.readouterr().err.endswith(FAULT)


def test_a_token_without_a_row_that_does_not_occur(recipe: Any) -> None:
    folder = str(enlarged("llama", template="<|im_end|>"))
    tokenizer, config = load_tokenizer(ModelSection(name_or_path=folder)), Base(folder).config
    chat = Chat(tokenizer)
    check_token_ids(tokens_of_any_row(chat, False, False), tokenizer, config)
    # A stream's rows are not known: its text may spell a special token, or the template writes it for some of them.
    check_token_ids(tokens_of_any_row(chat, True, False), tokenizer, config)
    with pytest.raises(ModelError, match=r"none for <.done.> "):
        check_token_ids(tokens_of_any_row(chat, True, True), tokenizer, config)
    tokenizer.chat_template += "{% if tools %}<|call|>{% endif %}"
    with pytest.raises(ModelError, match=r"none for <.call.> "):
        check_token_ids(tokens_of_any_row(Chat(tokenizer), True, False), tokenizer, config)


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("gemma2", {}, NEW),
        ("gemma2", {"trainable_token_indices": [3]}, [3, *NEW]),
        ("gemma2", {"trainable_token_indices": {"embed_tokens": [3]}}, {"embed_tokens": [3, *NEW], "lm_head": NEW}),
        ("llama", {}, {"embed_tokens": NEW, "lm_head": NEW}),
        ("llama", {"trainable_token_indices": [3]}, {"embed_tokens": [3, *NEW], "lm_head": NEW}),
        ("llama", {"trainable_token_indices": {"lm_head": [3]}}, {"lm_head": [3, *NEW], "embed_tokens": NEW}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, None),
        (
            "llama",
            {"modules_to_save": ["lm_head"]},
            "lora.modules_to_save: trains lm_head and not the other embedding; with model.resize_embeddings write both "
            "(embed_tokens, lm_head), or none",
        ),
    ],
)
def test_new_rows_beside_other_choices(architecture: str, options: dict[str, Any], expected: Any) -> None:
    model = load_base(locate(f"random:{architecture}"), torch.float32)
    if isinstance(expected, str):
        with pytest.raises(ModelError) as caught:
            with_new_tokens(model, options, NEW)
        assert str(caught.value) == expected
        return
    assert with_new_tokens(model, options, NEW) == expected
    model.resize_token_embeddings(1026)
    peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], **options | {"trainable_token_indices": expected})
    )


@pytest.mark.parametrize(("name", "rows"), [("gemma4", 1024), ("gemma3n", 1024), ("gemma3n", 1000)])
def test_an_embedding_for_each_layer_is_refused(name: str, rows: int, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(locate(f"random:{name}"), vocab_size_per_layer_input=rows)
    with quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ModelError, match=r"base has a further row for each token in model\.embed_tokens_per_layer, which"
    ):
        write_resized(str(tmp_path / "base"), None, False, 1030, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_a_disk_without_room_is_told_before_a_copy_is_written(
    recipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    enlarged("llama")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))  # another test may have made the copy
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**18))
    assert main([recipe("llama", resize_embeddings=True)]) == 2
    assert re.search(
        r"error: \S+/finetune has 1 MiB free, and 1 MiB are needed; make room, or name a cache on another disk with "
        r"XDG_CACHE_HOME$",
        capsys.readouterr().err.strip(),
    )
