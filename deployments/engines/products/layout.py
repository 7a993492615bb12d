"""How weights lie in memory for nibble's own products: in tiles of 16 rows and 64 columns, 544 bytes each.

For each 4 columns 32 bytes, of which byte 4 r + c holds the nibble of row r in column c in its low half and that of
row r + 8 in its high one: what a register of 8 lanes of 32 bits takes at once. Then the rows' scales, fp16. The tiles
of the same rows follow each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from cluster.model_config import Tune

TILE_ROWS = 16
LANES = 8  # of 32 bits, in a register
QUADS = BLOCK_WEIGHTS // 4
SCALES = 32 * QUADS  # where a tile's scales begin
TILE_BYTES = SCALES + 2 * TILE_ROWS
LOW_NIBBLES = np.uint32(0x0F0F0F0F)  # of four bytes
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
    # Four bytes at a time, of columns q to q + 3 (low nibbles) and q + 32 to q + 35 (high ones).
    quads = nibbles.view("<u4").reshape(-1, 2, LANES, blocks, QUADS // 2).transpose(1, 0, 3, 4, 2)
    low_rows, high_rows = np.ascontiguousarray(quads[0]), np.ascontiguousarray(quads[1])
    lanes = np.empty((len(low_rows), blocks, 2, QUADS // 2, LANES), "<u4")
    lanes[:, :, 0] = low_rows & LOW_NIBBLES | (high_rows & LOW_NIBBLES) << np.uint32(4)
    lanes[:, :, 1] = low_rows >> np.uint32(4) & LOW_NIBBLES | high_rows & ~LOW_NIBBLES
    packed = np.empty((len(lanes), blocks, TILE_BYTES), np.uint8)
    packed[..., :SCALES] = lanes.view(np.uint8).reshape(len(lanes), blocks, SCALES)
    by_tile = scales.reshape(-1, TILE_ROWS, blocks).transpose(0, 2, 1)
    packed[..., SCALES:] = np.ascontiguousarray(by_tile).view(np.uint8)
    return packed
