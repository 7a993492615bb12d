"""mapped_tensors on memory laid out as ggml's: a handle, its context and its tensors, whose data a file has too."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts.manifest import TensorEntry
from deployments.engines.bigdl.mapped_tensors import (
    DATA_WORD,
    OBJECT_BYTES,
    SIZE_WORD,
    TENSOR_BYTES,
    WORD,
    MappedTensors,
    find_tensors,
    read_words,
)

SIZES = (5 * mmap.PAGESIZE, 34, 5 * mmap.PAGESIZE)
OFFSETS = (18, 18 + SIZES[0] + 7, 18 + SIZES[0] + 7 + SIZES[1] + 5)  # of no alignment, as in artifacts


class Loaded:
    """What a library leaves after loading `parts`: `handle` is the model's, `tensors` the addresses of the structs."""

    def __init__(self, parts: list[bytes]) -> None:
        room = sum(OBJECT_BYTES + TENSOR_BYTES + len(part) + 16 for part in parts) + OBJECT_BYTES
        self.memory = mmap.mmap(-1, room + mmap.PAGESIZE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + 16
        self.tensors, place, node = [], self.start, self.start
        for number, part in enumerate(parts):
            node, tensor = place, place + OBJECT_BYTES
            place = -(-(tensor + TENSOR_BYTES + len(part)) // 16) * 16
            self.put(node, tensor - self.start, place - tensor, place if number + 1 < len(parts) else 0, 0)
            self.put(tensor + SIZE_WORD * WORD, len(part))
            self.put(tensor + DATA_WORD * WORD, tensor + TENSOR_BYTES)
            ctypes.memmove(tensor + TENSOR_BYTES, part, len(part))
            self.tensors.append(tensor)
        self.context = (ctypes.c_uint64 * 8)(room, self.start, 0, self.start, node)
        # Beside the context: numbers that are no addresses, and addresses of something else.
        self.words = (ctypes.c_uint64 * 32)(7, self.start, 2**64 - 1, 0, ctypes.addressof(self.context), 1 << 46)
        self.handle = ctypes.addressof(self.words)

    def put(self, address: int, *words: int) -> None:
        ctypes.memmove(address, (ctypes.c_uint64 * len(words))(*words), WORD * len(words))

    def data(self, number: int) -> int:
        """Where the library reads the tensor from."""
        return ctypes.c_uint64.from_address(self.tensors[number] + DATA_WORD * WORD).value


@pytest.fixture
def parts() -> list[bytes]:
    first, second = (np.random.default_rng(seed).bytes(size) for seed, size in enumerate(SIZES[:2]))
    return [first, second, first]  # an output matrix that is the embedding


@pytest.fixture
def binary(tmp_path: Path, parts: list[bytes]) -> Path:
    content = bytearray(OFFSETS[-1] + SIZES[-1] + 3)
    for offset, part in zip(OFFSETS, parts, strict=True):
        content[offset : offset + len(part)] = part
    (tmp_path / "model.bin").write_bytes(content)
    return tmp_path / "model.bin"


@pytest.fixture
def entries() -> list[TensorEntry]:
    return [
        TensorEntry(name=f"t{number}", type="q4_0", shape=(1, 64), offset=offset, bytes=size)
        for number, (offset, size) in enumerate(zip(OFFSETS, SIZES, strict=True))
    ]


def mappings(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and permissions of this process's mappings whose line has `text`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if text in line:
            start, _, end = line.split()[0].partition("-")
            yield int(start, 16), int(end, 16), line.split()[1]


def permissions(address: int) -> str:
    return next(permissions for start, end, permissions in mappings("") if start <= address < end)


def test_matrices_are_read_from_the_file_and_their_old_pages_are_gone(
    parts: list[bytes], binary: Path, entries: list[TensorEntry]
) -> None:
    loaded = Loaded(parts)
    mapped = MappedTensors(loaded.handle, binary, entries)
    assert mapped.bytes == sum(SIZES)
    ((start, _, _),) = mappings(str(binary))
    assert [loaded.data(number) - start for number in range(3)] == list(OFFSETS)
    assert [ctypes.string_at(loaded.data(number), size) for number, size in enumerate(SIZES)] == parts
    old = loaded.tensors[0] + TENSOR_BYTES
    assert permissions(old + mmap.PAGESIZE).startswith("---")
    assert permissions(old).startswith("rw")  # the page that has the struct
    assert read_words(loaded.tensors[1], TENSOR_BYTES // WORD)[SIZE_WORD] == SIZES[1]
    mapped.reopen()
    ctypes.memset(old, 1, SIZES[0])
    mapped.close()
    assert list(mappings(str(binary))) == []


def test_a_matrix_of_other_bytes_stays_and_is_logged(
    parts: list[bytes], binary: Path, entries: list[TensorEntry], caplog: pytest.LogCaptureFixture
) -> None:
    other = [parts[0][:-1] + bytes([parts[0][-1] ^ 1]), *parts[1:]]
    loaded = Loaded(other)
    with caplog.at_level(logging.WARNING, "ray.serve"):
        mapped = MappedTensors(loaded.handle, binary, entries)
    assert mapped.bytes == SIZES[1] + SIZES[2]
    assert loaded.data(0) == loaded.tensors[0] + TENSOR_BYTES
    assert ctypes.string_at(loaded.data(0), SIZES[0]) == other[0]
    assert f"1 matrices ({SIZES[0]} bytes" in caplog.text
    mapped.reopen()
    mapped.close()


def test_a_tensor_whose_data_lies_elsewhere_is_not_touched(
    parts: list[bytes], binary: Path, entries: list[TensorEntry]
) -> None:
    loaded = Loaded(parts)
    elsewhere = loaded.data(2)
    loaded.put(loaded.tensors[1] + DATA_WORD * WORD, elsewhere)
    mapped = MappedTensors(loaded.handle, binary, entries)
    assert loaded.data(1) == elsewhere
    assert mapped.bytes == SIZES[0] + SIZES[2]
    mapped.reopen()
    mapped.close()


def test_vectors_stay_where_the_library_has_them(parts: list[bytes], binary: Path, entries: list[TensorEntry]) -> None:
    loaded = Loaded(parts)
    vectors = [entry.model_copy(update={"type": "f32"}) for entry in entries]
    mapped = MappedTensors(loaded.handle, binary, vectors)
    assert mapped.bytes == 0
    assert loaded.data(0) == loaded.tensors[0] + TENSOR_BYTES
    mapped.close()


def test_tensors_are_found_in_the_only_context_of_the_handle(parts: list[bytes]) -> None:
    loaded, another = Loaded(parts), Loaded(parts)
    assert list(find_tensors(loaded.handle)) == loaded.tensors
    loaded.words[9] = ctypes.addressof(another.context)
    assert list(find_tensors(loaded.handle)) == []  # which of the two is the model's is not known
    loaded.words[9] = loaded.words[4] = 0
    assert list(find_tensors(loaded.handle)) == []


def test_a_list_that_leaves_the_buffer_ends_there(parts: list[bytes]) -> None:
    loaded = Loaded(parts)
    loaded.put(loaded.tensors[1] - OBJECT_BYTES + 2 * WORD, 1 << 46)
    assert list(find_tensors(loaded.handle)) == loaded.tensors[:2]


def test_memory_that_is_not_there_has_no_words() -> None:
    assert len(read_words(0, 4)) == len(read_words(2**64 - 8, 4)) == 0
