"""Checks of this machine: versions, GPUs, memory, disk and the Hub, each with its state and what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement

from finetune.system import devices
from finetune.system.devices import machine_memory, usable_cores
from finetune.system.errors import first_line
from finetune.system.extras import DISTRIBUTION, install_command, requirements
from finetune.system.numbers import GIB, memory

OK, NOTE, WRONG = "ok", "note", "wrong"
# Disk room for a base model, its cache and a first run.
_ROOM = 20 * GIB


@dataclass(frozen=True)
class CheckResult:
    """One line of the report, and one object of its JSON form.

    Attributes:
        name: What was checked.
        state: "ok", "note" or "wrong".
        found: What was found.
        do: What to do about it; empty if nothing helps or is needed.
    """

    name: str
    state: str
    found: str
    do: str = ""


def run_checks() -> Iterator[CheckResult]:
    """The results of all checks, one after another, the slow one (the Hub) last; a check that fails is "wrong"."""
    for check in (_python, _packages, _extras, _gpus, _flash_attention, _four_bit, _memory, _disk, _hub):
        try:
            yield from check()
        except Exception as error:
            yield CheckResult(check.__name__.strip("_"), WRONG, f"{type(error).__name__}: {first_line(error)}")


def as_text(result: CheckResult) -> str:
    """A result as a line."""
    do = f"; {result.do}" if result.do else ""
    return f"{result.state:<5}  {result.name:<13}  {result.found}{do}"


def as_json(results: list[CheckResult]) -> str:
    """All results as a JSON list."""
    return json.dumps([asdict(result) for result in results], ensure_ascii=False, indent=1)


def _python() -> Iterator[CheckResult]:
    good = sys.version_info >= (3, 11)
    do = "" if good else "make an environment with 3.11 or newer"
    yield CheckResult("python", OK if good else WRONG, platform.python_version(), do)


def _installed(wanted: Requirement) -> tuple[str, bool]:
    """The installed version of a package, empty if there is none, and whether it meets the requirement."""
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return "", False
    return version, wanted.specifier.contains(version, prereleases=True)


def _packages() -> Iterator[CheckResult]:
    for wanted in requirements():
        version, good = _installed(wanted)
        do = "" if good else f'run pip install "{wanted.name}{wanted.specifier}"'
        found = version if good else f"{version} is not {wanted.specifier}" if version else "is not installed"
        yield CheckResult(wanted.name, OK if good else WRONG, found, do)


def _extras() -> Iterator[CheckResult]:
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        if extra == "dev":
            continue
        if missing := [wanted.name for wanted in requirements(extra) if not _installed(wanted)[1]]:
            do = f"for it run {install_command(extra)}"
            yield CheckResult(f"[{extra}]", NOTE, f"{', '.join(missing)} not installed, or of another release", do)
        else:
            yield CheckResult(f"[{extra}]", OK, "installed")


def _gpus() -> Iterator[CheckResult]:
    import torch

    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    for i in range(torch.cuda.device_count()):
        device = devices.device_of(f"cuda:{i}")
        free, total = torch.cuda.mem_get_info(i)
        capability = ".".join(map(str, device.capability or ()))
        line = f"{device.name}, {memory(total)}, {memory(free)} free, compute capability {capability}"
        line += f", CUDA {torch.version.cuda}{_driver()}"
        busy = free < 0.9 * total
        do = "another program holds memory on it" if busy else ""
        yield CheckResult(f"gpu {i}", NOTE if busy else OK, line, do)
        if device.bf16:
            yield CheckResult(f"gpu {i} bf16", OK, "computes in bfloat16")
        else:
            do = "model.dtype: auto takes float16"
            yield CheckResult(f"gpu {i} bf16", NOTE, "does not compute in bfloat16", do)


def _no_gpu() -> CheckResult:
    """The result where torch sees no GPU: `nvidia-smi` tells whether there is one that it cannot use."""
    import torch

    tool = shutil.which("nvidia-smi")
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False) if tool else None
    if not listed or listed.returncode or not listed.stdout.strip():
        return CheckResult("gpu", NOTE, "none; training runs on the CPU, in float32, for small models")
    name = listed.stdout.split("(")[0].strip()
    found, do = (
        f"{name} is here, and torch {torch.__version__} is built for CPUs",
        "install torch for CUDA (pytorch.org)",
    )
    if torch.version.cuda is not None:
        found = f"{name} is here, and torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use it"
        do = "update the driver, or install a torch for its CUDA (pytorch.org)"
    return CheckResult("gpu", WRONG, found, do)


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return next((f", driver {word}" for word in words if word[0].isdigit() and "." in word), "")


def _flash_attention() -> Iterator[CheckResult]:
    import torch

    device = devices.device_of()
    if device.capability is None:
        return
    if importlib.util.find_spec("flash_attn"):
        yield CheckResult("flash-attn", OK, importlib.metadata.version("flash_attn"))
    elif device.capability >= (8, 0):
        do = "for long rows pip install flash-attn, and model.attn_implementation: flash_attention_2"
        yield CheckResult("flash-attn", NOTE, f"not installed; torch {torch.__version__}'s own is used", do)


def _four_bit() -> Iterator[CheckResult]:
    """Quantises a small weight to NF4 and back where models will be loaded."""
    import bitsandbytes.functional as bnb
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=place).view(64, 64)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    error = float((bnb.dequantize_4bit(packed, state) - weight).abs().mean())
    if error < 0.06:
        yield CheckResult("4 bit", OK, f"bitsandbytes' nf4 on the {place} works")
    else:
        found = f"bitsandbytes' nf4 on the {place} is off by {error:.2g} on average"
        yield CheckResult("4 bit", WRONG, found, "install another release of bitsandbytes")


def _memory() -> Iterator[CheckResult]:
    total, free = machine_memory()
    short = free < 4 * GIB
    do = "close other programs; a base model needs its size" if short else ""
    yield CheckResult("memory", NOTE if short else OK, f"{memory(free)} free of {memory(total)}", do)
    threads = os.environ.get("OMP_NUM_THREADS")
    limited = f", of which torch uses {threads} (OMP_NUM_THREADS)" if threads else ""
    yield CheckResult("cores", OK, f"{usable_cores()}{limited}")


def _disk() -> Iterator[CheckResult]:
    from huggingface_hub import constants

    places = {
        "disk": Path.cwd(),
        "disk: models": Path(constants.HF_HUB_CACHE),
        "disk: temp": Path(tempfile.gettempdir()),
    }
    for name, folder in places.items():
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(existing).free
        line = f"{memory(free)} free in {folder}"
        if not os.access(existing, os.W_OK):
            yield CheckResult(name, WRONG, f"{folder} cannot be written to", "change its owner, or HF_HOME")
        elif free < _ROOM and name != "disk: temp":
            do = "HF_HOME names another place" if name == "disk: models" else "make room for checkpoints"
            yield CheckResult(name, NOTE, line, do)
        else:
            yield CheckResult(name, OK, line)


def _hub() -> Iterator[CheckResult]:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield CheckResult("hub", NOTE, "HF_HUB_OFFLINE is set", "unset it to fetch models and to push")
        return
    token = huggingface_hub.get_token()
    answer = _status(constants.ENDPOINT, token)
    if isinstance(answer, str):
        do = "for models and rows of the Hub look at the network, a proxy (HTTPS_PROXY), or HF_ENDPOINT"
        yield CheckResult("hub", NOTE, f"{constants.ENDPOINT} cannot be reached: {answer}", do)
    elif not token:
        do = "for gated models, Gemma's too, and to push: hf auth login"
        yield CheckResult("hub", NOTE, f"{constants.ENDPOINT} is reached; not logged in", do)
    elif answer[0] in (401, 403):
        yield CheckResult("hub", WRONG, "the token is refused: expired or revoked", "run hf auth login")
    else:
        yield CheckResult("hub", OK, f"{constants.ENDPOINT} is reached; logged in as {answer[1]}")


def _status(endpoint: str, token: str | None) -> tuple[int, str] | str:
    """The HTTP status of the Hub's `whoami` and the user's name; one line that says why where it does not answer."""
    import httpx2

    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        reply = httpx2.get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=5, follow_redirects=True)
        return reply.status_code, str(reply.json().get("name", "")) if reply.is_success else ""
    except (httpx2.HTTPError, ValueError) as error:
        return first_line(error)
