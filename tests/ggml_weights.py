"""The weights of bigdl's ggml container as numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.artifacts.manifest import Quantization
from deployments.engines.ggml_blocks import BLOCKS


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


def unpacked(nibbles: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Q4_0's bytes [..., 32] as one byte a nibble, [..., 64], in the weights' order."""
    return np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)
