"""The graph of a decoder of any family, from its weights, with paged attention in it from the start.

One builder for all families: they differ in their norms, positions, feed-forward and biases, and each of these is one
`if` here. A step's tokens, of however many sequences, lie one after the other: every activation is [tokens, width].
Only the rows asked for go through the rest of the last layer and the output matrix.

PagedAttentionExtension is OpenVINO's own operation, the one that its continuous batching pipeline puts in the place of
scaled dot product attention. Built directly, a model needs no such transformation, and ALiBi, grouped heads and sliding
windows are inputs of the operation instead of patterns to be recognised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as op
from openvino.op import _PagedAttentionExtension as PagedAttention

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from cluster.families.architecture import Hyperparameters
from deployments.engines.openvino.derived_weights import DerivedWeights, QuantizedMatrix
from deployments.engines.openvino.frequencies import inverse_frequencies
from deployments.engines.products.operation import Q4Product
from deployments.engines.products.threads import Q4Threads

TOKEN_INPUTS = ("input_ids", "position_ids", "output_rows")  # i64, one dimension each
# i32; the last is a scalar. Their meaning: deployments/engines/openvino/paged_model.py.
BATCH_INPUTS = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins", "max_context_len")


class Positions(NamedTuple):
    """How a family's attention knows of positions, besides a position embedding."""

    cos: Any = None  # [tokens, 1, 1, rotated]
    sin: Any = None
    rotated: int = 0
    slopes: npt.NDArray[np.float32] | None = None  # ALiBi, [heads]


def build_graph(
    weights: DerivedWeights, model: Hyperparameters, threads: Q4Threads | None, layers: int | None = None
) -> ov.Model:
    """Results: `logits` [rows, vocabulary] and `hidden` [rows, width], the final norm's output. `threads`: for
    weights in tiles. `layers`: build only so many of them. The weights must stay mapped as long as the model, or what
    is compiled from it, lives."""
    return _Builder(weights, model, threads).decoder(model.layers if layers is None else layers)


