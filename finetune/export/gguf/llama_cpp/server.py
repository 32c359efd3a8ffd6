"""llama.cpp's own server with a GGUF file, from the package xllamacpp; it listens on this machine alone."""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.data.turns import Message
from finetune.export.gguf.llama_cpp.library import cpu_count, import_xllamacpp, unknown_release
from finetune.system.errors import LlamaCppError

# What `Server` says of a file for which llama.cpp says the rest on stderr.
NO_SERVER = "llama.cpp's server does not start with it"


class Server:
    """llama.cpp's own server with a GGUF file: the file's template, greedy answers, speed.

    Args:
        file: The file; one that `Llama` takes.
        context: How many tokens a prompt and its answer have at most.

    Raises:
        LlamaError: xllamacpp is not installed, or the server does not start; it says why on stderr.
    """

    def __init__(self, file: Path, context: int) -> None:
        package = import_xllamacpp()
        options = package.CommonParams()
        self._key = secrets.token_hex()
        settings = {
            "n_ctx": context,
            "n_parallel": 1,
            "api_keys": [self._key],
            "verbosity": 1,  # errors alone
            "ui": False,
            "warmup": False,
            "fit_params": False,  # would make the context smaller
            "cache_ram_mib": 0,
            # A conversation that ends with an answer is rendered whole, not for the answer to go on.
            "prefill_assistant": False,
        }
        options.model.path = str(file)
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = cpu_count()
        try:
            for name, value in settings.items():
                setattr(options, name, value)
        except (AttributeError, TypeError):
            raise unknown_release(f"server has no setting {name}") from None
        try:
            self._server = package.Server(options)
        except RuntimeError:
            raise LlamaCppError(f"{file}: {NO_SERVER}") from None
        # Whatever proxy the machine has is not for its own address.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        # Closed before its loop has begun, it waits for ever (xllamacpp 2026.10); that it answers shows that it has.
        self.answer([0], 1)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server = None  # which ends it

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation by the file's template, without the BOS that `tokenise` puts before it.

        One that ends with an answer is rendered as it is; any other with the beginning of the next answer.
        """
        ends = bool(messages) and messages[-1]["role"] == "assistant"
        request = {"messages": list(messages), "add_generation_prompt": not ends}
        return str(self._post("/apply-template", request)["prompt"])

    def tokenize(self, rendered: str) -> list[int]:
        """The token ids with which llama.cpp begins an answer to a rendered prompt."""
        request = {"content": rendered, "add_special": True, "parse_special": True}
        return list(self._post("/tokenize", request)["tokens"])

    def answer(self, prompt: str | Sequence[int], limit: int, ignore_end: bool = False) -> dict[str, Any]:
        """The greedy answer to a rendered prompt, or to token ids.

        Args:
            prompt: The prompt; a text is tokenised as `tokenise` does.
            limit: How many tokens at most.
            ignore_end: Goes on after a token that ends an answer.

        Returns:
            `ids` with the token that ended it, `text`, `ended` (by itself), tokens per second of the prompt
            (`prompt_speed`) and of the answer (`speed`).
        """
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n_predict": limit,
            "samplers": ["temperature"],
            "temperature": 0,
            "repeat_penalty": 1,
            "cache_prompt": False,
            "return_tokens": True,
            "ignore_eos": ignore_end,
        }
        said = self._post("/completion", request)
        times = said["timings"]
        return {
            "ids": said["tokens"],
            "text": said["content"],
            "ended": said["stop_type"] == "eos",
            "prompt_speed": times["prompt_per_second"],
            "speed": times["predicted_per_second"],
        }

    def _post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        address = self._server.listening_address + path
        body = json.dumps(request).encode()
        try:
            with self._open(urllib.request.Request(address, body, headers)) as reply:
                found: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode("utf-8", "replace")
            # Of a template the last line tells what it raised.
            try:
                why = str(json.loads(said)["error"]["message"]).strip().splitlines()[-1]
            except (ValueError, KeyError, TypeError, IndexError):
                why = f"{error.code} {error.reason}"
            raise LlamaCppError(f"llama.cpp's {path[1:]} fails: {why}") from None
        return found
