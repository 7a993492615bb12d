"""Where the tensors of a checkpoint lie, and how their rows are read: safetensors or torch.save's, single or sharded.

Only headers are read to plan; rows are read one range at a time, so that memory is bounded by the caller's range. A
`TensorSource` is all a conversion task needs to read one tensor: raw little-endian numbers at an offset of a file.
Nothing in a weights file is executed, not the pickle in a pytorch_model.bin either (`torch_weights.py`). Of
safetensors, what the safetensors library refuses is refused here as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from cluster.artifacts.digests import stream_sha256
from cluster.artifacts.manifest import Record
from cluster.checkpoints import torch_weights
from cluster.checkpoints.checkpoint_files import open_binary, read_json_object
from cluster.errors import CheckpointError

SourceType = Literal["F16", "BF16", "F32"]
SOURCE_TYPES: tuple[SourceType, ...] = get_args(SourceType)
_BYTES: dict[SourceType, int] = {"F16": 2, "BF16": 2, "F32": 4}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
# Bits of an element, by the words that the safetensors library 0.8 knows.
_SAFETENSORS_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# The longest header that the safetensors library itself accepts.
_MAX_HEADER_BYTES = 100_000_000


class WeightsForm(NamedTuple):
    """One way in which a checkpoint holds its weights: one file, or an index that names files with the suffix."""

    single: str
    index_file: str
    suffix: str


# In the order in which transformers looks for them.
FORMS = (
    WeightsForm(SINGLE_FILE, INDEX_FILE, ".safetensors"),
    WeightsForm(TORCH_FILE, TORCH_INDEX_FILE, ".bin"),
)


class TensorSource(Record):
    """A tensor in a weights file: `file` is a name inside the checkpoint folder, `offset` the byte where data begins.
    `type` is the header's own word; only the ones in SOURCE_TYPES can be converted."""

    name: str
    file: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_weights(self) -> int:
        """Numbers in one row; a 1-D tensor is a column of rows of one."""
        return self.shape[1] if len(self.shape) == 2 else 1


class WeightsReader:
    """Reads ranges of rows of the tensors of one folder, as they are stored. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, BufferedReader] = {}

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def rows(self, source: TensorSource, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop) as float16, float32 or, for BF16, uint16 (its bits), shape (rows, row length)."""
        width = _BYTES[_source_type(source)] * source.row_weights
        if source.file not in self._open:
            self._open[source.file] = open_binary(self._folder / source.file)
        file = self._open[source.file]
        buffer = np.empty(width * (stop - start), np.uint8)
        try:
            file.seek(source.offset + width * start)
            found = file.readinto(buffer.data)
        except OSError as error:
            raise CheckpointError(f"{self._folder / source.file}: cannot be read: {error.strerror}") from error
        if found != buffer.size:
            raise CheckpointError(
                f"{self._folder / source.file}: ends inside tensor {source.name}; it has changed since the conversion"
                " was planned: convert the checkpoint again"
            )
        numbers = buffer.view({"F16": "<f2", "BF16": "<u2", "F32": "<f4"}[source.type])
        return numbers.reshape(stop - start, source.row_weights)


def weight_sources(folder: Path) -> dict[str, TensorSource]:
    """Every tensor of the folder by name, from the headers alone. Raises CheckpointError for a folder without weights,
    a truncated or corrupt file, and an index that does not describe the files beside it."""
    form, single = _form_of(folder)
    return file_sources(folder, form.single) if single else _indexed_sources(folder, form)


def weight_files(folder: Path) -> tuple[str, ...]:
    """The names of the files that hold the tensors, the index among them."""
    form, single = _form_of(folder)
    files = sorted({source.file for source in weight_sources(folder).values()})
    return (form.single,) if single else (form.index_file, *files)


def _form_of(folder: Path) -> tuple[WeightsForm, bool]:
    """How the folder holds its weights, and whether as a single file."""
    for form in FORMS:
        if (folder / form.single).is_file():
            return form, True
        if (folder / form.index_file).is_file():
            return form, False
    allowed = " or ".join(f"{form.single}, {form.index_file} with its files" for form in FORMS)
    raise CheckpointError(f"{folder}: no weights; allowed is {allowed}")


def file_sources(folder: Path, name: str) -> dict[str, TensorSource]:
    """The tensors of one file, checked: every tensor lies inside the file and is as long as its shape."""
    path = folder / name
    if not name.endswith(".safetensors"):
        with open_binary(path) as file:
            return {
                tensor.name: TensorSource(
                    name=tensor.name, file=name, type=tensor.type, shape=tensor.shape, offset=tensor.offset
                )
                for tensor in torch_weights.stored_tensors(file, path)
            }
    header, data_start, data_length = _read_header(path)
    sources, end = {}, 0
    for tensor, kind, shape, begin, stop in sorted(_header_entries(path, header), key=lambda entry: entry[3:]):
        if stop > data_length:
            raise CheckpointError(
                f"{path}: truncated: tensor {tensor} ends at byte {data_start + stop}, the file at"
                f" {data_start + data_length}: download it again"
            )
        _check_length(path, tensor, kind, shape, stop - begin)
        if begin != end:
            raise CheckpointError(
                f"{path}: corrupt header: tensor {tensor} begins at byte {data_start + begin}, the one before ends at"
                f" {data_start + end}; allowed are neither gaps nor overlaps: download it again"
            )
        sources[tensor], end = (
            TensorSource(name=tensor, file=name, type=kind, shape=shape, offset=data_start + begin),
            stop,
        )
    if end != data_length:
        raise CheckpointError(
            f"{path}: {data_length - end} bytes follow the last tensor, which ends at byte {data_start + end}; allowed"
            " are none: download it again"
        )
    return sources


