"""How weights lie in memory for nibble's own products: in tiles of 16 rows and 64 columns, 544 bytes each.

For each 4 columns 32 bytes, of which byte 4 r + c holds the nibble of row r in column c in its low half and that of
row r + 8 in its high one: what a register of 8 lanes of 32 bits takes at once. Then the rows' scales, fp16. The tiles
of the same rows follow each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from cluster.config import Tune
from deployments.engines.ggml_blocks import unpacked

TILE_ROWS = 16
LANES = 8  # of 32 bits, in a register
QUADS = BLOCK_WEIGHTS // 4
SCALES = 32 * QUADS  # where a tile's scales begin
TILE_BYTES = SCALES + 2 * TILE_ROWS
PRODUCT_FLAGS = frozenset({"avx2", "fma", "f16c"})  # what the instructions of kernels.py need


def wants_tiles(tune: Tune, flags: frozenset[str]) -> bool:
    """Whether nibble's own products are the fastest: where OpenVINO has none in integers (tests/bench/NOTES.md)."""
    return tune != "precision" and flags >= PRODUCT_FLAGS and not flags & {"avx_vnni", "avx512_vnni"}


def tiles(nibbles: npt.NDArray[np.uint8], scales: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """[tiles of rows, blocks of a row, TILE_BYTES], of Q4_0's bytes [rows, blocks, 32] (byte j holds columns j and
    j + 32) and scales [rows, blocks]. Rows up to a multiple of 16 are filled with zeros."""
    rows, blocks = scales.shape
    missing = -rows % TILE_ROWS
    nibbles = np.pad(nibbles, ((0, missing), (0, 0), (0, 0)))
    scales = np.pad(scales, ((0, missing), (0, 0)))
    packed = np.empty((len(scales) // TILE_ROWS, blocks, TILE_BYTES), np.uint8)
    halves = unpacked(nibbles).reshape(-1, 2, LANES, blocks, QUADS, 4).transpose(1, 0, 3, 4, 2, 5)
    packed[..., :SCALES] = (halves[0] | halves[1] << 4).reshape(*packed.shape[:2], SCALES)
    by_tile = scales.reshape(-1, TILE_ROWS, blocks).transpose(0, 2, 1)
    packed[..., SCALES:] = np.ascontiguousarray(by_tile).view(np.uint8)
    return packed
