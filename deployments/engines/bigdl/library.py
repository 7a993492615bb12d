"""The two C APIs of bigdl-llm's native libraries, through ctypes alone (`import bigdl.llm` would import torch).

llama and gptneox export the llama.cpp API of mid-2023, bloom and starcoder one of their own; `NativeModel` is what both
come to. The libraries check nothing: an id outside the vocabulary, a position beyond the context or an empty batch
reads or writes foreign memory. `bigdl_model.CachedModel` keeps such calls away and alone calls what evaluates.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cluster.artifacts.manifest import TensorEntry
from cluster.errors import EngineError
from cluster.families import FAMILIES, FamilyName
from cluster.machine.isa import Isa, load_library
from deployments.engines.base import Logits
from deployments.engines.bigdl.mapped_tensors import MappedTensors

Floats = npt.NDArray[np.float32]

_INT_POINTER = ctypes.POINTER(ctypes.c_int)
_FLOAT_POINTER = ctypes.POINTER(ctypes.c_float)


class NativeModel(Protocol):
    """A loaded library context with one sequence in its KV cache."""

    vocab_size: int
    mapped_bytes: int  # of quantized matrices that lie in the mapped file, shared by the replicas of a node

    def share_weights(self, binary: Path, tensors: Sequence[TensorEntry]) -> None:
        """Makes the quantized matrices among `tensors` lie in a mapping of `binary`, the file that was loaded. Logits
        stay the same, bit for bit. Raises OSError where the file cannot be mapped."""
        ...

    def evaluate(self, tokens: Sequence[int], past: int) -> Logits:
        """Puts `tokens` at the positions from `past` on, after the first `past` tokens evaluated before, as one batch.

        The result, float32 [vocab_size] for the last position, lies in the library's memory until the next call.
        """
        ...

    def evaluate_each(self, tokens: Sequence[int], past: int) -> Iterator[Logits]:
        """As `evaluate`, but gives the logits after each of `tokens`, in order and each until the next is taken. The KV
        cache need not be, bit for bit, as `evaluate` leaves it."""
        ...

    def embed(self, tokens: Sequence[int], past: int) -> Floats:
        """As `evaluate`, but gives what the output layer makes the logits of: the last position's hidden state after
        the final norm, float32 [width], in the library's memory until the next call."""
        ...

    def tokenize(self, text: bytes) -> list[int]:
        """The library's own tokenizer, as bigdl-llm uses it (llama and gptneox put their first token in front)."""
        ...

    def token_bytes(self, token: int) -> bytes: ...

    def close(self) -> None: ...


def load_native(binary: Path, family: FamilyName, isa: Isa, threads: int, context: int, quiet: bool) -> NativeModel:
    """Raises EngineError where the library says that it cannot load the file; some files make it abort instead, which
    is why an artifact is loaded in a child process (`deployments.engines.check`) before it is published."""
    library, described = load_library(family, isa), FAMILIES[family].library
    api = LlamaApi if described.api == "llama.cpp" else ForwardApi
    if described.init_backend:
        getattr(library, f"{family}_init_backend")()
    with _captured_output(quiet) as said:
        model = api.load(library, family, binary, threads, context)
    if model is None:
        reason = said()[-1:] or ["no reason given"]
        raise EngineError(f"{binary}: the {family} library of bigdl-llm cannot load it: {reason[0]}")
    return model


