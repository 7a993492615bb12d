"""Makes bloom's and starcoder's library read its weights from the mapped artifact, so that replicas share one copy.

These two libraries have no mmap: each replica reads the file into memory of its own. What lies there is, byte for byte,
what lies in the file, and every computation takes a tensor's address from the `data` field of its `ggml_tensor`. So
after the library has loaded the file, the `data` field of each quantized matrix is pointed into a mapping of the file,
and the pages of the library's own copy go back to the system. The page cache then holds the one copy of the node, as it
does for llama and gptneox, whose libraries map the file themselves.

Where things lie is the layout of llama.cpp's ggml.h and ggml.c in mid-2023, which bigdl-llm 2.4.0 has in all builds:

    ggml_context  mem_size, mem_buffer, flags, objects_begin, objects_end, ...     the model's handle points to it
    ggml_object   offset of a tensor in mem_buffer, size, next, padding            a linked list within mem_buffer
    ggml_tensor   type, dimensions, ne[4], nb[4], op, ..., data, name, padding     its data follows the struct

None of this is trusted. A tensor is moved only where its `data` field holds the address behind its struct, its `nb`
gives the size of the manifest's entry, and all its bytes are equal to those of the file. Whatever does not fit stays as
the library loaded it. The old pages are made inaccessible: a pointer to them that was overlooked would end the process
instead of computing with zeros. The mapping is copy-on-write, so a build that rewrote its weights would get private
pages and not change the artifact.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.artifacts.manifest import TensorEntry
from cluster.serve_settings import SERVE_LOGGER

logger = logging.getLogger(SERVE_LOGGER)

WORD = 8
HANDLE_WORDS = 32  # of the model's handle that are searched for its ggml_context; it is word 13 or 15
OBJECT_BYTES = 32
TENSOR_BYTES = 224
SIZE_WORD, DATA_WORD = 8, 21  # of ggml_tensor: nb[2], the bytes of a matrix, and data
PROT_NONE, MAP_FIXED = 0, 0x10  # the mmap module has no names for them

Words = npt.NDArray[np.uint64]


class MappedTensors:
    """The matrices of one loaded model that lie in the mapped file. `bytes` is their size together."""

    def __init__(self, handle: int, binary: Path, tensors: Sequence[TensorEntry]) -> None:
        """Moves the quantized matrices among `tensors`, of the model that the library loaded from `binary`. Nothing may
        be evaluated meanwhile. Logs how much stays private where a matrix is not found. Raises OSError for a file that
        cannot be mapped."""
        self.bytes = 0
        self._file: npt.NDArray[np.uint8] | None = np.memmap(binary, np.uint8, "c")
        self._left: list[tuple[int, int]] = []  # start and size of the library's pages that were given back
        wanted: dict[int, list[TensorEntry]] = defaultdict(list)
        for entry in tensors:
            if entry.type != "f32":
                wanted[entry.bytes].append(entry)
        for tensor in find_tensors(handle):
            self._move(tensor, wanted)
        missing = [entry for entries in wanted.values() for entry in entries]
        if missing:
            size = sum(entry.bytes for entry in missing)
            logger.warning(
                "%s: %d matrices (%d bytes, the first %s) were not found where the library keeps its tensors; each"
                " replica holds a copy of them",
                *(binary, len(missing), size, missing[0].name),
            )

    def reopen(self) -> None:
        """Makes the library's own pages accessible again (they read as zeros): it frees and may reuse them. The model
        must not be evaluated any more."""
        while self._left:
            _new_pages(*self._left.pop(), mmap.PROT_READ | mmap.PROT_WRITE)

    def close(self) -> None:
        """Unmaps the file. The library must have freed the model before."""
        self._file = None

    def _move(self, tensor: int, wanted: dict[int, list[TensorEntry]]) -> None:
        """Points the ggml_tensor at this address into the file if it holds one of the entries, and takes that out."""
        assert self._file is not None, "moves happen before close"
        fields = read_words(tensor, TENSOR_BYTES // WORD)
        data, size = tensor + TENSOR_BYTES, int(fields[SIZE_WORD])
        if fields[DATA_WORD] != data:
            return
        entries = wanted[size]
        for number, entry in enumerate(entries):
            source = self._file.ctypes.data + entry.offset
            if _equal(data, source, size):
                ctypes.c_uint64.from_address(tensor + DATA_WORD * WORD).value = source
                self._give_back(data, size)
                self.bytes += size
                del entries[number]
                return

    def _give_back(self, start: int, size: int) -> None:
        """Gives the whole pages of a matrix that was moved back to the system, if it takes them."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (start + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole <= 0:
            return
        try:
            _new_pages(first, whole, PROT_NONE)
        except OSError as error:
            logger.warning("%d bytes of weights that nothing reads any more stay in memory: %s", whole, error.strerror)
            return
        self._left.append((first, whole))


def find_tensors(handle: int) -> Iterator[int]:
    """Addresses of the ggml_tensor structs of the context that a model's handle points to, none where there is no
    context to be recognized."""
    contexts = {context for word in read_words(handle, HANDLE_WORDS) if (context := _context(int(word))) is not None}
    if len(contexts) != 1:
        return
    ((start, size),) = contexts
    node = start
    while start <= node <= start + size - OBJECT_BYTES:
        offset, _, following, _ = (int(word) for word in read_words(node, OBJECT_BYTES // WORD))
        if offset + TENSOR_BYTES <= size:
            yield start + offset
        if following <= node:  # 0 ends the list, which runs through the buffer in order
            return
        node = following


def read_words(address: int, count: int) -> Words:
    """`count` words of 8 bytes of this process's memory, fewer where it ends. By way of the system, which gives none
    for an address that is not mapped where a plain read would end the process."""
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        try:
            data = os.pread(memory.fileno(), count * WORD, address)
        except (OSError, OverflowError):  # not mapped; not an address of a user's process
            data = b""
    return np.frombuffer(data[: len(data) // WORD * WORD], np.uint64)


def _context(address: int) -> tuple[int, int] | None:
    """Start and size of the ggml_context's buffer, if there is one at this address."""
    words = read_words(address, 5)
    if len(words) < 5:
        return None
    size, start, _, first, last = (int(word) for word in words)
    return (start, size) if start == first and start < last < start + size else None


def _equal(left: int, right: int, size: int) -> bool:
    """Compares memory without a copy and without the interpreter's lock."""
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return bool(compare(left, right, size) == 0)


def _new_pages(start: int, size: int, protection: int) -> None:
    """Puts fresh pages, which take no memory until they are written, in the place of whole pages of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = libc.mmap
    place.restype = ctypes.c_void_p
    place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    if place(start, size, protection, flags, -1, 0) != start:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
