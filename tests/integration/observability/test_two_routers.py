"""Two routers with API keys, in front of engine `openvino`: each tells and limits what both of them serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from deployments.api.access import LOOK_S
from deployments.observability.definitions import REPLICA_METRICS
from tests.integration.guarded_server import serving_with_key
from tests.integration.observability.prometheus import Prometheus, missing, running
from tests.integration.observability.test_metrics import Samples, samples_of, total
from tests.integration.processes import Served
from tests.k8s.rules.manifests import one, overlay
from tests.k8s.test_monitoring import DASHBOARD, RULES, alerts, dashboard_queries, selectors

pytest.importorskip("openvino", reason="the extra openvino is not installed")

CONFIG = """
auth: {api_keys_file: KEYS}
router: {replicas: 2}
models:
- {name: llama, family: llama, checkpoint: 'builtin:llama', engine: openvino}
"""
POLLING_S = 60
BODY = {"model": "llama", "prompt": "Q: What is CPU? A:", "max_tokens": 3, "ignore_eos": True}


class Guarded(NamedTuple):
    served: Served
    keys: Path
    key: str

    def scrape(self) -> Samples:
        return samples_of(httpx.get(f"{self.served.http}/metrics", headers=self.headers, timeout=30))

    def ask(self, **changed: Any) -> httpx.Response:
        return httpx.post(f"{self.served.http}/v1/completions", json=BODY | changed, headers=self.headers, timeout=60)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    with serving_with_key(CONFIG) as (served, keys, key):
        yield Guarded(served, keys, key)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + POLLING_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {POLLING_S} s"
        time.sleep(0.2)


def routers_of(samples: Samples) -> set[str]:
    return {dict(labels)["router"] for name, labels in samples if name == "nibble_build_info"}


def test_every_scrape_has_the_series_of_both_routers(guarded: Guarded) -> None:
    until(lambda: len(routers_of(guarded.scrape())) == 2)  # the second one may not have started
    for _ in range(6):  # each on a connection of its own
        assert guarded.ask().is_success

    def whole() -> bool:
        samples, llama = guarded.scrape(), {"model_name": "llama"}
        answered = total(samples, "vllm:generation_tokens_total", llama)
        generated = total(samples, "nibble_replica_generated_tokens_total", llama)
        return len(routers_of(samples)) == 2 and answered == 18 and generated >= 18

    # A scrape does without who answers late, which six in a row show of a router only if it never asks the other.
    until(lambda: all(whole() for _ in range(6)))


def test_an_openvino_replica_has_every_metric_but_those_of_mapped_weights(guarded: Guarded) -> None:
    bigdl_alone = {"mapped_bytes"}
    wanted = {each.exposed for each in REPLICA_METRICS if each.source not in bigdl_alone}
    until(lambda: wanted <= {name for name, labels in guarded.scrape() if ("model_name", "llama") in labels})


def test_a_scrape_without_a_key_is_refused(guarded: Guarded) -> None:
    assert httpx.get(f"{guarded.served.http}/metrics", timeout=60).status_code == 401


@pytest.fixture
def prometheus(guarded: Guarded, tmp_path: Path) -> Iterator[Prometheus]:
    """One that scrapes by overlay prod's ScrapeConfig, more often, once it has three scrapes of a server that was asked
    for something before. It has the alerts, too."""
    assert guarded.ask().is_success
    assert guarded.ask(model="nobody").status_code == 404
    key = tmp_path / "key"
    key.write_text(guarded.key)
    job = prometheus_job(one(overlay("prod"), "ScrapeConfig")["spec"], guarded.served.http.removeprefix("http://"), key)
    with running(tmp_path, [job], RULES, every="2s") as prometheus:
        until(lambda: any(series["value"][1] >= "3" for series in prometheus.query("count_over_time(up[1m])")))
        yield prometheus


def prometheus_job(spec: dict[str, Any], target: str, key: Path) -> dict[str, Any]:
    """What the Prometheus operator makes of a ScrapeConfig, with another target, and the key of its Secret in a
    file."""
    assert spec.keys() == {
        "jobName", "metricsPath", "scrapeInterval", "scrapeTimeout", "staticConfigs", "authorization"
    }  # fmt: skip
    return {
        "job_name": spec["jobName"],
        "metrics_path": spec["metricsPath"],
        "static_configs": [{"targets": [target]}],
        "authorization": {"credentials_file": str(key)},
    }


@pytest.mark.skipif(missing("prometheus", "promtool") is not None, reason=str(missing("prometheus", "promtool")))
def test_prometheus_has_series_for_every_query_of_the_dashboard(guarded: Guarded, prometheus: Prometheus) -> None:
    until(lambda: [(target["health"], target["lastError"]) for target in prometheus.targets()] == [("up", "")])
    for query in dashboard_queries():
        assert prometheus.query(query), query
    variables = [each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    assert variables == ["label_values(nibble_model_info, model_name)"]
    assert prometheus.label_values("nibble_model_info", "model_name") == ["llama"]

    asked = {selector.name for rule in alerts() for selector in selectors(rule["expr"])}
    assert all(prometheus.query(f"{{__name__={name!r}}}") for name in asked)
    until(lambda: all(rule["health"] == "ok" for rule in prometheus.alerts()))
    until(lambda: {rule["state"] for rule in prometheus.alerts()} == {"inactive"})
    assert {rule["name"] for rule in prometheus.alerts()} == {rule["alert"] for rule in alerts()}


def test_a_key_has_one_budget_at_both_routers(guarded: Guarded) -> None:
    """A request may take it below zero, and a router knows within a second what the other one has spent: two clients
    that ask once a second get the budget, what it fills up by meanwhile, and what two rounds of theirs take."""
    budget, tokens = 300, 30
    run = guarded.served.sandbox.run
    key = run("keys", "add", str(guarded.keys), "bob", "--tokens-per-minute", str(budget)).stdout.strip()
    time.sleep(LOOK_S)  # by then each router looks at the file when it is asked
    bob = guarded._replace(key=key)

    def spend(max_tokens: int) -> int:
        answer = bob.ask(max_tokens=max_tokens)
        if answer.status_code == 200:
            return int(answer.json()["usage"]["total_tokens"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        return 0

    began, spent, refused = time.monotonic(), 0, False
    with ThreadPoolExecutor(2) as clients:
        while not refused:
            taken = list(clients.map(spend, [tokens] * 2))
            spent, refused = spent + sum(taken), 0 in taken
            assert spent < 2 * budget, "each router gives a budget of its own"
            time.sleep(1)
    spent += sum(spend(max_tokens=1) for _ in range(8))  # at either router: what filled up since, and no more
    filled = budget * (time.monotonic() - began) / 60
    a_round = 2 * (tokens + len("Q: What is CPU? A:"))
    assert budget - a_round < spent < budget + filled + 2 * a_round
