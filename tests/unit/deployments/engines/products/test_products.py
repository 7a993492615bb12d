"""nibble's own products against the same integers in numpy."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.machine.isa import cpu_flags
from deployments.engines.cache_memory import zeros
from deployments.engines.products.layout import PRODUCT_FLAGS, tiles
from deployments.engines.products.threads import SHARES, Q4Threads

pytestmark = pytest.mark.skipif(
    not cpu_flags() >= PRODUCT_FLAGS, reason="this CPU lacks the instructions: nothing runs these products on it"
)

Matrix = tuple[np.ndarray, np.ndarray]  # type: ignore[type-arg]


def random_matrix(width: int, columns: int, seed: int = 0) -> Matrix:
    """Q4_0's bytes and scales."""
    random = np.random.default_rng(seed)
    nibbles = random.integers(0, 256, (width, columns // 64, 32)).astype(np.uint8)
    return nibbles, random.normal(size=(width, columns // 64)).astype(np.float16)


def weights_of(matrix: Matrix) -> np.ndarray:  # type: ignore[type-arg]
    nibbles, scales = matrix
    values = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1).astype(np.float64) - 8
    return (values * scales[..., None].astype(np.float64)).reshape(len(scales), -1)


def rounded(activations: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """To 8 bits in groups of 64, and back."""
    groups = activations.astype(np.float64).reshape(len(activations), -1, 64)
    scales = np.abs(groups).max(axis=-1, keepdims=True) / 127
    return (np.rint(np.divide(groups, scales, where=scales > 0, out=0 * groups)) * scales).reshape(activations.shape)


def multiplied(activations: np.ndarray, matrix: Matrix, threads: Q4Threads) -> np.ndarray:  # type: ignore[type-arg]
    packed = tiles(*matrix)
    aligned = zeros(packed.nbytes).reshape(packed.shape)
    aligned[...] = packed
    guarded = np.full((len(activations) + 2, len(matrix[0])), 7.0, np.float32)
    threads.multiply(np.ascontiguousarray(activations, np.float32), threads.add(aligned), guarded[1:-1])
    assert (guarded[[0, -1]] == 7).all(), "written outside the result"
    return guarded[1:-1]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 64])
@pytest.mark.parametrize(("width", "columns"), [(16, 64), (1, 64), (40, 192), (500, 320), (1000, 64)])
def test_products_are_those_of_the_rounded_activations(count: int, rows: int, width: int, columns: int) -> None:
    activations = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    activations[0, :64] = 0
    matrix = random_matrix(width, columns)
    wanted = rounded(activations) @ weights_of(matrix).T
    found = multiplied(activations, matrix, Q4Threads(count))
    # Rounding to nearest is exact but where a number lies in the middle, as seen in f32 or f64.
    assert np.abs(found - wanted).max() <= 2e-3 * np.abs(wanted).max()
    assert np.sqrt(np.mean((found - wanted) ** 2)) <= 1e-4 * np.sqrt(np.mean(wanted**2))


@pytest.mark.parametrize("nibble", [0x00, 0x88, 0xFF])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(nibble: int, sign: int) -> None:
    matrix = np.full((16, 2, 32), nibble, np.uint8), np.ones((16, 2), np.float16)
    activations = np.full((5, 128), sign * 127.0)
    wanted = (nibble % 16 - 8) * sign * 127.0 * 128
    assert (multiplied(activations, matrix, Q4Threads(1)) == wanted).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_spoils_its_row_only(value: float) -> None:
    activations = np.ones((6, 128))
    activations[2, 100] = value
    found = multiplied(activations, random_matrix(40, 128), Q4Threads(2))
    assert not np.isfinite(found[2]).any()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_threads_share_many_small_products_without_a_fault() -> None:
    """Each with another number of shares than the last, so that one who comes late would do harm."""
    team, random = Q4Threads(3), np.random.default_rng(1)
    matrices = [random_matrix(width, 64, seed=width) for width in (16, 16 * SHARES, 16 * SHARES * 5)]
    for turn in range(600):
        activations = random.normal(size=(1 + turn % 4, 64)).astype(np.float32)
        matrix = matrices[turn % len(matrices)]
        wanted = rounded(activations) @ weights_of(matrix).T
        assert np.abs(multiplied(activations, matrix, team) - wanted).max() <= 0.02 * np.abs(wanted).max()
        if turn % 100 == 0:
            time.sleep(0.02)  # the others have gone to sleep when the next product comes


def test_idle_threads_sleep_and_end_when_told() -> None:
    before = set(threading.enumerate())
    team = Q4Threads(3)
    multiplied(np.ones((1, 64)), random_matrix(16, 64), team)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    while any(state_of(thread) != "S" for thread in started):  # else the test's time limit ends it
        time.sleep(0.01)
    team.end()
    assert not started & set(threading.enumerate())


def state_of(thread: threading.Thread) -> str:
    """R: runs or could; S: sleeps."""
    return Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0]
