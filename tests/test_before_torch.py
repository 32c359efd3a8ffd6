"""bitsandbytes is imported without torch's compiler, and works; idle threads sleep."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.system import before_torch
from finetune.system.before_torch import _compile_later, _Deferred, prepare_imports


@pytest.mark.slow
def test_the_imports_of_a_run_load_no_compiler() -> None:
    script = """
import sys
from finetune.system.before_torch import prepare_imports

prepare_imports()
import bitsandbytes, torch

print("torch._inductor.compile_fx" in sys.modules, torch.compile.__module__)
weight = torch.linspace(-1, 1, 4096).view(64, 64)
packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
assert (bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max() < 0.2
"""
    # A process of its own: this one may have loaded the compiler.
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (process.returncode, process.stdout.splitlines()[-1]) == (0, "False torch"), process.stderr


def test_a_function_is_compiled_once_and_with_its_options() -> None:
    calls: list[Any] = []

    def compile_now(function: Any, **options: Any) -> Any:
        calls.append(options)
        return lambda *args, **kwargs: ("compiled", function(*args, **kwargs))

    @_compile_later(compile_now, dynamic=False)
    def double(x: int, times: int = 2) -> int:
        return x * times

    plain = _compile_later(compile_now, len)
    assert (double.__name__, calls) == ("double", [])
    assert (double(3), double(3, times=3), plain("ab")) == (("compiled", 6), ("compiled", 9), ("compiled", 2))
    assert calls == [{"dynamic": False}, {}]


def test_the_finder_is_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    prepare_imports()
    prepare_imports()
    assert sys.meta_path == [_Deferred]
    assert _Deferred.find_spec("torch") is None


@pytest.mark.parametrize(
    ("accelerator", "given", "policy"), [(False, None, "passive"), (True, None, None), (False, "active", "active")]
)
def test_idle_threads_sleep_on_a_cpu(
    accelerator: bool, given: str | None, policy: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = tmp_path / "nvidiactl"
    monkeypatch.setattr(before_torch, "_ACCELERATORS", (str(device),))
    if accelerator:
        device.touch()
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    prepare_imports()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
