from __future__ import annotations

import numpy as np

from cluster.artifacts.ggml import BLOCK_WEIGHTS, data_bytes
from deployments.engines.ggml_blocks import BLOCKS
from tests.ggml_weights import dequantize, unpacked


def test_blocks_are_as_long_as_the_container_s() -> None:
    for quantization, block in BLOCKS.items():
        assert block.itemsize == data_bytes(quantization, (1, BLOCK_WEIGHTS))  # type: ignore[arg-type]


def test_a_byte_holds_the_weights_of_both_halves_of_a_block() -> None:
    weights = np.arange(64, dtype=np.uint8) % 16
    weights[32:] = weights[32:][::-1]
    packed = weights[:32] | (weights[32:] << 4)
    assert np.array_equal(unpacked(packed[None]), weights[None])


def test_a_q4_0_weight_is_its_nibble_minus_8_times_the_scale() -> None:
    blocks = np.zeros(2, BLOCKS["q4_0"])
    blocks["scale"] = 0.5, 2
    blocks["weights"][0, 3] = 0x1F
    values = dequantize(blocks.view(np.uint8), "q4_0", (2, 64))
    assert (values[0, 3], values[0, 35], values[0, 0], values[1, 0]) == (3.5, -3.5, -4, -16)
