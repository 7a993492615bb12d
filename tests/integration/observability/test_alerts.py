"""The five alerts, evaluated by Prometheus' own promtool over made-up series: each fires at its fault, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.integration.observability.prometheus import missing, promtool
from tests.k8s.test_monitoring import RULES, alerts

pytestmark = pytest.mark.skipif(missing("promtool") is not None, reason=str(missing("promtool")))

RULE = {rule["alert"]: rule for rule in alerts()}
Series = dict[str, str]  # by name and labels: values a minute, in promtool's notation

# A server with work: two routers, of which one refuses nothing; 30 minutes.
HEALTHY: Series = {
    'nibble_build_info{router="a"}': "1x30",
    'nibble_model_ready{model_name="llama",router="a"}': "1x30",
    'nibble_requests_total{api="http",status="200",router="a"}': "0+60x30",
    'nibble_refused_total{model_name="llama",reason="queue_full",router="a"}': "0+1x30",
    'nibble_refused_total{model_name="llama",reason="no_replica",router="a"}': "0+1x30",
    'nibble_refused_total{model_name="",reason="model_not_found",router="a"}': "0+30x30",
    'vllm:num_requests_running{model_name="llama",router="a"}': "2x30",
    'vllm:generation_tokens_total{model_name="llama",router="a"}': "0+600x30",
}


class Fault(NamedTuple):
    changed: Series
    summary: str
    labels: dict[str, str]  # beside the rule's own


FAULTS = {
    "NibbleDown": Fault({'nibble_build_info{router="a"}': "_x30"}, "No router of nibble answers a scrape.", {}),
    "NibbleModelNotReady": Fault(
        {'nibble_model_ready{model_name="llama",router="a"}': "0x30"},
        "Model llama is not ready.",
        {"model_name": "llama"},
    ),
    "NibbleRequestsFail": Fault(
        {'nibble_refused_total{model_name="llama",reason="no_replica",router="a"}': "0+15x30"},
        "25% of the requests fail for reasons of the server's.",
        {},
    ),
    "NibbleOverloaded": Fault(
        {'nibble_refused_total{model_name="llama",reason="queue_full",router="a"}': "0+15x30"},
        "25% of the requests are refused because queues are full.",
        {},
    ),
    "NibbleStalled": Fault(
        {'vllm:generation_tokens_total{model_name="llama",router="a"}': "600x30"},
        "Model llama has requests under way and generates nothing.",
        {"model_name": "llama"},
    ),
}


def expected(name: str, fault: Fault) -> list[dict[str, Any]]:
    rule = RULE[name]
    annotations = {"summary": fault.summary, "description": rule["annotations"]["description"]}
    return [{"exp_labels": {**rule["labels"], **fault.labels}, "exp_annotations": annotations}]


def evaluate(folder: Path, series: Series, firing: dict[str, list[dict[str, Any]]]) -> None:
    """Fails unless, after 25 minutes, exactly these alerts fire."""
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": RULES}))
    alert_tests = [{"eval_time": "25m", "alertname": name, "exp_alerts": firing.get(name, [])} for name in RULE]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": alert_tests,
    }
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", str(path))


def test_no_alert_fires_of_a_server_that_works(tmp_path: Path) -> None:
    evaluate(tmp_path, HEALTHY, {})


def test_no_alert_fires_where_nobody_asks(tmp_path: Path) -> None:
    evaluate(tmp_path, {name: "5x30" for name in HEALTHY if "running" not in name}, {})


@pytest.mark.parametrize("name", FAULTS)
def test_an_alert_fires_of_its_fault_alone(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    evaluate(tmp_path, HEALTHY | fault.changed, {name: expected(name, fault)})


def test_every_alert_has_a_fault() -> None:
    assert FAULTS.keys() == RULE.keys()
