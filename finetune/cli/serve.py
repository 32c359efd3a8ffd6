"""`finetune serve`: finds out what serves a run, a model or a GGUF file, and starts that program's own server."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.model.adapter_readers import check_adapter
from finetune.model.provenance import adapter_base_sections, environment_of, has_tokenizer, is_adapter
from finetune.recipe.export_formats import MLX_BITS
from finetune.system import fresh_process
from finetune.system.errors import ServeError
from finetune.system.extras import install_command
from finetune.system.files import read_json, run_file
from finetune.system.pages import one_line, shell_word
from finetune.system.server_process import base_url, run_server
from finetune.system.terminal import Say, print_line, print_text
from finetune.train.checkpoint import checkpoints, is_whole

# The programs that serve each kind of model; the first one that is installed does.
PROGRAMS = {
    "an adapter": ("vLLM",),
    "a whole model": ("vLLM", "transformers"),
    "a model quantised by bitsandbytes": ("transformers",),
    "a model for mlx-lm": ("mlx-lm",),
    "a model in bfloat16 for mlx-lm": ("mlx-lm", "transformers"),
    "a GGUF file": ("llama.cpp", "xllamacpp"),
}
_EXECUTABLES = {"vLLM": "vllm", "transformers": "transformers", "mlx-lm": "mlx_lm.server", "llama.cpp": "llama-server"}
# The packages that transformers 5.23 asks for: `utils/import_utils.py`, `is_serve_available`.
_TRANSFORMERS_NEEDS = ("fastapi", "uvicorn", "openai")
# The later files of a divided GGUF model, which llama.cpp opens itself, and files that hold no language model.
_NO_MODEL = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$|^mmproj|^imatrix\.gguf$")
_ADAPTER = "-adapter.gguf"


@dataclass(frozen=True)
class Served:
    """A model that can be served.

    Attributes:
        name: The folder, file or id that was given, or the file that was chosen in a folder.
        kind: A key of `PROGRAMS`.
        path: What the program loads; for an adapter its base.
        label: A short name of the model, by which requests may ask for it.
        revision: The revision of a model on the Hub.
        flags: The flags that vLLM takes for this model alone.
        note: What else to say about it.
    """

    name: str
    kind: str
    path: str
    label: str
    revision: str | None = None
    flags: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Launch:
    """A server that can be started.

    Attributes:
        program: The program's name.
        command: Its command line.
        model: The name by which requests ask for the model.
        ours: True if the command runs a module of this package.
    """

    program: str
    command: list[str]
    model: str
    ours: bool = False


def serve(args: argparse.Namespace, say: Say) -> None:
    """Starts the server of a run or model and waits until it is interrupted; with `--print` prints its command.

    Args:
        args: The flags of `finetune serve`.
        say: Takes lines for standard error; with `--quiet` only the last lines of a server that fails are printed.

    Raises:
        ServeError: Nothing serves the folder, the program is not installed, the port is in use, or the server ended.
        ModelError, RunError: The model or run cannot be read, or its config names code.
    """
    served = find_served(Request(args.model, args.base, args.trust_remote_code), say)
    program = next(filter(_is_installed, PROGRAMS[served.kind]), None)
    if program is None and not args.print_only:
        raise ServeError(_not_installed(served))
    launch = launch_of(served, program or PROGRAMS[served.kind][0], args.host, args.port, args.trust_remote_code)
    shown = shlex.join(launch.command)
    if args.print_only:
        print_text(one_line(shown))
        return
    _check_packages(launch.program)
    if launch.program == "transformers":
        _make_hub_cache()
    say(f"{served.name}: {served.kind}, served by {launch.program}: {shown}")
    if served.note:
        say(served.note)
    last: deque[str] = deque(maxlen=10)
    environment = fresh_process.child_environment() if launch.ours else os.environ | {"PYTHONSAFEPATH": "1"}
    on_line = last.append if args.quiet else say
    try:
        run_server(
            launch.program,
            launch.command,
            environment,
            args.host,
            args.port,
            on_line,
            lambda: _say_ready(say, base_url(args.host, args.port), launch.model),
        )
    except ServeError:
        for line in last:
            print_line(line)
        raise


def _say_ready(say: Say, url: str, model: str) -> None:
    request = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
    say(f"ready: base URL {url}, model {model}; Ctrl-C ends it; try it:")
    say(f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(request)}")
    say(f"beside the answers of a run: finetune evaluate RUN --server {url} --server-model {shell_word(model)}")


# ---------------------------------------------------------------------------------------------------------------
# The model to serve


@dataclass(frozen=True)
class Request:
    """A model to serve, as the command line names it.

    Attributes:
        name: A run, a checkpoint, a folder of merge or export, a GGUF file, or what `model.name_or_path` takes.
        base: The path or id of a run's base, in place of the one that its files name.
        trust_remote_code: True if the user lets Python files of the model run.
    """

    name: str
    base: str | None = None
    trust_remote_code: bool = False


def find_served(request: Request, say: Say) -> Served:
    """The model that a request stands for.

    Args:
        request: The request.
        say: Takes a line before a model is converted, which takes a minute.

    Raises:
        ServeError: It is nothing that a program serves.
        ModelError, RunError: The model or run cannot be read, or its config names code.
    """
    name, folder = request.name, Path(request.name).expanduser()
    if not is_adapter(folder):
        if request.base:
            raise ServeError(f"--base {request.base}: {name} is no run with an adapter; leave out --base")
        if name.endswith(".gguf"):
            return _gguf(folder)
        config = read_json(folder / "config.json")
        if folder.is_dir() and not config:
            return _gguf(_gguf_file_in(folder))
        if kind := _kind_for_mlx(folder, config):
            # Source: mlx-lm 0.32 `utils.py`, `load_model`
            if config.get("model_file") and not request.trust_remote_code:
                raise ServeError(
                    f"{name}: its config.json names a Python file (model_file), which mlx-lm would run; read it, then "
                    "write --trust-remote-code"
                )
            return Served(name, kind, str(folder), folder.resolve().name)
    # transformers stays out of this process, which lives as long as the server.
    return fresh_process.call(read_model, request, say)


def read_model(request: Request) -> Served:
    """In a fresh process: a run with an adapter, or a whole model, whose base or config transformers can read.

    Raises:
        ServeError: vLLM does not take the adapter.
        ModelError, RunError: The model or run cannot be read, or its config names code.
    """
    from finetune.model.locate import Base
    from finetune.recipe.schema import ModelSection

    name, folder, trust = request.name, Path(request.name).expanduser(), request.trust_remote_code
    if is_adapter(folder):
        return _adapter(folder, request.base, trust)
    base = Base.of(ModelSection(name_or_path=name, trust_remote_code=trust), fresh_process.report)
    stored = getattr(base.config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    kind = "a model quantised by bitsandbytes" if method == "bitsandbytes" else "a whole model"
    label = folder.resolve().name if folder.is_dir() else name
    return Served(name, kind, base.path, label, note=_without_template(folder))


def _adapter(folder: Path, base_name: str | None, trust_remote_code: bool) -> Served:
    """A run with an adapter, which vLLM adds to its base."""
    from finetune.model.locate import Base

    verdict = check_adapter(folder, "vllm", base_name)
    if verdict.problems:
        raise ServeError(f"{folder}: an adapter that no server takes: {verdict.problems[0]}; {_merge_first(folder)}")
    section, _ = adapter_base_sections(folder, base_name, trust_remote_code)
    revision = section.revision if base_name else environment_of(folder).get("base_commit") or section.revision
    base = Base.of(section.model_copy(update={"revision": revision}), fresh_process.report)
    base.config  # noqa: B018 (it refuses a base that cannot be read, or that names code)
    place = folder.resolve()
    label = f"{place.parent.name}-{place.name}" if place.name.startswith("checkpoint-") else place.name
    # vLLM takes NAME=PATH, too, but divides it at every "=".
    flags = [*verdict.flags, "--lora-modules", json.dumps({"name": label, "path": str(folder)}, ensure_ascii=False)]
    if has_tokenizer(folder):
        flags += ["--tokenizer", str(folder)]
    if settings := run_file(folder, "generation_config.json"):
        flags += ["--generation-config", str(settings.parent)]
    on_hub = not Path(base.path).is_dir()
    return Served(str(folder), "an adapter", base.path, label, revision if on_hub else None, tuple(flags))


def _merge_first(folder: Path | str) -> str:
    return f"run finetune merge {shell_word(str(folder))} --output DIR, then finetune serve DIR"


def _gguf(file: Path) -> Served:
    if not file.is_file():
        raise ServeError(f"{file}: there is no such file; write a GGUF file, or a folder with one")
    if file.name.endswith(_ADAPTER):
        raise ServeError(
            f"{file}: an adapter without its base; write llama-server -m BASE.gguf --lora {shell_word(str(file))}, or "
            "export the run with --format gguf:Q4_K_M"
        )
    beside = [path.name for path in _gguf_files(file.parent) if path != file]
    note = f"other GGUF files beside it: {', '.join(beside)}" if beside else ""
    return Served(str(file), "a GGUF file", str(file), file.stem, note=note)


def _gguf_files(folder: Path) -> list[Path]:
    """The GGUF models of a folder, Q4_K_M first, which is what most people use."""
    files = [path for path in folder.glob("*.gguf") if not _NO_MODEL.search(path.name)]
    whole = [path for path in files if not path.name.endswith(_ADAPTER)] or files
    return sorted(whole, key=lambda path: ("Q4_K_M" not in path.name, path.name))


def _gguf_file_in(folder: Path) -> Path:
    """The GGUF file of a folder that is no model of transformers.

    Raises:
        ServeError: It holds none; the error names what else the folder holds.
    """
    if files := _gguf_files(folder):
        return files[0]
    if newest := next(filter(is_whole, reversed(checkpoints(folder))), None):
        raise ServeError(f"{folder}: no finished run; its newest checkpoint is {newest}, write that")
    inside = sorted({str(file.parent) for pattern in ("config.json", "*.gguf") for file in folder.glob(f"*/{pattern}")})
    if inside:
        raise ServeError(f"{folder}: holds several models; write one of {', '.join(inside)}")
    raise ServeError(
        f"{folder}: neither a finished run (adapter_config.json), nor a model (config.json), nor a folder of GGUF files"
    )


def _kind_for_mlx(folder: Path, config: dict[str, Any]) -> str:
    """The kind of a model that mlx-lm quantised, or that export wrote for it; empty for any other."""
    stored = config.get("quantization")
    if isinstance(stored, dict) and "group_size" in stored:
        return "a model for mlx-lm"
    return "a model in bfloat16 for mlx-lm" if config and folder.resolve().name in MLX_BITS else ""


def _without_template(folder: Path) -> str:
    """A line on a folder whose tokenizer has no chat template; empty for any other."""
    config = folder / "tokenizer_config.json"
    if not config.is_file() or (folder / "chat_template.jinja").is_file() or "chat_template" in read_json(config):
        return ""
    return f"{folder} has no chat template: it completes texts (/v1/completions) and answers no chat"


# ---------------------------------------------------------------------------------------------------------------
# The program that serves it


def launch_of(served: Served, program: str, host: str, port: int, trust_remote_code: bool = False) -> Launch:
    """The command with which a program serves a model.

    Args:
        served: The model.
        program: One of the programs that `PROGRAMS` has for its kind.
        host: The address to listen on.
        port: The port to listen on.
        trust_remote_code: True if the user lets Python files of the model run.

    Raises:
        ServeError: The program cannot take the model's path.
    """
    words, model = _COMMANDS[program](served)
    words += ["--host", host, "--port", str(port)]
    if trust_remote_code and served.kind != "a GGUF file":
        words.append("--trust-remote-code")
    return Launch(program, words, model, ours=program == "xllamacpp")


def _vllm(served: Served) -> tuple[list[str], str]:
    words = [_executable("vLLM"), "serve", served.path]
    words += ["--revision", served.revision] if served.revision else []
    return [*words, *(served.flags or ("--served-model-name", served.label))], served.label


def _transformers(served: Served) -> tuple[list[str], str]:
    # transformers 5.23 `cli/serving/model_manager.py` divides a model's name at "@", even a path.
    if "@" in served.path:
        raise ServeError(f"{served.path}: transformers serve takes no path with an @; rename the folder")
    return [_executable("transformers"), "serve", served.path], served.path


def _mlx(served: Served) -> tuple[list[str], str]:
    # Under another name than this one a request makes mlx-lm 0.32 load a model anew.
    return [_executable("mlx-lm"), "--model", served.path], "default_model"


def _llama_server(served: Served) -> tuple[list[str], str]:
    words = [_executable("llama.cpp"), "-m", served.path, "--alias", served.label, "--jinja"]
    return words, served.label


def _xllamacpp(served: Served) -> tuple[list[str], str]:
    module = "finetune.export.gguf.llama_cpp.http_server"
    return [sys.executable, "-P", "-m", module, "-m", served.path, "--alias", served.label], served.label


# The command line of each program, and the name by which requests ask for the model.
_COMMANDS: dict[str, Callable[[Served], tuple[list[str], str]]] = {
    "vLLM": _vllm,
    "transformers": _transformers,
    "mlx-lm": _mlx,
    "llama.cpp": _llama_server,
    "xllamacpp": _xllamacpp,
}


def _find(program: str) -> str | None:
    """The path of a program's executable, beside this Python or on PATH; None if there is none."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(_EXECUTABLES[program], path=places)


