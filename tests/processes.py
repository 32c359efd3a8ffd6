"""Commands in processes of their own, on one rank or several, as `accelerate launch` would start them."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass
class Command:
    """One command, a process for each rank."""

    server: "Processes"
    pids: list[int]
    outs: list[Path]
    store: Any
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> dict[int, int]:
        """The exit codes of the ranks that have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (code := self.server.ask({"poll": pid})) is not None:
                self.codes[rank] = code
        return self.codes

    def wait(self, seconds: float = 120) -> list[int]:
        deadline = time.monotonic() + seconds
        while len(self.poll()) < len(self.pids):
            assert time.monotonic() < deadline, f"still running: {self.said()}"
            time.sleep(0.02)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def said(self) -> str:
        return "".join(out.read_text() if out.exists() else "" for out in self.outs)

    def kill(self, number: int) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.poll():
                os.kill(pid, number)


class Processes:
    """Starts commands; the process that forks them lives as long as this."""

    def __init__(self) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(ROOT / "tests" / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.process.stdout
        while (line := self.process.stdout.readline()) != "ready\n":
            assert line, "it did not start"
        self.count = 0

    def ask(self, job: dict[str, Any]) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

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
        pids = [
            self.ask({"argv": argv, "cwd": str(cwd), "env": env, "out": str(out)})
            for env, out in zip(envs, outs, strict=True)
        ]
        return Command(self, pids, outs, store)

    def run(self, *argv: str, code: int = 0, **kwargs: Any) -> str:
        """Runs a command to its end on all ranks; what it said."""
        command = self.start(*argv, **kwargs)
        codes = command.wait()
        assert set(codes) == {code}, (codes, command.said())
        return command.said()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def environment(config: str, ranks: int) -> dict[str, str]:
    """What `accelerate launch --config_file accelerate_configs/CONFIG` sets for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = [
        "--config_file",
        str(ROOT / "accelerate_configs" / config),
        "--num_processes",
        str(ranks),
        "x.py",
    ]
    args: Namespace = launch_command_parser().parse_args(words)
    args, _, _ = _validate_launch_command(args)
    wanted = ("ACCELERATE_", "FSDP_")
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(wanted)}
