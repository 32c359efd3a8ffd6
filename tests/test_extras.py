"""The command that installs what a part of the project needs."""

import importlib.metadata

import pytest

from finetune.system.extras import DISTRIBUTION, install_command, requirements


def test_the_command_names_the_packages_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["rich>=1", 'a-b[cpu]<2,>=1; extra == "x"', "c==3; extra == 'x'", "d; extra == 'y'", "e; os_name == 'no'"]
    asked: list[str] = []
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked.append(name) or wanted)
    assert install_command("x") == "pip install 'a-b[cpu]<2,>=1' c==3"
    assert [str(one) for one in requirements()] == ["rich>=1"]
    # On PyPI, `finetune` is another project.
    assert set(asked) == {"finetune-recipes"}


def test_in_a_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert install_command("gguf") == "pip install -e '.[gguf]'"


def test_an_extra_that_is_newer_than_what_is_installed() -> None:
    assert install_command("not-there-yet") == "pip install -e '.[not-there-yet]'"


@pytest.mark.parametrize("extra", ["quickstart", "gguf", "compressed", "mlx", "lm-eval"])
def test_each_extra_is_in_the_metadata(extra: str) -> None:
    assert extra in (importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or [])
    assert requirements(extra)
