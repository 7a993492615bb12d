from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cluster.conversion.quantize import quantizer
from cluster.families import FAMILY_NAMES, FamilyName


def finite_halves() -> npt.NDArray[np.float16]:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return halves[np.isfinite(halves)]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_finite_half_is_read_as_numpy_reads_it(family: FamilyName) -> None:
    halves = finite_halves()
    floats = quantizer(family).from_half(halves)
    assert np.array_equal(floats.view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_infinities_and_nans_are_not_read_as_numbers() -> None:
    halves = np.array([np.inf, -np.inf, np.nan], np.float16)
    assert not np.isfinite(quantizer("llama").from_half(halves)).any()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_rounding_to_half_is_to_nearest_and_ties_to_even(family: FamilyName) -> None:
    halves = finite_halves().astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    numbers = np.concatenate(
        [halves, np.nextafter(halves, np.float32(np.inf)), between, np.float32([65519.9, 65520.0])]
    )
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16).astype(np.float32)
    assert np.array_equal(quantizer(family).rounded_to_half(numbers).view(np.uint32), expected.view(np.uint32))


def test_a_block_is_a_scale_and_nibbles_of_both_halves() -> None:
    weights = np.zeros((1, 64), np.float32)
    weights[0, 0], weights[0, 33] = -8.0, 3.0
    out = np.empty(34, np.uint8)
    quantizer("bloom").quantize(weights, out)
    assert out[:2].view(np.float16)[0] == 1.0
    assert out[2] == 0x80  # weight 0 is -8: nibble 0; weight 32 is 0: nibble 8
    assert out[3] == 0xB8  # weight 1 is 0: nibble 8; weight 33 is 3: nibble 11
    assert (out[4:] == 0x88).all()


def test_a_block_of_eight_bits_is_a_scale_and_signed_bytes() -> None:
    weights = np.zeros((1, 64), np.float32)
    weights[0, 0], weights[0, 33] = -254.0, 3.0
    out = np.empty(68, np.uint8)
    quantizer("llama").quantize(weights, out, "q8_0")
    assert out[:4].view(np.float32)[0] == 2.0
    numbers = out[4:].view(np.int8)
    assert (numbers[0], numbers[33]) == (-127, 2)
    assert np.count_nonzero(numbers) == 2


@pytest.mark.parametrize("shape", [(1, 63), (2, 96)])
def test_rows_that_are_no_whole_blocks_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        quantizer("llama").quantize(np.zeros(shape, np.float32), np.empty(shape[0] * shape[1] * 34 // 64, np.uint8))
    with pytest.raises(ValueError, match="q8_0 takes rows of whole blocks"):
        quantizer("llama").quantize(np.zeros((1, 64), np.float32), np.empty(34, np.uint8), "q8_0")
