"""The product with a matrix in tiles as an operation of OpenVINO's graph, which has none like it.

OpenVINO (2026.4) never frees an operation of Python, since each half of it keeps the other: `py_obj` of openvino.Op. So
it holds nothing that must go: the matrix and the threads end by `Q4Threads.end`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openvino as ov

from deployments.engines.products.threads import Q4Threads


class Q4Product(ov.Op):  # type: ignore[misc]  # OpenVINO has no types
    """f32 [tokens, columns] by a transposed matrix of `threads`, which has `width` rows: f32 [tokens, width]."""

    def __init__(self, inputs: Sequence[ov.Output], matrix: int, width: int, threads: Q4Threads) -> None:
        super().__init__(self)
        self._matrix, self._width, self._threads = matrix, width, threads
        self._sized: dict[int, Q4Product] = {}
        self._typed = False
        self.set_arguments(list(inputs))
        self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        if not self._typed:
            tokens = self.get_input_partial_shape(0)[0]
            self.set_output_type(0, ov.Type.f32, ov.PartialShape([tokens, self._width]))
            self._typed = tokens.is_static

    def clone_with_new_inputs(self, inputs: Sequence[ov.Output]) -> Q4Product:
        """Before each evaluation OpenVINO copies the node, with an input of so many tokens, to ask the copy for its
        output's shape, which costs more than a small product. So such copies are kept: one for each number of tokens,
        of which a step has `step_tokens` at most."""
        tokens = inputs[0].get_partial_shape()[0]
        if not tokens.is_static:
            return Q4Product(inputs, self._matrix, self._width, self._threads)
        count = tokens.get_length()
        if count not in self._sized:
            self._sized[count] = Q4Product(inputs, self._matrix, self._width, self._threads)
        return self._sized[count]

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes({"width": self._width})
        return True

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: Sequence[ov.Tensor], inputs: Sequence[ov.Tensor]) -> bool:
        activations = inputs[0].data
        if len(activations):
            self._threads.multiply(activations, self._matrix, outputs[0].data)
        return True
