"""Traces of a running cluster, as a collector gets them: a stand-in of this test's own, for OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import NamedTuple

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cluster.ray_cluster import free_ports
from deployments.client import NibbleClient
from tests.integration.processes import Served, sandbox, serving

ENGINES = ("bigdl", "openvino") if find_spec("openvino") else ("bigdl",)
CONFIG = "observability: {traces: true}\nmodels:\n" + "\n".join(
    f"- {{name: {engine}, family: llama, checkpoint: 'builtin:llama', engine: {engine}, threads: 1}}"
    for engine in ENGINES
)
POLLING_S = 60


class Exported(NamedTuple):
    """A span, with the service that it came from."""

    service: str
    name: str
    trace_id: str
    id: str
    parent: str
    start: int
    end: int
    attributes: frozenset[str]


class Collector:
    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Exported] = []

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            told = {each.key: each.value.string_value for each in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                made = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
                keys = frozenset(each.key for each in span.attributes)
                times = span.start_time_unix_nano, span.end_time_unix_nano
                self.spans.append(Exported(told["service.name"], span.name, *made, *times, keys))

    def trace(self, trace_id: str, spans: int) -> dict[str, Exported]:
        """By their names, once so many of a trace have come."""
        deadline = time.monotonic() + POLLING_S
        while len(found := [span for span in self.spans if span.trace_id == trace_id]) < spans:
            assert time.monotonic() < deadline, f"found {found}"
            time.sleep(0.1)
        assert len(found) == spans
        return {span.name: span for span in found}


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                collector.take(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Served, Collector]]:
    with (
        collecting() as collector,
        sandbox(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="100") as home,
        serving(home, CONFIG, *free_ports(2)) as served,
    ):
        yield served, collector


# Each span, and the one that it is a child of; the first one is its client's.
PARENTS = {
    "chat MODEL": None,
    "admission": "chat MODEL",
    "call replica": "chat MODEL",
    "replica": "call replica",
    "queue": "replica",
    "prefill": "replica",
    "decode": "replica",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trace_goes_from_the_client_to_the_engine_s_steps(traced: tuple[Served, Collector], engine: str) -> None:
    served, collector = traced
    trace_id, client = f"{ENGINES.index(engine) + 1:032x}", "b7ad6b7169203331"
    body = {
        "model": engine, "messages": [{"role": "user", "content": "What is CPU?"}], "max_tokens": 5, "ignore_eos": True
    }  # fmt: skip
    headers = {"traceparent": f"00-{trace_id}-{client}-01"}
    response = httpx.post(f"{served.http}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert response.is_success, response.text
    spans = collector.trace(trace_id, len(PARENTS))
    parents = {name.replace("MODEL", engine): parent for name, parent in PARENTS.items()}
    assert spans.keys() == parents.keys()
    for name, parent in parents.items():
        assert spans[name].parent == (client if parent is None else spans[parent.replace("MODEL", engine)].id)
    assert {span.service for span in spans.values()} == {"nibble"}
    # The clocks are one machine's: a child is within its parent.
    for name, parent in parents.items():
        if parent is not None:
            outer = spans[parent.replace("MODEL", engine)]
            assert outer.start <= spans[name].start <= spans[name].end
    assert spans["queue"].end == spans["prefill"].start
    assert spans["prefill"].end == spans["decode"].start <= spans["decode"].end <= spans["replica"].end
    assert "gen_ai.usage.output_tokens" in spans[f"chat {engine}"].attributes & spans["decode"].attributes


def test_a_stream_over_grpc_is_traced_from_its_own_beginning(traced: tuple[Served, Collector]) -> None:
    served, collector = traced
    before = {span.trace_id for span in collector.spans}
    with NibbleClient(f"grpc://{served.grpc}") as client:
        assert list(client.stream("bigdl", "Q: What is CPU? A:", max_tokens=3))
    deadline = time.monotonic() + POLLING_S
    while not (new := {span.trace_id for span in collector.spans} - before):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (trace_id,) = new
    assert collector.trace(trace_id, len(PARENTS))["text_completion bigdl"].parent == ""
