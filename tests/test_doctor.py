"""The checks of `finetune doctor`, on machines that are made up."""

import importlib.metadata
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from finetune.cli import doctor
from finetune.cli.commands import main
from finetune.system import devices


class Hub(BaseHTTPRequestHandler):
    """Knows one token."""

    def do_GET(self) -> None:
        known = self.headers.get("authorization") == "Bearer good"
        body = json.dumps({"name": "somebody"} if known else {"error": "Invalid credentials"}).encode()
        self.send_response(200 if known and self.path == "/api/whoami-v2" else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield address
    server.shutdown()
    server.server_close()


def lines(look: Iterator[doctor.CheckResult]) -> list[str]:
    return [" ".join(doctor.as_text(finding).split()) for finding in look]


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("good", "ok hub {} is reached; logged in as somebody"),
        ("old", "wrong hub the token is refused: expired or revoked; run hf auth login"),
        (None, "note hub {} is reached; not logged in; for gated models, Gemma's too, and to push: hf auth login"),
    ],
)
def test_the_hub(hub: str, token: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert lines(doctor._hub()) == [said.format(hub)]


def test_a_hub_that_is_not_there(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    [found] = lines(doctor._hub())
    assert found.startswith("note hub http://127.0.0.1:1 cannot be reached: ")
    assert found.endswith("look at the network, a proxy (HTTPS_PROXY), or HF_ENDPOINT")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lines(doctor._hub()) == ["note hub HF_HUB_OFFLINE is set; unset it to fetch models and to push"]


def test_releases_are_held_against_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    here = importlib.metadata.version("PyYAML")
    wanted = ["PyYAML>=5,<7", "rich<1", "nosuchpackage>=2", "pytest>=999; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    rich = importlib.metadata.version("rich")
    assert lines(doctor._packages()) == [
        f"ok PyYAML {here}",
        f'wrong rich {rich} is not <1; run pip install "rich<1"',
        'wrong nosuchpackage is not installed; run pip install "nosuchpackage>=2"',
    ]
    wanted[3] = "nosuchpackage>=2; extra == 'quickstart'"
    assert (
        "note [quickstart] nosuchpackage not installed, or of another release; "
        "for it run pip install 'nosuchpackage>=2'"
    ) in lines(doctor._extras())


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert lines(doctor._gpus()) == [
        f"wrong gpu GPU 0: Tesla T4 is here, and torch {torch.__version__} is built for CPUs; "
        "install torch for CUDA (pytorch.org)"
    ]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, cannot use it; update the driver" in lines(doctor._gpus())[0]
    tool.unlink()
    assert lines(doctor._gpus()) == ["note gpu none; training runs on the CPU, in float32, for small models"]


def test_gpus_and_what_they_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up machine with a T4 that is in use, and an L4."""
    facts = {"cuda:0": ("Tesla T4", False, (7, 5)), "cuda:1": ("NVIDIA L4", True, (8, 9))}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ([2**33, 22 * 2**30][i], [2**34, 23 * 2**30][i]))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_driver", lambda: ", driver 580.1")
    monkeypatch.setattr(devices, "device_of", lambda place=None: devices.Device(*facts[place or "cuda:1"]))
    assert lines(doctor._gpus()) == [
        "note gpu 0 Tesla T4, 16.0 GiB, 8.0 GiB free, compute capability 7.5, CUDA 13.0, driver 580.1; "
        "another program holds memory on it",
        "note gpu 0 bf16 does not compute in bfloat16; model.dtype: auto takes float16",
        "ok gpu 1 NVIDIA L4, 23.0 GiB, 22.0 GiB free, compute capability 8.9, CUDA 13.0, driver 580.1",
        "ok gpu 1 bf16 computes in bfloat16",
    ]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    [flash] = lines(doctor._flash_attention())
    assert flash.endswith("pip install flash-attn, and model.attn_implementation: flash_attention_2")


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    gib = 2**30
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=3 * gib))
    assert [line.split()[0] for line in lines(doctor._disk())] == ["note", "note", "ok"]
    monkeypatch.setattr(doctor.os, "access", lambda place, how: False)
    assert {line.split()[0] for line in lines(doctor._disk())} == {"wrong"}
    memory = SimpleNamespace(total=16 * gib, available=3 * gib)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert lines(doctor._memory())[0].startswith("note memory 3.0 GiB free of 16.0 GiB; close other programs")


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that fails is a result, too, and the others still run."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "_packages", lambda: iter([doctor.CheckResult("torch", "ok", "1")]))

    def _four_bit() -> Iterator[doctor.CheckResult]:
        raise RuntimeError("no kernel\nfor this")

    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name": "4 bit", "state": "ok", "found": "bitsandbytes' nf4 on the cpu works", "do": ""} in found
    monkeypatch.setattr(doctor, "_four_bit", _four_bit)
    assert main(["doctor", "--quiet"]) == 2
    assert capsys.readouterr().out == "wrong  four_bit       RuntimeError: no kernel\n"
