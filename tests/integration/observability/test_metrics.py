"""GET /metrics of a running cluster: real routers, real engines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deployments.observability.definitions import REPLICA_METRICS, STORE_METRICS
from tests.integration.processes import Served

POLLING_S = 60
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scraped(served: Served, replicas: int = 1) -> Samples:
    """The first scrape with all of them in it, and the artifact store: a scrape does without who answers late."""
    deadline = time.monotonic() + POLLING_S
    while True:
        samples = samples_of(httpx.get(f"{served.http}/metrics", timeout=30))
        models = {dict(labels)["model_name"] for name, labels in samples if name == "nibble_model_ready"}
        told = Counter(dict(labels)["model_name"] for name, labels in samples if name == "nibble_replica_info")
        stored = {each.exposed for each in STORE_METRICS} <= {name for name, _ in samples}
        if models and stored and all(told[model] >= replicas for model in models):
            return samples
        assert time.monotonic() < deadline, f"replicas {dict(told)} of {models}, artifact store: {stored}"
        time.sleep(0.2)


def samples_of(response: httpx.Response) -> Samples:
    assert response.status_code == 200, response.text
    families = text_string_to_metric_families(response.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def total(samples: Samples, name: str, labels: Mapping[str, str]) -> float:
    return sum(value for (found, own), value in samples.items() if found == name and labels.items() <= set(own))


def test_a_request_is_in_the_next_scrape_of_its_router_and_its_replica(served: Served) -> None:
    model = {"model_name": "gptneox"}
    before = scraped(served)
    body = {"model": "gptneox", "prompt": "Q: What is CPU? A:", "max_tokens": 5, "ignore_eos": True}
    usage = httpx.post(f"{served.http}/v1/completions", json=body, timeout=60).json()["usage"]
    assert httpx.post(f"{served.http}/v1/completions", json=body | {"model": "nobody"}, timeout=60).status_code == 404
    after = scraped(served)

    def new(name: str, **labels: str) -> float:
        return total(after, name, labels) - total(before, name, labels)

    assert usage["completion_tokens"] == 5
    assert new("vllm:prompt_tokens_total", **model) == usage["prompt_tokens"]
    assert new("vllm:generation_tokens_total", **model) == 5
    assert new("vllm:request_success_total", **model, finished_reason="length") == 1
    assert new("vllm:time_to_first_token_seconds_count", **model) == 1
    parts = ("nibble_serving_time_to_first_token", "vllm:request_queue_time", "vllm:request_prefill_time")
    assert [new(f"{part}_seconds_count", **model) for part in parts] == [1, 1, 1]
    assert new("nibble_requests_total", api="http", method="/v1/completions", status="200") == 1
    assert new("nibble_refused_total", reason="model_not_found") == 1
    assert new("nibble_replica_requests_total", **model) == 1
    assert new("nibble_replica_generated_tokens_total", **model) == 5
    assert total(after, "nibble_replica_info", {**model, "engine": "bigdl"}) == 1
    assert total(after, "nibble_model_ready", model) == 1


def test_the_artifacts_are_told_that_were_made_and_taken(served: Served) -> None:
    """Four demos were converted, which the check left in the node's cache, and a fifth replica shares one of them."""
    samples = scraped(served)
    assert total(samples, "nibble_conversions_total", {"result": "done"}) == 4
    assert total(samples, "nibble_conversions_total", {"result": "failed"}) == 0
    assert total(samples, "nibble_artifact_fetches_total", {"source": "node_cache"}) >= 5
    found = {name for name, _ in samples}
    assert {each.exposed for each in STORE_METRICS} <= found
    assert total(samples, "nibble_conversion_bytes_total", {}) > 1e6
    assert total(samples, "nibble_conversion_seconds_total", {}) > 0


def test_a_replica_that_is_full_is_scraped_too(served: Served) -> None:
    """Model `narrow` takes one request at a time."""
    body = {"model": "narrow", "prompt": "a", "max_tokens": 400, "n": 8, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.http}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        during = scraped(served)
    assert total(during, "nibble_replica_running_sequences", {"model_name": "narrow"}) == 1
    assert total(during, "vllm:num_requests_running", {"model_name": "narrow"}) == 1


def test_every_engine_s_metrics_are_known(served: Served) -> None:
    """Of bigdl: what of it is in the table comes from `info`, under the name that the table has."""
    found = {name for name, labels in scraped(served) if ("model_name", "llama") in labels}
    told = {"running", "waiting", "requests", "cancelled", "prompt_tokens", "reused_tokens", "scored_tokens",
            "generated_tokens", "mapped_bytes"}  # fmt: skip
    assert {each.exposed for each in REPLICA_METRICS if each.source in told} <= found
