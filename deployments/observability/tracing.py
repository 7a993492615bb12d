"""OpenTelemetry spans of a request: the router's, the wait for admission, the call of a replica, and of the engine its
queue, prefill and decode.

The router begins a trace where `observability.traces` says so. To a replica it goes in the request's record
(`GenerationRequest.trace`), so that a replica needs no setting. A request without one costs a comparison, and where
there is none opentelemetry is not imported. Attributes are those of OpenTelemetry's conventions for generative AI; the
texts of prompts and completions are in none. OTEL_* variables configure sampling and export, as everywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from cluster.serve_settings import SERVE_LOGGER
from deployments.error_statuses import status_of
from deployments.records import GenerationRequest, SamplingParams, Trace

if TYPE_CHECKING:
    from opentelemetry import trace as otel

logger = logging.getLogger(SERVE_LOGGER)

PROVIDER = "nibble"  # gen_ai.provider.name, and the name of the service unless OTEL_SERVICE_NAME says another
HEADERS = ("traceparent", "tracestate")  # W3C Trace Context: what a `Trace` has

Kind = Literal["SERVER", "CLIENT", "INTERNAL"]
Attributes = Mapping[str, Any]
Operation = Literal["chat", "text_completion", "embeddings"]


@cache
def tracer() -> otel.Tracer | None:
    """Of this process, which exports by OTLP over HTTP. None, with a warning, where a package is missing: a replica's
    node may have been set up otherwise than the router's."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no traces from this process: %s; pip install 'nibble-serve[otlp]'", error)
        return None
    resource = Resource.create({SERVICE_NAME: PROVIDER}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer(PROVIDER, version("nibble-serve"))


class Span:
    """One that has begun. Times are nanoseconds since 1970."""

    def __init__(self, span: otel.Span) -> None:
        self._span = span

    @property
    def trace(self) -> Trace | None:
        """What makes further spans its children, in another process, too; None where it is not sampled."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if not self._span.is_recording():
            return None
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(self._span))
        return carrier

    def set(self, attributes: Attributes) -> None:
        """Those that are None are left out."""
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def end(self, error: BaseException | None = None, end_ns: int | None = None) -> None:
        """An error's message may show a prompt: only its kind is told."""
        from opentelemetry.trace import Status, StatusCode

        if isinstance(error, Exception):
            self._span.set_attribute("error.type", status_of(error).reason.lower())
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(end_ns)


def start_span(
    parent: Trace, name: str, kind: Kind = "INTERNAL", attributes: Attributes | None = None, start_ns: int | None = None
) -> Span | None:
    """`parent`: of the span that it is a child of; empty for the first one of a trace, as is what is no trace. None
    where this process has no tracer."""
    made_by = tracer()
    if made_by is None:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract(parent, Context())
    span = Span(made_by.start_span(name, context, SpanKind[kind], start_time=start_ns))
    span.set(attributes or {})
    return span


@contextmanager
def traced(
    request: GenerationRequest, name: str, kind: Kind = "INTERNAL", attributes: Attributes | None = None
) -> Iterator[GenerationRequest]:
    """A span around what is done for a request; within it the request's further spans are its children. The request as
    it is, where it is not traced."""
    span = None if request.trace is None else start_span(request.trace, name, kind, attributes)
    if span is None:
        yield request
        return
    error: BaseException | None = None
    try:
        yield replace(request, trace=span.trace)
    except BaseException as raised:
        error = raised
        raise
    finally:
        span.end(error)


class FirstToken(Protocol):
    """What is read of an engine's tokens."""

    @property
    def reused(self) -> int: ...
    @property
    def queued_s(self) -> float: ...


T = TypeVar("T", bound=FirstToken)


def traced_tokens(
    batches: AsyncGenerator[list[T], None], trace: Trace | None, prompt_tokens: int
) -> AsyncGenerator[list[T], None]:
    """The same tokens of an engine, which begins now, with a span each for its queue, prefill and decode. No span a
    token: they are made at the end, of four points in time."""
    return batches if trace is None else with_engine_spans(batches, trace, prompt_tokens)


async def with_engine_spans(
    batches: AsyncGenerator[list[T], None], trace: Trace, prompt_tokens: int
) -> AsyncGenerator[list[T], None]:
    came, first_ns, first, count = time.time_ns(), 0, None, 0
    try:
        async with aclosing(batches):
            async for batch in batches:
                if first is None:
                    first, first_ns = batch[0], time.time_ns()
                count += len(batch)
                yield batch
    finally:
        if first is not None:
            begun_ns = came + int(first.queued_s * 1e9)
            prompt = {
                "gen_ai.usage.input_tokens": prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": first.reused,
            }
            whole_span(trace, "queue", came, begun_ns, {})
            whole_span(trace, "prefill", begun_ns, first_ns, prompt)
            whole_span(trace, "decode", first_ns, time.time_ns(), {"gen_ai.usage.output_tokens": count})


def whole_span(trace: Trace, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
    span = start_span(trace, name, attributes=attributes, start_ns=start_ns)
    if span is not None:
        span.end(end_ns=end_ns)


def trace_of(headers: Mapping[str, str]) -> Trace:
    """Of a request's headers or gRPC metadata; empty where it brings no trace."""
    return {name: headers[name] for name in HEADERS if name in headers}


def request_attributes(operation: Operation, model: str, requests: Sequence[GenerationRequest] = ()) -> Attributes:
    """What a request asks for, by the conventions. Its sequences differ in their prompts and seeds alone."""
    common = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
    }
    if not requests:
        return common
    first = requests[0]
    return {
        **common,
        "gen_ai.request.choice.count": len(requests) if len(requests) > 1 else None,
        "gen_ai.request.max_tokens": first.max_tokens,
        "gen_ai.request.seed": first.sampling.seed,
        **sampling_attributes(first.sampling),
    }


def sampling_attributes(sampling: SamplingParams) -> Attributes:
    return {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
    }
