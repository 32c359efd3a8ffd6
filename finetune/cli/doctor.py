"""This machine as a list: what is right, what could be better, what must be mended, each with what to do."""

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

from finetune.system import devices
from finetune.system.devices import GIB, machine_memory

OK, NOTE, WRONG = "ok", "note", "wrong"
# What a first base model, its cache and a run take.
_ROOM = 20 * GIB


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is (ok, note, wrong), what was found, and what to do where that helps."""

    name: str
    state: str
    found: str
    do: str = ""


def examine() -> Iterator[Finding]:
    """Everything that a run will need of this machine, one thing after the other; slow ones (the Hub) last."""
    for look in (_python, _packages, _extras, _cards, _flash, _four_bit, _memory, _disk, _hub):
        try:
            yield from look()
        except Exception as error:  # what breaks while it is looked at is what is wrong
            line = next(iter(str(error).strip().splitlines()), "")
            yield Finding(look.__name__.strip("_"), WRONG, f"{type(error).__name__}: {line}")


def as_text(finding: Finding) -> str:
    """A finding as a line."""
    do = f"; {finding.do}" if finding.do else ""
    return f"{finding.state:<5}  {finding.name:<13}  {finding.found}{do}"


def as_json(findings: list[Finding]) -> str:
    """All findings as a JSON list."""
    return json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=1)


def _python() -> Iterator[Finding]:
    version, good = platform.python_version(), sys.version_info >= (3, 11)
    yield Finding(
        "python", OK if good else WRONG, version, "" if good else "make an environment with 3.11 or newer"
    )


def _packages() -> Iterator[Finding]:
    """The releases that are here against those that the project was tested with, which its metadata names."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("finetune") or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        plain = f"{wanted.name}{wanted.specifier}"
        try:
            here = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(wanted.name, WRONG, "is not installed", f'run pip install "{plain}"')
            continue
        if wanted.specifier.contains(here, prereleases=True):
            yield Finding(wanted.name, OK, here)
        else:
            yield Finding(
                wanted.name, WRONG, f"{here} is not {wanted.specifier}", f'run pip install "{plain}"'
            )


def _extras() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    missing: dict[str, list[str]] = {}
    metadata = importlib.metadata.metadata("finetune")
    for extra in metadata.get_all("Provides-Extra") or []:
        if extra == "dev":
            continue
        missing[extra] = []
        for text in importlib.metadata.requires("finetune") or []:
            wanted = Requirement(text)
            if not wanted.marker or wanted.marker.evaluate({"extra": ""}):
                continue
            if wanted.marker.evaluate({"extra": extra}):
                try:
                    here = importlib.metadata.version(wanted.name)
                    good = wanted.specifier.contains(here, prereleases=True)
                except importlib.metadata.PackageNotFoundError:
                    good = False
                missing[extra] += [] if good else [wanted.name]
    for extra, names in missing.items():
        if names:
            do = f"for it run pip install 'finetune[{extra}]'"
            yield Finding(f"[{extra}]", NOTE, f"{', '.join(names)} not installed, or of another release", do)
        else:
            yield Finding(f"[{extra}]", OK, "installed")


def _cards() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        tool = shutil.which("nvidia-smi")
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False) if tool else None
        if listed and listed.returncode == 0 and listed.stdout.strip():
            name = listed.stdout.split("(")[0].strip()
            build = torch.version.cuda
            why = f"and torch {torch.__version__}, built for CUDA {build}, cannot use it"
            do = "update the driver, or install a torch for its CUDA (pytorch.org)"
            if build is None:
                why, do = (
                    f"and torch {torch.__version__} is built for CPUs",
                    "install torch for CUDA (pytorch.org)",
                )
            yield Finding("gpu", WRONG, f"{name} is here, {why}", do)
        else:
            yield Finding("gpu", NOTE, "none; training runs on the CPU, in float32, for small models")
        return
    for i in range(torch.cuda.device_count()):
        device = devices.device_of(f"cuda:{i}")
        free, total = torch.cuda.mem_get_info(i)
        size = f"{total / GIB:.1f} GiB, {free / GIB:.1f} free"
        capability = ".".join(map(str, device.capability or ()))
        line = f"{device.name}, {size}, compute capability {capability}, CUDA {torch.version.cuda}{_driver()}"
        busy = free < 0.9 * total
        yield Finding(
            f"gpu {i}", NOTE if busy else OK, line, "another program holds memory on it" if busy else ""
        )
        yield (
            Finding(f"gpu {i} bf16", OK, "computes in bfloat16")
            if device.bf16
            else Finding(
                f"gpu {i} bf16", NOTE, "does not compute in bfloat16", "model.dtype: auto takes float16"
            )
        )


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return next((f", driver {word}" for word in words if word[0].isdigit() and "." in word), "")


