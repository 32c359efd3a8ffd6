"""llama.cpp's HTTP server from the package xllamacpp, as a process: `python -m` this module, see `--help`."""

from __future__ import annotations

import argparse
import signal
import sys

from finetune.export.gguf.llama_cpp.library import import_xllamacpp
from finetune.system.errors import LlamaCppError


def main() -> int:
    """Serves a GGUF file until the process is ended; the flags are those of `llama-server`.

    Returns:
        1 if the server does not start; llama.cpp has written the reason to stderr.
    """
    command = argparse.ArgumentParser(prog=f"python -m {__spec__.name}")
    command.add_argument("-m", dest="file", metavar="FILE", required=True, help="a GGUF file")
    command.add_argument("--alias", required=True, help="the model's name in requests")
    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=int, default=8080)
    args = command.parse_args()
    try:
        package = import_xllamacpp()
    except LlamaCppError as error:
        sys.exit(f"error: {error}")
    options = package.CommonParams()
    options.model.path = args.file
    options.model_alias = {args.alias}
    options.hostnames, options.port = [args.host], args.port
    options.verbosity = 2  # warnings and errors; at 3, its default, ten lines say how it loads the file
    try:
        server = package.Server(options)
    except RuntimeError:
        return 1
    while server:
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
