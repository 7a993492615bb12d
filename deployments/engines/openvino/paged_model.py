"""A compiled graph with its KV cache: one call is one step of continuous batching."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import openvino as ov

from cluster.errors import EngineError
from cluster.families.architecture import Hyperparameters
from deployments.engines.base import Logits
from deployments.engines.cache_memory import Cache, populate, zeros
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS
from deployments.engines.openvino.derived_weights import DerivedWeights
from deployments.engines.openvino.graph import build_graph
from deployments.engines.products.threads import Q4Threads


@dataclass(frozen=True)
class PagedSettings:
    """Of OpenVINO's CPU plugin. `precision`: f32 or bf16, of activations. `quantized_activations`: whether a matrix
    product takes them as 8-bit integers, in groups as long as a block of weights (DYNAMIC_QUANTIZATION_GROUP_SIZE):
    several times as fast on batches, at some cost of precision. `cache`: u8, f16 or f32, of keys and values; f16 takes
    less time than u8, for 1.7 times the memory (tests/bench/NOTES.md)."""

    precision: str = "f32"
    quantized_activations: bool = True
    cache: str = "f16"

    def properties(self, threads: int) -> dict[str, Any]:
        return {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # The engine's cores are set by the mask that the plugin's threads inherit; it would count from core 0.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64 if self.quantized_activations else 0,
            "KV_CACHE_PRECISION": self.cache,
        }


class Work(NamedTuple):
    """A sequence's part of a step: `tokens` follow the `past` tokens whose keys and values are in the blocks of
    `table`, which has room for both. `rows`: of which of the tokens the logits are wanted."""

    tokens: Sequence[int]
    past: int
    table: Sequence[int]
    rows: Sequence[int]


class PagedModel:
    """One instance in one thread at a time."""

    def __init__(
        self,
        weights: DerivedWeights,
        model: Hyperparameters,
        threads: int,
        settings: PagedSettings,
        layers: int | None = None,
    ) -> None:
        """Raises EngineError where OpenVINO cannot compile the model."""
        self._weights = weights  # the compiled model reads the mapped file
        self.settings = settings
        self.products = "nibble" if weights.in_tiles else "openvino"  # whose they are, with most matrices
        self.vocab_size = model.vocabulary
        self._memory: list[Cache] = []
        try:
            products = Q4Threads(threads) if weights.in_tiles else None
            self._end_products = weakref.finalize(self, products.end) if products else None
            graph = build_graph(weights, model, products, layers)
            compiled = ov.Core().compile_model(graph, "CPU", settings.properties(threads))
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile the model: {error}") from error
        self._caches = {
            port.get_any_name(): port for port in compiled.inputs if port.get_any_name().startswith(("key_", "value_"))
        }

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers, keys and values."""
        total = 0
        for port in self._caches.values():
            shape = port.get_partial_shape()
            total += int(np.prod([shape[i].get_length() for i in range(1, 4)])) * port.get_element_type().size
        return total

    @property
    def mapped_bytes(self) -> int:
        """Of the weights' file, shared by all replicas of the node, what every step reads: all of it, but for the
        embedding, where the products are nibble's own; of OpenVINO's packed weights none."""
        return self._weights.mapped_bytes if self.products == "nibble" else 0

    def unload_packed(self) -> None:
        """Once the first steps were run: OpenVINO's products have their weights packed in memory of their own, and read
        the file no more, but for rows of the embedding."""
        if self.products == "openvino":
            self._weights.unload()

    def allocate(self, blocks: int) -> None:
        """Gives the KV cache so many blocks; what was in it is lost."""
        self._memory = []  # a tensor that shares memory does not keep it
        for name, port in self._caches.items():
            shape = port.get_partial_shape()
            sizes = ov.Shape([blocks, *(shape[i].get_length() for i in range(1, 4))])
            self._memory.append(zeros(int(np.prod(sizes)) * port.get_element_type().size))
            self._request.set_tensor(name, ov.Tensor(self._memory[-1], sizes, port.get_element_type()))

    def close(self) -> None:
        """Frees the compiled graph and the KV cache, whoever still holds the model, as the traceback of a step that
        failed does until Python's collector comes. No step can follow."""
        del self._request, self._caches  # a cache's port holds the graph, too
        if self._end_products:
            self._end_products()
        self._memory.clear()
        del self._weights

    def populate(self) -> Iterator[None]:
        """Gets the cache's memory from the kernel, some milliseconds at a time."""
        return populate(self._memory)

    def step(self, works: Sequence[Work]) -> tuple[Logits, npt.NDArray[np.float32]]:
        """Logits [rows, vocabulary] and hidden states [rows, width] of the rows wanted, in order; views that the next
        step overwrites. Raises EngineError where OpenVINO fails or the logits are not finite."""
        begins = [0, *accumulate(len(work.tokens) for work in works)]
        tables = [work.table[: -(-(work.past + len(work.tokens)) // BLOCK_TOKENS)] for work in works]
        rows = [begin + row for begin, work in zip(begins, works, strict=False) for row in work.rows]
        positions = chain.from_iterable(range(work.past, work.past + len(work.tokens)) for work in works)
        self._set("input_ids", np.int64, list(chain.from_iterable(work.tokens for work in works)))
        self._set("position_ids", np.int64, list(positions))
        self._set("output_rows", np.int64, rows)
        self._set("past_lens", np.int32, [work.past for work in works])
        self._set("subsequence_begins", np.int32, begins)
        self._set("block_indices", np.int32, list(chain.from_iterable(tables)))
        self._set("block_indices_begins", np.int32, [0, *accumulate(map(len, tables))])
        self._set("max_context_len", np.int32, max(work.past + len(work.tokens) for work in works))
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed in a step of {begins[-1]} tokens: {error}") from error
        logits: Logits = self._request.get_tensor("logits").data
        if not np.isfinite(logits).all():
            raise EngineError("the logits are not finite: the artifact or the checkpoint is damaged")
        return logits, self._request.get_tensor("hidden").data

    def _set(self, name: str, kind: type, value: Any) -> None:
        self._request.set_tensor(name, ov.Tensor(np.array(value, kind)))
