from __future__ import annotations

import math

import numpy as np

from cluster.families.rotary import Rotary
from deployments.engines.openvino.frequencies import inverse_frequencies


def test_frequencies_are_powers_of_the_base() -> None:
    assert inverse_frequencies(Rotary(8, 10000.0)).tolist() == np.float32([1, 0.1, 0.01, 0.001]).tolist()


def test_linear_scaling_divides_them_all() -> None:
    plain = inverse_frequencies(Rotary(8, 10000.0))
    assert np.allclose(inverse_frequencies(Rotary(8, 10000.0, (("factor", 4.0),), "linear")), plain / 4)


def test_llama3_scaling_keeps_the_short_waves_and_divides_the_long_ones() -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = inverse_frequencies(Rotary(128, 500000.0, tuple(numbers.items()), "llama3"))
    plain = inverse_frequencies(Rotary(128, 500000.0))
    waves = 2 * math.pi / plain.astype(np.float64)
    short, long = waves < 8192 / 4, waves > 8192
    assert np.array_equal(scaled[short], plain[short])
    assert np.allclose(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()
    # The 40th pair by hand: transformers' _compute_llama3_parameters.
    index = int(np.flatnonzero(between)[0])
    smooth = (8192 / waves[index] - 1) / 3
    assert math.isclose(scaled[index], (1 - smooth) * plain[index] / 8 + smooth * plain[index], rel_tol=1e-6)
