"""Which tensors a family's binary holds: in what order, under which names, from which Hub tensor, rows in what order.

A layout is data. Every transformation that llm_convert applies to a weight only takes whole rows of the source, in
another order or several times, so a rule names a `RowOrder` and the rows of a result can be made a few at a time.
Source names are without the base model's prefix ("model.", "transformer.", ...), which some checkpoints leave out and
others have twice (`base_name`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.checkpoints.hyperparameters import Hyperparameters
from cluster.families import FamilyName

RuleType = Literal["quantized", "f32"]
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


_ROTARY = r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
_MASKS = r"(bias|masked_bias)"

LAYOUTS: dict[FamilyName, Layout] = {
    "llama": Layout(
        "model.", "embed_tokens.weight", "lm_head.weight", re.compile(rf"(layers\.\d+\.self_attn\.)?{_ROTARY}")
    ),
    "gptneox": Layout(
        "gpt_neox.",
        "embed_in.weight",
        "embed_out.weight",
        re.compile(rf"(layers\.\d+\.attention\.)?{_ROTARY}|layers\.\d+\.attention\.{_MASKS}"),
    ),
    "bloom": Layout(
        "transformer.",
        "word_embeddings.weight",
        "lm_head.weight",
        re.compile(rf"h\.\d+\.self_attention\.{_MASKS}"),
    ),
    "starcoder": Layout("transformer.", "wte.weight", "lm_head.weight", re.compile(rf"(h\.\d+\.attn\.)?{_MASKS}")),
}
# transformers 5 calls every output matrix so; it reads gptneox's under either name.
_ANY_OUTPUT = "lm_head.weight"


def base_name(name: str, layout: Layout) -> str:
    """The name that rules have for a stored tensor, as transformers finds it: the base model's prefix may be left out
    or there once too often. What transformers would not find (a third prefix, another one) is returned as it is."""
    once = name.removeprefix(layout.prefix)
    if once == _ANY_OUTPUT or name == layout.output:
        return layout.output
    base = once.removeprefix(layout.prefix)
    return name if base in (_ANY_OUTPUT, layout.output) else base


def tensor_rules(family: FamilyName, model: Hyperparameters) -> Iterator[TensorRule]:
    """The tensors of the binary in file order. Embedding and output matrix are two rules, also of a model that ties
    them: which stored tensor each is made from, the plan decides."""
    return _RULES[family](model)


def output_rows(order: RowOrder, heads: int, head_width: int, source_rows: int) -> npt.NDArray[np.int64]:
    """For each row of the result, the row of the source that it is.

    interleave_halves  transformers rotates a head's first half against its second, llama.cpp neighbours: within a head,
                       rows 0, n/2, 1, n/2+1, ...; and each head as in repeat_heads.
    repeat_heads       a llama of grouped queries has fewer key and value heads than query heads; its runtime wants one
                       for every query head, so each is repeated for the neighbours that share it.
    split_qkv          bloom stores q, k, v of head 0, then of head 1, ...; its runtime wants all q, then all k, all v.
    repeat_kv          starcoder has one key and one value head; its runtime wants one for every query head.
    """
    rows: npt.NDArray[np.int64] = np.arange(source_rows, dtype=np.int64)
    if order == "interleave_halves":
        pairs = rows.reshape(-1, 2, head_width // 2).swapaxes(1, 2)
        rows = np.repeat(pairs, heads * head_width // source_rows, axis=0)
    elif order == "repeat_heads":
        rows = np.repeat(rows.reshape(-1, head_width), heads * head_width // source_rows, axis=0)
    elif order == "split_qkv":
        rows = rows.reshape(heads, 3, head_width).swapaxes(0, 1)
    elif order == "repeat_kv":
        query, key, value = np.split(rows, [heads * head_width, (heads + 1) * head_width])
        rows = np.concatenate([query, np.tile(key, heads), np.tile(value, heads)])
    return rows.reshape(-1)


def _llama(model: Hyperparameters) -> Iterator[TensorRule]:
    square, wide = (model.width, model.width), (model.feed_forward, model.width)
    embedding = (model.vocabulary, model.width)
    grouped = (model.key_value_heads * model.head_width, model.width)

    def matrix(name: str, source: str, shape: tuple[int, int], rows: RowOrder = "as_is") -> TensorRule:
        return TensorRule(f"{name}.weight", f"{source}.weight", shape, "quantized", rows)

    def norm(name: str, source: str) -> TensorRule:
        return TensorRule(f"{name}.weight", f"{source}.weight", (model.width,), "f32", rounded=False)

    def projection(name: str, source: str, shape: tuple[int, int], rows: RowOrder, bias: bool) -> Iterator[TensorRule]:
        yield matrix(name, source, shape, rows)
        if bias:
            yield TensorRule(f"{name}.bias", f"{source}.bias", shape[:1], "f32", rows, rounded=False)

    repeated: RowOrder = "as_is" if grouped == square else "repeat_heads"
    yield matrix("tok_embeddings", "embed_tokens", embedding)
    yield norm("norm", "norm")
    yield matrix("output", "lm_head", embedding)
    for i in range(model.layers):
        layer, ours, theirs = f"layers.{i}", f"layers.{i}.attention", f"layers.{i}.self_attn"
        yield from projection(f"{ours}.wq", f"{theirs}.q_proj", square, "interleave_halves", model.attention_bias)
        yield from projection(f"{ours}.wk", f"{theirs}.k_proj", grouped, "interleave_halves", model.attention_bias)
        yield from projection(f"{ours}.wv", f"{theirs}.v_proj", grouped, repeated, model.attention_bias)
        yield from projection(f"{ours}.wo", f"{theirs}.o_proj", square, "as_is", model.output_bias)
        yield norm(f"{layer}.attention_norm", f"{layer}.input_layernorm")
        yield matrix(f"{layer}.feed_forward.w1", f"{layer}.mlp.gate_proj", wide)
        yield matrix(f"{layer}.feed_forward.w2", f"{layer}.mlp.down_proj", wide[::-1])
        yield matrix(f"{layer}.feed_forward.w3", f"{layer}.mlp.up_proj", wide)
        yield norm(f"{layer}.ffn_norm", f"{layer}.post_attention_layernorm")


def _weight_and_bias(
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


def _gptneox(model: Hyperparameters) -> Iterator[TensorRule]:
    width, wide = model.width, model.feed_forward
    embedding = (model.vocabulary, width)
    prefix = LAYOUTS["gptneox"].prefix

    def same(source: str, *shape: int) -> Iterator[TensorRule]:
        return _weight_and_bias(prefix + source, source, shape)

    yield TensorRule(f"{prefix}embed_in.weight", "embed_in.weight", embedding, "quantized")
    for i in range(model.layers):
        layer = f"layers.{i}"
        yield from same(f"{layer}.input_layernorm", width)
        yield from same(f"{layer}.post_attention_layernorm", width)
        yield from same(f"{layer}.attention.query_key_value", 3 * width, width)
        yield from same(f"{layer}.attention.dense", width, width)
        yield from same(f"{layer}.mlp.dense_h_to_4h", wide, width)
        yield from same(f"{layer}.mlp.dense_4h_to_h", width, wide)
    yield from same("final_layer_norm", width)
    yield TensorRule("embed_out.weight", "embed_out.weight", embedding, "quantized")


def _bloom(model: Hyperparameters) -> Iterator[TensorRule]:
    width, wide = model.width, model.feed_forward
    embedding = (model.vocabulary, width)
    yield TensorRule("tok_embeddings.weight", "word_embeddings.weight", embedding, "quantized")
    yield from _weight_and_bias("norm", "word_embeddings_layernorm", (width,))
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"h.{i}"
        yield from _weight_and_bias(f"{ours}.attention_norm", f"{theirs}.input_layernorm", (width,))
        qkv = "query_key_value"
        yield from _weight_and_bias(
            f"{ours}.attention.{qkv}", f"{theirs}.self_attention.{qkv}", (3 * width, width), "split_qkv"
        )
        yield from _weight_and_bias(f"{ours}.attention.wo", f"{theirs}.self_attention.dense", (width, width))
        yield from _weight_and_bias(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", (width,))
        yield from _weight_and_bias(f"{ours}.feed_forward.w1", f"{theirs}.mlp.dense_h_to_4h", (wide, width))
        yield from _weight_and_bias(f"{ours}.feed_forward.w2", f"{theirs}.mlp.dense_4h_to_h", (width, wide))
    yield from _weight_and_bias("output_norm", "ln_f", (width,))
    yield TensorRule("output.weight", "lm_head.weight", embedding, "quantized")


def _starcoder(model: Hyperparameters) -> Iterator[TensorRule]:
    width, wide = model.width, model.feed_forward
    embedding = (model.vocabulary, width)
    attention = (width + 2 * model.head_width, width)
    linear, norm = ("/w", "/b"), ("/g", "/b")
    yield TensorRule("model/wte", "wte.weight", embedding, "quantized")
    yield TensorRule("model/wpe", "wpe.weight", (model.context, width), "f32")
    for i in range(model.layers):
        ours, theirs = f"model/h{i}", f"h.{i}"
        yield from _weight_and_bias(f"{ours}/ln_1", f"{theirs}.ln_1", (width,), suffixes=norm)
        yield from _weight_and_bias(f"{ours}/attn/c_attn", f"{theirs}.attn.c_attn", attention, "repeat_kv", linear)
        yield from _weight_and_bias(f"{ours}/attn/c_proj", f"{theirs}.attn.c_proj", (width, width), suffixes=linear)
        yield from _weight_and_bias(f"{ours}/ln_2", f"{theirs}.ln_2", (width,), suffixes=norm)
        yield from _weight_and_bias(f"{ours}/mlp/c_fc", f"{theirs}.mlp.c_fc", (wide, width), suffixes=linear)
        yield from _weight_and_bias(f"{ours}/mlp/c_proj", f"{theirs}.mlp.c_proj", (width, wide), suffixes=linear)
    yield from _weight_and_bias("model/ln_f", "ln_f", (width,), suffixes=norm)
    yield TensorRule("model/lm_head", "lm_head.weight", embedding, "quantized")


_RULES = {"llama": _llama, "gptneox": _gptneox, "bloom": _bloom, "starcoder": _starcoder}
