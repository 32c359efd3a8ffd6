"""The tables judge values as upstream's own types do, and with them a check of a recipe imports nothing of upstream."""

import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from finetune.cli.commands import main
from finetune.recipe import upstream_tables
from finetune.recipe.foreign_keys import INSTEAD
from finetune.recipe.schema import CONFIGS
from finetune.recipe.upstream import STRICT
from finetune.recipe.upstream_tables import config_class, tables, types_of, unless_known_good
from finetune.system.installed import installed_digest

# One value of each kind that YAML has, and some that single options take.
VALUES = [None, True, 0, 1, -3, 0.5, "", "no", "steps", "cosine", "adamw_8bit", "fork", "bfd", "lora_only", "underflow"]
VALUES += [[], [1], ["a"], [[1, 2]], [[1, 2, 3]], {}, {"a": 1}, {"rank": 2}, {"num_samples": 2, "nonsense": 1}]
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy")


def judged(hint: Any, value: Any) -> set[str]:
    """The kinds of errors of a value; empty if it is taken."""
    try:
        TypeAdapter(hint, config=STRICT).validate_json(json.dumps(value))
    except ValidationError as error:
        # An enum's values are written as literals.
        return {f"{e['loc'][:0]}{e['type'].replace('enum', 'literal_error')} {e['msg']}" for e in error.errors()}
    return set()


@pytest.mark.parametrize("owner", [*CONFIGS, "lora"])
def test_the_tables_judge_as_upstreams_types_do(owner: str) -> None:
    from peft import LoraConfig

    config = LoraConfig if owner == "lora" else config_class(owner)
    table = tables()["lora"] if owner == "lora" else tables()["training"][owner]
    hints = typing.get_type_hints(config)
    kept = types_of(table)
    assert kept.keys() == {name for name in hints if name in config.__dataclass_fields__}
    for name in kept.keys() - INSTEAD["lora" if owner == "lora" else "training"]:
        kind = kept[name]
        own = upstream_tables._narrowed(hints[name], config.__dataclass_fields__[name].metadata.get("choices"))
        for value in VALUES:
            assert judged(kind, value) == judged(own, value), (name, value)


def test_a_type_that_cannot_be_written_takes_anything() -> None:
    assert types_of({"a": upstream_tables._encoded(bytes)})["a"] is Any
    assert judged(types_of({"a": upstream_tables._encoded(bytes | None)})["a"], {"b": 1}) == set()


@pytest.mark.slow
def test_a_check_imports_nothing_of_upstream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, faulty = tmp_path / "r.yaml", tmp_path / "faulty.yaml"
    recipe.write_text(
        "model: {name_or_path: owner/model}\ndata: {train: [{path: owner/rows}]}\nlora: {r: 4}\n"
        "training: {learning_rate: 3e-4, optim: adamw_torch, eval_steps: 7}\n"
    )
    faulty.write_text(recipe.read_text().replace("eval_steps: 7", "eval_stepz: 7, seed: -1"))
    assert main(["check", str(recipe)]) == 0
    assert main(["check", str(faulty)]) == 2
    # wandb, which upstream imports where nobody has before, prints a line.
    out, err = (text.replace("[INFO] Running in WANDB offline mode\n", "") for text in capsys.readouterr())
    assert "training.seed: is -1; write a number greater than or equal to 0\n" in err
    assert "training.eval_stepz: is unknown; perhaps eval_steps\n" in err
    script = (
        "import sys\nfrom finetune.cli.commands import main\n"
        f"assert main(['check', {str(recipe)!r}]) == 0\nassert main(['check', {str(faulty)!r}]) == 2\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (process.stdout, process.stderr) == (out + "[]\n", err)


def test_only_values_without_a_fault_are_known_to_be_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.cache_clear()
    monkeypatch.setattr(upstream_tables, "_computed", dict)
    tree: Any = SimpleNamespace(method="sft", faults=[])
    calls: list[str] = []

    def bad() -> None:
        tree.faults.append("fault")
        calls.append("bad")

    def ask(values: dict[str, Any], check: Any = lambda: calls.append("good"), name: str = "training") -> int:
        calls.clear()
        unless_known_good(tree, name, values, check)
        return len(calls)

    try:
        assert [ask({"a": 1}, bad), ask({"a": 1}, bad)] == [1, 1]
        assert [ask({"a": 1}), ask({"a": 1}), ask({"a": 1, "seed": 3, "output_dir": "x"})] == [1, 0, 0]
        assert [ask({"a": 2}), ask({"a": True}), ask({"a": 1}, name="lora"), ask({"a": 1, "b": None})] == [1, 1, 1, 1]
        tree.method = "dpo"
        assert ask({"a": 1}) == 1
        # Another release: what was good before is asked again.
        (tmp_path / "site" / "trl-99.dist-info").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / "site")
        installed_digest.cache_clear()
        tables.cache_clear()
        assert ask({"a": 1}) == 1
    finally:
        monkeypatch.undo()
        installed_digest.cache_clear()
        tables.cache_clear()


def test_tables_of_earlier_releases_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(upstream_tables, "_computed", lambda: {"training": {}})
    old, recent = (tmp_path / "finetune" / "upstream" / name for name in ("old", "recent"))
    for folder in (old, recent):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert tables.__wrapped__() == {"training": {}}
    assert (old.exists(), recent.exists()) == (False, True)
