"""The first span of a traced request: its time in the router, from arrival to end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from deployments.observability.tracing import Attributes, Operation, Span, request_attributes, start_span
from deployments.records import GenerationRequest, Trace


class CallSpan:
    """It begins where a model is going to compute for the request, with the time of its arrival: what is refused before
    (a wrong key, an unknown model) is not traced. `parent`: the trace that the request brought, or an empty one."""

    def __init__(self, parent: Trace) -> None:
        self._parent = parent
        self._came_ns = time.time_ns()
        self._span: Span | None = None

    def begin(self, operation: Operation, model: str, requests: Sequence[GenerationRequest]) -> Trace | None:
        """For the spans within it; None where it is not sampled. `model`: as the client calls it."""
        attributes = request_attributes(operation, model, requests)
        self._span = start_span(self._parent, f"{operation} {model}", "SERVER", attributes, self._came_ns)
        return None if self._span is None else self._span.trace

    def end(self, attributes: Attributes, error: Exception | None) -> None:
        if self._span is not None:
            self._span.set(attributes)
            self._span.end(error)
