"""Spans of a request, in OpenTelemetry's in-memory exporter: whose children they are, and what they tell."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from cluster.config import AuthConfig, LoggingConfig
from cluster.errors import UnavailableError
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.http.http_api import build_http_api
from deployments.api.operations import Operations
from deployments.engines.base import Token, TokenRequest
from deployments.observability import tracing
from deployments.observability.tracing import traced, traced_tokens
from deployments.records import GenerationRequest, Trace
from deployments.routing.router import Router
from tests.unit.deployments.routing.test_serve_model import Handle, Response, chunk, served
from tests.unit.fakes import EchoModel
from tests.unit.grpc_fakes import Context, api_of, ask

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "theirs=1"}
COMPLETION = {"model": "echo", "prompt": "a b", "max_tokens": 9, "temperature": 0.5, "seed": 3}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "tracer", lambda: provider.get_tracer("test"))
    return exporter


def operations_of(model: EchoModel, traces: bool = True) -> Operations:
    return Operations(Router({"echo": model}), Calls(Access(AuthConfig()), LoggingConfig(), traces=traces))


def client_of(model: EchoModel, traces: bool = True) -> TestClient:
    operations = operations_of(model, traces)
    return TestClient(build_http_api(lambda: operations))


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = exporter.get_finished_spans()
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def ids(span: ReadableSpan) -> tuple[str, str]:
    """Of its trace and its own."""
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def parent_id(span: ReadableSpan) -> str | None:
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def traceparent(span: ReadableSpan) -> str:
    return "00-{}-{}-01".format(*ids(span))


async def test_a_completion_goes_on_with_the_trace_of_its_client(exporter: InMemorySpanExporter) -> None:
    model = EchoModel()
    response = client_of(model).post("/v1/completions", json=COMPLETION, headers={**SAMPLED, "X-Request-Id": "mine"})
    spans = by_name(exporter)
    router = spans["text_completion echo"]
    assert (ids(router)[0], parent_id(router), router.kind) == (TRACE_ID, PARENT_ID, SpanKind.SERVER)
    assert parent_id(spans["admission"]) == ids(router)[1]
    # What its replica gets makes it a part of the same trace.
    assert model.requests[0].trace == {"traceparent": traceparent(router), "tracestate": "theirs=1"}
    attributes = dict(router.attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "nibble",
        "gen_ai.request.model": "echo",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.seed": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.model": "echo",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": response.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": response.json()["usage"]["completion_tokens"],
        "http.response.status_code": 200,
        "nibble.method": "/v1/completions",
        "nibble.request_id": "mine",
    }


async def test_without_a_client_s_trace_one_begins(exporter: InMemorySpanExporter) -> None:
    chat = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "n": 2}
    client_of(EchoModel()).post("/v1/chat/completions", json=chat, headers={"traceparent": "nonsense"})
    *admissions, router = exporter.get_finished_spans()
    assert (router.name, router.parent) == ("chat echo", None)
    assert [(span.name, parent_id(span)) for span in admissions] == [("admission", ids(router)[1])] * 2
    assert router.attributes is not None
    assert router.attributes["gen_ai.request.choice.count"] == 2


async def test_grpc_metadata_has_a_trace_too(exporter: InMemorySpanExporter) -> None:
    api = api_of(EchoModel())
    api.operations = operations_of(EchoModel())
    await api.Generate(ask(prompt="a b"), Context(traceparent=SAMPLED["traceparent"]))
    router = by_name(exporter)["text_completion echo"]
    assert (ids(router)[0], parent_id(router)) == (TRACE_ID, PARENT_ID)
    assert router.attributes is not None
    assert router.attributes["rpc.response.status_code"] == "OK"


def test_embeddings_are_one_span(exporter: InMemorySpanExporter) -> None:
    client_of(EchoModel()).post("/v1/embeddings", json={"model": "echo", "input": "a b"})
    assert by_name(exporter).keys() == {"embeddings echo"}


def test_a_span_tells_the_kind_of_an_error_and_nothing_of_the_prompt(exporter: InMemorySpanExporter) -> None:
    model = EchoModel()
    model.fill()
    assert client_of(model).post("/v1/completions", json=COMPLETION | {"prompt": "secret"}).status_code == 429
    spans = by_name(exporter)
    assert spans.keys() == {"admission", "text_completion echo"}
    for span in spans.values():
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == "queue_full"
        assert "secret" not in span.to_json()


def test_what_no_model_computes_for_is_not_traced(exporter: InMemorySpanExporter) -> None:
    client = client_of(EchoModel())
    client.post("/v1/completions", json=COMPLETION | {"model": "nobody"})
    client.post("/v1/tokenize", json={"model": "echo", "prompt": "a"})
    for path in ("/healthz", "/metrics", "/v1/models"):
        assert client.get(path).is_success
    assert not exporter.get_finished_spans()


def test_a_trace_that_its_client_does_not_sample_has_no_span(exporter: InMemorySpanExporter) -> None:
    model = EchoModel()
    headers = {"traceparent": SAMPLED["traceparent"].removesuffix("01") + "00"}
    assert client_of(model).post("/v1/completions", json=COMPLETION, headers=headers).is_success
    assert not exporter.get_finished_spans()
    assert model.requests[0].trace is None


def test_off_is_off(exporter: InMemorySpanExporter) -> None:
    model = EchoModel()
    assert client_of(model, traces=False).post("/v1/completions", json=COMPLETION, headers=SAMPLED).is_success
    assert not exporter.get_finished_spans()
    assert model.requests[0].trace is None


def test_a_missing_package_costs_the_spans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    tracing.tracer.cache_clear()
    try:
        assert tracing.tracer() is None
        model = EchoModel()
        assert client_of(model).post("/v1/completions", json=COMPLETION, headers=SAMPLED).is_success
        assert model.requests[0].trace is None
    finally:
        tracing.tracer.cache_clear()


class NotingHandle(Handle):
    def __init__(self, *tries: list[Any]) -> None:
        super().__init__(*tries)
        self.requests: list[GenerationRequest] = []

    def remote(self, *arguments: Any) -> Response:
        self.requests += arguments
        return super().remote()


def traced_request(trace: Trace | None = SAMPLED) -> GenerationRequest:
    return GenerationRequest("r", "a", 1, trace=trace)


async def test_the_call_of_a_replica_is_a_span_that_the_replica_s_own_are_children_of(
    exporter: InMemorySpanExporter,
) -> None:
    handle = NotingHandle([chunk(0, last=True)])
    assert [each async for each in served(handle).generate(traced_request())] == [chunk(0, last=True)]
    call = by_name(exporter)["call replica"]
    assert (parent_id(call), call.kind) == (PARENT_ID, SpanKind.CLIENT)
    assert [routed.request.trace for routed in handle.requests] == [
        {"traceparent": traceparent(call), "tracestate": "theirs=1"}
    ]


async def test_a_call_that_fails_says_so(exporter: InMemorySpanExporter) -> None:
    handle = NotingHandle([UnavailableError("no")])
    with pytest.raises(UnavailableError):
        _ = [each async for each in served(handle).generate(traced_request())]
    assert (by_name(exporter)["call replica"].attributes or {})["error.type"] == "no_replica"


async def test_the_code_that_is_traced_keeps_its_errors_and_its_request(exporter: InMemorySpanExporter) -> None:
    with traced(traced_request(None), "not traced") as request:
        assert request == traced_request(None)
    with pytest.raises(ValueError, match="mine"), traced(traced_request(), "a span"):
        raise ValueError("mine")
    assert (by_name(exporter)["a span"].attributes or {})["error.type"] == "internal_error"


class Engine:
    """Gives three tokens, of which the first had waited a nanosecond."""

    closed = False

    async def generate(self, request: TokenRequest) -> AsyncGenerator[list[Token], None]:
        try:
            yield [Token(1, reused=4, queued_s=1e-9)]
            yield [Token(2), Token(3, "length")]
        finally:
            self.closed = True


@pytest.mark.parametrize("taken", [1, 2])
async def test_an_engine_has_three_spans_a_completion_whole_or_not(taken: int, exporter: InMemorySpanExporter) -> None:
    engine = Engine()
    batches = traced_tokens(engine.generate(TokenRequest([1], 3)), SAMPLED, prompt_tokens=5)
    for _ in range(taken):
        await batches.__anext__()
    await batches.aclose()
    assert engine.closed
    spans = by_name(exporter)
    assert list(spans) == ["queue", "prefill", "decode"]
    queue, prefill, decode = spans.values()
    assert {parent_id(span) for span in spans.values()} == {PARENT_ID}
    assert (queue.end_time or 0) - (queue.start_time or 0) == 1
    assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
    assert dict(prefill.attributes or {}) == {
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
    }
    assert dict(decode.attributes or {}) == {"gen_ai.usage.output_tokens": 2 * taken - 1}


async def test_a_completion_that_ends_before_its_first_token_has_no_span_of_the_engine(
    exporter: InMemorySpanExporter,
) -> None:
    async def none() -> AsyncGenerator[list[Token], None]:
        raise UnavailableError("gone")
        yield []

    with pytest.raises(UnavailableError):
        await traced_tokens(none(), SAMPLED, 1).__anext__()
    assert not exporter.get_finished_spans()