class _Builder:
    def __init__(self, weights: DerivedWeights, model: Hyperparameters, threads: Q4Threads | None) -> None:
        self._weights, self._model, self._threads = weights, model, threads
        self._inputs = {name: _parameter(name, ov.Type.i64) for name in TOKEN_INPUTS}
        for name in BATCH_INPUTS:
            self._inputs[name] = _parameter(name, ov.Type.i32, dimensions=int(name != "max_context_len"))

    def decoder(self, layers: int) -> ov.Model:
        weights, inputs = self._weights, self._inputs
        zero = op.constant(np.int64(0))
        x = op.gather(self._matrix("embedding.weight"), inputs["input_ids"], zero)
        if "position_embedding.weight" in weights:
            table = op.constant(weights.array("position_embedding.weight"))
            x = op.add(x, op.gather(table, inputs["position_ids"], zero))
        if "embedding_norm.weight" in weights:
            x = self._norm(x, "embedding_norm")
        positions = self._positions()
        for i in range(layers):
            x = self._layer(x, i, positions, last=i == layers - 1)
        hidden = self._norm(x, "final_norm")
        results = {"logits": self._linear(hidden, "output"), "hidden": hidden}
        for name, node in results.items():
            node.output(0).set_names({name})
        return ov.Model([op.result(node) for node in results.values()], list(inputs.values()), "decoder")

    def _layer(self, x: Any, index: int, positions: Positions, last: bool) -> Any:
        name = f"layers.{index}"
        attention = self._attention(self._norm(x, f"{name}.attention_norm"), name, index, positions)
        if last:  # of all other rows nobody needs more than the keys and values
            rows, zero = self._inputs["output_rows"], op.constant(np.int64(0))
            x, attention = (op.gather(part, rows, zero) for part in (x, attention))
        attention = self._linear(attention, f"{name}.attention_out")
        if self._model.parallel_residual:
            return op.add(op.add(x, attention), self._feed_forward(self._norm(x, f"{name}.mlp_norm"), name))
        x = op.add(x, attention)
        return op.add(x, self._feed_forward(self._norm(x, f"{name}.mlp_norm"), name))

    def _attention(self, x: Any, name: str, index: int, positions: Positions) -> Any:
        model = self._model
        query, key = model.heads * model.head_width, model.key_value_heads * model.head_width
        lengths = op.constant(np.array([query, key, key], np.int64))
        q, k, v = op.variadic_split(self._linear(x, f"{name}.qkv"), op.constant(np.int64(1)), lengths).outputs()
        if positions.rotated:
            q, k = (_rotate(part, model.head_width, positions) for part in (q, k))
        return self._paged_attention(q, k, v, index, positions.slopes)

    def _feed_forward(self, x: Any, name: str) -> Any:
        up = self._linear(x, f"{name}.mlp_up")
        if self._model.activation == "silu":
            gate, up = op.split(up, op.constant(np.int64(1)), 2).outputs()
            up = op.multiply(op.swish(gate), up)
        else:
            up = op.gelu(up, "erf" if self._model.activation == "gelu" else "tanh")
        return self._linear(up, f"{name}.mlp_down")

    def _norm(self, x: Any, name: str) -> Any:
        """Root mean square where there is no bias, else a layer norm."""
        gain, last = op.constant(self._weights.array(f"{name}.weight")), op.constant(np.array([-1], np.int64))
        if f"{name}.bias" in self._weights:
            normed = op.mvn(x, last, True, self._model.epsilon, "inside_sqrt")
            return op.add(op.multiply(normed, gain), op.constant(self._weights.array(f"{name}.bias")))
        square = op.reduce_mean(op.power(x, _float(2)), last, True)
        scale = op.divide(_float(1), op.sqrt(op.add(square, _float(self._model.epsilon))))
        return op.multiply(gain, op.multiply(x, scale))

    def _linear(self, x: Any, name: str) -> Any:
        weight = f"{name}.weight"
        if self._weights.tiled(weight):
            tiles, width = self._weights.tiles(weight)
            assert self._threads is not None, f"{weight} is in tiles"
            y = Q4Product([_output(x)], self._threads.add(tiles), width, self._threads)
        else:
            y = op.matmul(x, self._matrix(weight), False, True)
        if f"{name}.bias" in self._weights:
            y = op.add(y, op.constant(self._weights.array(f"{name}.bias").reshape(1, -1)))
        return y

    def _matrix(self, name: str) -> Any:
        return dequantized(self._weights.matrix(name))

    def _positions(self) -> Positions:
        model = self._model
        if model.rotary is not None:
            frequencies = op.constant(np.tile(inverse_frequencies(model.rotary), 2).reshape(1, 1, 1, -1))
            where = op.convert(self._inputs["position_ids"], "f32")
            angles = op.multiply(op.reshape(where, op.constant(np.array([-1, 1, 1, 1])), False), frequencies)
            return Positions(op.cos(angles), op.sin(angles), model.rotary.width)
        if "position_embedding.weight" in self._weights:
            return Positions()
        return Positions(slopes=alibi_slopes(model.heads))

    def _paged_attention(self, q: Any, k: Any, v: Any, index: int, slopes: npt.NDArray[np.float32] | None) -> Any:
        model, inputs = self._model, self._inputs
        caches = [f"{kind}_cache.{index}" for kind in ("key", "value")]
        for name in caches:
            # Element type and shape are the plugin's choice, made when the model is compiled.
            inputs[name] = _parameter(name, ov.Type.dynamic, dimensions=4)
        past, begins, blocks, blocks_begins, longest = (inputs[name] for name in BATCH_INPUTS)
        integers, integer = op.constant(np.zeros(0, np.int32)), op.constant(np.int32(0))
        floats = op.constant(np.zeros(0, np.float32))
        arguments = [
            *(q, k, v, inputs[caches[0]], inputs[caches[1]], past, begins, blocks, blocks_begins),
            _float(model.head_width**-0.5),
            op.constant(np.int32(model.sliding_window or 0)),
            floats if slopes is None else op.constant(slopes),
            longest,
            integers,  # score_aggregation_window
            *(integers, integers, floats),  # of rotating cached keys
            *(floats, integer, integer),  # of XAttention: threshold, block size, stride
            op.constant(np.zeros((0, 0, 0, 0), np.float32)),  # sinks
            *(integer, integers, integers, integers),  # of the adaptive R-KV eviction
            integers,  # token_type_ids
            *(op.constant(np.zeros(0, np.uint8)), integers),  # of query-query biases
        ]
        node = PagedAttention([_output(argument) for argument in arguments])
        info = node.get_rt_info()
        for kind in ("k", "v"):
            info[f"num_{kind}_heads"], info[f"{kind}_head_size"] = model.key_value_heads, model.head_width
        return node.output(0)


