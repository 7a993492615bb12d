"""The metrics of the cluster's artifacts, made of what their store has counted (`StoreCounters`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client.core import Metric

from deployments.observability.definitions import STORE_METRICS
from deployments.observability.metrics import family


def store_families(counters: Mapping[str, Any]) -> list[Metric]:
    """A metric with a label has a number for each of its values."""
    found = []
    for definition in STORE_METRICS:
        metric, counted = family(definition), counters[definition.source]
        for labels, value in counted.items() if definition.labels else [(None, counted)]:
            metric.add_metric([] if labels is None else [labels], value)
        found.append(metric)
    return found
