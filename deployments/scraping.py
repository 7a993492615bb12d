"""What a scrape of one router asks of the other routers, of the replicas and of the artifact store: a load balancer
takes each scrape to any router, and all of them give the same series."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from prometheus_client.core import Metric
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.model_config import ROUTER_APP, ROUTER_NAME
from cluster.serve_settings import ARTIFACT_STORE, NAMESPACE
from deployments.observability.artifacts import store_families
from deployments.observability.replicas import replica_families
from deployments.routing.serve_model import ServeModel

# Seconds. Who takes longer is left out; Prometheus waits for 10 s, by default.
ANSWER_S = 2.0


class Elsewhere:
    """`own`: the name of the router that is scraped."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._routers: Any = None
        self._store: Any = None

    async def metrics(self, several: bool, models: Mapping[str, ServeModel]) -> list[Metric]:
        """`several`: whether there may be other routers. A model without a replica is not asked."""
        routers, store, *stats = await asyncio.gather(
            self._other_routers() if several else nobody(),
            self._artifact_store(),
            *(model.replica_stats(ANSWER_S) for model in models.values()),
        )
        return [*routers, *store, *replica_families(dict(zip(models, stats, strict=True)))]

    async def _artifact_store(self) -> list[Metric]:
        """It is found by its name, not started."""
        try:
            counters = await asyncio.wait_for(self._counters(), ANSWER_S)
        except (ValueError, RayError, asyncio.TimeoutError):
            self._store = None
            return []
        return store_families(counters)

    async def _counters(self) -> Mapping[str, Any]:
        # In a thread: it asks the head, which may be away.
        self._store = self._store or await asyncio.to_thread(ray.get_actor, ARTIFACT_STORE, NAMESPACE)
        counters: Mapping[str, Any] = await self._store.counters.remote()
        return counters

    async def _other_routers(self) -> list[Metric]:
        self._routers = self._routers or serve.get_deployment_handle(ROUTER_NAME, ROUTER_APP)
        response = self._routers.broadcast("router_metrics")
        try:
            # `results_async` has no answers at all where one is late.
            asked = await asyncio.wait_for(response._fetch_replica_results_async(), ANSWER_S)
        except (RayError, RayServeException, asyncio.TimeoutError):
            return []
        answers = await asyncio.gather(*(in_time(result) for result in asked), return_exceptions=True)
        families = [family for answer in answers if isinstance(answer, list) for family in answer]
        for family in families:
            family.samples = [sample for sample in family.samples if sample.labels["router"] != self._own]
        return families


async def nobody() -> list[Metric]:
    return []


async def in_time(result: Any) -> list[Metric]:
    answer: list[Metric] = await asyncio.wait_for(result.get_async(), ANSWER_S)
    return answer
