"""The container that bigdl-llm 2.4.0's native runtimes read: a head, then one record a tensor.

    head:    magic, [version], hyperparameters, vocabulary          all integers little-endian int32
    record:  n_dims, name length, type, dims (innermost first), name, padding, data

Each family has its own magic, version, hyperparameters and alignment of `data` (its `Container`), which are what the
runtimes of the wheel read. Q4_0 and Q8_0 are bigdl's, not llama.cpp's: a block holds 64 weights. In Q4_0 it has 34
bytes, an fp16 scale and 32 bytes whose low nibbles are weights 0 to 31 and whose high nibbles are weights 32 to 63; in
Q8_0 68 bytes, an fp32 scale and 64 signed bytes. A row must be whole blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from cluster.artifacts.manifest import Quantization, TensorType
from cluster.families.family import Container

BLOCK_WEIGHTS = 64
BLOCK_BYTES: dict[Quantization, int] = {"q4_0": 34, "q8_0": 68}

_TYPE_CODES: dict[TensorType, int] = {"f32": 0, "q4_0": 2, "q8_0": 8}
_FILE_TYPES: dict[Quantization, int] = {"q4_0": 2, "q8_0": 7}  # "mostly" that; vectors are F32


def file_type(container: Container, quantization: Quantization) -> int:
    """A field of the header, among the hyperparameters."""
    return container.file_type_base + _FILE_TYPES[quantization]


class VocabToken(NamedTuple):
    """One entry of the vocabulary; only the form scored_pieces has scores."""

    text: bytes
    score: float | None = None


def pack_integers(values: Iterable[int]) -> bytes:
    numbers = tuple(values)
    return struct.pack(f"<{len(numbers)}i", *numbers)


def pack_head(container: Container, hyperparameters: Iterable[int], vocabulary: Iterable[VocabToken]) -> bytes:
    """The bytes before the first tensor record; `hyperparameters` as the family's header lists them, all of them."""
    parts = [container.magic]
    if container.version is not None:
        parts.append(pack_integers([container.version]))
    parts.append(pack_integers(hyperparameters))
    for token in vocabulary:
        parts += (pack_integers([len(token.text)]), token.text)
        if token.score is not None:
            parts.append(struct.pack("<f", token.score))
    return b"".join(parts)


def pack_record_header(
    container: Container, name: str, tensor_type: TensorType, shape: tuple[int, ...], start: int
) -> bytes:
    """What precedes a tensor's data, padding included, for a record that begins at byte `start` of the file."""
    encoded = name.encode()
    header = pack_integers([len(shape), len(encoded), _TYPE_CODES[tensor_type], *reversed(shape)]) + encoded
    return header + bytes(-(start + len(header)) % container.alignment)


def data_bytes(tensor_type: TensorType, shape: tuple[int, ...]) -> int:
    """Size of a tensor's data; quantized rows are whole blocks, which planning has checked."""
    weights = 1
    for length in shape:
        weights *= length
    return weights * 4 if tensor_type == "f32" else weights // BLOCK_WEIGHTS * BLOCK_BYTES[tensor_type]
