"""Which rows of an artifact's tensors make which weights of the openvino engine's graph, as the family's file says.

The graph's own names are the same for all families, so that one builder serves them all:

    embedding.weight  [position_embedding.weight]  [embedding_norm.weight, .bias]
    layers.N.attention_norm  layers.N.qkv  layers.N.attention_out  layers.N.mlp_norm
    layers.N.mlp_up (gate and up of a gated one)  layers.N.mlp_down         each .weight and, where there is one, .bias
    final_norm  output

`qkv` has the rows of all query heads, then of all key heads, then of all value heads, each head in the Hub's order.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.conversion.layouts import output_rows
from cluster.families import FAMILIES, FamilyName
from cluster.families.architecture import Hyperparameters
from cluster.families.tensors import PartRows, RowOrder

Rows = npt.NDArray[np.int64]


class StoredPart(NamedTuple):
    """Rows of a tensor of the artifact, in their order there where `rows` is None."""

    tensor: str
    rows: Rows | None = None


def graph_parts(
    family: FamilyName, model: Hyperparameters, tensors: Container[str]
) -> Iterator[tuple[str, tuple[StoredPart, ...]]]:
    """The graph's weights, each with the parts that it is, one after the other. `tensors` are those of the artifact: a
    bias that it lacks is left out."""
    for name, parts in FAMILIES[family].graph(model):
        if parts[0].tensor in tensors:
            yield name, tuple(StoredPart(part.tensor, _rows(part.rows, model)) for part in parts)


def _rows(rows: PartRows | None, model: Hyperparameters) -> Rows | None:
    if rows is None:
        return None
    if rows.undone:
        return stored_rows(rows.order, model, rows.source_rows)
    return output_rows(rows.order, model.heads, model.head_width, rows.source_rows)


def stored_rows(order: RowOrder, model: Hyperparameters, source_rows: int) -> Rows:
    """For each row of the Hub's tensor one row of the artifact's that holds it (the last, where heads were repeated):
    the inverse of cluster.conversion.layouts.output_rows."""
    order_of_rows = output_rows(order, model.heads, model.head_width, source_rows)
    rows = np.empty(source_rows, np.int64)
    rows[order_of_rows] = np.arange(len(order_of_rows))
    return rows
