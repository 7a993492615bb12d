"""An artifact's weights as the openvino engine maps them: a file beside the artifact's own, derived once a node.

    <artifact folder>/openvino-<version>.bin    matrices and vectors, each on a 64-byte border
    <artifact folder>/openvino-<version>.json   where they are; written last, so that a folder that has it is whole
    <artifact folder>/openvino-<version>-tiles.*    the same, for nibble's own products

The numbers are those of the artifact. What changes is their order: OpenVINO's i4 wants neighbours in one byte where
Q4_0 has weights j and j + 32, and scales in an array of their own; rows go back to the Hub's order, with each key and
value head once; and matrices that read the same input are one matrix. nibble's own products (kernels.py) want tiles.
Replicas of a node share the file through mmap.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from cluster.artifacts.manifest import Manifest, Record, TensorEntry
from cluster.artifacts.node_cache import written
from cluster.artifacts.verified import is_verified, mark_verified
from cluster.checkpoints.hyperparameters import artifact_hyperparameters
from cluster.families.architecture import Hyperparameters
from cluster.machine.isa import available_cores
from deployments.engines.ggml_blocks import BLOCKS
from deployments.engines.openvino.graph_parts import StoredPart, graph_parts
from deployments.engines.products.layout import TILE_BYTES, TILE_ROWS, tiles

DERIVED_VERSION = 1
LOOKED_UP = ("embedding.weight", "position_embedding.weight")  # by rows, not multiplied with: never in tiles
ALIGNMENT = 64  # of a tensor in the file: a cache line, and the widest vector of the CPU
SLAB_BYTES = 4 << 20  # repacked at a time, by each thread: bounds the memory of deriving


class DerivedTensor(Record):
    """`shape` is (rows, columns) or (numbers,). A matrix's scales, one for each block of 64 weights of a row, begin at
    `scales_offset`: fp16 for i4, fp32 for i8. Tiles have theirs inside."""

    type: Literal["i4", "i8", "f32", "tiles"]
    shape: tuple[int, ...]
    offset: int
    scales_offset: int | None = None


class DerivedIndex(Record):
    artifact_id: str
    sha256: str
    tensors: dict[str, DerivedTensor]


class QuantizedMatrix(NamedTuple):
    """`values`: [rows, columns / 2] bytes of two i4 (the first in the low nibble), or [rows, columns] i8; `scales`:
    [rows, columns / 64]. A weight is its value times the scale of its block."""

    values: npt.NDArray[Any]
    scales: npt.NDArray[Any]
    type: Literal["i4", "i8"]
    shape: tuple[int, int]


class DerivedWeights:
    """The mapped file. What it returns are views of it: keep them, or this, as long as they are used."""

    def __init__(self, binary: Path, index: DerivedIndex) -> None:
        # OpenVINO shares memory only with arrays that could be written to; a write would copy the page.
        with binary.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        # Read ahead: the first step would otherwise take a cold file from the disk page by page.
        self._mapping.madvise(mmap.MADV_WILLNEED)
        self._data = np.frombuffer(self._mapping, np.uint8)
        self._tensors = index.tensors
        self.in_tiles = any(tensor.type == "tiles" for tensor in index.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def mapped_bytes(self) -> int:
        return self._data.nbytes

    def unload(self) -> None:
        """Takes the file's pages out of this process. They stay in the kernel's page cache as long as there is room,
        and come back where they are read."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor that is not quantized."""
        tensor = self._tensors[name]
        return self._view(tensor.offset, "<f4", tensor.shape)

    def tiled(self, name: str) -> bool:
        return self._tensors[name].type == "tiles"

    def tiles(self, name: str) -> tuple[npt.NDArray[np.uint8], int]:
        """A matrix in tiles, and how many rows it has: see q4_layout.tiles."""
        tensor = self._tensors[name]
        rows, columns = tensor.shape
        shape = (-(-rows // TILE_ROWS), columns // BLOCK_WEIGHTS, TILE_BYTES)
        return self._view(tensor.offset, "u1", shape), rows

    def matrix(self, name: str) -> QuantizedMatrix:
        tensor = self._tensors[name]
        rows, columns = tensor.shape
        assert tensor.type in ("i4", "i8"), f"{name} is quantized, and not in tiles"
        assert tensor.scales_offset is not None, f"{name} has scales"
        width, kind = (columns // 2, "u1") if tensor.type == "i4" else (columns, "i1")
        scales = self._view(
            tensor.scales_offset, "<f2" if tensor.type == "i4" else "<f4", (rows, columns // BLOCK_WEIGHTS)
        )
        return QuantizedMatrix(self._view(tensor.offset, kind, (rows, width)), scales, tensor.type, (rows, columns))

    def _view(self, offset: int, kind: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return self._data[offset : offset + size].view(kind).reshape(shape)


def derived_weights(
    folder: Path, beside: Path | None = None, in_tiles: bool = False
) -> tuple[DerivedWeights, Hyperparameters]:
    """Of the artifact in `folder`, kept there (or in the folder `beside`); derives them where that was not done yet or
    what is there is damaged. `in_tiles`: the INT4 matrices that are multiplied with, for nibble's own products. Raises
    ArtifactError where they cannot be written."""
    manifest, kept = Manifest.read(folder), beside or folder
    in_tiles = in_tiles and manifest.quantization == "q4_0"
    model = artifact_hyperparameters(folder, manifest)
    with FileLock(kept / "openvino.lock"):
        name = f"openvino-{DERIVED_VERSION}" + ("-tiles" if in_tiles else "")
        binary, index_file = (kept / f"{name}.{suffix}" for suffix in ("bin", "json"))
        index = _whole(binary, index_file, manifest)
        if index is None:
            index = _derive(folder, manifest, model, binary, in_tiles)
            with written(index_file):
                new = index_file.with_suffix(".new")
                new.write_text(index.model_dump_json())
                os.replace(new, index_file)
    return DerivedWeights(binary, index), model


def _whole(binary: Path, index_file: Path, manifest: Manifest) -> DerivedIndex | None:
    """The index of an undamaged derived file, which is read only where it has changed since it was last verified."""
    try:
        index = DerivedIndex.model_validate_json(index_file.read_bytes())
        sound = index.artifact_id == manifest.artifact_id and is_verified(binary, index.sha256)
    except (OSError, ValueError):
        return None
    return index if sound else None


def _derive(folder: Path, manifest: Manifest, model: Hyperparameters, binary: Path, in_tiles: bool) -> DerivedIndex:
    source: npt.NDArray[np.uint8] = np.memmap(folder / manifest.binary, np.uint8, "r")
    entries = {entry.name: entry for entry in manifest.tensors}
    tensors: dict[str, DerivedTensor] = {}
    with written(binary), tempfile.NamedTemporaryFile(dir=binary.parent, prefix=".openvino.", delete=False) as file:
        try:
            with _HashedFile(file) as out:
                for name, parts in graph_parts(manifest.family, model, entries):
                    matrix = _Rows(source, entries, parts)
                    tiled = in_tiles and matrix.type == "q4_0" and name not in LOOKED_UP
                    tensors[name] = _write_tiles(out, matrix) if tiled else _write_tensor(out, matrix)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # replicas of another user map it too
            os.replace(file.name, binary)
        except BaseException:
            os.unlink(file.name)
            raise
    sha256 = out.sha256.hexdigest()
    mark_verified(binary, sha256)
    return DerivedIndex(artifact_id=manifest.artifact_id, sha256=sha256, tensors=tensors)


class _HashedFile:
    """Pieces are repacked by several threads, and hashed and written in order by the caller's."""

    def __init__(self, file: Any) -> None:
        self._file: BinaryIO = file
        self.position = 0
        self.sha256 = hashlib.sha256()
        self._threads = available_cores()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="derive")

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def write(self, data: npt.NDArray[Any]) -> None:
        piece = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
        self._file.write(piece)
        self.sha256.update(piece)
        self.position += len(piece)

    def write_all(self, pieces: Iterable[Callable[[], npt.NDArray[Any]]]) -> None:
        """What each of them returns, in their order; few are under way at a time, which bounds the memory."""
        begun: deque[Future[npt.NDArray[Any]]] = deque()
        for piece in pieces:
            begun.append(self._pool.submit(piece))
            if len(begun) > self._threads:
                self.write(begun.popleft().result())
        for future in begun:
            self.write(future.result())

    def align(self) -> int:
        self.write(np.zeros(-self.position % ALIGNMENT, np.uint8))
        return self.position


class _Rows:
    """The rows of one of the graph's weights, from the parts of the artifact that they are: each is blocks [blocks of
    a row], or numbers."""

    def __init__(
        self, source: npt.NDArray[np.uint8], entries: Mapping[str, TensorEntry], parts: tuple[StoredPart, ...]
    ) -> None:
        first = entries[parts[0].tensor]
        self.type = first.type
        kind = np.dtype("<f4") if first.type == "f32" else np.dtype(BLOCKS[first.type])
        self._parts: list[tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]] = []
        for part in parts:
            entry = entries[part.tensor]
            data = source[entry.offset : entry.offset + entry.bytes].view(kind)
            self._parts.append((data.reshape(entry.shape[0], -1) if len(entry.shape) == 2 else data, part.rows))
        self._counts = [len(data if rows is None else rows) for data, rows in self._parts]
        self.shape = (sum(self._counts), *first.shape[1:])
        self._row_bytes = self._parts[0][0][:1].nbytes

    def slabs(self, multiple: int = 1) -> Iterator[Callable[[], npt.NDArray[Any]]]:
        """Some rows at a time, a multiple of so many but for the last; each is copied when it is called."""
        step = max(1, SLAB_BYTES // (self._row_bytes * multiple)) * multiple
        for start in range(0, self.shape[0], step):
            yield partial(self._between, start, start + step)

    def _between(self, start: int, end: int) -> npt.NDArray[Any]:
        found, begin = [], 0
        for (data, rows), count in zip(self._parts, self._counts, strict=True):
            own = slice(max(start - begin, 0), max(min(end - begin, count), 0))
            if own.start < own.stop:
                found.append(data[own] if rows is None else data[rows[own]])
            begin += count
        return found[0] if len(found) == 1 else np.concatenate(found)


def _write_tensor(out: _HashedFile, matrix: _Rows) -> DerivedTensor:
    offset = out.align()
    if matrix.type == "f32":
        out.write_all(matrix.slabs())
        return DerivedTensor(type="f32", shape=matrix.shape, offset=offset)
    repacked = i4_pairs if matrix.type == "q4_0" else np.ascontiguousarray
    out.write_all(partial(_repacked, slab, repacked) for slab in matrix.slabs())
    scales_offset = out.align()
    out.write_all(partial(_scales, slab) for slab in matrix.slabs())
    kind: Literal["i4", "i8"] = "i4" if matrix.type == "q4_0" else "i8"
    return DerivedTensor(type=kind, shape=matrix.shape, offset=offset, scales_offset=scales_offset)


def _repacked(
    slab: Callable[[], npt.NDArray[Any]], repack: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> npt.NDArray[Any]:
    return repack(slab()["weights"])


def _scales(slab: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(slab()["scale"])


def _write_tiles(out: _HashedFile, matrix: _Rows) -> DerivedTensor:
    offset = out.align()
    out.write_all(partial(_tiles, slab) for slab in matrix.slabs(TILE_ROWS))
    return DerivedTensor(type="tiles", shape=matrix.shape, offset=offset)


def _tiles(slab: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    blocks = slab()
    return tiles(blocks["weights"], blocks["scale"])


def i4_pairs(nibbles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Q4_0's bytes [..., 32] as OpenVINO's i4: byte k holds weights 2k and 2k + 1, low nibble first, each minus 8 in
    two's complement, which flips the nibble's highest bit. In Q4_0 byte j holds weights j and j + 32."""
    low, high = nibbles & 0x0F, nibbles >> 4
    pairs = np.empty_like(low)
    half = low.shape[-1] // 2
    pairs[..., :half] = low[..., 0::2] | (low[..., 1::2] << 4)
    pairs[..., half:] = high[..., 0::2] | (high[..., 1::2] << 4)
    pairs ^= np.uint8(0x88)
    return pairs
