"""Python processes without seconds of imports each: a server imports what is heavy, and forks one for each command.

    python tests/forks.py NAME      serves at the abstract socket NAME until its standard input ends

pytest's first process starts the server (tests/conftest.py), and both of xdist's workers use it. `Popen` takes
the commands that `subprocess.Popen` takes: `python -m MODULE`, `python -c CODE`, `python FILE`. It starts a real
process, cold, where the server cannot stand in for one: another program, or an environment that upstream reads when it
is imported.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PIPE = subprocess.PIPE
# The environment variable with the server's name.
NAME = "FINETUNE_TEST_FORKS"
# What the commands of tests import from upstream, and what transformers imports late.
HEAVY = (
    *("torch", "torch.distributed.fsdp", "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"),
    *("bitsandbytes", "peft", "peft.tuners.lora.bnb", "datasets", "wandb", "gguf", "rich.progress"),
    *("matplotlib.pyplot", "matplotlib.backends.backend_agg", "PIL.JpegImagePlugin", "PIL.GifImagePlugin"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gemma", "gemma2", "gemma3", "llama", "qwen3")),
    *("transformers.models.auto", "transformers.trainer", "transformers.integrations.bitsandbytes"),
    "trl.trainer.sft_trainer",
)
# Upstream reads these when it is imported.
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "CUDA_", "PYTHONHASHSEED")
# As `finetune` sets them before it imports anything.
SILENT = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


# ---------------------------------------------------------------------------------------------------------------
# In tests


class Popen(subprocess.Popen):
    """`subprocess.Popen`, whose process is forked by the server where it can be."""

    _server: socket.socket | None = None

    def _execute_child(self, args: Any, *rest: Any) -> None:
        # Source: CPython 3.11 to 3.14, `subprocess.py`, `Popen._execute_child`.
        cwd, environment, pipes = rest[4], rest[5], rest[9:15]
        environment = dict(os.environ if environment is None else environment)
        if not forks(args, environment):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._server.connect(f"\0{os.environ[NAME]}")
            job = {"args": [str(arg) for arg in args[1:]], "cwd": str(cwd or Path.cwd()), "env": environment}
            # The child's end of each stream; -1 is this process's own.
            ends = [end if end != -1 else own for own, end in enumerate((pipes[0], pipes[3], pipes[5]))]
            socket.send_fds(self._server, [json.dumps(job).encode()], ends)
            answer = self._server.recv(64)
            assert answer, "the server of forks has ended"
            self.pid, self._child_created = int(answer), True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _ended(self, timeout: float | None) -> bool:
        assert self._server
        self._server.settimeout(timeout)
        try:
            answer = self._server.recv(64)
        except (TimeoutError, BlockingIOError):
            return False
        self._server.close()
        self.returncode = int(answer) if answer else -signal.SIGKILL
        return True

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if not self._server:
            return super()._internal_poll(*args, **options)  # type: ignore[misc]
        if self.returncode is None and self._child_created:
            self._ended(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if not self._server:
            return super()._wait(timeout)  # type: ignore[misc]
        if self.returncode is None and not self._ended(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


def forks(args: Any, environment: dict[str, str]) -> bool:
    """True if the server can stand in for the process of a command."""
    server = NAME in os.environ and not isinstance(args, str) and args[0] == sys.executable
    return server and read_at_import(environment) == json.loads(os.environ[f"{NAME}_ENVIRONMENT"])


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)} | SILENT


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` by way of `Popen`; `input`, `capture_output`, `check` and `timeout` are as there."""
    check, timeout, said = (options.pop(name, None) for name in ("check", "timeout", "input"))
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if said is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(command, text=True, **options) as process:
        try:
            stdout, stderr = process.communicate(said, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stdout, stderr)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def start(names: tuple[str, ...], environment: dict[str, str], stderr: Any) -> Popen:
    """In place of `fresh_process._start`, in tests and in the commands that they start."""
    code = "import sys; from finetune.system.fresh_process import serve; serve(*sys.argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", code, *names]
    return Popen(command, env=environment, stdout=PIPE, stderr=stderr, text=True)