class _ContextParams(ctypes.Structure):
    """`{llama,gptneox}_context_params`; the second field is n_gpu_layers in one and n_parts in the other."""

    _fields_ = (
        ("n_ctx", ctypes.c_int),
        ("n_gpu_layers_or_n_parts", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("f16_kv", ctypes.c_bool),
        ("logits_all", ctypes.c_bool),
        ("vocab_only", ctypes.c_bool),
        ("use_mmap", ctypes.c_bool),
        ("use_mlock", ctypes.c_bool),
        ("embedding", ctypes.c_bool),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
    )


class LlamaApi:
    """llama and gptneox: the caller says where in the KV cache a batch goes."""

    def __init__(self, library: ctypes.CDLL, prefix: str, handle: int, threads: int) -> None:
        self._library, self._prefix, self._handle, self._threads = library, prefix, handle, threads
        context_pointer = ctypes.c_void_p
        int_ = ctypes.c_int
        self._eval = self._function("eval", int_, context_pointer, _INT_POINTER, int_, int_, int_)
        self._get_logits = self._function("get_logits", _FLOAT_POINTER, context_pointer)
        self._get_embeddings = self._function("get_embeddings", _FLOAT_POINTER, context_pointer)
        self._tokenize = self._function(
            "tokenize", int_, context_pointer, ctypes.c_char_p, _INT_POINTER, int_, ctypes.c_bool
        )
        self._token_to_str = self._function("token_to_str", ctypes.c_char_p, context_pointer, int_)
        self.vocab_size = int(self._function("n_vocab", int_, context_pointer)(handle))
        self.width = int(self._function("n_embd", int_, context_pointer)(handle))
        self.context = int(self._function("n_ctx", int_, context_pointer)(handle))
        self.mapped_bytes = 0

    @classmethod
    def load(cls, library: ctypes.CDLL, prefix: str, binary: Path, threads: int, context: int) -> LlamaApi | None:
        defaults = getattr(library, f"{prefix}_context_default_params")
        defaults.restype = _ContextParams
        params = defaults()
        params.n_ctx, params.f16_kv = context, True
        # Both are computed anyway, and only copied out.
        params.logits_all, params.embedding = True, True
        # Replicas of a node then share the pages of one file.
        params.use_mmap = bool(getattr(library, f"{prefix}_mmap_supported")())
        init = getattr(library, f"{prefix}_init_from_file")
        # By pointer, unlike upstream llama.cpp.
        init.restype, init.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.POINTER(_ContextParams)]
        handle = init(os.fsencode(binary), ctypes.byref(params))
        return cls(library, prefix, handle, threads) if handle else None

    def share_weights(self, binary: Path, tensors: Sequence[TensorEntry]) -> None:
        # The library has mapped the file itself where it can.
        if self._function("mmap_supported", ctypes.c_bool)():
            self.mapped_bytes = sum(entry.bytes for entry in tensors if entry.type != "f32")

    def evaluate(self, tokens: Sequence[int], past: int) -> Logits:
        logits: Logits = self._all_logits(tokens, past)[-1]
        return logits

    def evaluate_each(self, tokens: Sequence[int], past: int) -> Iterator[Logits]:
        yield from self._all_logits(tokens, past)

    def embed(self, tokens: Sequence[int], past: int) -> Floats:
        self._all_logits(tokens, past)
        return np.ctypeslib.as_array(self._get_embeddings(self._handle), (self.width,))

    def tokenize(self, text: bytes) -> list[int]:
        room = len(text) + 2  # a token is at least a byte; one more goes in front
        buffer = (ctypes.c_int * room)()
        count = self._tokenize(self._handle, text, buffer, room, True)
        if count < 0:
            raise EngineError(f"{self._prefix}_tokenize wants {-count} tokens for {len(text)} bytes")
        return list(buffer[:count])

    def token_bytes(self, token: int) -> bytes:
        return bytes(self._token_to_str(self._handle, token) or b"")

    def close(self) -> None:
        self._function("free", None, ctypes.c_void_p)(self._handle)

    def _all_logits(self, tokens: Sequence[int], past: int) -> Logits:
        """[tokens, vocab_size]"""
        batch = (ctypes.c_int * len(tokens))(*tokens)
        status = self._eval(self._handle, batch, len(tokens), past, self._threads)
        if status != 0:
            raise EngineError(f"{self._prefix}_eval returned {status} for {len(tokens)} tokens at position {past}")
        return np.ctypeslib.as_array(self._get_logits(self._handle), (len(tokens), self.vocab_size))

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        return _prototype(self._library, f"{self._prefix}_{name}", result, *arguments)


