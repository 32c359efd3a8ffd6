"""llama.cpp itself with a GGUF file, from the package xllamacpp; to be used in a process of its own.

Its server, which listens on this machine alone, renders the file's template, answers and keeps time. Whole rows of
logits, and texts in which nothing is a control token, the server does not give: they come from the C interface of its
shared library.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.turns import Message

Logits = NDArray[np.float32]

# Logits that llama.cpp holds at once, in numbers: 64 MB.
_OUTPUTS = 2**24
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


_CONTEXT = "llama_context_params is laid out otherwise"
# What `Server` says of a file for which llama.cpp says the rest on stderr.
NO_SERVER = "llama.cpp's server does not start with it"


class LlamaError(ValueError):
    """llama.cpp is not there, is another one than is known, or does not take a file."""


class _Options(ctypes.Structure):
    """A parameter struct of llama.cpp that is larger than any of its releases has.

    Such structs are passed in memory, so that what is behind the fields that a release knows is never looked at.
    """

    _fields_ = (("words", ctypes.c_uint64 * 128),)


class _Batch(ctypes.Structure):
    """`llama_batch` as in llama.h."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_P, _I, _B = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
# Result and arguments, as in llama.h of July 2025 to October 2026.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (_LOG, _P)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Options, ()),
    "llama_context_default_params": (_Options, ()),
    "llama_model_load_from_file": (_P, (ctypes.c_char_p, _Options)),
    "llama_model_free": (None, (_P,)),
    "llama_model_get_vocab": (_P, (_P,)),
    "llama_model_n_ctx_train": (_I, (_P,)),
    "llama_init_from_model": (_P, (_P, _Options)),
    "llama_free": (None, (_P,)),
    "llama_set_n_threads": (None, (_P, _I, _I)),
    "llama_n_ctx": (ctypes.c_uint32, (_P,)),
    "llama_n_batch": (ctypes.c_uint32, (_P,)),
    "llama_n_ubatch": (ctypes.c_uint32, (_P,)),
    "llama_get_memory": (_P, (_P,)),
    "llama_memory_clear": (None, (_P, _B)),
    "llama_vocab_n_tokens": (_I, (_P,)),
    "llama_tokenize": (
        _I,
        (_P, ctypes.c_char_p, _I, ctypes.POINTER(ctypes.c_int32), _I, _B, _B),
    ),
    "llama_batch_init": (_Batch, (_I, _I, _I)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (_I, (_P, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_P, _I)),
}


def _module() -> ModuleType:
    try:
        return importlib.import_module("xllamacpp.xllamacpp")
    except ImportError as error:
        raise LlamaError(
            f'running a GGUF file needs xllamacpp ({error}); write pip install "finetune[gguf]"'
        ) from None


def library() -> ctypes.CDLL:
    """llama.cpp's shared library, its functions declared.

    Raises:
        LlamaError: xllamacpp is not installed, or its library is otherwise than is known.
    """
    found = ctypes.CDLL(str(_module().__file__))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name, None)
        if function is None:
            raise _unknown(f"library has no {name}")
        function.restype, function.argtypes = result, arguments
    return found


def _unknown(what: str) -> LlamaError:
    return LlamaError(f"xllamacpp {version('xllamacpp')} is not known to work: its {what}")


