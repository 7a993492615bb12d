"""Which replica is chosen, without Serve: a router of Ray's own class, fed with replicas that are only names."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from cluster.config import ModelConfig
from deployments.app import model_deployment
from deployments.routing.request_router import CHOICE_S, LEAST_BUSY, InFlight, LeastBusyRouter

DEPLOYMENT = DeploymentID(name="m", app_name="nibble")
IDS = [ReplicaID(unique_id=name, deployment_id=DEPLOYMENT) for name in "abc"]
REPLICAS: list[Any] = [SimpleNamespace(replica_id=id, max_ongoing_requests=4) for id in IDS]


@pytest.fixture
def router() -> LeastBusyRouter:
    made = LeastBusyRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    made.initialize_state()
    return made


async def choose(router: LeastBusyRouter, replicas: list[Any]) -> ReplicaID:
    ((chosen,),) = await router.choose_replicas(replicas)
    return chosen.replica_id


@pytest.mark.parametrize("_", range(20))
async def test_requests_that_come_at_once_are_split_evenly_before_the_first_is_sent(
    router: LeastBusyRouter, _: int
) -> None:
    chosen = await asyncio.gather(*(choose(router, REPLICAS[:2]) for _ in range(4)))
    assert sorted(Counter(chosen).values()) == [2, 2]


@pytest.mark.parametrize("_", range(20))
async def test_an_idle_replica_of_which_serve_forgot_the_queue_is_preferred(router: LeastBusyRouter, _: int) -> None:
    router.on_send_request(IDS[0])
    assert router.replica_queue_len_cache.get(IDS[1]) is None
    assert await choose(router, REPLICAS[:2]) == IDS[1]
    assert router.replica_queue_len_cache.get(IDS[1]) == 0, "Serve need not ask the replica"


@pytest.mark.parametrize("_", range(20))
async def test_a_busy_replica_of_which_serve_forgot_the_queue_is_not_taken_for_idle(
    router: LeastBusyRouter, _: int
) -> None:
    for _ in range(2):
        router.on_send_request(IDS[0])
    router.on_replica_actor_unavailable(IDS[0])  # it makes Serve forget
    router.on_send_request(IDS[1])
    assert await choose(router, REPLICAS[:2]) == IDS[1]


async def test_what_a_replica_reports_counts(router: LeastBusyRouter) -> None:
    router.on_new_queue_len_info(IDS[0], 3)  # requests of another process
    router.on_send_request(IDS[1])
    assert await choose(router, REPLICAS[:2]) == IDS[1]


async def test_a_request_that_ended_counts_no_more(router: LeastBusyRouter) -> None:
    for id in IDS[:2]:
        router.on_send_request(id)
        router.on_send_request(id)
    router.on_request_completed(IDS[0], "request")
    router.decrement_queue_len_cache(IDS[0])  # Serve calls both
    assert await choose(router, REPLICAS[:2]) == IDS[0]


async def test_without_a_replica_there_is_no_choice(router: LeastBusyRouter) -> None:
    assert await router.choose_replicas([]) == []


def test_a_choice_that_came_to_nothing_is_forgotten() -> None:
    now = 0.0
    in_flight = InFlight(lambda: now)
    in_flight.choose(IDS[0])
    in_flight.choose(IDS[1])
    in_flight.send(IDS[1])
    assert (in_flight[IDS[0]], in_flight[IDS[1]]) == (1, 1)
    now = CHOICE_S
    assert (in_flight[IDS[0]], in_flight[IDS[1]]) == (0, 1)


def test_counts_are_never_negative_and_replicas_that_left_are_forgotten() -> None:
    in_flight = InFlight()
    in_flight.complete(IDS[0])
    assert in_flight[IDS[0]] == 0
    for id in IDS:
        in_flight.send(id)
    in_flight.keep({IDS[1]})
    assert [in_flight[id] for id in IDS] == [0, 1, 0]


def test_every_model_has_it() -> None:
    model = ModelConfig(name="m", family="llama", checkpoint="builtin:llama")
    config = model_deployment(model, [], SimpleNamespace())._bound_deployment._deployment_config  # type: ignore[arg-type]
    assert config.request_router_config.request_router_class == LEAST_BUSY
    assert config.request_router_config.get_request_router_class().__name__ == "LeastBusyRouter"
