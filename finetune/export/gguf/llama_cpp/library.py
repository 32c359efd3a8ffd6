"""Runs a GGUF file in llama.cpp through ctypes: token ids and whole rows of logits.

llama.cpp's server (`server.py`) returns no logits, nor the ids of a text in which nothing is a control token. So they
come from the C interface of xllamacpp's shared library, whose structs change from release to release: a field is found
by the default values around it, and a check afterwards shows that llama.cpp took the values.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.system.devices import usable_cores
from finetune.system.errors import LlamaCppError
from finetune.system.extras import install_command

Logits = NDArray[np.float32]

# Logits that llama.cpp holds at once: 64 MB.
_MOST_LOGITS = 2**24
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_CONTEXT_CHANGED = "llama_context_params is laid out otherwise"


class _ParameterStruct(ctypes.Structure):
    """A parameter struct of llama.cpp, larger than that of any release.

    Such structs are passed in memory, and no release reads beyond the fields that it knows.
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
    "llama_tokenize": (_I, (_P, ctypes.c_char_p, _I, ctypes.POINTER(ctypes.c_int32), _I, _B, _B)),
    "llama_batch_init": (_Batch, (_I, _I, _I)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_adapter_lora_init": (_P, (_P, ctypes.c_char_p)),
    "llama_set_adapters_lora": (_I, (_P, ctypes.POINTER(_P), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float))),
    "llama_decode": (_I, (_P, _Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_P, _I)),
}


class _Log:
    """Collects llama.cpp's log messages; there is one for the process, as llama.cpp's own log is global."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.cache: str | None = None  # the type of the cached keys
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
    """The module xllamacpp.

    Raises:
        LlamaCppError: It is not installed.
    """
    try:
        return importlib.import_module("xllamacpp.xllamacpp")
    except ImportError as error:
        raise LlamaCppError(f"running a GGUF file needs xllamacpp ({error}); run {install_command('gguf')}") from None


def llama_library() -> ctypes.CDLL:
    """llama.cpp's shared library, with its functions declared.

    Raises:
        LlamaCppError: xllamacpp is not installed, or its library lacks a function.
    """
    found = ctypes.CDLL(str(import_xllamacpp().__file__))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(found, name, None)
        if function is None:
            raise unknown_release(f"library has no {name}")
        function.restype, function.argtypes = result, arguments
    return found


def unknown_release(what: str) -> LlamaCppError:
    """The error for a release of xllamacpp that differs from the known ones."""
    return LlamaCppError(f"xllamacpp {version('xllamacpp')} is not known to work: its {what}")


def _context_fields(words: Sequence[int]) -> tuple[int, int, int]:
    """The places of flash_attn_type, type_k and type_v in `llama_context_params`, found by the defaults around them.

    Fields come and go in it, but not between these (August 2025 to October 2026):

        rope_scaling_type, pooling_type, attention_type, flash_attn_type      -1
        rope_freq_base, rope_freq_scale                                       0.0
        yarn_ext_factor, _attn_factor, _beta_fast, _beta_slow                 -1.0
        yarn_orig_ctx, defrag_thold                                           0, -1.0
        cb_eval, cb_eval_user_data                                            null, perhaps aligned by a word
        type_k, type_v                                                        1, which is float16
    """
    # n_ctx, n_batch and n_ubatch have been first as long.
    if list(words[:3]) == [512, 2048, 512]:
        minus = 0xBF800000
        for zeros in (4, 5):
            known = [0xFFFFFFFF] * 4 + [0, 0] + [minus] * 4 + [0, minus] + [0] * zeros + [1, 1]
            places = [i for i in range(3, 64) if list(words[i : i + len(known)]) == known]
            if len(places) == 1:
                end = places[0] + len(known)
                return places[0] + 3, end - 2, end - 1
    raise unknown_release(_CONTEXT_CHANGED)


class Llama:
    """A GGUF file in llama.cpp, on all cores. Use it in a fresh process, because a fault in llama.cpp ends the process.

    Keys and values are cached in float32, without flash attention (a user's default is float16 with flash attention),
    so that differences from another model's predictions come from the file alone.

    Args:
        file: The file.
        context: The most tokens of a row or an answer.
        adapter: A GGUF file of LoRA to add.

    Raises:
        LlamaCppError: xllamacpp is missing or of an unknown release, or llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, context: int = 512, adapter: Path | None = None) -> None:
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
        # The model frees it.
        self._adapter = adapter and self._library.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        if adapter and not self._adapter:
            raise LlamaCppError(f"{adapter}: llama.cpp does not take it: {_log.first_error()}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.size: int = self._library.llama_vocab_n_tokens(self._vocabulary)
        # The context that the model was trained for.
        self.trained_context: int = self._library.llama_model_n_ctx_train(self._model)
        # Positions that are computed at once, with their logits.
        self.step = max(16, min(512, _MOST_LOGITS // self.size))

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        if self._batch:
            self._library.llama_batch_free(self._batch)
        if self._context:
            self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def tokenize(self, text: str, special: bool, begin: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            special: The names of control tokens stand for these tokens, as in a rendered conversation.
            begin: Adds the tokens that the file puts around a text (BOS, EOS).
        """
        data = text.encode("utf-8")
        capacity = len(data) + 16  # a token has at least one byte
        ids = (ctypes.c_int32 * capacity)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, capacity, begin, special)
        assert count >= 0, f"{len(data)} bytes are {-count} tokens"
        return list(ids[:count])

    def logits(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Yields the logits (V) at each position of a row.

        Raises:
            LlamaCppError: llama.cpp cannot compute the tokens.
        """
        self.reset()
        yield from self.feed(ids, [True] * len(ids))

    def reset(self) -> None:
        """Forgets the tokens fed so far.

        Raises:
            LlamaCppError: llama.cpp cannot make a context of this size.
        """
        self._make_context()
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._past = 0

    def feed(self, ids: Sequence[int], wanted: Sequence[bool]) -> Iterator[Logits]:
        """Feeds tokens after those already fed; yields the logits (V) of those that are wanted, in order.

        Raises:
            LlamaCppError: A token is not in the vocabulary, the context is too small, or llama.cpp fails.
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
        """Makes the context at the first call."""
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
            raise LlamaCppError(f"llama.cpp cannot make a context of {self._wanted} tokens: {_log.first_error()}")
        self._context = context
        made = [int(getattr(self._library, f"llama_n_{name}")(context)) for name in ("ctx", "batch", "ubatch")]
        if made[0] < self._wanted or made[1:] != [self.step] * 2 or _log.cache not in (None, "f32"):
            raise unknown_release(f"{_CONTEXT_CHANGED}: asked for it made {made}, cache {_log.cache}")
        if self._adapter:
            one = (_P * 1)(self._adapter), 1, (ctypes.c_float * 1)(1.0)
            if self._library.llama_set_adapters_lora(context, *one):
                raise LlamaCppError(f"llama.cpp cannot add the adapter: {_log.first_error()}")
        self._library.llama_set_n_threads(context, usable_cores(), usable_cores())
        batch = self._library.llama_batch_init(self.step, 0, 1)
        if batch.count or batch.embd or not (batch.token and batch.pos and batch.seq_id and batch.logits):
            raise unknown_release("llama_batch is laid out otherwise")
        self._batch = batch
