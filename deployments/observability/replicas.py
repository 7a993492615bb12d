"""The metrics of replicas, made of what each says of itself (`Engine.info`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client.core import Metric

from deployments.observability.definitions import REPLICA_INFO, REPLICA_METRICS
from deployments.observability.metrics import family

Info = Mapping[str, Any]


def replica_families(replicas: Mapping[str, Mapping[str, Info]]) -> list[Metric]:
    """By model and replica. An engine has not every metric."""
    found = {definition.name: family(definition) for definition in (REPLICA_INFO, *REPLICA_METRICS)}
    for model, infos in replicas.items():
        for replica, info in infos.items():
            told = [str(info.get(label, "")) for label in REPLICA_INFO.labels[2:]]
            found[REPLICA_INFO.name].add_metric((model, replica, *told), 1)
            for definition in REPLICA_METRICS:
                if definition.source in info:
                    found[definition.name].add_metric((model, replica), info[definition.source])
    return list(found.values())
