"""An artifact's weights as the openvino engine maps them: a file beside the artifact's own, derived once a node.

    <artifact folder>/openvino-<version>.bin    matrices and vectors, each on a 64-byte border
    <artifact folder>/openvino-<version>.json   where they are; written last, so that a folder that has it is whole
    <artifact folder>/openvino-<version>-tiles.*    the same, for nibble's own products

The numbers are those of the artifact. What changes is their order: OpenVINO's i4 wants neighbours in one byte where
Q4_0 has weights j and j + 32, and scales in an array of their own; rows go back to the Hub's order, with each key and
value head once; and matrices that read the same input are one matrix. nibble's own products (q4_kernels.py) want tiles.
Replicas of a node share the file through mmap.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from cluster.checkpoint import read_config
from cluster.digests import file_sha256
from cluster.ggml import BLOCK_WEIGHTS
from cluster.hyperparameters import Hyperparameters, read_hyperparameters
from cluster.manifest import Manifest, Record, TensorEntry
from cluster.node_cache import written
from deployments.engines.ggml_blocks import BLOCKS
from deployments.engines.openvino_recipes import Part, recipe
from deployments.engines.q4_layout import TILE_BYTES, TILE_ROWS, tiles

DERIVED_VERSION = 1
ALIGNMENT = 64  # of a tensor in the file: a cache line, and the widest vector of the CPU
SLAB_BYTES = 8 << 20  # repacked at a time: bounds the memory of deriving


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
        self._data: npt.NDArray[np.uint8] = np.memmap(binary, np.uint8, "c")
        self._tensors = index.tensors
        self.in_tiles = any(tensor.type == "tiles" for tensor in index.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

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
    model = read_hyperparameters(folder, read_config(folder), manifest.family, manifest.quantization)
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
    """The index of an undamaged derived file. Reading it whole also warms the page cache for mmap."""
    try:
        index = DerivedIndex.model_validate_json(index_file.read_bytes())
        sound = index.artifact_id == manifest.artifact_id and file_sha256(binary) == index.sha256
    except (OSError, ValueError):
        return None
    return index if sound else None


def _derive(folder: Path, manifest: Manifest, model: Hyperparameters, binary: Path, in_tiles: bool) -> DerivedIndex:
    source: npt.NDArray[np.uint8] = np.memmap(folder / manifest.binary, np.uint8, "r")
    entries = {entry.name: entry for entry in manifest.tensors}
    tensors: dict[str, DerivedTensor] = {}
    with written(binary), tempfile.NamedTemporaryFile(dir=binary.parent, prefix=".openvino.", delete=False) as file:
        try:
            out = _HashedFile(file)
            for name, parts in recipe(manifest.family, model, entries):
                # The embedding's rows are looked up, not multiplied.
                write = _write_tiles if in_tiles and _tileable(name, entries[parts[0].tensor]) else _write_tensor
                tensors[name] = write(out, source, entries, parts)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # replicas of another user map it too
            os.replace(file.name, binary)
        except BaseException:
            os.unlink(file.name)
            raise
    return DerivedIndex(artifact_id=manifest.artifact_id, sha256=out.sha256.hexdigest(), tensors=tensors)


class _HashedFile:
    def __init__(self, file: Any) -> None:
        self._file: BinaryIO = file
        self.position = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: npt.NDArray[Any]) -> None:
        piece = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
        self._file.write(piece)
        self.sha256.update(piece)
        self.position += len(piece)

    def align(self) -> int:
        self.write(np.zeros(-self.position % ALIGNMENT, np.uint8))
        return self.position


def _write_tensor(
    out: _HashedFile, source: npt.NDArray[np.uint8], entries: Mapping[str, TensorEntry], parts: tuple[Part, ...]
) -> DerivedTensor:
    first = entries[parts[0].tensor]
    offset = out.align()
    if first.type == "f32":
        rows = 0
        for part in parts:
            numbers = _rows(source, entries[part.tensor], part, np.dtype("<f4"))
            rows += len(numbers)
            out.write(numbers)
        return DerivedTensor(type="f32", shape=(rows, *first.shape[1:]), offset=offset)
    scales, rows, blocks = [], 0, np.dtype(BLOCKS[first.type])
    for part in parts:
        for slab in _slabs(_rows(source, entries[part.tensor], part, blocks)):
            out.write(i4_pairs(slab["weights"]) if first.type == "q4_0" else slab["weights"])
            scales.append(slab["scale"].copy())
            rows += len(slab)
    scales_offset = out.align()
    for piece in scales:
        out.write(piece)
    kind: Literal["i4", "i8"] = "i4" if first.type == "q4_0" else "i8"
    return DerivedTensor(type=kind, shape=(rows, first.shape[1]), offset=offset, scales_offset=scales_offset)


def _tileable(name: str, entry: TensorEntry) -> bool:
    return entry.type == "q4_0" and name not in ("embedding.weight", "position_embedding.weight")


def _write_tiles(
    out: _HashedFile, source: npt.NDArray[np.uint8], entries: Mapping[str, TensorEntry], parts: tuple[Part, ...]
) -> DerivedTensor:
    offset, blocks = out.align(), np.dtype(BLOCKS["q4_0"])
    rows = np.concatenate([_rows(source, entries[part.tensor], part, blocks) for part in parts])
    for slab in _slabs(rows, TILE_ROWS):
        out.write(tiles(slab["weights"], slab["scale"]))
    return DerivedTensor(type="tiles", shape=(len(rows), rows.shape[1] * BLOCK_WEIGHTS), offset=offset)


def _rows(source: npt.NDArray[np.uint8], entry: TensorEntry, part: Part, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """The part's rows of a tensor of the artifact: blocks [rows, blocks of a row], or numbers."""
    data = source[entry.offset : entry.offset + entry.bytes].view(kind)
    data = data.reshape(entry.shape[0], -1) if len(entry.shape) == 2 else data
    return data if part.rows is None else data[part.rows]


def _slabs(blocks: npt.NDArray[Any], multiple: int = 1) -> Iterator[npt.NDArray[Any]]:
    """Some rows at a time, a multiple of so many but for the last."""
    step = max(1, SLAB_BYTES // (blocks.itemsize * blocks.shape[1] * multiple)) * multiple
    for start in range(0, len(blocks), step):
        yield blocks[start : start + step]


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
