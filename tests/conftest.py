"""What all tests share: no network, one cache of tiny models, one thread, recipes on disk."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
}
# Tiny models: a second thread costs more than it gives.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml

ROOT = Path(__file__).parents[1]
USER_CACHE = os.environ.get("XDG_CACHE_HOME")


@pytest.fixture(scope="session", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models are made anew for each session: a cached one could be older than the code."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
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
            if values is None:
                recipe.pop(section, None)
            elif section == "data":
                recipe[section] = values
            else:
                recipe[section] = recipe.get(section, {}) | values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write