def _places(words: Sequence[int]) -> tuple[int, int, int]:
    """Where `llama_context_params` has flash_attn_type, type_k and type_v, found by the defaults around them.

    Fields come and go in it, but not between these (August 2025 to October 2026):

        rope_scaling_type, pooling_type, attention_type, flash_attn_type      -1
        rope_freq_base, rope_freq_scale                                       0.0
        yarn_ext_factor, _attn_factor, _beta_fast, _beta_slow                 -1.0
        yarn_orig_ctx, defrag_thold                                           0, -1.0
        cb_eval, cb_eval_user_data                                            null, perhaps aligned by a word
        type_k, type_v                                                        1, which is float16
    """
    # n_ctx, n_batch and n_ubatch have stood first for as long.
    if list(words[:3]) == [512, 2048, 512]:
        minus = 0xBF800000
        for zeros in (4, 5):
            known = [0xFFFFFFFF] * 4 + [0, 0] + [minus] * 4 + [0, minus] + [0] * zeros + [1, 1]
            places = [i for i in range(3, 64) if list(words[i : i + len(known)]) == known]
            if len(places) == 1:
                end = places[0] + len(known)
                return places[0] + 3, end - 2, end - 1
    raise _unknown(_CONTEXT)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Llama:
    """A GGUF file in llama.cpp, on all cores; to be used in a process of its own, for a fault in it ends the process.

    Attention rounds nothing here (keys and values in float32, no flash attention, where a user has float16 and flash
    attention by default): so what differs from another model's predictions is the file's, and not the cache's.

    Args:
        file: The file.
        context: How many tokens a row or an answer has at most.

    Raises:
        LlamaError: As `library`, and what llama.cpp says of a file that it does not take.
    """

    def __init__(self, file: Path, context: int = 512) -> None:
        self._library = library()
        self._said: list[str] = []
        self._cache: str | None = None  # the type of attention's keys, as llama.cpp's log tells
        self._log = _LOG(self._hear)  # as long as the library holds it
        self._library.llama_log_set(self._log, None)
        self._library.llama_backend_init()
        self._wanted = context
        self._context: int | None = None
        self._past = 0
        options = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(os.fsencode(file), options)
        if not self._model:
            raise LlamaError(f"{file}: llama.cpp does not take it: {self._why()}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.size: int = self._library.llama_vocab_n_tokens(self._vocabulary)
        # How far the model was made to look back.
        self.trained_context: int = self._library.llama_model_n_ctx_train(self._model)
        # How many positions are computed, and their logits held, at once.
        self.step = max(16, min(512, _OUTPUTS // self.size))

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context:
            self._library.llama_batch_free(self._batch)
            self._library.llama_free(self._context)
            self._context = None
        self._library.llama_model_free(self._model)

    def tokenise(self, text: str, special: bool, begin: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            special: Whether the names of control tokens stand for them, as in a rendered conversation.
            begin: Whether the tokens that the file puts around a text (BOS, EOS) are put.
        """
        data = text.encode("utf-8")
        room = len(data) + 16
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, room, begin, special)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The logits (V) at each position of a row, one after the other."""
        self.forget()
        yield from self.feed(ids, [True] * len(ids))

    def forget(self) -> None:
        """Begins a row anew."""
        self._open()
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._past = 0

    def feed(self, ids: Sequence[int], wanted: Sequence[bool]) -> Iterator[Logits]:
        """Puts tokens behind those already fed; gives the logits (V) of those that are wanted, in order.

        Raises:
            LlamaError: A token that the vocabulary has not, more than the context holds, or a failure in llama.cpp.
        """
        self._open()
        if self._past + len(ids) > self._wanted:
            raise LlamaError(f"{self._past + len(ids)} tokens do not fit a context of {self._wanted}")
        if wrong := [token for token in ids if not 0 <= token < self.size]:
            raise LlamaError(f"token {wrong[0]} is not in the file's vocabulary of {self.size:,}")
        batch = self._batch
        for start in range(0, len(ids), self.step):
            part = ids[start : start + self.step]
            batch.count = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, self._past + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = wanted[start + i]
            if code := self._library.llama_decode(self._context, batch):
                raise LlamaError(f"llama.cpp cannot run the model (code {code}): {self._why()}")
            self._past += len(part)
            for i in range(len(part)):
                if wanted[start + i]:
                    place = self._library.llama_get_logits_ith(self._context, i)
                    yield np.ctypeslib.as_array(place, (self.size,)).copy()

    def _open(self) -> None:
        """Makes the context, once."""
        if self._context:
            return
        options = self._library.llama_context_default_params()
        words = ctypes.cast(ctypes.byref(options), ctypes.POINTER(ctypes.c_uint32))
        flash, keys, values = _places(words[:128])
        words[0], words[1], words[2] = self._wanted, self.step, self.step
        words[flash] = words[keys] = words[values] = 0  # off, float32, float32
        context = self._library.llama_init_from_model(self._model, options)
        if not context:
            raise LlamaError(f"llama.cpp cannot make a context of {self._wanted} tokens: {self._why()}")
        self._context = context
        made = [
            int(getattr(self._library, f"llama_n_{name}")(context)) for name in ("ctx", "batch", "ubatch")
        ]
        if made[0] < self._wanted or made[1:] != [self.step] * 2 or self._cache not in (None, "f32"):
            raise _unknown(f"{_CONTEXT}: asked for it made {made}, cache {self._cache}")
        self._library.llama_set_n_threads(context, _cores(), _cores())
        self._batch = batch = self._library.llama_batch_init(self.step, 0, 1)
        if batch.count or batch.embd or not (batch.token and batch.pos and batch.seq_id and batch.logits):
            raise _unknown("llama_batch is laid out otherwise")

    def _hear(self, level: int, text: bytes | None, _: int | None) -> None:
        if text and (cache := re.search(rb"\bK \((\w+)\)", text)):
            self._cache = cache[1].decode()
        if level == _ERROR and text and text.strip():
            self._said = [*self._said[-19:], text.decode("utf-8", "replace").strip()]

    def _why(self) -> str:
        """The first error that llama.cpp spoke of; those that follow only say that it failed."""
        return self._said[0] if self._said else "it does not say why"


class Server:
    """llama.cpp's own server with a GGUF file: the file's template, greedy answers, speed.

    Args:
        file: The file; one that `Llama` takes.
        context: How many tokens a prompt and its answer have at most.

    Raises:
        LlamaError: xllamacpp is not installed, or the server does not start; it says why on stderr.
    """

    def __init__(self, file: Path, context: int) -> None:
        module = _module()
        options = module.CommonParams()
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
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = _cores()
        try:
            for name, value in settings.items():
                setattr(options, name, value)
        except (AttributeError, TypeError):
            raise _unknown(f"server has no setting {name}") from None
        try:
            self._server = module.Server(options)
        except RuntimeError:
            raise LlamaError(f"{file}: {NO_SERVER}") from None
        # Whatever proxy the machine has is not for its own address.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

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
        return str(self._ask("/apply-template", request)["prompt"])

    def tokenise(self, rendered: str) -> list[int]:
        """The token ids with which llama.cpp begins an answer to a rendered prompt."""
        request = {"content": rendered, "add_special": True, "parse_special": True}
        return list(self._ask("/tokenize", request)["tokens"])

    def answer(self, prompt: str | Sequence[int], limit: int, on: bool = False) -> dict[str, Any]:
        """The greedy answer to a rendered prompt, or to token ids.

        Args:
            prompt: The prompt; a text is tokenised as `tokenise` does.
            limit: How many tokens at most.
            on: Whether it goes on behind a token that ends it.

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
            "ignore_eos": on,
        }
        said = self._ask("/completion", request)
        times = said["timings"]
        return {
            "ids": said["tokens"],
            "text": said["content"],
            "ended": said["stop_type"] == "eos",
            "prompt_speed": times["prompt_per_second"],
            "speed": times["predicted_per_second"],
        }

    def _ask(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
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
            raise LlamaError(f"llama.cpp's {path[1:]} fails: {why}") from None
        return found
