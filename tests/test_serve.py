"""`finetune serve`: what serves what, what is refused, and servers that start, answer and end."""

import importlib.util
import json
import shutil
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_tiny
import peft
import psutil
import pytest
from processes import Command, Processes
from transformers import AutoModelForCausalLM

from finetune.cli import serve
from finetune.cli.commands import main
from finetune.model.locate import locate
from finetune.system import server_process
from finetune.system.extras import install_command
from finetune.system.terminal import quiet

PYTHON = sys.executable
TAIL = "--host 127.0.0.1 --port 8000"
# A server that answers, does not end on SIGTERM, and has started a process of its own.
STUBBORN = f"""#!{PYTHON} -SE
import http.server, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of random:llama, of rank 12, with the files of a run that serving reads."""
    folder = tmp_path_factory.mktemp("runs") / "chats"
    with quiet():
        config = peft.LoraConfig(r=12, target_modules=["q_proj"])
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(locate("random:llama")), config)
        model.save_pretrained(folder)
    base = Path(locate("random:llama"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(base / name, folder)
    checkpoint = folder / "checkpoint-5"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, checkpoint)
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = gguf_tiny.make_tokenizer()
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return gguf_tiny.write_gguf(gguf_tiny.make_model(len(tokenizer)), tokenizer, file)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with a folder `bin` before all others of PATH."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(PYTHON).parent}:/usr/bin:/bin")
    return tmp_path


