"""Memory of a KV cache, in huge pages that are got from the kernel while there is nothing else to do.

A page that comes when a block is first used makes that step slower; to have all of them before the first request would
keep a replica from its work, for seconds where the machine is virtual and its host hands out memory slowly.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cluster.serve_settings import SERVE_LOGGER

logger = logging.getLogger(SERVE_LOGGER)

Cache = npt.NDArray[np.uint8]

MADV_POPULATE_WRITE = 23  # Linux 5.14 and later; it changes no content, so blocks may be in use meanwhile
BYTES_AT_ONCE = 2 << 20  # a huge page on x86


def zeros(size: int) -> Cache:
    """So many bytes, whose pages are not there yet."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def populate(caches: Sequence[Cache]) -> Iterator[None]:
    """Gets the pages of caches of one size, a few at a time, in the order in which blocks are taken: the first ones of
    all caches, then the next ones. On an older kernel it ends at once, and pages come when they are used."""
    # The mmap module's madvise would hold the interpreter's lock meanwhile.
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start in range(0, caches[0].nbytes, BYTES_AT_ONCE):
        for cache in caches:
            if madvise(cache.ctypes.data + start, min(BYTES_AT_ONCE, cache.nbytes - start), MADV_POPULATE_WRITE):
                logger.info("KV cache: its pages come when they are used: %s", os.strerror(ctypes.get_errno()))
                return
            yield


def trim_heap() -> None:
    """Gives memory that malloc has free back to the kernel, as what packing weights needed for a time. Without glibc
    nothing happens."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
