"""Commands in processes of their own, on one rank or several, as `accelerate launch` would start them."""

import os
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import forks

ROOT = Path(__file__).parents[1]


@dataclass
class Command:
    """One command, a process for each rank."""

    ranks: list[forks.Popen]
    outs: list[Path]
    store: Any

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.ranks]

    def poll(self) -> dict[int, int]:
        """The exit codes of the ranks that have ended."""
        codes = {rank: process.poll() for rank, process in enumerate(self.ranks)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def wait(self, seconds: float = 120) -> list[int]:
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(deadline - time.monotonic()) for process in self.ranks]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running: {self.said()}") from None

    def said(self) -> str:
        return "".join(out.read_text() if out.exists() else "" for out in self.outs)

    def kill(self, number: int) -> None:
        for process in self.ranks:
            process.send_signal(number)


class Processes:
    """Starts commands."""

    def __init__(self) -> None:
        self.count = 0

    def start(
        self,
        *argv: str,
        ranks: int = 1,
        config: str = "fsdp.yaml",
        cwd: Path | None = None,
        env: Sequence[dict[str, str]] = (),
    ) -> Command:
        """`finetune ARGV` on so many ranks, with what `accelerate_configs/CONFIG` sets, and `env` for each rank."""
        import torch.distributed as dist

        self.count += 1
        cwd = cwd or Path.cwd()
        store, envs = None, [{}]
        if ranks > 1:
            # The store is the launcher's, as with `accelerate launch`.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            shared = environment(config, ranks) | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            envs = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        envs = [rank_env | more for rank_env, more in zip_longest(envs, env, fillvalue={})]
        outs = [cwd / f"out-{self.count}-{rank}.txt" for rank in range(ranks)]
        processes = []
        for rank_env, out in zip(envs, outs, strict=True):
            command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "on_cpu.py"), *argv]
            place = rank_env.get("FINETUNE_TEST_CWD", cwd)
            with out.open("ab") as file:
                processes.append(forks.Popen(command, cwd=place, env=os.environ | rank_env, stdout=file, stderr=file))
        return Command(processes, outs, store)

    def run(self, *argv: str, code: int = 0, **kwargs: Any) -> str:
        """Runs a command to its end on all ranks; what it said."""
        command = self.start(*argv, **kwargs)
        codes = command.wait()
        assert set(codes) == {code}, (codes, command.said())
        return command.said()


def environment(config: str, ranks: int) -> dict[str, str]:
    """The variables that `accelerate launch --config_file accelerate_configs/CONFIG` sets for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "accelerate_configs" / config), "--num_processes", str(ranks), "x.py"]
    args: Namespace = launch_command_parser().parse_args(words)
    args, _, _ = _validate_launch_command(args)
    wanted = ("ACCELERATE_", "FSDP_")
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(wanted)}


def in_a_child(work: Callable[[], Any]) -> int:
    """A process that does `work` and ends, with 0 or, at an exception, 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns where there are threads
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child
