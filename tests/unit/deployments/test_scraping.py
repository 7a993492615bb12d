"""What a scrape asks of others, without Serve."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.artifacts.counters import StoreCounters
from deployments import scraping
from deployments.observability.definitions import STORE_METRICS
from deployments.observability.metrics import RouterMetrics
from deployments.scraping import Elsewhere


class Store:
    """The artifact store: `counters` answers with this, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.counters = SimpleNamespace(remote=self._counters)
        self._answer = answer

    async def _counters(self) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> list[Store]:
    """Those that will be found, one after the other, by their name."""
    stores: list[Store] = []

    def get_actor(name: str, namespace: str) -> Store:
        assert (name, namespace) == ("artifact-store", "nibble")
        if not stores:
            raise ValueError("no such actor")
        return stores.pop(0)

    monkeypatch.setattr(scraping.ray, "get_actor", get_actor)
    return stores


async def test_the_artifact_store_s_counters_are_there_while_it_is(stores: list[Store]) -> None:
    counters = asdict(StoreCounters(conversion_bytes=7, fetches={"node_cache": 2, "object_store": 1}))
    died = Store(ActorDiedError())
    stores += [died, Store(counters)]
    elsewhere = Elsewhere("own")
    assert not any(family.samples for family in await elsewhere.metrics(False, {}))
    for _ in range(2):  # it is not looked for again
        families = await elsewhere.metrics(False, {})
        samples = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
        assert {family.name for family in families if family.samples} == {each.name for each in STORE_METRICS}
        assert samples["nibble_artifact_fetches_total", "node_cache"] == 2
        assert samples["nibble_artifact_fetches_total", "object_store"] == 1
        assert samples["nibble_conversions_total", "failed"] == 0
        assert samples[("nibble_conversion_bytes_total",)] == 7


class Result:
    """A router's answer: of one with this name, which is late without `in_time`, or an error."""

    def __init__(self, router: str, in_time: bool = True, error: Exception | None = None) -> None:
        self._router, self._in_time, self._error = router, in_time, error

    async def get_async(self) -> Any:
        if not self._in_time:
            await asyncio.Event().wait()
        if self._error is not None:
            raise self._error
        return RouterMetrics(self._router).families([])


class Handle:
    """Of the router's deployment."""

    def __init__(self, *results: Result, error: Exception | None = None) -> None:
        self._results, self._error = results, error

    def broadcast(self, method: str) -> Any:
        assert method == "router_metrics"
        return SimpleNamespace(_fetch_replica_results_async=self._fetch)

    async def _fetch(self) -> list[Result]:
        if self._error is not None:
            raise self._error
        return list(self._results)


async def routers(monkeypatch: pytest.MonkeyPatch, handle: Handle) -> set[str]:
    monkeypatch.setattr(scraping, "ANSWER_S", 0.1)
    monkeypatch.setattr(scraping.serve, "get_deployment_handle", lambda name, app: handle)
    families = await Elsewhere("own").metrics(True, {})
    return {sample.labels["router"] for family in families for sample in family.samples}


async def test_the_other_routers_that_answer_in_time_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    late, broken = Result("late", in_time=False), Result("broken", error=RuntimeError("died"))
    assert await routers(monkeypatch, Handle(Result("own"), Result("one"), late, broken, Result("two"))) == {
        "one",
        "two",
    }


async def test_where_the_routers_cannot_be_asked_the_scrape_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    error = DeploymentUnavailableError(DeploymentID(name="router", app_name="nibble"))
    assert await routers(monkeypatch, Handle(error=error)) == set()


async def test_models_without_a_replica_are_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stats(timeout_s: float) -> dict[str, Any]:
        return {}

    def fail(name: str, app: str) -> None:
        raise AssertionError("one router asks no others")

    monkeypatch.setattr(scraping.serve, "get_deployment_handle", fail)
    model: Any = SimpleNamespace(replica_stats=stats)
    families = await Elsewhere("own").metrics(False, {"m": model})
    assert [family for family in families if family.samples] == []
