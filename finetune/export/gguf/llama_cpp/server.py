"""Runs a GGUF file in llama.cpp's server, from the package xllamacpp; it listens on the loopback address only."""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.turns import Message
from finetune.export.gguf.llama_cpp.library import import_xllamacpp, unknown_release
from finetune.system.devices import usable_cores
from finetune.system.errors import LlamaCppError

# The end of `Server`'s error; llama.cpp writes the reason to stderr.
NO_SERVER = "llama.cpp's server does not start with it"


class Server:
    """llama.cpp's server with a GGUF file: renders by the file's chat template, answers greedily, measures the speed.

    Args:
        file: The file; one that `Llama` can load.
        context: The most tokens of a prompt and its answer together.
        adapter: A GGUF file of LoRA to add.

    Raises:
        LlamaCppError: xllamacpp is not installed, or the server does not start; it writes the reason to stderr.
    """

    def __init__(self, file: Path, context: int, adapter: Path | None = None) -> None:
        package = import_xllamacpp()
        options = package.CommonParams()
        self._key = secrets.token_hex()
        settings = {
            "n_ctx": context,
            "n_parallel": 1,
            "api_keys": [self._key],
            "verbosity": 1,  # errors
            "ui": False,
            "warmup": False,
            "fit_params": False,  # would make the context smaller
            "cache_ram_mib": 0,
            # A conversation that ends with an answer is rendered whole, with its end of turn.
            "prefill_assistant": False,
        }
        options.model.path = str(file)
        if adapter:
            options.lora_adapters = [package.CommonAdapterLoraInfo(str(adapter), 1.0)]
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = usable_cores()
        try:
            for name, value in settings.items():
                setattr(options, name, value)
        except (AttributeError, TypeError):
            raise unknown_release(f"server has no setting {name}") from None
        try:
            self._server = package.Server(options)
        except RuntimeError:
            raise LlamaCppError(f"{file}: {NO_SERVER}") from None
        # The machine's proxy must not be used for its own address.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        # A server closed before its loop runs hangs (xllamacpp 2026.10); an answer shows that it runs.
        self.answer([0], 1)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._server = None  # which ends it

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation rendered by the file's template, without the BOS that `tokenize` adds.

        One that ends with an answer is rendered as it is; any other with the generation prompt.

        Raises:
            LlamaCppError: The server refuses the request.
        """
        ends = bool(messages) and messages[-1]["role"] == "assistant"
        request = {"messages": list(messages), "add_generation_prompt": not ends}
        return str(self._post("/apply-template", request)["prompt"])

    def tokenize(self, rendered: str) -> list[int]:
        """The token ids with which llama.cpp begins an answer to a rendered prompt.

        Raises:
            LlamaCppError: The server refuses the request.
        """
        request = {"content": rendered, "add_special": True, "parse_special": True}
        return list(self._post("/tokenize", request)["tokens"])

    def answer(self, prompt: str | Sequence[int], limit: int, ignore_end: bool = False) -> dict[str, Any]:
        """The greedy answer to a rendered prompt, or to token ids.

        Args:
            prompt: The prompt; a text is tokenized as `tokenize` does.
            limit: The most tokens of the answer.
            ignore_end: Goes on after a token that ends an answer.

        Returns:
            `ids` with the token that ended it, `text`, `ended` (by itself), tokens per second of the prompt
            (`prompt_speed`) and of the answer (`speed`).

        Raises:
            LlamaCppError: The server refuses the request.
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
            # For a template the last line is what it raised.
            try:
                why = str(json.loads(said)["error"]["message"]).strip().splitlines()[-1]
            except (ValueError, KeyError, TypeError, IndexError):
                why = f"{error.code} {error.reason}"
            raise LlamaCppError(f"llama.cpp's {path[1:]} fails: {why}") from None
        return found
