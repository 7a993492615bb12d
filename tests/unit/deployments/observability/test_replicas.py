"""What is made of what replicas say of themselves."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from deployments.observability.definitions import REPLICA_INFO, REPLICA_METRICS
from deployments.observability.exposition import exposition
from deployments.observability.metrics import merged
from deployments.observability.replicas import replica_families
from tests.metrics_page import PAGE, page

BIGDL = {"engine": "bigdl", "isa": "avx512", "threads": 2, "cores": "0,1", "running": 1, "waiting": 3, "pid": 7}
OPENVINO = {"engine": "openvino", "precision": "f32", "products": "onednn", "threads": 2, "kv_cache_usage": 0.25,
            "running": 8, "waiting": 0, "steps": 5, "step_s": 0.5, "generated_tokens": 40}  # fmt: skip


def samples(replicas: dict[str, dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    text = exposition(list(merged(replica_families(replicas))), None)[0].decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name, each.labels["model_name"], each.labels["replica"]): each.value for each in found}


def test_each_replica_has_series_of_its_own() -> None:
    found = samples({"m": {"a": BIGDL, "b": {**BIGDL, "waiting": 5}}, "o": {"c": OPENVINO}, "none": {}})
    assert found["nibble_replica_waiting_sequences", "m", "a"] == 3
    assert found["nibble_replica_waiting_sequences", "m", "b"] == 5
    assert found["vllm:kv_cache_usage_perc", "o", "c"] == 0.25
    assert found["nibble_replica_steps_total", "o", "c"] == 5
    assert found["nibble_replica_step_seconds_total", "o", "c"] == 0.5
    assert {model for _, model, _ in found} == {"m", "o"}


def test_an_engine_leaves_out_what_it_does_not_have() -> None:
    found = samples({"m": {"a": BIGDL}})
    names = {name for name, _, _ in found}
    assert names == {"nibble_replica_info", "nibble_replica_running_sequences", "nibble_replica_waiting_sequences"}


def test_what_a_replica_is_is_in_the_labels_of_its_info() -> None:
    (info,) = (each for each in replica_families({"o": {"c": OPENVINO}}) if each.name == REPLICA_INFO.name)
    (sample,) = info.samples
    assert sample.labels == {
        "model_name": "o", "replica": "c", "engine": "openvino", "isa": "", "precision": "f32", "products": "onednn",
        "threads": "2", "cores": "",
    }  # fmt: skip


def test_each_metric_has_a_source_of_its_own() -> None:
    sources = [definition.source for definition in REPLICA_METRICS]
    assert all(sources)
    assert len(set(sources)) == len(sources)


def test_the_page_is_made_of_the_definitions() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"