def _executable(program: str) -> str:
    """The first word of a program's command: its name where a shell finds it, else its path."""
    name, path = _EXECUTABLES[program], _find(program)
    return name if path is None or shutil.which(name) == path else path


def _is_installed(program: str) -> bool:
    return bool(importlib.util.find_spec("xllamacpp") if program == "xllamacpp" else _find(program))


def _not_installed(served: Served) -> str:
    """The line on a model whose programs are all missing."""
    if served.kind == "an adapter":
        return (
            f"{served.name}: an adapter, which vLLM would serve, but it is not installed; {_merge_first(served.name)}"
        )
    needed = {
        "a GGUF file": f"llama-server is not on PATH; install llama.cpp, or run {install_command('gguf')}",
        "a model for mlx-lm": f"mlx-lm is not installed; run {install_command('mlx')}",
    }
    return f"{served.name}: {needed.get(served.kind, 'transformers is not installed; run pip install transformers')}"


def _make_hub_cache() -> None:
    """transformers 5.23 answers `GET /v1/models` with an error 500 where the Hub's cache does not exist yet."""
    from huggingface_hub import constants

    with contextlib.suppress(OSError):
        Path(constants.HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)


def _check_packages(program: str) -> None:
    """Refuses a program whose server needs a package that is missing in this environment.

    Raises:
        ServeError: The line says what to install.
    """
    if program != "transformers":
        return
    missing = [name for name in _TRANSFORMERS_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ServeError(f"transformers serve needs {', '.join(missing)}; run {install_command('serve')}")
