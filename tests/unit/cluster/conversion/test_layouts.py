from __future__ import annotations

import numpy as np
import pytest

from cluster.conversion.layouts import base_name, output_rows
from cluster.families import FAMILIES, FamilyName
from cluster.families.tensors import RowOrder


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


@pytest.mark.parametrize(
    ("family", "stored", "name"),
    [
        ("llama", "layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("llama", "model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("llama", "model.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("llama", "model.model.model.norm.weight", "model.norm.weight"),
        ("llama", "model.lm_head.weight", "lm_head.weight"),
        ("llama", "model.model.lm_head.weight", "model.model.lm_head.weight"),
        ("llama", "embed_out.weight", "embed_out.weight"),
        ("gptneox", "embed_out.weight", "embed_out.weight"),
        ("gptneox", "lm_head.weight", "embed_out.weight"),
        ("gptneox", "gpt_neox.lm_head.weight", "embed_out.weight"),
        ("gptneox", "gpt_neox.embed_out.weight", "gpt_neox.embed_out.weight"),
    ],
)
def test_stored_tensors_are_found_under_the_names_that_transformers_finds(
    family: FamilyName, stored: str, name: str
) -> None:
    assert base_name(stored, FAMILIES[family].layout) == name


def test_interleaving_is_llama_cpps_permute() -> None:
    weights = np.arange(32 * 3).reshape(32, 3)
    permuted = weights.reshape(4, 2, 4, 3).swapaxes(1, 2).reshape(weights.shape)
    assert np.array_equal(weights[output_rows("interleave_halves", 4, 8, 32)], permuted)