class ForwardApi:
    """bloom and starcoder: `forward_api(ids)` keeps the KV cache of the previous call's ids, evaluates what follows the
    common prefix (at least the last id) and samples by itself with fixed settings, so its result is of no use here.

    The logits it sampled from are read where `eval_api` of a single token once said that they lie: both write the same
    buffer, which stays put as long as no `eval_api` of several tokens makes it grow. `evaluate` marks that place before
    each call and raises EngineError when the mark is still there, so that stale logits are never taken for new ones.
    `embed_api` does what `forward_api` does, logits and KV cache included, and returns the hidden state instead.
    """

    _SEED = 1  # of the library's own sampling, which is not used

    def __init__(self, library: ctypes.CDLL, prefix: str, handle: int, threads: int, context: int) -> None:
        self._library, self._prefix, self._handle, self._threads = library, prefix, handle, threads
        self._mapped: MappedTensors | None = None
        self.mapped_bytes = 0
        int_, handle_ = ctypes.c_int, ctypes.c_void_p
        self._forward = _prototype(library, "forward_api", int_, handle_, _INT_POINTER, int_, int_, int_, int_)
        self._embed = _prototype(
            library,
            "embed_api",
            _FLOAT_POINTER,
            *(handle_, _INT_POINTER, int_, int_, int_, int_, ctypes.POINTER(ctypes.c_long)),
        )
        self._tokenize = _prototype(
            library, "tokenize_api", _INT_POINTER, handle_, ctypes.c_char_p, ctypes.c_bool, _INT_POINTER
        )
        self._token_chars = _prototype(library, "detokenize_api", ctypes.c_char_p, handle_, int_)
        self._free_pointer = _prototype(library, "c_free", None, ctypes.c_void_p)
        # What the library holds in its KV cache: the first `_held` ids. It starts with the token of `_find_logits`.
        self._ids = np.zeros(context, np.intc)
        self._ids_pointer = self._ids.ctypes.data_as(_INT_POINTER)
        self._held = 1
        self._logits = self._find_logits()
        self.vocab_size = len(self._logits)

    @classmethod
    def load(cls, library: ctypes.CDLL, prefix: str, binary: Path, threads: int, context: int) -> ForwardApi | None:
        load = _prototype(library, f"{prefix}_load", ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
        handle = load(os.fsencode(binary), context, threads)
        return cls(library, prefix, handle, threads, context) if handle else None

    def share_weights(self, binary: Path, tensors: Sequence[TensorEntry]) -> None:
        self._mapped = MappedTensors(self._handle, binary, tensors)
        self.mapped_bytes = self._mapped.bytes

    def evaluate(self, tokens: Sequence[int], past: int) -> Logits:
        self._forget_beyond(past, tokens[0])
        self._put(self._forward, tokens, past)
        return self._logits

    def evaluate_each(self, tokens: Sequence[int], past: int) -> Iterator[Logits]:
        # One by one: `eval_api` of several tokens evaluates everything before them again and keeps the logits of all.
        for position, token in enumerate(tokens, past):
            yield self.evaluate([token], position)

    def embed(self, tokens: Sequence[int], past: int) -> Floats:
        self._forget_beyond(past, tokens[0])
        width = ctypes.c_long(0)
        pointer = self._put(self._embed, tokens, past, ctypes.byref(width))
        return np.ctypeslib.as_array(pointer, (width.value,))

    def tokenize(self, text: bytes) -> list[int]:
        count = ctypes.c_int(0)
        pointer = self._tokenize(self._handle, text, False, ctypes.byref(count))
        try:
            return list(pointer[: count.value])
        finally:
            self._free_pointer(pointer)

    def token_bytes(self, token: int) -> bytes:
        return bytes(self._token_chars(self._handle, token) or b"")

    def close(self) -> None:
        if self._mapped:
            self._mapped.reopen()  # the library frees its own memory and may use it again
        _prototype(self._library, f"{self._prefix}_free", None, ctypes.c_void_p)(self._handle)
        if self._mapped:
            self._mapped.close()

    def _find_logits(self) -> Logits:
        int_ = ctypes.c_int
        count = ctypes.c_long(0)
        eval_api = _prototype(
            self._library,
            "eval_api",
            _FLOAT_POINTER,
            *(ctypes.c_void_p, _INT_POINTER, int_, int_, int_, int_, ctypes.POINTER(ctypes.c_long)),
        )
        pointer = eval_api(self._handle, (ctypes.c_int * 1)(0), 1, self._SEED, self._threads, 1, ctypes.byref(count))
        return np.ctypeslib.as_array(pointer, (count.value,))

    def _forget_beyond(self, past: int, following: int) -> None:
        """Makes the library evaluate from `past` on even where it still holds the same tokens there.

        Asked for ids that it holds already it would evaluate the last one only, which gives other float noise than the
        whole batch: the same request would not give the same logits twice. One call with another token at `past` ends
        the common prefix there.
        """
        if self._held > past and self._ids[past] == following:
            self._put(self._forward, [(following + 1) % self.vocab_size], past)

    def _put(self, call: Any, tokens: Sequence[int], past: int, *more: Any) -> Any:
        count = past + len(tokens)
        self._ids[past:count] = tokens
        self._held = count
        self._logits[0] = np.nan
        result = call(self._handle, self._ids_pointer, count, self._SEED, self._threads, len(tokens), *more)
        if np.isnan(self._logits[0]):
            raise EngineError(f"{self._prefix}: no logits after {count} tokens (or they are NaN)")
        return result


def _prototype(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


@contextmanager
def _captured_output(quiet: bool) -> Iterator[Any]:
    """Takes what C code writes to stdout and stderr meanwhile; yields a function that returns its lines. It redirects
    the file descriptors of the whole process, hence only while loading. With `quiet` off nothing is taken, so that the
    last words of a library that aborts are not lost."""
    if not quiet:
        yield list
        return
    with tempfile.TemporaryFile() as capture:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        try:
            for fd, _ in saved:
                os.dup2(capture.fileno(), fd)

            def lines() -> list[str]:
                capture.seek(0)
                return capture.read().decode(errors="replace").split("\n")

            yield lambda: [line for line in lines() if line.strip()]
        finally:
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)
