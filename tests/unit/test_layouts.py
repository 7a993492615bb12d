from __future__ import annotations

import numpy as np
import pytest

from cluster.layouts import RowOrder, output_rows


@pytest.mark.parametrize(
    ("order", "heads", "head_width", "source_rows", "expected"),
    [
        ("as_is", 2, 2, 5, [0, 1, 2, 3, 4]),
        ("interleave_halves", 2, 4, 8, [0, 2, 1, 3, 4, 6, 5, 7]),
        ("interleave_halves", 4, 4, 8, [0, 2, 1, 3, 0, 2, 1, 3, 4, 6, 5, 7, 4, 6, 5, 7]),
        ("repeat_heads", 4, 2, 4, [0, 1, 0, 1, 2, 3, 2, 3]),
        ("repeat_heads", 2, 2, 2, [0, 1, 0, 1]),
        ("split_qkv", 2, 2, 12, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]),
        ("repeat_kv", 2, 2, 8, [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7]),
    ],
)
def test_rows_of_the_result(
    order: RowOrder, heads: int, head_width: int, source_rows: int, expected: list[int]
) -> None:
    assert output_rows(order, heads, head_width, source_rows).tolist() == expected


def test_interleaving_is_llama_cpps_permute() -> None:
    weights = np.arange(32 * 3).reshape(32, 3)
    permuted = weights.reshape(4, 2, 4, 3).swapaxes(1, 2).reshape(weights.shape)
    assert np.array_equal(weights[output_rows("interleave_halves", 4, 8, 32)], permuted)
