"""The built wheel in a fresh environment outside the clone: it contains the templates, pages and sample rows."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("build", reason="needs the extra dev")


@pytest.mark.slow
def test_the_wheel_checks_trains_and_generates(tmp_path: Path) -> None:
    clone = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "finetune", "data"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name) if clone.exists() else (clone.mkdir(), copy(ROOT / name, clone / name))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(clone)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("finetune_recipes-*.whl")
    shutil.rmtree(clone)

    # The dependencies are this environment's; the project itself is the wheel's alone.
    venv.create(tmp_path / "env", system_site_packages=False, symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    ours = Path(sys.prefix) / "lib" / site.parent.name / "site-packages"
    shutil.unpack_archive(wheel, site, "zip")
    (site / "dependencies.pth").write_text(f"{ours}\n")
    python = str(tmp_path / "env" / "bin" / "python")
    work = tmp_path / "work"
    work.mkdir()

    def finetune(*arguments: str, code: str = "") -> str:
        """A command, or code in place of it, of the wheel's package; what it printed."""
        start = ["-c", code] if code else ["-m", "finetune"]
        done = subprocess.run(
            [python, "-P", *start, *arguments],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": ""},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = finetune(code="import finetune; print(finetune.__file__)")
    assert where.strip() == str(site / "finetune" / "__init__.py")
    shutil.copy(ROOT / "recipes" / "cpu_smoke.yaml", work)
    shutil.copytree(ROOT / "data", work / "data")
    overrides = ["cpu_smoke.yaml", "training.max_steps=1", "model.chat_template=gemma"]
    assert finetune("check", *overrides).startswith("cpu_smoke.yaml: ok\n")
    # One process for all that import much.
    train, report = ["train", *overrides], ["report", "runs/cpu_smoke"]
    generate = ["generate", "runs/cpu_smoke", "--prompt", "Hello", "--max-new-tokens", "3"]
    run = f"main({train}) or main({generate}) or main({report})"
    finetune(code=f"from finetune.cli.commands import main; exit({run})")
    assert (work / "runs" / "cpu_smoke" / "README.md").exists()
    assert "<svg" in (work / "runs" / "cpu_smoke" / "report.html").read_text()
