"""Shared by all tests: no network, one cache of tiny models, one thread, forked processes, recipes on disk."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
}
# Tiny models: a second thread costs more than it gives. Where a process takes two all the same, one that waits must not
# spin: beside other processes that took four times the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import forks
import pytest
import yaml
from hypothesis import settings

from finetune.system import fresh_process, limited
from finetune.system.before_torch import prepare_imports

prepare_imports()

ROOT = Path(__file__).parents[1]
USER_CACHE = os.environ.get("XDG_CACHE_HOME")
# `make test`: fewer examples, drawn anew for each commit (`--hypothesis-seed`). One that fails becomes an `@example`.
settings.register_profile("ci", max_examples=25, derandomize=False, deadline=None, print_blob=True)


def examples(count: int) -> int:
    """`max_examples` of a test: `count` by default, a share of it in a profile with fewer than hypothesis's 100."""
    return max(1, count * settings().max_examples // 100)


# The files that take longest, which begin first, so that no worker is idle at the end.
LONGEST = (
    *("test_distributed", "test_gemma", "test_export", "test_plan", "test_survival", "test_merge", "test_mlx"),
    *("test_recipes_family", "test_train", "test_push", "test_referee", "test_rules", "test_evaluate", "test_wheel"),
    *("test_packing", "test_imatrix", "test_gguf_write", "test_preference_runs", "test_notebook", "test_gguf_export"),
    *("test_rehearse", "test_language", "test_gguf_vocabulary", "test_gguf_adapter", "test_gguf_llama", "test_data"),
    *("test_adapters", "test_track"),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if getattr(config.option, "dist", "no") == "load":
        # `pytest -n 2`: a file's tests stay together and share its fixtures; the order of files is LONGEST's.
        config.option.dist, config.option.loadscopereorder = "loadfile", False
    if sys.platform == "linux":
        server = forks.start_server()  # xdist's workers use it, too

        def stop() -> None:
            server.communicate()

        config.add_cleanup(stop)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, which xdist's workers share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_cache(shared: Path) -> Iterator[None]:
    """Tiny models are made anew for each session: a cached one could be older than the code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield


@pytest.fixture
def user_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real Gemma is converted from its GGUF once for all sessions, by whoever is first."""
    if USER_CACHE:
        monkeypatch.setenv("XDG_CACHE_HOME", USER_CACHE)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


@pytest.fixture(scope="session", autouse=True)
def _forked() -> Iterator[Callable[..., Any]]:
    """`fresh_process.call` forks its processes, which saves the seconds that their imports take."""
    cold = fresh_process._start

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh_process, "_start", forks.start)
        yield cold


@pytest.fixture(autouse=True)
def _forks_go_on() -> Iterator[None]:
    """Removes what a test has set of the variables that upstream reads when it is imported.

    With other values each later process of this worker starts cold. lm_eval 0.4 sets HF_XET_HIGH_PERFORMANCE.
    """
    before = forks.read_at_import(os.environ)
    yield
    for name in forks.read_at_import(os.environ).keys() - before.keys():
        os.environ.pop(name, None)


_frozen: set[str] = set()


@pytest.fixture(autouse=True)
def _imports_are_frozen() -> None:
    """Garbage is not searched for among what earlier tests have imported: that took 40% of the time of a short run."""
    if len(sys.modules) > len(_frozen) + 100:
        _frozen.update(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _trusted() -> Iterator[Callable[..., int]]:
    """Tests' own chat templates and expressions are not tried in a process of their own first."""
    run = limited.run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limited, "run", lambda module, job, limits: 0)
        yield run


@pytest.fixture
def cold(_forked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh processes start as users' do: by importing all that they need."""
    monkeypatch.setattr(fresh_process, "_start", _forked)


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers that an evaluation samples, which take longer than the rest of a tiny run, have four tokens."""
    monkeypatch.setattr("finetune.train.callbacks.trackers._NEW_TOKENS", 4)


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_samples: None) -> Callable[..., Path]:
    """Writes a recipe for a tiny model into an empty working directory; a section given as None is left out."""
    monkeypatch.chdir(tmp_path)

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        recipe: dict[str, Any] = {
            "model": {"name_or_path": "random:gemma3"},
            "lora": {"r": 4, "lora_alpha": 8},
            "data": {"train": [{"path": str(ROOT / "data" / "chat_sample.jsonl")}]},
            "training": {
                "output_dir": "run",
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
                "max_length": 128,
                "logging_steps": 1,
                "save_strategy": "no",
            },
        }
        for section, values in sections.items():
            if values is None and section == "lora":
                recipe["lora"] = None  # all weights are trained
            elif values is None:
                recipe.pop(section, None)
            elif section == "data" or not isinstance(values, dict):
                recipe[section] = values
            else:
                recipe[section] = recipe.get(section, {}) | values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write
