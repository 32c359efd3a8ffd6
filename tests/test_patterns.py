"""Regular expressions of a LoRA config are matched in a process with a limit of time before PEFT matches them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from finetune.cli.commands import main
from finetune.model import patterns
from finetune.model.patterns import check_patterns
from finetune.system import limited
from finetune.system.errors import ModelError

MODEL = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(2, 2)}) for _ in range(2))})


@pytest.fixture
def tried(_trusted: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs of processes, which are real."""
    jobs: list[Any] = []
    monkeypatch.setattr(limited, "run", lambda *given: (jobs.append(given[1]), _trusted(*given))[1])
    patterns._ends.cache_clear()
    return jobs


def test_only_expressions_are_tried(tried: list[Any]) -> None:
    names = [name for name, _ in MODEL.named_modules()]
    config = {"target_modules": ["q_proj"], "layers_pattern": "layers", "rank_pattern": {"q_proj": 3, "q_.*": 4}}
    check_patterns(config, MODEL, "lora.")
    check_patterns(config, MODEL, "lora.")
    assert tried == [[r"(.*\.)?(q_.*)$", tuple(names)]]
    check_patterns({"target_modules": "(.*q_proj", "exclude_modules": None, "modules_to_save": None}, MODEL, "")
    assert len(tried) == 2  # PEFT says that it is no expression


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"target_modules": r".*\.q_proj"}, "target_modules"),
        ({"exclude_modules": r".*\.q_proj"}, "exclude_modules"),
        ({"layers_pattern": [r".*\.q_proj"]}, "layers_pattern"),
        ({"modules_to_save": ["lm_head", r".*\.q_proj"]}, "modules_to_save"),
        ({"alpha_pattern": {r".*\.q_proj": 1}}, "alpha_pattern"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_expression_that_reaches_the_limit_is_named(
    config: dict[str, Any], key: str, tried: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "_SECONDS", 0.01)
    with pytest.raises(ModelError) as caught:
        check_patterns(config, MODEL, "lora.")
    assert str(caught.value) == (
        rf"lora.{key}: '.*\\.q_proj' is not matched with the base's modules within 10 s; write names, or a simpler "
        "expression"
    )


def test_the_process_matches_as_peft_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expression of PEFT's matches that is tried is one that PEFT compiles."""
    import peft

    compiled: set[str] = set()
    real = re._compile  # type: ignore[attr-defined]
    monkeypatch.setattr(re, "_compile", lambda pattern, flags: (compiled.add(pattern), real(pattern, flags))[1])
    options: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "exclude_modules": r".*1\.q_proj",
        "layers_pattern": ["lay.*"],
        "layers_to_transform": [0, 1],
        "rank_pattern": {"q_.*": 3},
        "alpha_pattern": {"q_p.*": 3},
    }
    model = nn.Sequential()
    model.add_module("net", MODEL)
    peft.inject_adapter_in_model(peft.LoraConfig(**options), model)
    for key in ("layers_pattern", "rank_pattern", "alpha_pattern"):
        assert {patterns._FORMS[key].format(text) for text in options[key]} <= compiled
    assert options["exclude_modules"] in compiled


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_the_command_line_names_the_key(
    verb: str,
    tried: list[Any],
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(limited, "_SECONDS", 0.01)
    monkeypatch.setattr(patterns, "_LIMITS", replace(patterns._LIMITS, seconds=7))
    assert main([verb, "--quiet", str(write_recipe(lora={"target_modules": r".*\.q_proj"}))]) == 2
    assert capsys.readouterr().err == (
        "error: lora.target_modules: '.*\\\\.q_proj' is not matched with the base's modules within 7 s; write names, "
        "or a simpler expression\n"
    )
