"""Which replica is chosen, without Serve: a router of Ray's own class, fed with replicas that are only names."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle, serve
from ray.serve._private import build_app
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from deployments.records import GenerationRequest
from deployments.routing.prefix import ReplicaCosts, Routed, prefix_of
from deployments.routing.request_router import (
    CHOICE_S,
    CostRouter,
    InFlight,
    RoutedRequest,
    replica_stats,
    running_replicas,
    use_cost_router,
)

DEPLOYMENT = DeploymentID(name="m", app_name="nibble")
OTHER = DeploymentID(name="other", app_name="nibble")
IDS = [ReplicaID(unique_id=name, deployment_id=DEPLOYMENT) for name in "abc"]
REPLICAS: list[Any] = [SimpleNamespace(replica_id=id, max_ongoing_requests=4) for id in IDS]


@pytest.fixture
def router() -> CostRouter:
    made = CostRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    made.initialize_state()
    return made


async def choose(router: CostRouter, replicas: list[Any]) -> ReplicaID:
    ((chosen,),) = await router.choose_replicas(replicas)
    return chosen.replica_id


@pytest.mark.parametrize("_", range(20))
async def test_requests_that_come_at_once_are_split_evenly_before_the_first_is_sent(router: CostRouter, _: int) -> None:
    chosen = await asyncio.gather(*(choose(router, REPLICAS[:2]) for _ in range(4)))
    assert sorted(Counter(chosen).values()) == [2, 2]


@pytest.mark.parametrize("_", range(20))
async def test_an_idle_replica_of_which_serve_forgot_the_queue_is_preferred(router: CostRouter, _: int) -> None:
    router.on_send_request(IDS[0])
    assert router.replica_queue_len_cache.get(IDS[1]) is None
    assert await choose(router, REPLICAS[:2]) == IDS[1]
    assert router.replica_queue_len_cache.get(IDS[1]) == 0, "Serve need not ask the replica"


@pytest.mark.parametrize("_", range(20))
async def test_a_busy_replica_of_which_serve_forgot_the_queue_is_not_taken_for_idle(router: CostRouter, _: int) -> None:
    for _ in range(2):
        router.on_send_request(IDS[0])
    router.on_replica_actor_unavailable(IDS[0])  # it makes Serve forget
    router.on_send_request(IDS[1])
    assert await choose(router, REPLICAS[:2]) == IDS[1]


async def test_calls_of_one_request_each_get_the_replica_that_was_chosen_for_them(router: CostRouter) -> None:
    """Serve gives all of them the id of the HTTP request that they are made for, by which it would tell them apart."""
    router._replicas, router._replicas_list = {each.replica_id: each for each in REPLICAS}, REPLICAS
    calls = [PendingRequest([], {}, RequestMetadata("a request", "its id")) for _ in IDS]
    routed = [router._choose_replica_for_request(call) for call in calls]
    chosen = await asyncio.wait_for(asyncio.gather(*routed), 10)
    assert {replica.replica_id for replica in chosen} == set(IDS)


async def test_what_a_replica_reports_counts(router: CostRouter) -> None:
    router.on_new_queue_len_info(IDS[0], 3)  # requests of another process
    router.on_send_request(IDS[1])
    assert await choose(router, REPLICAS[:2]) == IDS[1]


async def test_a_request_that_ended_counts_no_more(router: CostRouter) -> None:
    for id in IDS[:2]:
        router.on_send_request(id)
        router.on_send_request(id)
    router.on_request_completed(IDS[0], "request")
    router.decrement_queue_len_cache(IDS[0])  # Serve calls both
    assert await choose(router, REPLICAS[:2]) == IDS[0]


def pending(args: list[Any]) -> Any:
    return SimpleNamespace(args=args, kwargs={}, routing_context=SimpleNamespace(should_backoff=False))


class Sender:
    """Sends completions of one prompt, as a router does that knows of none of its replicas at first."""

    def __init__(self, router: CostRouter, only_router: bool = True) -> None:
        self.router, self.only_router, self.costs = router, only_router, ReplicaCosts(10_000)
        self.request = GenerationRequest(request_id="r", prompt="x" * 4000, max_tokens=1)

    async def choose(self, replicas: list[Any]) -> tuple[ReplicaID, Routed]:
        routed = Routed(prefix_of(self.request), None, 1000, 1)
        asked = RoutedRequest(self.request, routed, self.costs, self.only_router)
        ((chosen,),) = await self.router.choose_replicas(replicas, pending([asked]))
        assert routed.replica == chosen.replica_id.unique_id
        return chosen.replica_id, routed

    async def send(self, replicas: list[Any]) -> ReplicaID:
        """It has ended."""
        id, routed = await self.choose(replicas)
        self.router.on_send_request(id)
        self.costs.end(routed)
        self.router.on_request_completed(id, "request")
        self.router.decrement_queue_len_cache(id)
        return id


async def test_completions_with_the_same_beginning_go_to_the_same_replica(router: CostRouter) -> None:
    sender = Sender(router)
    assert len({await sender.send(REPLICAS) for _ in range(5)}) == 1


async def test_a_replica_without_room_gets_no_completion_while_another_has_some(router: CostRouter) -> None:
    sender = Sender(router)
    home = await sender.send(REPLICAS)
    for _ in range(4):  # max_ongoing_requests
        router.on_send_request(home)
    assert (await sender.choose(REPLICAS))[0] != home
    only = [replica for replica in REPLICAS if replica.replica_id == home]
    assert (await sender.choose(only))[0] == home, "Serve asks again while it is full"


async def test_what_other_routers_have_at_a_replica_counts_where_there_are_some(router: CostRouter) -> None:
    several, alone = Sender(router, only_router=False), Sender(router)
    home = await several.send(REPLICAS)
    router.on_new_queue_len_info(home, 2)  # as the replica reports
    assert (await several.choose(REPLICAS))[0] != home
    assert (await alone.choose(REPLICAS))[0] == home


async def test_a_replica_that_died_is_no_more_chosen(router: CostRouter) -> None:
    sender = Sender(router)
    home = await sender.send(REPLICAS)
    assert await sender.send([replica for replica in REPLICAS if replica.replica_id != home]) != home


async def test_while_all_are_full_serve_pauses_before_it_asks_again(router: CostRouter) -> None:
    asked = pending([])
    await router.choose_replicas(REPLICAS, asked)
    assert asked.routing_context.should_backoff


def test_a_replica_gets_the_request_alone() -> None:
    request = GenerationRequest(request_id="r", prompt="x", max_tokens=1)
    asked = RoutedRequest(request, Routed(prefix_of(request), None, 1, 1), ReplicaCosts(100), True)
    assert cloudpickle.loads(cloudpickle.dumps(asked)) == request


async def test_without_a_replica_there_is_no_choice(router: CostRouter) -> None:
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


def test_every_handle_of_the_router_s_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestRouterConfig, "get_request_router_class", RequestRouterConfig.get_request_router_class)
    assert RequestRouterConfig().get_request_router_class() is not CostRouter
    use_cost_router()
    assert RequestRouterConfig().get_request_router_class() is CostRouter


def test_serve_takes_no_request_router_for_the_root_of_an_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's limit, seen in 2.60: when this fails, deployments can name their request router themselves."""
    monkeypatch.setattr(build_app, "RAY_SERVE_ENABLE_HA_PROXY", True)
    name = f"{CostRouter.__module__}:{CostRouter.__name__}"
    routed = serve.deployment(RequestRouterConfig).options(
        request_router_config=RequestRouterConfig(request_router_class=name)
    )
    with pytest.raises(RayServeException, match="is not supported on the ingress deployment"):
        build_app.build_app(routed.bind(), name="app")


async def test_how_many_replicas_take_requests_is_known_at_once(router: CostRouter) -> None:
    assert running_replicas(OTHER) is None
    router.update_replicas(REPLICAS)
    assert running_replicas(DEPLOYMENT) == 3
    router.on_replica_actor_died(IDS[0])
    assert running_replicas(DEPLOYMENT) == 2
    router.update_replicas([])
    assert running_replicas(DEPLOYMENT) == 0


class Actor:
    """A replica's actor that answers with `answer`, fails with it, or never answers."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.record_routing_stats = SimpleNamespace(remote=self._record)

    async def _record(self) -> Any:
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


async def test_replicas_that_do_not_answer_in_time_are_left_out(router: CostRouter) -> None:
    answers = [{"running": 2}, None, RuntimeError("died")]
    replicas = [
        SimpleNamespace(replica_id=id, max_ongoing_requests=4, _actor_handle=Actor(answer))
        for id, answer in zip(IDS, answers, strict=True)
    ]
    router.update_replicas(replicas)
    assert await replica_stats(DEPLOYMENT, 0.1) == {"a": {"running": 2}}
    router.update_replicas([])
    assert await replica_stats(DEPLOYMENT, 0.1) == await replica_stats(OTHER, 0.1) == {}
