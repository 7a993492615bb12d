"""The KV cache's memory comes piece by piece, and what is in it stays."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import pytest

from deployments.engines.cache_memory import BYTES_AT_ONCE, Cache, populate, zeros

SIZE = 2 * BYTES_AT_ONCE + 4096


def resident(cache: Cache) -> int:
    """Bytes that are in memory of the mapping that the cache lies in."""
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        start, end = (int(part, 16) for part in mapping.split(maxsplit=1)[0].split("-"))
        if start <= cache.ctypes.data < end:
            return 1024 * int(re.findall(r"Rss: +(\d+) kB", mapping)[0])
    raise AssertionError("not mapped")


def test_every_page_comes_and_content_stays() -> None:
    caches = [zeros(SIZE), zeros(SIZE)]
    caches[1][SIZE - 1] = 7
    before = resident(caches[0])  # of a mapping that neighbours may be part of
    pieces = populate(caches)
    next(pieces)
    caches[0][5] = 9
    assert sum(1 for _ in pieces) == 2 * 3 - 1
    assert resident(caches[0]) >= before + SIZE
    assert resident(caches[1]) >= SIZE
    assert caches[0][5] == 9
    assert caches[1][SIZE - 1] == 7
    assert sum(int(cache.sum()) for cache in caches) == 16


def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # refused, as by such a kernel
    with pytest.raises(OSError, match="Invalid argument"):
        mmap.mmap(-1, 4096).madvise(9999)
    cache = zeros(SIZE)
    assert (cache.nbytes, cache.any()) == (SIZE, False)


def test_an_older_kernel_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.madvise = lambda *arguments: -1
            self.madvise.argtypes = None  # type: ignore[attr-defined]

    monkeypatch.setattr(ctypes, "CDLL", Refusing)
    cache = zeros(SIZE)
    assert list(populate([cache])) == []
    assert not cache.any()