@pytest.fixture
def program(workdir: Path) -> Callable[..., None]:
    """Puts a program on PATH."""

    def write(name: str, text: str = "#!/bin/sh\n") -> None:
        file = workdir / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    return write


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command; its only line, on standard output or as an error."""

    def run(*words: str) -> str:
        code = main(["serve", *map(str, words)])
        out = capsys.readouterr()
        assert (code, out.out) == (2, "") or (code, out.err) == (0, "")
        return out.out or out.err

    return run


def copied(folder: Path, config: dict[str, Any]) -> Path:
    """random:llama with other values in its config."""
    shutil.copytree(locate("random:llama"), folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | config))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------------------------------------------------
# What serves what


def test_an_adapter_by_vllm(adapter: Path, workdir: Path, said: Callable[..., str]) -> None:
    base = locate("random:llama")
    assert said(adapter, "--print", "--base", base) == (
        f"vllm serve {base} --enable-lora --max-lora-rank 16 --lora-modules "
        f'\'{{"name": "chats", "path": "{adapter}"}}\' --tokenizer {adapter} --generation-config {adapter} {TAIL}\n'
    )
    checkpoint = adapter / "checkpoint-5"
    assert said(checkpoint, "--print", "--host", "0.0.0.0", "--port", "1", "--trust-remote-code", "--quiet") == (
        f"vllm serve {base} --enable-lora --max-lora-rank 16 --lora-modules "
        f'\'{{"name": "chats-checkpoint-5", "path": "{checkpoint}"}}\' --generation-config {adapter} '
        "--host 0.0.0.0 --port 1 --trust-remote-code\n"
    )


def test_an_adapter_that_nothing_here_serves(adapter: Path, workdir: Path, said: Callable[..., str]) -> None:
    cure = f"run finetune merge {adapter} --output DIR, then finetune serve DIR\n"
    assert said(adapter) == (f"error: {adapter}: an adapter, which vLLM would serve, but it is not installed; {cure}")
    dora = workdir / "dora"
    shutil.copytree(adapter, dora)
    config = json.loads((dora / "adapter_config.json").read_text()) | {"use_dora": True}
    (dora / "adapter_config.json").write_text(json.dumps(config))
    assert said("dora", "--print") == (
        "error: dora: an adapter that no server takes: vLLM 0.33.0 refuses it: DoRA: it has no DoRA; "
        "run finetune merge dora --output DIR, then finetune serve DIR\n"
    )


def test_whole_models_by_vllm_or_transformers(
    workdir: Path, said: Callable[..., str], program: Callable[..., None]
) -> None:
    base = locate("random:llama")
    assert said("random:llama", "--print") == f"transformers serve {base} {TAIL}\n"
    copied(Path("nf4"), {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    program("vllm")
    assert said(base, "--print") == f"vllm serve {base} --served-model-name {Path(base).name} {TAIL}\n"
    assert said("nf4", "--print") == f"transformers serve nf4 {TAIL}\n"


def test_mlx_models_by_mlx_lm(
    workdir: Path, said: Callable[..., str], program: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another name than that of the mlx-lm which may be installed beside this Python.
    monkeypatch.setitem(serve._EXECUTABLES, "mlx-lm", "mlx_lm.of_a_test")
    copied(Path("mlx-4bit"), {"quantization": {"group_size": 64, "bits": 4}})
    copied(Path("mlx-bf16"), {})
    assert said("mlx-bf16", "--print") == f"transformers serve mlx-bf16 {TAIL}\n"
    assert said("mlx-4bit") == f"error: mlx-4bit: mlx-lm is not installed; run {install_command('mlx')}\n"
    program("mlx_lm.of_a_test")
    assert said("mlx-bf16", "--print") == f"mlx_lm.of_a_test --model mlx-bf16 {TAIL}\n"
    copied(Path("code"), {"quantization": {"group_size": 64, "bits": 4}, "model_file": "model.py"})
    # mlx-lm runs that file without being asked.
    assert said("code", "--print") == (
        "error: code: its config.json names a Python file (model_file), which mlx-lm would run; read it, then write "
        "--trust-remote-code\n"
    )


def test_gguf_files_by_llama_cpp(
    workdir: Path, said: Callable[..., str], program: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("gguf")
    folder.mkdir()
    names = ("m-Q2_K", "m-Q4_K_M", "imatrix", "mmproj-x", "m-adapter", "a-00001-of-00002", "a-00002-of-00002")
    for name in names:
        (folder / f"{name}.gguf").touch()
    monkeypatch.setattr(serve, "_is_installed", lambda program: False)
    assert said("gguf/m-Q2_K.gguf").startswith(
        "error: gguf/m-Q2_K.gguf: llama-server is not on PATH; install llama.cpp"
    )
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    module = "-P -m finetune.export.gguf.llama_cpp.http_server"
    assert said("gguf", "--print") == (f"{PYTHON} {module} -m gguf/m-Q4_K_M.gguf --alias m-Q4_K_M {TAIL}\n")
    monkeypatch.setenv("PATH", f"{workdir / 'bin'}")
    program("llama-server")
    # A GGUF file holds no code.
    words = ("gguf/m-Q2_K.gguf", "--print", "--trust-remote-code", "--quiet")
    assert said(*words) == f"llama-server -m gguf/m-Q2_K.gguf --alias m-Q2_K --jinja {TAIL}\n"
    assert serve.find_served(serve.Request("gguf/m-Q2_K.gguf"), print).note == (
        "other GGUF files beside it: m-Q4_K_M.gguf, a-00001-of-00002.gguf"
    )


def test_what_is_refused(adapter: Path, workdir: Path, said: Callable[..., str]) -> None:
    Path("x-adapter.gguf").touch()
    for folder in ("half/checkpoint-2", "exports/bf16", "exports/gguf", "empty", "b@se"):
        Path(folder).mkdir(parents=True)
    Path("exports/bf16/config.json").write_text("{}")
    Path("exports/gguf/m.gguf").touch()
    copied(Path("kernel"), {"attn_implementation": "stranger/kernel"})
    copied(Path("a@b"), {})
    for words, line in {
        "x.gguf": "x.gguf: there is no such file; write a GGUF file, or a folder with one",
        "x-adapter.gguf": "x-adapter.gguf: an adapter without its base; write llama-server -m BASE.gguf --lora "
        "x-adapter.gguf, or export the run with --format gguf:Q4_K_M",
        "exports": "exports: holds several models; write one of exports/bf16, exports/gguf",
        "empty": "empty: neither a finished run (adapter_config.json), nor a model (config.json), nor a folder of GGUF "
        "files",
        "exports/gguf --base x": "--base x: exports/gguf is no run with an adapter; leave out --base",
        "a@b": "a@b: transformers serve takes no path with an @; rename the folder",
        "kernel": "model.name_or_path: the config.json of kernel names the attention kernel stranger/kernel of the "
        "Hub, which is code; remove attn_implementation from it",
    }.items():
        expected = f"error: {line}\n" if words != "x.gguf" else None
        answer = said(*words.split(), "--print")
        assert expected in (answer, None), words
        assert answer.startswith("error: "), words


def test_a_run_that_is_not_finished_names_its_newest_checkpoint(
    workdir: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (2, 10, 12):
        Path(f"half/checkpoint-{number}").mkdir(parents=True)
    monkeypatch.setattr(serve, "is_whole", lambda folder: folder.name != "checkpoint-12")
    assert said("half") == "error: half: no finished run; its newest checkpoint is half/checkpoint-10, write that\n"


# ---------------------------------------------------------------------------------------------------------------
# Servers that do not start


def test_a_package_that_transformers_needs(
    workdir: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name != "openai" else None)
    assert said("random:llama") == f"error: transformers serve needs openai; run {install_command('serve')}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--port {port}", "--port {port}: another program listens there; write another port"),
        (
            "--host 192.0.2.1",
            "--host 192.0.2.1: Cannot assign requested address; write 127.0.0.1, or an address of this machine",
        ),
    ],
)
def test_an_address_that_cannot_be_used(
    words: str, line: str, workdir: Path, said: Callable[..., str], program: Callable[..., None]
) -> None:
    program("llama-server")
    Path("x.gguf").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert said("x.gguf", "--quiet", *words.format(port=port).split()) == f"error: {line.format(port=port)}\n"


def test_a_server_that_ends_before_it_answers(
    workdir: Path, program: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    program("llama-server", "#!/bin/sh\necho reading\nprintf '10%%\\r100%%\\n\\033[31mno memory\\n\\n' >&2\nexit 3\n")
    Path("x.gguf").touch()
    port = free_port()
    end = "error: llama.cpp ended with code 3 before it answered: \\x1b[31mno memory\n"
    lines = "reading\n100%\n\\x1b[31mno memory\n"
    for flags, first in (
        (
            (),
            f"x.gguf: a GGUF file, served by llama.cpp: llama-server -m x.gguf --alias x --jinja --host 127.0.0.1 "
            f"--port {port}\n",
        ),
        (("--quiet",), ""),
    ):
        assert main(["serve", "x.gguf", "--port", str(port), *flags]) == 2
        assert capsys.readouterr().err == first + lines + end
    program("llama-server", "#!/no/such/shell\n")
    assert main(["serve", "x.gguf", "--port", str(port), "--quiet"]) == 2
    assert capsys.readouterr().err == "error: llama.cpp cannot be started: llama-server: No such file or directory\n"


# ---------------------------------------------------------------------------------------------------------------
# Servers that answer, and end


def started(*words: str, seconds: float = 60) -> Command:
    """`finetune serve`, once its server answers."""
    command = Processes().start("serve", *words)
    deadline = time.monotonic() + seconds
    while "\nready: " not in command.said():
        assert not command.poll(), command.said()
        assert time.monotonic() < deadline, command.said()
        time.sleep(0.05)
    return command


def family(command: Command) -> list[psutil.Process]:
    return psutil.Process(command.pids[0]).children(recursive=True)


def answer(port: int, model: str) -> dict[str, Any]:
    """The answer to a chat request."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