def _flash() -> Iterator[Finding]:
    import torch

    device = devices.device_of()
    if device.capability is None:
        return
    if importlib.util.find_spec("flash_attn"):
        yield Finding("flash-attn", OK, importlib.metadata.version("flash_attn"))
    elif device.capability >= (8, 0):
        do = "for long rows pip install flash-attn, and model.attn_implementation: flash_attention_2"
        yield Finding("flash-attn", NOTE, f"not installed; torch {torch.__version__}'s own is used", do)


def _four_bit() -> Iterator[Finding]:
    """A weight taken to 4 bit and back where models will be."""
    import bitsandbytes.functional as four_bit
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 4096, device=place).view(64, 64)
    quantised, state = four_bit.quantize_4bit(weight, quant_type="nf4")
    lost = float((four_bit.dequantize_4bit(quantised, state) - weight).abs().mean())
    good = lost < 0.06
    yield Finding(
        "4 bit",
        OK if good else WRONG,
        f"bitsandbytes' nf4 on the {place} {'works' if good else f'is off by {lost:.2g} on average'}",
        "" if good else "install another release of bitsandbytes",
    )


def _memory() -> Iterator[Finding]:
    total, free = machine_memory()
    line = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    short = free < 4 * GIB
    yield Finding(
        "memory",
        NOTE if short else OK,
        line,
        "close other programs; a base model needs its size" if short else "",
    )
    yield Finding("cores", OK, f"{os.cpu_count()}{_threads()}")


def _threads() -> str:
    threads = os.environ.get("OMP_NUM_THREADS")
    return f", of which torch uses {threads} (OMP_NUM_THREADS)" if threads else ""


def _disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    places = {
        "disk": Path.cwd(),
        "disk: models": Path(constants.HF_HUB_CACHE),
        "disk: temp": Path(tempfile.gettempdir()),
    }
    for name, folder in places.items():
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        line = f"{free / GIB:.1f} GiB free in {folder}"
        if not os.access(there, os.W_OK):
            yield Finding(name, WRONG, f"{folder} cannot be written to", "change its owner, or HF_HOME")
        elif free < _ROOM and name != "disk: temp":
            do = "HF_HOME names another place" if name == "disk: models" else "make room for checkpoints"
            yield Finding(name, NOTE, line, do)
        else:
            yield Finding(name, OK, line)


def _hub() -> Iterator[Finding]:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", NOTE, "HF_HUB_OFFLINE is set", "unset it to fetch models and to push")
        return
    token = huggingface_hub.get_token()
    answer = _status(constants.ENDPOINT, token)
    if isinstance(answer, str):
        do = "for models and rows of the Hub look at the network, a proxy (HTTPS_PROXY), or HF_ENDPOINT"
        yield Finding("hub", NOTE, f"{constants.ENDPOINT} cannot be reached: {answer}", do)
    elif not token:
        do = "for gated models, Gemma's too, and to push: hf auth login"
        yield Finding("hub", NOTE, f"{constants.ENDPOINT} is reached; not logged in", do)
    elif answer[0] in (401, 403):
        yield Finding("hub", WRONG, "the token is refused: expired or revoked", "run hf auth login")
    else:
        yield Finding("hub", OK, f"{constants.ENDPOINT} is reached; logged in as {answer[1]}")


def _status(endpoint: str, token: str | None) -> tuple[int, str] | str:
    """Who the Hub says we are, with its status; why not, in words."""
    import httpx2

    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        reply = httpx2.get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=5, follow_redirects=True)
        return reply.status_code, str(reply.json().get("name", "")) if reply.is_success else ""
    except (httpx2.HTTPError, ValueError) as error:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
