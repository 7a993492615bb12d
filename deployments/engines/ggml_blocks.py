"""The quantized blocks of bigdl's ggml container as numpy sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from cluster.artifacts.manifest import Quantization

# 64 weights, a scale first: the nibbles minus 8 (byte j holds weights j and j + 32), or the signed bytes, times it.
BLOCKS: dict[str, np.dtype[Any]] = {
    "q4_0": np.dtype([("scale", "<f2"), ("weights", "u1", BLOCK_WEIGHTS // 2)]),
    "q8_0": np.dtype([("scale", "<f4"), ("weights", "i1", BLOCK_WEIGHTS)]),
}


def unpacked(nibbles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Q4_0's bytes [..., 32] as one byte a nibble, [..., 64], in the weights' order."""
    return np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)


def dequantize(
    data: npt.NDArray[np.uint8], quantization: Quantization, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """The weights of whole blocks, [rows, columns]."""
    blocks = data.view(BLOCKS[quantization])
    weights = blocks["weights"]
    if quantization == "q4_0":
        weights = unpacked(weights).astype(np.int8) - np.int8(8)
    result: npt.NDArray[np.float32] = weights.astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
    return result.reshape(shape)