def content_sha256(path: Path) -> str:
    """Of a whole file of a checkpoint, compared on the way with the checksums that are in it: a .bin has them. Raises
    CheckpointError where they differ, and where the file cannot be read."""
    with open_binary(path) as file:
        return torch_weights.file_sha256(file, path) if path.suffix == ".bin" else stream_sha256(file)


def _header_entries(path: Path, header: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, type, shape and [begin, end) of every tensor, counted from the end of the header."""
    for tensor, entry in header.items():
        if tensor != "__metadata__":
            yield tensor, *_header_entry(path, tensor, entry)


def _header_entry(path: Path, tensor: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's type, shape and the bytes [begin, end) of its data, counted from the end of the header."""
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]}:
            numbers = [*shape, begin, end]
            if all(type(number) is int and number >= 0 for number in numbers) and begin <= end:
                return kind, tuple(shape), begin, end
    raise CheckpointError(
        f"{path}: corrupt header at tensor {tensor}: found {str(entry)[:200]}; allowed are dtype, shape and"
        " data_offsets: download it again"
    )


def _check_length(path: Path, tensor: str, kind: str, shape: tuple[int, ...], found: int) -> None:
    bits = _SAFETENSORS_BITS.get(kind)
    if bits is None:
        raise CheckpointError(
            f"{path}: corrupt header at tensor {tensor}: found type {kind!r:.40}; allowed are"
            f" {', '.join(_SAFETENSORS_BITS)}"
        )
    expected, rest = divmod(bits * math.prod(shape), 8)
    if rest or found != expected:
        raise CheckpointError(
            f"{path}: corrupt header at tensor {tensor}: found {found} bytes, {kind} of shape {list(shape)} takes"
            f" {expected}{f' and {rest} bits' if rest else ''}"
        )


# Our own: huggingface_hub's parser accepts gaps, overlaps and truncation; safetensors' safe_open gives no data offsets.
def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where its data begins, and how many bytes of data the file holds."""
    size = path.stat().st_size
    with open_binary(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file: found {size} bytes, a header of {length}")
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: truncated: the header ends at byte {8 + length}, the file at {size}: download it again"
            )
        try:
            header = json.loads(file.read(length).decode())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: corrupt header: {error}: download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: corrupt header: found a JSON {type(header).__name__}, allowed is an object")
    metadata = {} if header.get("__metadata__") is None else header["__metadata__"]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"{path}: corrupt header: __metadata__: found {metadata!r:.200}, allowed is an object of texts"
        )
    return header, 8 + length, size - 8 - length


def _indexed_sources(folder: Path, form: WeightsForm) -> dict[str, TensorSource]:
    index = folder / form.index_file
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: found {weight_map!r:.100}, allowed is an object from tensors to files"
        )
    by_file: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        _check_file_name(index, file, form.suffix)
        by_file.setdefault(file, []).append(tensor)
    sources: dict[str, TensorSource] = {}
    for file, tensors in by_file.items():
        if not (folder / file).is_file():
            raise CheckpointError(f"{index}: names {file}, which is not in the folder: download it")
        held = file_sources(folder, file)
        for tensor in tensors:
            if tensor not in held:
                raise CheckpointError(f"{index}: says {file} holds {tensor}, which it does not: download both again")
            sources[tensor] = held[tensor]
    return sources


def _check_file_name(index: Path, file: object, suffix: str) -> None:
    """A plain name only, so that an index cannot reach outside its folder. (A file may be a symbolic link: the Hub
    cache links every file of a snapshot to its blob.)"""
    if not isinstance(file, str) or file in {"", ".", ".."} or any(c in file for c in "/\\\0"):
        raise CheckpointError(f"{index}: names {file!r}; allowed are names of files in the same folder")
    if not file.endswith(suffix):
        raise CheckpointError(f"{index}: names {file!r}; allowed are {suffix} files")


def _source_type(source: TensorSource) -> SourceType:
    for known in SOURCE_TYPES:
        if source.type == known:
            return known
    raise CheckpointError(
        f"{source.file}: tensor {source.name} has type {source.type}; allowed are {', '.join(SOURCE_TYPES)}"
    )


def require_convertible(source: TensorSource) -> None:
    """Raises CheckpointError for a type that no row can be read of, for instance that of a quantized checkpoint."""
    _source_type(source)