@pytest.mark.parametrize(
    ("number", "code", "last"), [(signal.SIGINT, 130, "stopped\n"), (signal.SIGTERM, 143, "terminated\n")]
)
@pytest.mark.slow
def test_a_signal_ends_the_server_and_its_processes(
    number: int, code: int, last: str, workdir: Path, program: Callable[..., None]
) -> None:
    program("llama-server", STUBBORN)
    Path("x.gguf").touch()
    port = free_port()
    command = started("x.gguf", "--port", str(port))
    children = family(command)
    assert sorted(child.name() for child in children if child.name() != "sh")[-1] == "sleep"
    command.kill(number)
    assert command.wait() == [code]
    assert psutil.wait_procs(children, timeout=5)[1] == []
    request = '{"model": "x", "messages": [{"role": "user", "content": "Hello"}]}'
    assert command.said().split("\n", 1)[1] == (
        f"ready: base URL http://127.0.0.1:{port}/v1, model x; Ctrl-C ends it; try it:\n"
        f"  curl http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'\n"
        f"beside the answers of a run: finetune evaluate RUN --server http://127.0.0.1:{port}/v1 --server-model x\n"
        f"{last}"
    )


@pytest.mark.slow
def test_a_killed_command_leaves_no_server(workdir: Path, program: Callable[..., None]) -> None:
    program("llama-server", STUBBORN)
    Path("x.gguf").touch()
    command = started("x.gguf", "--port", str(free_port()))
    children = family(command)
    command.kill(signal.SIGKILL)
    command.wait()
    assert psutil.wait_procs(children, timeout=5)[1] == []


@pytest.mark.slow
def test_llama_cpp_answers(tiny_gguf: Path, workdir: Path) -> None:
    pytest.importorskip("xllamacpp")
    port = free_port()
    command = started(str(tiny_gguf), "--port", str(port))
    reply = answer(port, "tiny")
    assert reply["model"] == "tiny"
    assert reply["usage"]["completion_tokens"] == 4
    command.kill(signal.SIGTERM)
    assert command.wait() == [143]


@pytest.mark.slow
def test_transformers_answers(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server imports transformers anew, which takes seconds."""
    pytest.importorskip("openai", reason=f"transformers serve needs it: {install_command('serve')}")
    copied(Path("merged"), {})
    port = free_port()
    # Without the Hub's cache transformers 5.23 answers the list of models with an error.
    monkeypatch.setenv("HF_HUB_CACHE", str(workdir / "hub"))
    command = started("merged", "--port", str(port), seconds=120)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as found:
        assert found.status == 200
    reply = answer(port, "merged")
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["usage"]["completion_tokens"] == 4
    command.kill(signal.SIGTERM)
    assert command.wait() == [143]


def test_the_base_url_of_an_address() -> None:
    assert [server_process.base_url(host, 80) for host in ("127.0.0.1", "0.0.0.0", "::", "::1")] == [
        *["http://127.0.0.1:80/v1"] * 2,
        *["http://[::1]:80/v1"] * 2,
    ]
