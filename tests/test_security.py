"""Nothing of somebody else's files runs unless the user says so for this command (docs/security.md).

In place of an attack each file would write a marker.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import transformers.dynamic_module_utils as dynamic_modules
import yaml
from transformers import AutoModelForCausalLM

from finetune.cli.commands import main
from finetune.model.locate import locate
from finetune.model.provenance import adapter_base_sections
from finetune.system.errors import ModelError
from finetune.system.terminal import quiet

CONFIG = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class StrangerConfig(LlamaConfig):
    model_type = "stranger"
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_stranger import StrangerConfig
class StrangerForCausalLM(LlamaForCausalLM):
    config_class = StrangerConfig
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of random:llama."""
    folder = tmp_path_factory.mktemp("adapter")
    with quiet():
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(locate("random:llama")), peft.LoraConfig(r=2))
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that code of the stranger would write."""
    return tmp_path / "ran"


@pytest.fixture
def stranger(adapter: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run whose base has Python files, and whose own recipe says that they may run."""
    monkeypatch.chdir(tmp_path)
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(locate("random:llama"), base)
    code = {"AutoConfig": "configuration_stranger.StrangerConfig"}
    code["AutoModelForCausalLM"] = "modeling_stranger.StrangerForCausalLM"
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": code, "architectures": ["StrangerForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    (base / "configuration_stranger.py").write_text(CONFIG.format(marker=str(marker)))
    (base / "modeling_stranger.py").write_text(MODEL)
    shutil.copytree(adapter, run)
    sections = {
        "model": {"name_or_path": str(base), "trust_remote_code": True},
        "data": {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.5},
    }
    rows = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c}]} for c in "abcd"]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run / "recipe.yaml").write_text(yaml.safe_dump(sections))
    # The copy of the code that transformers imports.
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield run
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


REFUSED = (
    "model.name_or_path: {base} brings Python files, which are not run unless you say so; read them, then write "
    "--trust-remote-code (in a recipe: model.trust_remote_code: true)"
)
TRUSTED = "--trust-remote-code: Python files that come with the model may run, with your rights"


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "run", "--prompt", "Hello"],
        ["merge", "run", "--output", "merged"],
        ["export", "run", "--output", "exported", "--format", "bf16"],
        ["evaluate", "run"],
        ["generate", "base", "--prompt", "Hello"],
        ["evaluate", "base", "--recipe", "run/recipe.yaml"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_the_word_of_a_run_lets_no_code_run(
    words: list[str], stranger: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--quiet"]) == 2
    name = "base" if words[1] == "base" else str(stranger.with_name("base"))
    assert capsys.readouterr().err == f"error: {REFUSED.format(base=name)}\n"
    assert not marker.exists()


def test_the_users_own_word_lets_it_run_and_is_repeated(
    stranger: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "run", "--prompt", "Hello", "--max-new-tokens", "2", "--trust-remote-code"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == TRUSTED
    assert marker.exists()


def test_a_recipe_of_the_users_lets_it_run_and_that_is_repeated(
    stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "run/recipe.yaml", "lora.r=4", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["check", "run/recipe.yaml", "lora.r=4"]) == 0
    base = stranger.with_name("base")
    assert capsys.readouterr().err == (
        f"run/recipe.yaml:7: model.trust_remote_code: Python files that come with {base} may run, with your rights\n"
    )


def test_a_task_in_a_file_is_code_too(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = yaml.safe_load((stranger / "recipe.yaml").read_text())
    sections |= {"model": {"name_or_path": "random:llama"}, "evaluate": {"lm_eval": {"tasks": ["run/task.yaml"]}}}
    (stranger / "recipe.yaml").write_text(yaml.safe_dump(sections))
    assert main(["evaluate", "run", "--quiet"]) == 2
    assert capsys.readouterr().err == (
        "error: evaluate.lm_eval.tasks: run/recipe.yaml names run/task.yaml, and a task in a file may run Python; read "
        "it, then write --trust-remote-code, or --recipe with a recipe that names it\n"
    )


def test_kernels_of_the_hub_are_code_too(stranger: Path, tmp_path: Path) -> None:
    sections = yaml.safe_load((stranger / "recipe.yaml").read_text())
    sections["model"] = {"name_or_path": "random:llama", "attn_implementation": "stranger/kernel"}
    (stranger / "recipe.yaml").write_text(yaml.safe_dump(sections))
    assert adapter_base_sections(stranger)[0].attn_implementation is None
    base = tmp_path / "model"
    shutil.copytree(locate("random:llama"), base)
    config = json.loads((base / "config.json").read_text()) | {"attn_implementation": "stranger/kernel"}
    (base / "config.json").write_text(json.dumps(config))
    assert main(["generate", str(base), "--prompt", "Hello"]) == 2


@pytest.mark.parametrize("source", ["adapter_config.json", "recipe.yaml"])
@pytest.mark.parametrize("name", ["stranger_module", "os", "stranger_package.inner", "not_there"])
def test_a_module_that_a_file_names_is_looked_at_and_not_imported(
    name: str, source: str, stranger: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    touch = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (tmp_path / "stranger_module.py").write_text(touch)
    (tmp_path / "stranger_package").mkdir()
    (tmp_path / "stranger_package/__init__.py").write_text(touch)
    if source == "recipe.yaml":
        (stranger / source).write_text(yaml.safe_dump({"model": {"name_or_path": f"package:{name}"}}))
    else:
        (stranger / "recipe.yaml").unlink()
        config = json.loads((stranger / source).read_text()) | {"base_model_name_or_path": f"package:{name}"}
        (stranger / source).write_text(json.dumps(config))
    section, _ = adapter_base_sections(stranger)
    with pytest.raises(ModelError) as refused:
        locate(section.name_or_path)
    missing = "is not installed; pip install 'finetune[quickstart]'"
    reason = "holds no GGUF model (no function `assemble`)" if name in ("stranger_module", "os") else missing
    assert str(refused.value) == f"model.name_or_path: the package {name} {reason}"
    assert not marker.exists()
    assert name not in sys.modules or name == "os"


def test_a_package_with_a_model_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "package_of_a_model.py").write_text(
        "from shutil import copyfile as assemble\nMODEL_NAME = 'm.gguf'\nEXPECTED_SHA256: str = '0' * 64\n"
    )
    with pytest.raises(TypeError):  # the import went well, and `assemble` is no real one
        locate("package:package_of_a_model")
