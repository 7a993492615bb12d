"""Converts one shard of a plan: reads its tensors a slab of rows at a time and writes their bytes of the binary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.artifacts.ggml import data_bytes
from cluster.checkpoints.weights import WeightsReader
from cluster.conversion.layouts import output_rows
from cluster.conversion.plan import ConversionPlan, TensorPlan
from cluster.conversion.quantize import Quantizer, quantizer
from cluster.errors import CheckpointError

# Weights converted at a time: small enough for a core's cache. It bounds what a task needs besides its result.
SLAB_WEIGHTS = 1 << 18


def convert_shard(plan: ConversionPlan, index: int) -> npt.NDArray[np.uint8]:
    """The bytes of shard `index`; all shards in order are the binary. Raises CheckpointError for weights that are not
    finite in fp16, and for a weights file that no longer is what was planned."""
    result = np.empty(plan.shards[index].bytes, np.uint8)
    end = 0
    for piece in shard_pieces(plan, index):
        result[end : end + len(piece)] = piece
        end += len(piece)
    return result


def shard_pieces(plan: ConversionPlan, index: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The same in pieces, in order, none larger than a slab: for who has no room for a shard."""
    shard = plan.shards[index]
    if index == 0:
        yield np.frombuffer(plan.head, np.uint8)
    with WeightsReader(Path(plan.checkpoint)) as reader:
        for tensor in plan.tensors[shard.first : shard.stop]:
            yield np.frombuffer(tensor.header, np.uint8)
            yield from _tensor_pieces(tensor, reader, quantizer(plan.family))


def _tensor_pieces(tensor: TensorPlan, reader: WeightsReader, native: Quantizer) -> Iterator[npt.NDArray[np.uint8]]:
    order = output_rows(tensor.rows, tensor.heads, tensor.head_width, tensor.source.shape[0])
    slab_rows = max(1, SLAB_WEIGHTS // tensor.source.row_weights)
    row_bytes = data_bytes(tensor.type, tensor.shape[1:])
    for start in range(0, len(order), slab_rows):
        rows = order[start : start + slab_rows]
        weights = _as_float32(_stored_rows(tensor, reader, rows), tensor, native)
        if not np.isfinite(weights).all():
            raise CheckpointError(
                f"{tensor.source.file}: tensor {tensor.source.name} holds NaN, infinity or a number beyond fp16's"
                " 65504; allowed are finite weights: the checkpoint is damaged, download it again or save it anew"
            )
        if tensor.type == "f32":
            yield weights.reshape(-1).view(np.uint8)
            continue
        piece = np.empty(len(rows) * row_bytes, np.uint8)
        native.quantize(weights, piece, tensor.type)
        yield piece


def _stored_rows(tensor: TensorPlan, reader: WeightsReader, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The given rows of the source. Neighbours in the result are close to each other in the source, so the span from
    the first to the last of them is read at once."""
    first = int(rows.min())
    stored = reader.rows(tensor.source, first, int(rows.max()) + 1)
    return stored if tensor.rows == "as_is" else stored[rows - first]


def _as_float32(stored: npt.NDArray[Any], tensor: TensorPlan, native: Quantizer) -> npt.NDArray[np.float32]:
    if stored.dtype == np.float16:
        return native.from_half(stored)
    if stored.dtype == np.uint16:  # bfloat16: the upper half of a float32
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    weights = stored.astype(np.float32, copy=False)
    # llm_convert writes an fp16 file on the way.
    return native.rounded_to_half(weights) if tensor.rounded else weights
