"""Rotary position embeddings: the angle a position turns each pair of a head's numbers by."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cluster.families.rotary import Rotary


def inverse_frequencies(rotary: Rotary) -> npt.NDArray[np.float32]:
    """Radians per position, [width / 2]: base ** (-2i / width), then scaled as the checkpoint says.

    linear divides all by its factor. llama3 (transformers' modeling_rope_utils, of Llama 3.1) divides those whose
    wavelength is longer than the original context / low_freq_factor, keeps those shorter than it / high_freq_factor,
    and passes smoothly from one to the other in between.
    """
    frequencies = rotary.base ** (-np.arange(0, rotary.width, 2, dtype=np.float64) / rotary.width)
    scaling = dict(rotary.scaling)
    if rotary.kind == "linear":
        frequencies = frequencies / scaling["factor"]
    elif rotary.kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (smooth + (1 - smooth) / scaling["factor"])
    return frequencies.astype(np.float32)
