"""`finetune` as a command without seconds of imports each time: a server imports what is heavy, and forks per command.

    python quick.py NAME              serves at the abstract socket NAME
    a script of CLIENT                is the command: its streams, directory and environment go to the fork

The package itself is imported after the fork: it may be installed when the server runs already.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import traceback

# What a `finetune` on the PATH is; {python} and {name} are filled in.
CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect("\\0{name}")
    job = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [job], [0, 1, 2])
    sys.exit(int(server.recv(8) or b"70"))
"""
HEAVY = (
    *("torch", "transformers.trainer", "transformers.models.auto", "transformers.models.gemma", "bitsandbytes"),
    *("trl", "trl.trainer.sft_trainer", "peft", "datasets", "wandb", "matplotlib.pyplot", "pydantic"),
)


def serve(name: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        for module in HEAVY:
            importlib.import_module(module)
        while True:
            client, _ = listener.accept()
            job, streams, _, _ = socket.recv_fds(client, 2**20, 3)
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                client.send(str(run(*json.loads(job), streams)).encode())
                os._exit(0)
            for stream in streams:
                os.close(stream)
            client.close()


def run(argv: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> int:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # The server's own remember whether its files can be sought in.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    sys.argv = ["finetune", *argv]
    importlib.invalidate_caches()
    code = 70
    try:
        from finetune.cli.commands import main

        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    for number in (1, 2):  # whoever reads to their end has all
        os.close(number)
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
