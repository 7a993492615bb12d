from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cluster.artifacts.ggml import BLOCK_BYTES
from cluster.artifacts.manifest import Quantization
from cluster.conversion.quantize import Quantizer, quantizer
from cluster.conversion.quantize_numpy import NumpyQuantizer
from cluster.families import FAMILY_NAMES

EACH: list[Quantizer] = [*map(quantizer, FAMILY_NAMES), NumpyQuantizer()]
each = pytest.mark.parametrize("quantizes", EACH, ids=[*FAMILY_NAMES, "numpy"])


def finite_halves() -> npt.NDArray[np.float16]:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return halves[np.isfinite(halves)]


@each
def test_every_finite_half_is_read_as_numpy_reads_it(quantizes: Quantizer) -> None:
    halves = finite_halves()
    floats = quantizes.from_half(halves)
    assert np.array_equal(floats.view(np.uint32), halves.astype(np.float32).view(np.uint32))


@each
def test_infinities_and_nans_are_not_read_as_numbers(quantizes: Quantizer) -> None:
    halves = np.array([np.inf, -np.inf, np.nan], np.float16)
    assert not np.isfinite(quantizes.from_half(halves)).any()


@each
def test_rounding_to_half_is_to_nearest_and_ties_to_even(quantizes: Quantizer) -> None:
    halves = finite_halves().astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    numbers = np.concatenate(
        [halves, np.nextafter(halves, np.float32(np.inf)), between, np.float32([65519.9, 65520.0])]
    )
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16).astype(np.float32)
    assert np.array_equal(quantizes.rounded_to_half(numbers).view(np.uint32), expected.view(np.uint32))


@each
def test_a_block_is_a_scale_and_nibbles_of_both_halves(quantizes: Quantizer) -> None:
    weights = np.zeros((1, 64), np.float32)
    weights[0, 0], weights[0, 33] = -8.0, 3.0
    out = np.empty(34, np.uint8)
    quantizes.quantize(weights, out)
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


def blocks() -> dict[str, npt.NDArray[np.float32]]:
    """Of fp16 numbers, as a conversion has them: ordinary and extreme, with ties of rounding and of magnitude, and with
    zeros of both signs."""
    random = np.random.default_rng(0)
    normal = random.standard_normal((512, 256))
    zeros = np.where(random.random((64, 256)) < 0.5, -0.0, 0.0)
    made = {
        "normal": normal,
        "tiny": normal * 1e-7,
        "great": (normal * 2e4).clip(-65504, 65504),
        "integers": random.integers(-8, 9, (512, 256)),
        "halves": random.integers(-127, 128, (512, 256)) / 2,
        "sparse": np.where(random.random((512, 256)) < 0.02, normal, 0),
        "zeros": zeros,
    }
    with np.errstate(over="ignore"):
        return {name: numbers.astype(np.float16).astype(np.float32) for name, numbers in made.items()}


@pytest.mark.parametrize("quantization", ["q4_0", "q8_0"])
@pytest.mark.parametrize("kind", blocks())
def test_numpy_gives_the_bytes_of_the_library(kind: str, quantization: Quantization) -> None:
    weights = blocks()[kind]
    expected, found = np.empty((2, weights.size // 64 * BLOCK_BYTES[quantization]), np.uint8)
    quantizer("llama").quantize(weights, expected, quantization)
    NumpyQuantizer().quantize(weights, found, quantization)
    assert np.array_equal(found, expected)


def test_a_node_that_runs_no_build_quantizes_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.machine.isa.cpu_flags", frozenset)
    assert isinstance(quantizer.__wrapped__("llama"), NumpyQuantizer)
