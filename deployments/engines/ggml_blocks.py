"""The quantized blocks of bigdl's ggml container as numpy sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.artifacts.ggml import BLOCK_WEIGHTS

# 64 weights, a scale first: the nibbles minus 8 (byte j holds weights j and j + 32), or the signed bytes, times it.
BLOCKS: dict[str, np.dtype[Any]] = {
    "q4_0": np.dtype([("scale", "<f2"), ("weights", "u1", BLOCK_WEIGHTS // 2)]),
    "q8_0": np.dtype([("scale", "<f4"), ("weights", "i1", BLOCK_WEIGHTS)]),
}
