"""The product with a matrix in tiles as an operation of OpenVINO's graph, which has none like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from deployments.engines.q4_threads import Q4Threads


class Q4Product(ov.Op):  # type: ignore[misc]  # OpenVINO has no types
    """f32 [tokens, columns] by the transposed matrix in `tiles`: f32 [tokens, width]. OpenVINO copies and reshapes the
    node as it likes; the copies share `tiles` and `threads`."""

    def __init__(
        self, inputs: Sequence[ov.Output], tiles: npt.NDArray[np.uint8], width: int, threads: Q4Threads
    ) -> None:
        super().__init__(self)
        self._tiles, self._width, self._threads = tiles, width, threads
        self.set_arguments(list(inputs))
        self.constructor_validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        tokens = self.get_input_partial_shape(0)[0]
        self.set_output_type(0, ov.Type.f32, ov.PartialShape([tokens, self._width]))

    def clone_with_new_inputs(self, inputs: Sequence[ov.Output]) -> Q4Product:
        return Q4Product(inputs, self._tiles, self._width, self._threads)

    def visit_attributes(self, visitor: Any) -> bool:
        visitor.on_attributes({"width": self._width})
        return True

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: Sequence[ov.Tensor], inputs: Sequence[ov.Tensor]) -> bool:
        activations = inputs[0].data
        if len(activations):
            self._threads.multiply(activations, self._tiles, outputs[0].data)
        return True
