"""llama.cpp itself with a GGUF file: token ids and whole rows of logits, from the package xllamacpp.

Its server (`server.py`) does not give logits, nor the ids of a text in which nothing is a control token. So they come
from the C interface of the package's shared library, whose structs change from release to release: what is written into
one is first found by its defaults, and what came of it asked afterwards.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.system.errors import LlamaCppError

Logits = NDArray[np.float32]

# Logits that llama.cpp holds at once, in numbers: 64 MB.
_MOST_LOGITS = 2**24
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_CONTEXT_CHANGED = "llama_context_params is laid out otherwise"


class _ParameterStruct(ctypes.Structure):
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


_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_P, _I, _B = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
# Result and arguments, as in llama.h of July 2025 to October 2026.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (_LOG_CALLBACK, _P)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_ParameterStruct, ()),
    "llama_context_default_params": (_ParameterStruct, ()),
    "llama_model_load_from_file": (_P, (ctypes.c_char_p, _ParameterStruct)),
    "llama_model_free": (None, (_P,)),
    "llama_model_get_vocab": (_P, (_P,)),
    "llama_model_n_ctx_train": (_I, (_P,)),
    "llama_init_from_model": (_P, (_P, _ParameterStruct)),
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


class _Log:
    """What llama.cpp says, instead of on stderr; one for the process and as long as it, as llama.cpp's own log is."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.cache: str | None = None  # the type of attention's keys
        self.callback = _LOG_CALLBACK(self._on_message)

    def first_error(self) -> str:
        """The first error; those that follow only say that something failed."""
        return self.errors[0] if self.errors else "it does not say why"

    def _on_message(self, level: int, text: bytes | None, _: int | None) -> None:
        if text and (cache := re.search(rb"\bK \((\w+)\)", text)):
            self.cache = cache[1].decode()
        if level == _ERROR_LEVEL and text and text.strip():
            self.errors.append(text.decode("utf-8", "replace").strip())


_log = _Log()


def import_xllamacpp() -> ModuleType:
    """xllamacpp.

    Raises:
        LlamaError: It is not installed.
    """
    try:
        return importlib.import_module("xllamacpp.xllamacpp")
    except ImportError as error:
        raise LlamaCppError(
            f'running a GGUF file needs xllamacpp ({error}); write pip install "finetune[gguf]"'
        ) from None


def llama_library() -> ctypes.CDLL:
    """llama.cpp's shared library, its functions declared.

    Raises:
        LlamaError: xllamacpp is not installed, or its library is otherwise than is known.
    """
    found = ctypes.CDLL(str(import_xllamacpp().__file__))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name, None)
        if function is None:
            raise unknown_release(f"library has no {name}")
        function.restype, function.argtypes = result, arguments
    return found


def unknown_release(what: str) -> LlamaCppError:
    """The error of an xllamacpp that is otherwise than is known."""
    return LlamaCppError(f"xllamacpp {version('xllamacpp')} is not known to work: its {what}")


def _context_fields(words: Sequence[int]) -> tuple[int, int, int]:
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
    raise unknown_release(_CONTEXT_CHANGED)


def cpu_count() -> int:
    """How many cores this process may use."""
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
        self._library = llama_library()
        self._library.llama_log_set(_log.callback, None)
        _log.errors.clear()
        self._library.llama_backend_init()
        self._wanted = context
        self._context: int | None = None
        self._batch: Any = None
        self._past = 0
        options = self._library.llama_model_default_params()
        self._model = self._library.llama_model_load_from_file(os.fsencode(file), options)
        if not self._model:
            raise LlamaCppError(f"{file}: llama.cpp does not take it: {_log.first_error()}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.size: int = self._library.llama_vocab_n_tokens(self._vocabulary)
        # How far the model was made to look back.
        self.trained_context: int = self._library.llama_model_n_ctx_train(self._model)
        # How many positions are computed, and their logits held, at once.
        self.step = max(16, min(512, _MOST_LOGITS // self.size))

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._batch:
            self._library.llama_batch_free(self._batch)
        if self._context:
            self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def tokenize(self, text: str, special: bool, begin: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            special: Whether the names of control tokens stand for them, as in a rendered conversation.
            begin: Whether the tokens that the file puts around a text (BOS, EOS) are put.
        """
        data = text.encode("utf-8")
        room = len(data) + 16  # no token is less than a byte
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, room, begin, special)
        assert count >= 0, f"{len(data)} bytes are {-count} tokens"
        return list(ids[:count])

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """The logits (V) at each position of a row, one after the other."""
        self.reset()
        yield from self.feed(ids, [True] * len(ids))

    def reset(self) -> None:
        """Begins a row anew."""
        self._make_context()
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._past = 0

    def feed(self, ids: Sequence[int], wanted: Sequence[bool]) -> Iterator[Logits]:
        """Puts tokens behind those already fed; gives the logits (V) of those that are wanted, in order.

        Raises:
            LlamaError: A token that the vocabulary has not, more than the context holds, or a failure in llama.cpp.
        """
        self._make_context()
        if self._past + len(ids) > self._wanted:
            raise LlamaCppError(f"{self._past + len(ids)} tokens do not fit a context of {self._wanted}")
        if wrong := [token for token in ids if not 0 <= token < self.size]:
            raise LlamaCppError(f"token {wrong[0]} is not in the file's vocabulary of {self.size:,}")
        batch = self._batch
        for start in range(0, len(ids), self.step):
            part = ids[start : start + self.step]
            batch.count = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, self._past + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = wanted[start + i]
            _log.errors.clear()
            if code := self._library.llama_decode(self._context, batch):
                raise LlamaCppError(f"llama.cpp cannot run the model (code {code}): {_log.first_error()}")
            self._past += len(part)
            for i in range(len(part)):
                if wanted[start + i]:
                    place = self._library.llama_get_logits_ith(self._context, i)
                    yield np.ctypeslib.as_array(place, (self.size,)).copy()

    def _make_context(self) -> None:
        """Makes the context, once."""
        if self._context:
            return
        _log.errors.clear()
        _log.cache = None
        options = self._library.llama_context_default_params()
        words = ctypes.cast(ctypes.byref(options), ctypes.POINTER(ctypes.c_uint32))
        flash, keys, values = _context_fields(words[:128])
        # A context smaller than a batch would make the batch smaller.
        words[0], words[1], words[2] = max(self._wanted, self.step), self.step, self.step
        words[flash] = words[keys] = words[values] = 0  # off, float32, float32
        context = self._library.llama_init_from_model(self._model, options)
        if not context:
            raise LlamaCppError(
                f"llama.cpp cannot make a context of {self._wanted} tokens: {_log.first_error()}"
            )
        self._context = context
        made = [
            int(getattr(self._library, f"llama_n_{name}")(context)) for name in ("ctx", "batch", "ubatch")
        ]
        if made[0] < self._wanted or made[1:] != [self.step] * 2 or _log.cache not in (None, "f32"):
            raise unknown_release(f"{_CONTEXT_CHANGED}: asked for it made {made}, cache {_log.cache}")
        self._library.llama_set_n_threads(context, cpu_count(), cpu_count())
        batch = self._library.llama_batch_init(self.step, 0, 1)
        if batch.count or batch.embd or not (batch.token and batch.pos and batch.seq_id and batch.logits):
            raise unknown_release("llama_batch is laid out otherwise")
        self._batch = batch
