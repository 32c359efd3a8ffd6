"""llama.cpp itself on a written GGUF file: token ids, predictions, greedy answers by the file's own template, speed.

What is measured here is what a user of llama.cpp meets. It comes from the package xllamacpp: its server, which listens
on this machine alone, renders the template and keeps time; token ids and whole rows of logits, which the server does
not give, come from the C interface of its shared library.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

# Logits that llama.cpp holds at once, in numbers: 64 MB.
_OUTPUTS = 2**24
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


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
    "llama_vocab_is_eog": (_B, (_P, _I)),
    "llama_tokenize": (
        _I,
        (_P, ctypes.c_char_p, _I, ctypes.POINTER(ctypes.c_int32), _I, _B, _B),
    ),
    "llama_batch_init": (_Batch, (_I, _I, _I)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (_I, (_P, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_P, _I)),
}


def library() -> ctypes.CDLL:
    """llama.cpp's shared library, its functions declared.

    Raises:
        LlamaError: xllamacpp is not installed, or is one whose library is otherwise.
    """
    try:
        module = importlib.import_module("xllamacpp.xllamacpp")
    except ImportError as error:
        raise LlamaError(
            f'running a GGUF file needs xllamacpp ({error}); pip install "finetune[gguf]"'
        ) from error
    found = ctypes.CDLL(module.__file__)
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(found, name)
        except AttributeError:
            raise _unknown(f"function {name} is not there") from None
        function.restype, function.argtypes = result, arguments
    return found


def _unknown(what: str) -> LlamaError:
    from importlib.metadata import version

    return LlamaError(f"xllamacpp {version('xllamacpp')} is not known to work: its {what}")


class Llama:
    """A GGUF file in llama.cpp, on all cores; to be used in a process of its own, for a fault in it ends the process.

    Args:
        file: The file.
        context: How many tokens a row or an answer has at most.

    Raises:
        LlamaError: As `library`, and what llama.cpp says of a file that it does not take.
    """

    def __init__(self, file: Path, context: int = 512) -> None:
        self._library = library()
        self._said: list[str] = []
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
        self._step = max(16, min(512, _OUTPUTS // self.size))

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

    def ends(self, token: int) -> bool:
        """Whether llama.cpp ends an answer at a token."""
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The logits (V) at each position of a row, one after the other."""
        self.forget()
        yield from self.feed(ids, [True] * len(ids))

    def generate(self, ids: Sequence[int], limit: int) -> list[int]:
        """The greedy answer to a prompt, with the token that ends it where one does."""
        self.forget()
        answer: list[int] = []
        feed = list(ids)
        while len(answer) < limit:
            (last,) = self.feed(feed, [False] * (len(feed) - 1) + [True])
            answer.append(int(last.argmax()))
            if self.ends(answer[-1]):
                break
            feed = answer[-1:]
        return answer

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
        for start in range(0, len(ids), self._step):
            part = ids[start : start + self._step]
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
        head = ctypes.cast(ctypes.byref(options), ctypes.POINTER(ctypes.c_uint32))
        # n_ctx, n_batch, n_ubatch have stood first, with these defaults, in every release since February 2024.
        if (head[0], head[1], head[2]) != (512, 2048, 512):
            raise _unknown("llama_context_params is laid out otherwise")
        head[0], head[1], head[2] = self._wanted, self._step, self._step
        context = self._library.llama_init_from_model(self._model, options)
        if not context:
            raise LlamaError(f"llama.cpp cannot make a context of {self._wanted} tokens: {self._why()}")
        self._context = context
        made = [
            int(getattr(self._library, f"llama_n_{name}")(context)) for name in ("ctx", "batch", "ubatch")
        ]
        if made[0] < self._wanted or made[1] < self._step or made[2] > made[1]:
            raise _unknown(f"llama_context_params is laid out otherwise (made {made})")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._library.llama_set_n_threads(context, cores, cores)
        self._batch = self._library.llama_batch_init(self._step, 0, 1)
        b = self._batch
        if b.count or b.embd or not (b.token and b.pos and b.n_seq_id and b.seq_id and b.logits):
            raise _unknown("llama_batch is laid out otherwise")

    def _hear(self, level: int, text: bytes | None, _: int | None) -> None:
        if level == _ERROR and text and text.strip():
            self._said = [*self._said[-19:], text.decode("utf-8", "replace").strip()]

    def _why(self) -> str:
        """The first error that llama.cpp spoke of; those that follow only say that it failed."""
        return self._said[0] if self._said else "it does not say why"
