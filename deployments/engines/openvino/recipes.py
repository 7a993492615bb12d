"""Which tensors of a family's artifact make which weights of the openvino engine's graph.

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

from cluster.checkpoints.hyperparameters import Hyperparameters
from cluster.conversion.layouts import RowOrder, output_rows
from cluster.families import FamilyName

Rows = npt.NDArray[np.int64]


class Part(NamedTuple):
    """Rows of a tensor of the artifact, in their order there where `rows` is None."""

    tensor: str
    rows: Rows | None = None


Recipe = Iterator[tuple[str, tuple[Part, ...]]]


def recipe(family: FamilyName, model: Hyperparameters, tensors: Container[str]) -> Recipe:
    """The graph's weights, each with the parts that it is, one after the other. `tensors` are those of the artifact: a
    bias that it lacks is left out."""
    for name, parts in _RECIPES[family](model):
        if parts[0].tensor in tensors:
            yield name, parts


def stored_rows(order: RowOrder, model: Hyperparameters, source_rows: int) -> Rows:
    """For each row of the Hub's tensor one row of the artifact's that holds it (the last, where heads were repeated):
    the inverse of cluster.conversion.layouts.output_rows."""
    order_of_rows = output_rows(order, model.heads, model.head_width, source_rows)
    rows = np.empty(source_rows, np.int64)
    rows[order_of_rows] = np.arange(len(order_of_rows))
    return rows


def _pair(name: str, tensor: str, rows: Rows | None = None, suffixes: tuple[str, str] = (".weight", ".bias")) -> Recipe:
    for ours, theirs in zip((".weight", ".bias"), suffixes, strict=True):
        yield name + ours, (Part(tensor + theirs, rows),)


def _llama(model: Hyperparameters) -> Recipe:
    query_rows, key_rows = model.heads * model.head_width, model.key_value_heads * model.head_width
    projections = (
        ("wq", stored_rows("interleave_halves", model, query_rows)),
        ("wk", stored_rows("interleave_halves", model, key_rows)),
        ("wv", stored_rows("repeat_heads", model, key_rows)),
    )
    yield "embedding.weight", (Part("tok_embeddings.weight"),)
    for i in range(model.layers):
        layer = f"layers.{i}"
        yield f"{layer}.attention_norm.weight", (Part(f"{layer}.attention_norm.weight"),)
        for kind in ("weight", "bias"):
            yield f"{layer}.qkv.{kind}", tuple(Part(f"{layer}.attention.{w}.{kind}", rows) for w, rows in projections)
        yield from _pair(f"{layer}.attention_out", f"{layer}.attention.wo")
        yield f"{layer}.mlp_norm.weight", (Part(f"{layer}.ffn_norm.weight"),)
        yield f"{layer}.mlp_up.weight", tuple(Part(f"{layer}.feed_forward.{w}.weight") for w in ("w1", "w3"))
        yield f"{layer}.mlp_down.weight", (Part(f"{layer}.feed_forward.w2.weight"),)
    yield "final_norm.weight", (Part("norm.weight"),)
    yield "output.weight", (Part("output.weight"),)


def _gptneox(model: Hyperparameters) -> Recipe:
    qkv = output_rows("split_qkv", model.heads, model.head_width, 3 * model.width)
    yield "embedding.weight", (Part("gpt_neox.embed_in.weight"),)
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        yield from _pair(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        yield from _pair(f"{ours}.qkv", f"{theirs}.attention.query_key_value", qkv)
        yield from _pair(f"{ours}.attention_out", f"{theirs}.attention.dense")
        yield from _pair(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
        yield from _pair(f"{ours}.mlp_up", f"{theirs}.mlp.dense_h_to_4h")
        yield from _pair(f"{ours}.mlp_down", f"{theirs}.mlp.dense_4h_to_h")
    yield from _pair("final_norm", "gpt_neox.final_layer_norm")
    yield "output.weight", (Part("embed_out.weight"),)


def _bloom(model: Hyperparameters) -> Recipe:
    yield "embedding.weight", (Part("tok_embeddings.weight"),)
    yield from _pair("embedding_norm", "norm")
    for i in range(model.layers):
        layer = f"layers.{i}"
        yield from _pair(f"{layer}.attention_norm", f"{layer}.attention_norm")
        yield from _pair(f"{layer}.qkv", f"{layer}.attention.query_key_value")
        yield from _pair(f"{layer}.attention_out", f"{layer}.attention.wo")
        yield from _pair(f"{layer}.mlp_norm", f"{layer}.ffn_norm")
        yield from _pair(f"{layer}.mlp_up", f"{layer}.feed_forward.w1")
        yield from _pair(f"{layer}.mlp_down", f"{layer}.feed_forward.w2")
    yield from _pair("final_norm", "output_norm")
    yield "output.weight", (Part("output.weight"),)


def _starcoder(model: Hyperparameters) -> Recipe:
    qkv = stored_rows("repeat_kv", model, model.width + 2 * model.head_width)
    linear, norm = ("/w", "/b"), ("/g", "/b")
    yield "embedding.weight", (Part("model/wte"),)
    yield "position_embedding.weight", (Part("model/wpe"),)
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"model/h{i}"
        yield from _pair(f"{ours}.attention_norm", f"{theirs}/ln_1", suffixes=norm)
        yield from _pair(f"{ours}.qkv", f"{theirs}/attn/c_attn", qkv, suffixes=linear)
        yield from _pair(f"{ours}.attention_out", f"{theirs}/attn/c_proj", suffixes=linear)
        yield from _pair(f"{ours}.mlp_norm", f"{theirs}/ln_2", suffixes=norm)
        yield from _pair(f"{ours}.mlp_up", f"{theirs}/mlp/c_fc", suffixes=linear)
        yield from _pair(f"{ours}.mlp_down", f"{theirs}/mlp/c_proj", suffixes=linear)
    yield from _pair("final_norm", "model/ln_f", suffixes=norm)
    yield "output.weight", (Part("model/lm_head"),)


_RECIPES = {"llama": _llama, "gptneox": _gptneox, "bloom": _bloom, "starcoder": _starcoder}
