"""How a family's file describes tensors: those of a checkpoint, those of the binary that are made of them, and the
weights of engine openvino's graph that are made of these.

Every transformation that llm_convert applies to a weight only takes whole rows of the source, in another order or
several times, so a rule names a `RowOrder` and the rows of a result can be made a few at a time. Source names are
without the base model's prefix ("model.", "transformer.", ...), which some checkpoints leave out and others have twice
(`cluster.conversion.layouts.base_name`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

RuleType = Literal["quantized", "f32"]
# What each order is: cluster.conversion.layouts.output_rows.
RowOrder = Literal["as_is", "interleave_halves", "repeat_heads", "split_qkv", "repeat_kv"]


class TensorRule(NamedTuple):
    """`source_shape` is what the Hub tensor must have; the result has the same, with more rows if heads repeat."""

    name: str
    source: str
    source_shape: tuple[int, ...]
    type: RuleType
    rows: RowOrder = "as_is"
    # llm_convert loads all but llama as fp16, so even what stays F32 has been rounded to it.
    rounded: bool = True


class Layout(NamedTuple):
    prefix: str  # of the base model's tensors; the output matrix has none
    embedding: str  # the Hub name of the token embedding, without the prefix
    output: str  # the Hub name of the output matrix
    # Buffers that versions of transformers or other programs saved among the weights. Computed, so never read: masks,
    # and the frequencies and tables of rotary embeddings, in each layer or once for the model.
    buffers: re.Pattern[str]


# Patterns of such buffers, for `Layout.buffers`.
ROTARY_BUFFERS = r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
MASKS = r"(bias|masked_bias)"


class PartRows(NamedTuple):
    """Rows of a tensor of the binary, in another order than there. `undone`: the binary has them in `order`, and they
    go back to the Hub's, each key and value head once; else the binary has the Hub's, and they go into `order`."""

    order: RowOrder
    source_rows: int  # of the Hub's tensor
    undone: bool = True


class Part(NamedTuple):
    """A tensor of the binary, all of it as it is where `rows` is None."""

    tensor: str
    rows: PartRows | None = None


# By the graph's names (deployments/engines/openvino/graph_parts.py): the parts of a weight, one after the other.
GraphWeights = Iterator[tuple[str, tuple[Part, ...]]]


def weight_and_bias(
    name: str,
    source: str,
    shape: tuple[int, ...],
    rows: RowOrder = "as_is",
    suffixes: tuple[str, str] = (".weight", ".bias"),
) -> Iterator[TensorRule]:
    """A linear layer (2-D shape) or a layer norm (1-D): its weight, then its bias of one number a row."""
    kind: RuleType = "quantized" if len(shape) == 2 else "f32"
    yield TensorRule(name + suffixes[0], f"{source}.weight", shape, kind, rows)
    yield TensorRule(name + suffixes[1], f"{source}.bias", shape[:1], "f32", rows)


def graph_pair(
    name: str, tensor: str, rows: PartRows | None = None, suffixes: tuple[str, str] = (".weight", ".bias")
) -> GraphWeights:
    """A weight and its bias, each all of a tensor of the binary or those rows of it."""
    for ours, theirs in zip((".weight", ".bias"), suffixes, strict=True):
        yield name + ours, (Part(tensor + theirs, rows),)
