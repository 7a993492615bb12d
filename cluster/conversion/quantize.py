"""Numbers to Q4_0 or Q8_0 by the family's own library, so that the bytes are those of bigdl-llm's converter.

fp16 goes through the library as well: its conversions round as numpy's do (to nearest, ties to even) but run several
times as fast, and with numpy they would take longer than the quantization itself. Where no build of the library runs
(arm64), numpy does all of it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.artifacts.ggml import BLOCK_BYTES, BLOCK_WEIGHTS
from cluster.artifacts.manifest import Quantization
from cluster.conversion.quantize_numpy import NumpyQuantizer
from cluster.families import FamilyName
from cluster.machine.isa import choose_isa, load_library, runs_bigdl


class Quantizer(Protocol):
    """All arrays are contiguous."""

    def use_one_thread(self) -> None:
        """For the calling thread, whatever OMP_NUM_THREADS says: where every core has a caller of its own."""

    def from_half(self, numbers: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]: ...

    def rounded_to_half(self, numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The nearest fp16 numbers; what is beyond fp16's range becomes infinite."""
        ...

    def quantize(
        self, weights: npt.NDArray[np.float32], out: npt.NDArray[np.uint8], quantization: Quantization = "q4_0"
    ) -> None:
        """Writes the blocks of `weights`, shape (rows, multiple of 64), to `out`."""


class _InitParams(ctypes.Structure):
    """struct ggml_init_params, passed by value."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class LibraryQuantizer:
    """Of one family, on this node. Raises EngineError where no build of the library runs."""

    def __init__(self, family: FamilyName) -> None:
        library = load_library(family, choose_isa())
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        # ggml_quantize_q4_0 gives the same bytes, but takes a quarter longer: it counts nibbles in a histogram.
        # OpenMP's threads are those of OMP_NUM_THREADS, which Ray sets to the CPUs of the task.
        self._q4_0 = library.ggml_quantize_q4_0_multi_thread
        self._q4_0.argtypes = [pointer, pointer, ctypes.c_size_t, integer]
        self._q8_0 = library.ggml_quantize_q8_0
        self._q8_0.argtypes = [pointer, pointer, integer, integer, pointer]
        self._q4_0.restype = self._q8_0.restype = ctypes.c_size_t
        self._to_half, self._to_float = library.ggml_fp32_to_fp16_row, library.ggml_fp16_to_fp32_row
        for function in (self._to_half, self._to_float):
            function.argtypes, function.restype = [pointer, pointer, integer], None
        # The first context fills the table that fp16 is read with; before that every fp16 number reads as 0.
        library.ggml_init.argtypes, library.ggml_init.restype = [_InitParams], pointer
        library.ggml_free.argtypes, library.ggml_free.restype = [pointer], None
        library.ggml_free(library.ggml_init(_InitParams(mem_size=16384)))
        self._set_threads = library.omp_set_num_threads
        self._histogram = (ctypes.c_int64 * 16)()  # ggml_quantize_q8_0 counts in it; nobody reads it

    def use_one_thread(self) -> None:
        self._set_threads(1)

    def from_half(self, numbers: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
        out = np.empty(numbers.shape, np.float32)
        self._to_float(numbers.ctypes.data, out.ctypes.data, numbers.size)
        return out

    def rounded_to_half(self, numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        half = np.empty(numbers.shape, np.float16)
        self._to_half(numbers.ctypes.data, half.ctypes.data, numbers.size)
        return self.from_half(half)

    def quantize(
        self, weights: npt.NDArray[np.float32], out: npt.NDArray[np.uint8], quantization: Quantization = "q4_0"
    ) -> None:
        if weights.shape[1] % BLOCK_WEIGHTS or out.size * BLOCK_WEIGHTS != weights.size * BLOCK_BYTES[quantization]:
            raise ValueError(
                f"{quantization} takes rows of whole blocks; found shape {weights.shape} for {out.size} bytes"
            )
        arguments = (weights.ctypes.data, out.ctypes.data, weights.size, weights.shape[1])
        if quantization == "q4_0":
            self._q4_0(*arguments)
        else:
            self._q8_0(*arguments, ctypes.addressof(self._histogram))


@lru_cache(maxsize=4)
def quantizer(family: FamilyName) -> Quantizer:
    """The process's quantizer of a family: a library is loaded once."""
    return LibraryQuantizer(family) if runs_bigdl() else NumpyQuantizer()