def dequantized(matrix: QuantizedMatrix) -> Any:
    """The weights as a node [rows, columns] of f32, in the form that the plugin takes for compressed weights: it keeps
    them as they are and multiplies with them directly. The constants share the arrays' memory."""
    rows, columns = matrix.shape
    groups = columns // BLOCK_WEIGHTS
    kind = ov.Type.i4 if matrix.type == "i4" else ov.Type.i8
    values = ov.Tensor(matrix.values.reshape(-1), ov.Shape([rows, groups, BLOCK_WEIGHTS]), kind)
    precision = "f16" if matrix.type == "i4" else "f32"
    scales = op.constant(matrix.scales.reshape(rows, groups, 1), shared_memory=True)
    grouped = op.multiply(op.convert(op.constant(values, shared_memory=True), precision), scales)
    weights = op.reshape(grouped, op.constant(np.array([rows, columns])), False)
    return op.convert(weights, "f32") if precision == "f16" else weights


def alibi_slopes(heads: int) -> npt.NDArray[np.float32]:
    """Of bloom, [heads] (transformers' build_alibi_tensor; Press et al. 2022): a geometric series for the largest power
    of two up to `heads`, then every other number of the series for twice as many."""
    power = 1 << (heads.bit_length() - 1)

    def series(count: int) -> npt.NDArray[np.float64]:
        return np.asarray(2.0 ** (-8.0 / count * np.arange(1, count + 1)))

    return np.concatenate([series(power), series(2 * power)[::2][: heads - power]]).astype(np.float32)


def _rotate(x: Any, head_width: int, positions: Positions) -> Any:
    """Turns each head's first `rotated` numbers, the i-th of their first half with the i-th of the second. Written as
    the plugin recognises it (OpenVINO's RoPEFusionGPTNEOX and RoPEFusionIOSlicing), to compute it in one operation."""
    width, rotated, last = x.get_partial_shape()[1].get_length(), positions.rotated, op.constant(np.int64(3))
    x = op.reshape(x, op.constant(np.array([0, width // head_width, 1, head_width])), True)
    kept = []
    if rotated < head_width:
        x, *kept = op.variadic_split(x, last, op.constant(np.array([rotated, head_width - rotated]))).outputs()
    first, second = op.variadic_split(x, last, op.constant(np.array([rotated // 2] * 2))).outputs()
    half_turned = op.concat([op.multiply(second, _float(-1)), first], -1)
    turned = op.add(op.multiply(x, positions.cos), op.multiply(half_turned, positions.sin))
    if kept:
        turned = op.concat([turned, *kept], -1)
    return op.reshape(turned, op.constant(np.array([0, width])), True)


def _parameter(name: str, kind: ov.Type, dimensions: int = 1) -> Any:
    parameter = op.parameter([-1] * dimensions, kind, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _output(node: Any) -> ov.Output:
    return node if isinstance(node, ov.Output) else node.output(0)


def _float(value: float) -> Any:
    return op.constant(np.float32(value))
