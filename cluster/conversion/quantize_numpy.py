"""Numbers to Q4_0 or Q8_0 with numpy, for nodes that bigdl-llm has no library for: the same bytes, at a fifth of the
speed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.artifacts.ggml import BLOCK_BYTES, BLOCK_WEIGHTS
from cluster.artifacts.manifest import Quantization

Floats = npt.NDArray[np.float32]


class NumpyQuantizer:
    """As quantize.py's Quantizer."""

    def use_one_thread(self) -> None:
        """It never uses more."""

    def from_half(self, numbers: npt.NDArray[np.float16]) -> Floats:
        return numbers.astype(np.float32)

    def rounded_to_half(self, numbers: Floats) -> Floats:
        with np.errstate(over="ignore"):  # infinite, as the library has it
            return numbers.astype(np.float16).astype(np.float32)

    def quantize(self, weights: Floats, out: npt.NDArray[np.uint8], quantization: Quantization = "q4_0") -> None:
        blocks = weights.reshape(-1, BLOCK_WEIGHTS)
        written = out.reshape(-1, BLOCK_BYTES[quantization])
        if quantization == "q4_0":
            _q4_0(blocks, written)
        else:
            _q8_0(blocks, written)


def _q4_0(blocks: Floats, out: npt.NDArray[np.uint8]) -> None:
    # The number of the greatest magnitude, the first of several, becomes -8. Of zeros, -0 too, the scale is -0.
    greatest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)[:, 0] + np.float32(0)
    scales = greatest / np.float32(-8)
    # The library fuses the product and the sum; a float64 holds the product exactly.
    levels = (blocks.astype(np.float64) * _inverse(scales) + 8.5).astype(np.float32).astype(np.uint8)
    np.minimum(levels, 15, out=levels)
    out[:, :2] = scales.astype(np.float16)[:, None].view(np.uint8)
    out[:, 2:] = levels[:, : BLOCK_WEIGHTS // 2] | levels[:, BLOCK_WEIGHTS // 2 :] << 4


def _q8_0(blocks: Floats, out: npt.NDArray[np.uint8]) -> None:
    scales = np.abs(blocks).max(1) / np.float32(127)
    levels = (blocks * _inverse(scales)).astype(np.float64)
    out[:, :4] = scales[:, None].view(np.uint8)
    out[:, 4:] = np.trunc(levels + np.copysign(0.5, levels)).astype(np.int8).view(np.uint8)  # ties go away from zero


def _inverse(scales: Floats) -> Floats:
    """One column; 0 for 0."""
    inverse = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=inverse, where=scales != 0)
    return inverse[:, None]
