"""Real `finetune` processes without seven seconds of imports each: one process imports, and forks when it is told to.

Each line of input is JSON: `{"argv", "cwd", "env", "out"}` starts a command (its output goes to the file `out`) and is
answered with its process number; `{"poll": PID}` with its exit code, minus the signal that ended it, or null.
"""

import json
import os
import sys
import threading
import traceback

import on_cpu  # noqa: F401 (two CPU ranks may be FSDP)
import torch

import finetune.train.run  # noqa: F401 (what takes long)
from finetune.cli.commands import main
from finetune.system import distributed


def start(job: dict) -> int:
    if pid := os.fork():
        return pid
    os.environ |= job["env"]
    distributed._SILENCE = float(os.environ.get("FINETUNE_TEST_SILENCE", distributed._SILENCE))
    os.chdir(os.environ.get("FINETUNE_TEST_CWD", job["cwd"]))
    out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    code = 70
    try:
        code = main(job["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def poll(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert threading.active_count() == 1, "a fork has only the thread that forked"
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(poll(job["poll"]) if "poll" in job else start(job)), flush=True)
