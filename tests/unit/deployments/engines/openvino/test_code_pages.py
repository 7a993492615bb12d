"""Compiled code runs as before after its pages were moved, and only such code is moved."""

from __future__ import annotations

import ctypes
import gc
import mmap
import platform
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deployments.engines.openvino import code_pages
from deployments.engines.openvino.code_pages import compiled_code, scatter, scatter_code

SIZE = 64 * mmap.PAGESIZE
RETURNS_ITS_ARGUMENT_PLUS = b"\x8d\x87"  # lea eax, [rdi + …], as x86 has it
RET = b"\xc3"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the code of this test is x86's")


@contextmanager
def code() -> Iterator[tuple[int, mmap.mmap]]:
    """A mapping with a function on every second page: that of page n adds n to its argument."""
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, everything)
    for page in range(0, SIZE // mmap.PAGESIZE, 2):
        function = RETURNS_ITS_ARGUMENT_PLUS + page.to_bytes(4, "little") + RET
        memory[page * mmap.PAGESIZE : page * mmap.PAGESIZE + len(function)] = function
    yield ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory


def called(start: int, page: int, argument: int) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(start + page * mmap.PAGESIZE)(argument))


def test_code_runs_as_before_and_no_byte_differs() -> None:
    with code() as (start, memory):
        before = bytes(memory[:])
        assert scatter(start, SIZE) == SIZE // mmap.PAGESIZE // 2
        assert memory[:] == before
        assert [called(start, page, 1000) for page in range(0, 64, 2)] == [1000 + page for page in range(0, 64, 2)]


def test_the_code_of_this_process_is_found() -> None:
    with code() as (start, _):
        assert scatter_code() >= SIZE // mmap.PAGESIZE // 2
        assert called(start, 2, 5) == 7


def test_the_collector_frees_no_code_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it freed an earlier engine's code while pages of it were about to be moved: a segmentation fault."""

    class Ring:
        def __init__(self) -> None:
            self.ring = self

    alive = []

    def scatter_amid_garbage(start: int, size: int) -> int:
        garbage = weakref.ref(Ring())
        assert len([[] for _ in range(100_000)]) == 100_000  # so many new objects bring the collector
        alive.append(garbage() is not None)
        return scatter(start, size)

    monkeypatch.setattr(code_pages, "scatter", scatter_amid_garbage)
    with code():
        scatter_code()
    assert alive
    assert all(alive)
    assert gc.isenabled()


def test_what_cannot_be_moved_stays_as_it_is() -> None:
    with code() as (start, memory):
        before = bytes(memory[:])
        with pytest.raises(OSError, match="Invalid argument"):
            scatter(start + 64, SIZE - mmap.PAGESIZE)  # not where a page begins
        assert memory[:] == before


@pytest.mark.parametrize(
    "line",
    [
        "7f7af2768000-7f7af27a8000 r-xp 00000000 00:00 0",
        "7f7af2768000-7f7af27a8000 rwxs 00000000 00:00 0",
        "7f7af2768000-7f7af27a8000 rwxp 00000000 fe:00 1234                      /usr/lib/libc.so.6",
        "7ffd0b1e0000-7ffd0b201000 rwxp 00000000 00:00 0                          [stack]",
    ],
)
def test_other_mappings_are_left_alone(line: str) -> None:
    assert list(compiled_code([line, "10000-30000 rwxp 00000000 00:00 0"])) == [(0x10000, 0x30000)]