def start_server() -> subprocess.Popen[bytes]:
    """The server, which imports when it is first asked; it ends with this process, or when its input is closed."""
    os.environ[NAME] = f"finetune-tests-{os.getpid()}"
    os.environ[f"{NAME}_ENVIRONMENT"] = json.dumps(read_at_import(os.environ))
    environment = os.environ | SILENT | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, os.environ[NAME]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    return process


# ---------------------------------------------------------------------------------------------------------------
# The server


def serve(name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal, which pytest answers
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{name}")
    listener.listen()
    print("ready", flush=True)
    poll = selectors.PollSelector()
    poll.register(listener, selectors.EVENT_READ)
    poll.register(sys.stdin, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}
    imported = False
    while True:
        for key, _ in poll.select():
            if key.fileobj is listener:
                if not imported:
                    import_all()
                    imported = True
                client, _ = listener.accept()
                job, streams, _, _ = socket.recv_fds(client, 2**20, 3)
                if not job:
                    client.close()
                    continue
                pid = os.fork()
                if not pid:
                    for other in (listener, client, *(one for _, one in running.values())):
                        other.close()
                    for descriptor in running:
                        os.close(descriptor)
                    execute(json.loads(job), streams)
                for stream in streams:
                    os.close(stream)
                client.send(str(pid).encode())
                descriptor = os.pidfd_open(pid)
                running[descriptor] = pid, client
                poll.register(descriptor, selectors.EVENT_READ)
            elif key.fileobj is sys.stdin:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                return
            else:
                poll.unregister(key.fileobj)
                pid, client = running.pop(key.fd)
                os.close(key.fd)
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    client.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
                client.close()


def import_all() -> None:
    sys.path.insert(0, str(ROOT))
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        from finetune.system.before_torch import prepare_imports

        prepare_imports()
        for module in HEAVY:
            with contextlib.suppress(ImportError):  # an extra that is not installed
                importlib.import_module(module)
        import finetune

        for module in pkgutil.walk_packages(finetune.__path__, "finetune."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        make_caches()
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    # jemalloc's, of pyarrow, is started anew in a fork.
    others = [name for name in threads[1:] if name != "jemalloc_bg_thd"]
    assert not others, f"a fork has only the thread that forked, and imports have started {others}"
    gc.freeze()


def make_caches() -> None:
    """Fills what each command would compute anew: a quarter of the time of a short run."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from finetune.recipe.upstream_tables import tables
    from finetune.system.pages import environment
    from finetune.train.environment import versions

    versions()
    tables()
    get_checkpoint_conversion_mapping("gemma3")
    package = ROOT / "finetune"
    for path in (*package.rglob("*.md.jinja"), *package.rglob("*.html.jinja")):
        environment(path.name.endswith(".html.jinja")).get_template(str(path.relative_to(package)))


def execute(job: dict[str, Any], streams: list[int]) -> None:
    """In the fork: becomes the process that the command would start."""
    code = 1
    try:
        become(job["cwd"], job["env"], streams)
        code = call(job["args"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def become(cwd: str, environment: dict[str, str], streams: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    lines = os.isatty(1)
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if lines else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[0:1] = ["", *(path for path in paths if path not in sys.path)]
    import torch

    from finetune.system import fresh_process
    from finetune.train.callbacks import trackers

    fresh_process._start = start
    trackers._NEW_TOKENS = 4  # as in tests/conftest.py
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


def call(args: list[str]) -> int:
    """Runs `-W ignore`, then `-m MODULE`, `-c CODE` or FILE, with its arguments; the exit code."""
    args = [*args]
    while args[0] in ("-W", "-u", "-P"):
        option = args.pop(0)
        if option == "-W":
            warnings.simplefilter(args.pop(0))
    kind = args.pop(0) if args[0] in ("-m", "-c") else "FILE"
    what = args.pop(0)
    sys.argv = [kind if kind == "-c" else what, *args]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(what, main.__dict__)
        else:
            sys.path[0] = str(Path(what).parent)
            runpy.run_path(what, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
