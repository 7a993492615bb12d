"""What a scrape of the router shows after requests over HTTP and gRPC, read by Prometheus' own parser."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cluster.config import AuthConfig, LoggingConfig
from cluster.errors import EngineError, QueueFullError
from deployments.api.access import Access, hash_of
from deployments.api.calls import Calls
from deployments.observability.definitions import ROUTER_METRICS
from deployments.observability.exposition import exposition
from deployments.observability.metrics import Histogram, RouterMetrics, merged
from deployments.records import EngineTimes
from tests.unit.fakes import EchoModel
from tests.unit.grpc_fakes import Api, Context, api_of, ask, stream
from tests.unit.http_fakes import client_for, client_of

ECHO = {"model": "echo", "prompt": "a b c"}


class Scrape:
    """The samples of an exposition."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        samples = [sample for family in self.families for sample in family.samples]
        self.series = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
        assert len(self.series) == len(samples), "a series is there twice"

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the series with these labels; of none: 0."""
        return sum(value for (found, own), value in self.series.items() if found == name and labels.items() <= set(own))

    def labels(self, name: str, label: str) -> set[str]:
        return {dict(own)[label] for found, own in self.series if found == name}


def scraped(client: TestClient, headers: Mapping[str, str] | None = None) -> Scrape:
    response = client.get("/metrics", headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Scrape(response.text)


def of(api: Api) -> Scrape:
    return Scrape(exposition(list(merged(api.operations.router_metrics())), None)[0].decode())


@pytest.fixture
def model() -> EchoModel:
    return EchoModel(aliases=("parrot",))


@pytest.fixture
def client(model: EchoModel) -> TestClient:
    return client_of(model)


def test_a_completion_is_counted_once_with_its_tokens_and_times(client: TestClient, model: EchoModel) -> None:
    model.cached_tokens = 2
    assert client.post("/v1/completions", json=ECHO).status_code == 200
    found = scraped(client)
    assert found("nibble_requests_total") == 1
    assert found("nibble_requests_total", api="http", method="/v1/completions", status="200") == 1
    assert found("vllm:request_success_total", model_name="echo", finished_reason="stop") == 1
    assert found("vllm:prompt_tokens_total", model_name="echo") == 3
    assert found("vllm:generation_tokens_total", model_name="echo") == 3
    assert found("vllm:prefix_cache_queries_total", model_name="echo") == 3
    assert found("vllm:prefix_cache_hits_total", model_name="echo") == 2
    assert found("vllm:time_to_first_token_seconds_count", model_name="echo") == 1
    assert found("vllm:inter_token_latency_seconds_count", model_name="echo") == 2
    assert found("vllm:e2e_request_latency_seconds_count", model_name="echo") == 1
    assert found("nibble_refused_total") == 0
    assert found("vllm:num_requests_running") == found("vllm:num_requests_waiting") == 0


def test_the_first_token_s_time_is_told_by_part(client: TestClient, model: EchoModel) -> None:
    parts = {
        "vllm:request_queue_time_seconds": 0.5,
        "vllm:request_prefill_time_seconds": 0.25,
        "nibble_serving_time_to_first_token_seconds": 2.25,
    }
    model.engine_times = EngineTimes(0.5, 0.25)
    call = Calls(Access(AuthConfig()), LoggingConfig(), clock=iter((10.0, 13.0)).__next__).begin("http", "POST /", None)
    call.computes("echo", 1)
    call.count(2, 1)
    call.engine_took(EngineTimes(0.5, 0.25))
    histograms = call._calls.metrics.model("echo").histograms()
    assert {name: histograms[name].sum for name in parts} == parts
    client.post("/v1/completions", json={**ECHO, "n": 2})
    found = scraped(client)
    assert [found(f"{name}_count", model_name="echo") for name in parts] == [2, 2, 1], "of each completion; a request"
    assert found("vllm:request_queue_time_seconds_sum") == 1.0


def test_what_a_queue_refuses_is_counted_by_its_reason(client: TestClient, model: EchoModel) -> None:
    model.fill()
    assert client.post("/v1/completions", json=ECHO).status_code == 429
    found = scraped(client)
    assert found("nibble_admission_refusals_total") == 1
    assert found("nibble_admission_refusals_total", model_name="echo", reason="requests") == 1
    assert found("nibble_refused_total", model_name="echo", reason="queue_full") == 1


def test_the_series_of_a_model_that_nobody_asked_are_there(client: TestClient) -> None:
    found = scraped(client)
    assert found.labels("vllm:generation_tokens_total", "model_name") == {"echo", "absent"}
    assert found("nibble_model_ready", model_name="echo") == 1
    assert found("nibble_model_ready", model_name="absent") == 0
    reasons = found.labels("nibble_admission_refusals_total", "reason")
    assert reasons == {"requests", "tokens", "deadline", "displaced"}
    assert found("nibble_model_info", model_name="echo", family="llama", engine="bigdl") == 1
    assert found.labels("nibble_build_info", "version")


def test_an_alias_is_counted_as_its_model(client: TestClient) -> None:
    client.post("/v1/completions", json={**ECHO, "model": "parrot"})
    found = scraped(client)
    assert found("vllm:generation_tokens_total", model_name="echo") == 3
    assert found("vllm:generation_tokens_total", model_name="parrot") == 0


def test_a_stream_s_sequences_are_counted_each(client: TestClient) -> None:
    body = {**ECHO, "prompt": ["a b", "c d e"], "stream": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    found = scraped(client)
    assert found("vllm:request_success_total", finished_reason="stop") == 2
    assert found("vllm:generation_tokens_total") == 5
    assert found("vllm:inter_token_latency_seconds_count") == 3  # 1 of the first sequence, 2 of the second
    assert found("vllm:e2e_request_latency_seconds_count") == 1


@pytest.mark.parametrize(
    ("body", "reason", "model_name", "status"),
    [
        ({**ECHO, "max_tokens": -1}, "invalid_request", "", "400"),
        ({**ECHO, "model": "nobody"}, "model_not_found", "", "404"),
        ({**ECHO, "model": "absent"}, "no_replica", "absent", "503"),
        ({**ECHO, "prompt": "x " * 600}, "request_too_large", "", "413"),
    ],
)
def test_a_refusal_is_counted_by_its_reason(
    body: Mapping[str, object], reason: str, model_name: str, status: str
) -> None:
    client = client_of(EchoModel(), body_bytes=1000)
    assert str(client.post("/v1/completions", json=body).status_code) == status
    found = scraped(client)
    assert found("nibble_refused_total") == 1
    assert found("nibble_refused_total", reason=reason, model_name=model_name) == 1
    assert found("nibble_requests_total", status=status) == 1
    assert found("vllm:request_success_total") == 0


@pytest.mark.parametrize(
    ("error", "reason"), [(QueueFullError("full"), "queue_full"), (EngineError("x"), "internal_error")]
)
def test_what_a_model_raises_is_counted_with_the_model(
    client: TestClient, model: EchoModel, error: Exception, reason: str
) -> None:
    model.error = error
    client.post("/v1/completions", json=ECHO)
    found = scraped(client)
    assert found("nibble_refused_total", model_name="echo", reason=reason) == 1
    assert found("vllm:num_requests_waiting") == 0


def test_a_stream_that_breaks_keeps_the_tokens_that_came(client: TestClient, model: EchoModel) -> None:
    model.error, model.error_at = EngineError("x"), 2
    assert client.post("/v1/completions", json={**ECHO, "stream": True}).status_code == 200
    found = scraped(client)
    assert found("nibble_refused_total", reason="internal_error") == 1
    assert found("vllm:generation_tokens_total") == 2
    assert found("vllm:request_success_total") == 0
    assert found("vllm:e2e_request_latency_seconds_count") == 0


def test_paths_of_clients_make_no_series_of_their_own(client: TestClient) -> None:
    for path in ("/nowhere", "/v1/elsewhere/2", "/v1/models/echo", "/v1/models/nobody"):
        client.get(path)
    client.request("BREW", "/v1/completions")
    found = scraped(client)
    assert found.labels("nibble_requests_total", "method") == {"other", "/v1/models/{model:path}", "/v1/completions"}
    assert found("nibble_requests_total", method="other", status="404") == 2


def test_probes_and_scrapes_are_not_counted(client: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        client.get(path)
    assert scraped(client)("nibble_requests_total") == 0


def test_openmetrics_is_given_to_those_who_accept_it(client: TestClient) -> None:
    client.post("/v1/completions", json=ECHO)
    accepts = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4"
    response = client.get("/metrics", headers={"Accept": accepts})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics_families(response.text)}
    (sample,) = (each for each in families["vllm:generation_tokens"].samples if each.labels["model_name"] == "echo")
    assert (sample.name, sample.value) == ("vllm:generation_tokens_total", 3)


def test_a_scrape_wants_a_key_where_there_are_keys_and_takes_no_place(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump([{"name": "alice", "sha256": hash_of("nbl-key"), "max_concurrent": 1}]))
    client = client_for({"echo": EchoModel()}, auth=AuthConfig(api_keys_file=keys))
    refused = client.get("/metrics")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    key = {"Authorization": "Bearer nbl-key"}
    for _ in range(3):
        scraped(client, key)
    assert client.post("/v1/completions", json=ECHO, headers=key).status_code == 200
    assert client.post("/v1/completions", json=ECHO).status_code == 401
    found = scraped(client, key)
    assert found("nibble_refused_total", reason="invalid_api_key", model_name="") == 1
    assert found("nibble_requests_total", status="401", method="other") == 1


def test_an_embedding_s_tokens_are_counted_and_it_is_no_completion(client: TestClient) -> None:
    assert client.post("/v1/embeddings", json={"model": "echo", "input": ["a b", "c"]}).status_code == 200
    found = scraped(client)
    assert found("vllm:prompt_tokens_total") == 3
    assert found("vllm:request_success_total") == found("vllm:e2e_request_latency_seconds_count") == 0
    assert found("vllm:prefix_cache_queries_total") == 0


async def test_grpc_is_counted_by_its_method_and_code() -> None:
    api = api_of(EchoModel())
    await api.Generate(ask(prompt="a b"), Context())
    await stream(api, ask(prompt="a b c"))
    await api.Generate(ask(model="nobody", prompt="a"), Context())
    found = of(api)
    methods = found.labels("nibble_requests_total", "method")
    assert methods == {"/nibble.v1.Inference/Generate", "/nibble.v1.Inference/GenerateStream"}
    assert found("nibble_requests_total", api="grpc", status="OK") == 2
    assert found("nibble_requests_total", api="grpc", status="NOT_FOUND") == 1
    assert found("nibble_refused_total", reason="model_not_found") == 1
    assert found("vllm:generation_tokens_total", model_name="echo") == 5


async def test_a_request_in_flight_shows_and_one_that_is_left_is_aborted() -> None:
    model = EchoModel()
    model.delay_s = 60
    api = api_of(model)
    waiting = asyncio.ensure_future(api.Generate(ask(prompt="a b"), Context()))
    while not model.requests:
        await asyncio.sleep(0)
    assert of(api)("vllm:num_requests_waiting", model_name="echo") == 1
    model.delay_s = 0
    async with aclosing(api.GenerateStream(ask(prompt="a b c d"), Context())) as answers:
        await anext(answers)
        found = of(api)
        assert found("vllm:num_requests_running", model_name="echo") == 1
        assert found("vllm:generation_tokens_total", model_name="echo") >= 1  # before it ends
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    found = of(api)
    assert found("vllm:num_requests_running") == found("vllm:num_requests_waiting") == 0
    assert found("vllm:request_success_total", finished_reason="abort") == 2
    assert found("nibble_requests_total", status="CANCELLED") == 2
    assert found("vllm:e2e_request_latency_seconds_count") == 0


def test_a_histogram_s_buckets_count_what_is_at_most_their_bound() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(value)
    assert histogram.buckets == [("0.1", 2.0), ("1.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == pytest.approx(7.65)


def test_several_routers_keep_their_series_apart() -> None:
    first, second = RouterMetrics("one"), RouterMetrics("two")
    first.answered("http", "/v1/completions", "200")
    second.answered("http", "/v1/completions", "200")
    second.answered("http", "/v1/completions", "200")
    families = list(merged([*first.families([]), *second.families([])]))
    found = Scrape(exposition(families, None)[0].decode())
    assert found("nibble_requests_total", router="one") == 1
    assert found("nibble_requests_total", router="two") == 2


def test_each_sample_has_the_labels_that_its_definition_names(client: TestClient, model: EchoModel) -> None:
    client.post("/v1/completions", json=ECHO)
    client.post("/v1/completions", json={**ECHO, "model": "nobody"})
    families = {family.name: family for family in scraped(client).families}
    assert families.keys() == {definition.name for definition in ROUTER_METRICS}
    for definition in ROUTER_METRICS:
        assert families[definition.name].type == definition.kind
        for sample in families[definition.name].samples:
            # A label without a value is no label.
            assert set(sample.labels) - {"le"} <= set(definition.labels), definition.name
