"""Moves compiled code to other pages of memory, in random order.

oneDNN compiles a kernel for each shape of a product and gives it a mapping of its own, of which a page or two is used.
New pages come from the operating system one after the other, and code that lies so is slow in some processes: a step
of 8 sequences takes 42 ms in one, 60 in the next, and stays so. On pages in random order it takes 41 to 47
(tests/bench/NOTES.md has the figures, and what else was tried). Nothing but the physical pages changes: not an address,
not a byte.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.serve_settings import SERVE_LOGGER

logger = logging.getLogger(SERVE_LOGGER)

MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


def scatter_code() -> int:
    """Of this process, what is executable and from no file. Other threads may run it meanwhile; none may compile, or
    free what was compiled. Returns how many pages were moved: fewer where the system refuses memory that is writable
    and executable."""
    moved = 0
    with no_collector():
        for start, end in compiled_code(Path("/proc/self/maps").read_text().splitlines()):
            try:
                moved += scatter(start, end - start)
            except OSError as error:
                logger.info("compiled code stays where it is: %s", error.strerror)
                break
    return moved


@contextmanager
def no_collector() -> Iterator[None]:
    """Python's collector of reference cycles waits: it would free the code of a model that is no more, be it between
    two lines of `scatter`."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compiled_code(maps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Start and end of the private mappings in /proc/PID/maps that are writable and executable and of no file."""
    for line in maps:
        addresses, permissions, _, _, inode, *name = line.split()
        if permissions == "rwxp" and inode == "0" and not name:
            start, _, end = addresses.partition("-")
            yield int(start, 16), int(end, 16)


def scatter(start: int, size: int) -> int:
    """Copies the pages of a mapping that are in use to new ones in random order, and puts these in its place. Returns
    how many. Raises OSError where it cannot, and has changed nothing then."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    beside = libc.mmap(None, ctypes.c_size_t(size), everything, flags, -1, ctypes.c_long(0))
    if beside == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    old, new = pages(start, size), pages(beside, size)
    used = np.random.default_rng().permutation(np.flatnonzero(old.any(axis=1)))
    for page in used:
        new[page] = old[page]
    # In one step: a thread that runs this code finds either the old pages or the new ones.
    arguments = ctypes.c_void_p(beside), ctypes.c_size_t(size), ctypes.c_size_t(size)
    if libc.mremap(*arguments, MREMAP_MAYMOVE | MREMAP_FIXED, ctypes.c_void_p(start)) != start:
        number = ctypes.get_errno()
        libc.munmap(ctypes.c_void_p(beside), ctypes.c_size_t(size))
        raise OSError(number, os.strerror(number))
    return len(used)


def pages(start: int, size: int) -> npt.NDArray[np.uint8]:
    """The memory from address `start` on, [pages, bytes]."""
    memory = (ctypes.c_uint8 * size).from_address(start)
    return np.ctypeslib.as_array(memory).reshape(-1, mmap.PAGESIZE)
