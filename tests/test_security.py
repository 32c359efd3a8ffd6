"""Nothing of somebody else's files runs unless the user says so for this command (docs/security.md).

In place of an attack each file would write a marker.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import transformers.dynamic_module_utils as dynamic_modules
import yaml
from conftest import ROOT
from transformers import AutoModelForCausalLM

from finetune.cli.commands import main
from finetune.hub.payload import make_payload
from finetune.model.locate import locate
from finetune.model.provenance import adapter_base_sections
from finetune.recipe.load import load_recipe
from finetune.system.errors import ModelError
from finetune.system.extras import install_command
from finetune.system.terminal import quiet

SAMPLE_ROWS = ROOT / "data/chat_sample.jsonl"
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
    missing = f"is not installed; run {install_command('quickstart')}"
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


# ---------------------------------------------------------------------------------------------------------------
# The environment


@pytest.mark.slow
def test_a_value_from_the_environment_is_written_nowhere(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"PRIVATE_ROWS": "rows-of-a-client", "JUDGE": "judge-of-a-client", "NOISE": "0.987654321"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    Path(values["PRIVATE_ROWS"]).mkdir()
    shutil.copy(SAMPLE_ROWS, f"{values['PRIVATE_ROWS']}/chat.jsonl")
    judge = {"model": "${JUDGE}", "base_url": "http://127.0.0.1:1/v1", "reference": None}
    recipe = write_recipe(
        data={"train": [{"path": "${PRIVATE_ROWS}/*.jsonl"}], "eval_fraction": 0.1},
        training={"max_steps": 1, "adam_beta1": "${NOISE}", "report_to": "tensorboard", "save_strategy": "steps"},
        evaluate={"judge": judge},
    )
    assert main(["train", str(recipe)]) == 0
    assert main(["report", "run"]) == 0
    assert main(["check", str(recipe), "--json"]) == 0
    shown = capsys.readouterr()
    payload = make_payload(Path("run"), "you/run", "owner/base", ask=False)
    texts = {str(path): path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    texts |= {f"pushed {name}": text for name, text in payload.files.items() if isinstance(text, bytes)}
    texts |= {"stdout": shown.out.encode(), "stderr": shown.err.encode()}
    found = [(name, value) for name, text in texts.items() for value in values.values() if value.encode() in text]
    assert found == []
    for name in ("recipe.yaml", "ledger.json", "report.html", "README.md"):
        assert b"${PRIVATE_ROWS}" in texts[f"run/{name}"], name
    assert any("events" in name for name in texts)
    assert b"adam_beta1: ${NOISE}  # /" in texts["run/recipe.yaml"]
    saved = load_recipe("run/recipe.yaml")
    assert (saved.training["adam_beta1"], saved.data.train[0].path) == (0.987654321, "rows-of-a-client/*.jsonl")


def test_a_base_from_the_environment_is_found_again(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stranger / "recipe.yaml").write_text("model: {name_or_path: '${BASE}'}\n")
    monkeypatch.setenv("BASE", "random:llama")
    assert adapter_base_sections(stranger)[0].name_or_path == "random:llama"
    monkeypatch.delenv("BASE")
    with pytest.raises(ModelError) as refused:
        adapter_base_sections(stranger)
    assert str(refused.value) == (
        f"{stranger / 'recipe.yaml'}: its base is ${{BASE}}, which is not set in the environment; export it, or write "
        "--base"
    )


def test_an_evaluation_follows_no_link_of_the_run(
    stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (stranger / "evaluation").symlink_to(tmp_path / "elsewhere")
    assert main(["evaluate", str(stranger)]) == 2
    line = f"error: {stranger}/evaluation is a link, which may lead anywhere; write --output DIR\n"
    assert capsys.readouterr().err == line
    assert not list((tmp_path / "elsewhere").iterdir())
