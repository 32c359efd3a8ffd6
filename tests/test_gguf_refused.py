"""Tokenizers that cannot be written for llama.cpp: each is refused in one line that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import KINDS

from finetune.export.gguf.tokenizer.vocabulary import read_tokenizer
from finetune.system.errors import ExportError


def edited(change: Callable[[dict[str, Any]], Any], file: str = "tokenizer.json") -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        whole = json.loads((model / file).read_text(encoding="utf-8"))
        change(whole)
        (model / file).write_text(json.dumps(whole), encoding="utf-8")

    return edit


def replaced(old: str, new: str, file: str = "tokenizer.json") -> Callable[[Path], None]:
    def replace(model: Path) -> None:
        text = (model / file).read_text(encoding="utf-8")
        assert old in text
        (model / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return replace


def lose(token: str) -> Callable[[dict[str, Any]], None]:
    def change(whole: dict[str, Any]) -> None:
        at = whole["model"]["vocab"].pop(token)
        whole["model"]["vocab"]["a new one"] = at

    return change


SPM, BPE = "gemma, byte fallback", "llama-bpe"
REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no file": (BPE, lambda model: (model / "tokenizer.json").unlink(), r"tokenizer.json is missing; save the"),
    "no JSON": (BPE, lambda model: (model / "tokenizer.json").write_text("{"), r"tokenizer.json is damaged: Exp"),
    "Unigram": (BPE, edited(lambda it: it["model"].update(type="Unigram")), r"its model is Unigram; only BPE"),
    "no merges": (BPE, edited(lambda it: it["model"].pop("merges")), r"is damaged: KeyError: 'merges'"),
    "a merge of nothing": (
        BPE,
        edited(lambda it: it["model"]["merges"].append(["nothing", "s"])),
        r"a merge names 'nothing', which is no token",
    ),
    "an id twice": (
        BPE,
        edited(lambda it: it["model"]["vocab"].update({"!": 1})),
        r"'!' and '.+' have both the id 1|'.+' and '!' have both the id 1",
    ),
    "a missing id": (
        BPE,
        edited(lambda it: it["added_tokens"][-1].update(id=9999)),
        r"no token has the id 1504, though there are 1505 tokens",
    ),
    "two ids": (SPM, edited(lambda it: it["added_tokens"][0].update(id=7)), r"'<pad>' has the ids 0 and 7"),
    "a key twice": (BPE, replaced('"!"', '"#"'), r"'#' is there twice"),
    "too few rows": (
        SPM,
        edited(lambda it: it.update(vocab_size=300), "config.json"),
        r"has the id 300, and the model's embedding has 300 rows \(config.json: vocab_size\)",
    ),
    "no rows": (SPM, edited(lambda it: it.pop("vocab_size"), "config.json"), r"config.json: it has no vocab_size"),
    "a stop that is none": (
        SPM,
        edited(lambda it: it.update(eos_token_id=[1, 5000]), "generation_config.json"),
        r"eos_token_id 5000 is no token",
    ),
    "no EOS": (SPM, replaced('"eos_token": "<eos>"', '"eos_token": null', "tokenizer_config.json"), r"no eos_token"),
    "no byte token": (SPM, edited(lose("<0xF0>")), r"byte tokens are missing \(<0xF0>\.\.\.\)"),
    "a normalizer": (
        SPM,
        edited(lambda it: it.update(normalizer={"type": "NFKC"})),
        r"its normalizer and pre_tokenizer are \[\{.+NFKC.+\}\]; llama.cpp knows",
    ),
    "lower case": (
        BPE,
        edited(lambda it: it.update(normalizer={"type": "Lowercase"})),
        r"its normalizer is \[\{\"type\": \"Lowercase\"\}\], which llama.cpp lacks",
    ),
    "splits at spaces": (
        SPM,
        edited(
            lambda it: it.update(
                normalizer=None,
                pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
            )
        ),
        r"it splits texts at spaces, which llama.cpp does not, and has merges across them \('.*▁'\)",
    ),
    "a regex": (
        BPE,
        edited(lambda it: it["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+")),
        r"its pre_tokenizer is .+; llama.cpp's that are known here are gpt-2, gpt-4o, llama-bpe, ",
    ),
    "a space before": (
        BPE,
        edited(lambda it: it["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
        r"its pre_tokenizer is ",
    ),
    "no bytes": (BPE, edited(lambda it: it["pre_tokenizer"]["pretokenizers"].pop()), r"its pre_tokenizer is "),
    "a post-processor": (
        BPE,
        edited(lambda it: it.update(post_processor={"type": "BertProcessing", "sep": ["!", 0], "cls": ["!", 0]})),
        r"its post_processor is .+; llama.cpp knows TemplateProcessing alone",
    ),
    "two BOS": (
        BPE,
        edited(
            lambda it: it["post_processor"]["processors"][1]["single"].insert(
                0, {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
            )
        ),
        r"its post_processor adds \[1500, 1500\] where llama.cpp adds bos_token alone \(1500\)",
    ),
    "dropout": (BPE, edited(lambda it: it["model"].update(dropout=0.1)), r"its model has dropout 0.1"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in which nothing is wrong yet."""
    found = {kind: KINDS[kind](tmp_path_factory.mktemp("model")) for kind in (SPM, BPE)}
    for model in found.values():
        read_tokenizer(model)
    return found


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_written_is_refused(fault: str, sound: dict[str, Path], tmp_path: Path) -> None:
    kind, damage, message = REFUSED[fault]
    model = shutil.copytree(sound[kind], tmp_path / "model")
    damage(model)
    with pytest.raises(ExportError, match=message) as refused:
        read_tokenizer(model)
    assert str(refused.value).startswith(str(model))
    assert "\n" not in str(refused.value)
