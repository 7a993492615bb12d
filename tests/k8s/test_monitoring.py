"""Every query of the dashboard and of the alerts is PromQL, and asks for series that a scrape has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cluster.config import AuthConfig, LoggingConfig
from deployments.api.access import Access
from deployments.api.calls import Calls
from deployments.api.http.http_api import build_http_api
from deployments.api.operations import Operations
from deployments.observability.replicas import replica_families
from deployments.routing.router import Router
from tests.k8s.rules.manifests import K8S, combination, one, read_yaml
from tests.unit.deployments.observability.test_replicas import OPENVINO
from tests.unit.fakes import EchoModel

DASHBOARD = json.loads((K8S / "components/dashboards/nibble.json").read_text())
RULES = read_yaml((K8S / "components/alerts/rules.yaml").read_text())["spec"]["groups"]
# Grafana's variables, as it puts them into a query.
VARIABLES = {"$__rate_interval": "1m", "$model": ".*"}


def dashboard_queries() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            yield expression


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES for rule in group["rules"]]


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """The labels of each metric in a scrape of an app that was asked for something."""
    operations = Operations(Router({"echo": EchoModel()}), Calls(Access(AuthConfig()), LoggingConfig()))
    operations.calls.metrics.router = "r"

    async def replicas() -> list[Any]:
        return replica_families({"echo": {"one": OPENVINO}})

    operations.metrics_elsewhere = replicas
    client = TestClient(build_http_api(lambda: operations))
    for name in ("echo", "nobody"):
        client.post("/v1/completions", json={"model": name, "prompt": "a b"})
    families = text_string_to_metric_families(client.get("/metrics").text)
    found: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(expression: str) -> list[Any]:
    """Fails where it is no PromQL."""
    found: list[Any] = []
    promql_parser.walk(
        promql_parser.parse(expression),
        lambda node: found.append(node) if isinstance(node, promql_parser.VectorSelector) else None,
    )
    return found


@pytest.mark.parametrize("expression", [*dashboard_queries(), *(rule["expr"] for rule in alerts())])
def test_a_query_asks_for_series_of_a_scrape(expression: str, series: dict[str, set[str]]) -> None:
    asked = selectors(expression)
    assert asked
    for selector in asked:
        assert selector.name in series, f"a scrape has no {selector.name}"
        assert {matcher.name for matcher in selector.matchers.matchers} <= series[selector.name]
    grouped = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", expression) for label in labels.split(",")}
    assert all(grouped <= series[selector.name] for selector in asked)


def test_a_query_of_a_metric_that_no_scrape_has_is_seen(series: dict[str, set[str]]) -> None:
    (selector,) = selectors("sum(rate(nibble_refusals_total[5m]))")
    assert selector.name not in series


def test_a_legend_names_labels_of_its_query() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert labels
            assert all(label in target["expr"] or label == "replica" for label in labels), target


def test_the_dashboard_has_each_panel_once_and_in_a_place_of_its_own() -> None:
    panels = DASHBOARD["panels"]
    for key in (
        lambda panel: panel["id"],
        lambda panel: panel["title"],
        lambda p: (p["gridPos"]["x"], p["gridPos"]["y"]),
    ):
        assert len({key(panel) for panel in panels}) == len(panels)


def test_the_sidecar_finds_the_dashboard_by_its_label() -> None:
    config_map = one(combination(["dashboards"]), "ConfigMap", "nibble-dashboard")
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config_map["data"]["nibble.json"]) == DASHBOARD


def test_five_things_wake_someone_and_each_says_what_to_do() -> None:
    assert len(alerts()) == 5
    for rule in alerts():
        assert rule["labels"] == {"severity": "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["for"]
