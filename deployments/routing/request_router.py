"""Which replica a request goes to: a completion to the one where it costs least (`prefix.py`), anything else to the one
with the fewest requests in flight. Ray Serve runs it inside each process that holds a handle of the deployment, which
is nibble's router.

Serve 2.60's own request router (the power of two choices) splits four requests on two idle replicas 3 to 1 at times. It
forgets how long a replica's queue is after 10 s (RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S), counts from zero at the next
request, and prefers a busy replica whose queue it knows to an idle one whose queue it forgot; and requests that come at
the same time all choose before the first one counts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter
from ray.serve.config import RequestRouterConfig

from deployments.records import GenerationRequest
from deployments.routing.prefix import ReplicaCosts, Routed

# Seconds. A chosen replica gets its request within one turn of the event loop; a choice older than this has come to
# nothing, because its client left, say.
CHOICE_S = 1.0


class InFlight:
    """The requests that this process has sent to each replica and that have not ended, and those about to be sent."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: Counter[ReplicaID] = Counter()
        self._chosen: dict[ReplicaID, list[float]] = {}  # when each choice was made, in order

    def __getitem__(self, replica: ReplicaID) -> int:
        since = self._clock() - CHOICE_S
        chosen = [at for at in self._chosen.get(replica, ()) if at > since]
        self._chosen[replica] = chosen
        return self._sent[replica] + len(chosen)

    def choose(self, replica: ReplicaID) -> None:
        self._chosen.setdefault(replica, []).append(self._clock())

    def send(self, replica: ReplicaID) -> None:
        del self._chosen.get(replica, [])[:1]
        self._sent[replica] += 1

    def complete(self, replica: ReplicaID) -> None:
        """Serve calls it once too often for a request that could not be sent."""
        self._sent[replica] = max(0, self._sent[replica] - 1)

    def keep(self, replicas: set[ReplicaID]) -> None:
        """Forgets all other replicas: Serve never reuses an id."""
        self._sent = Counter({id: count for id, count in self._sent.items() if id in replicas})
        self._chosen = {id: choices for id, choices in self._chosen.items() if id in replicas}


# The replicas of a deployment that take requests, as this process was told last: Serve pushes each change here at once,
# where its status has to be asked for.
_RUNNING: dict[DeploymentID, tuple[RunningReplica, ...]] = {}


def running_replicas(deployment: DeploymentID) -> int | None:
    """Of a deployment that this process has a handle of; None in the moment before Serve has told it."""
    running = _RUNNING.get(deployment)
    return None if running is None else len(running)


async def replica_stats(deployment: DeploymentID, timeout_s: float) -> dict[str, dict[str, Any]]:
    """What the running replicas of a deployment say of themselves (`record_routing_stats`), by their ids; without those
    that do not answer in time. A handle's `broadcast` would wait for a place among a replica's requests."""
    running = _RUNNING.get(deployment, ())
    asked = [asked_for_stats(replica, timeout_s) for replica in running]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    return {
        replica.replica_id.unique_id: answer
        for replica, answer in zip(running, answers, strict=True)
        if isinstance(answer, dict)
    }


async def asked_for_stats(replica: RunningReplica, timeout_s: float) -> dict[str, Any]:
    answer: dict[str, Any] = await asyncio.wait_for(replica._actor_handle.record_routing_stats.remote(), timeout_s)
    return answer


class RoutedRequest:
    """What the handle's `generate` is called with: the request router finds in it what it decides by, the replica gets
    the request alone. `only_router`: no other process sends completions there."""

    def __init__(self, request: GenerationRequest, routed: Routed, costs: ReplicaCosts, only_router: bool) -> None:
        self.request, self.routed, self.costs, self.only_router = request, routed, costs, only_router

    def __reduce__(self) -> tuple[Any, ...]:
        return request_alone, (self.request,)


def request_alone(request: GenerationRequest) -> GenerationRequest:
    return request


def running_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None, "Serve chooses in a task"
    return task


class CostRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """What a replica reports counts too, so that requests of other processes are seen. Serve asks again, after a pause,
    while the chosen replica is full. A request gets the replica that was chosen for it, and no other one."""

    def initialize_state(self) -> None:
        self.in_flight = InFlight()
        # Each of Serve's routing tasks chooses for one request at a time.
        self._chosen_for: WeakKeyDictionary[asyncio.Task[Any], PendingRequest] = WeakKeyDictionary()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            self._chosen_for[running_task()] = pending_request
        with_room = [each for each in candidate_replicas if self._load(each.replica_id) < each.max_ongoing_requests]
        candidates = with_room or candidate_replicas
        asked = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if isinstance(asked, RoutedRequest):
            asked.costs.keep(each.replica_id.unique_id for each in candidate_replicas)
            chosen = self._cheapest(candidates, asked)
        else:
            chosen = self._least_busy(candidates)
        id = chosen.replica_id
        if self.replica_queue_len_cache.get(id) is None:
            # Else Serve would first ask the replica, and again after every 10 s without a request.
            self.on_new_queue_len_info(id, self.in_flight[id])
        self.in_flight.choose(id)
        return [[chosen]]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Gives the replica to the request that it was chosen for. Serve 2.60 looks that up by an id which all calls
        made within one HTTP or gRPC request have in common (n: 2, several prompts): one of them would wait for ever.
        Its FIFOMixin gives the replica to the request that waits longest."""
        request = self._chosen_for.pop(running_task())
        if not request.future.done():
            self._record_queue_wait_time(request)
            request.future.set_result(replica)
            self._remove_pending_request_from_indices(request)

    def _cheapest(self, candidates: list[RunningReplica], asked: RoutedRequest) -> RunningReplica:
        by_id = {each.replica_id.unique_id: each for each in candidates}
        others = {}
        for unique_id, each in by_id.items():
            id = each.replica_id
            load = self.in_flight[id] if asked.only_router else self._load(id)
            others[unique_id] = max(0, load - asked.costs.completions(unique_id))
        return by_id[asked.costs.choose(asked.routed, others)]

    def _least_busy(self, candidates: list[RunningReplica]) -> RunningReplica:
        # In a random order: `min` takes the first one of equals.
        shuffled = random.sample(candidates, len(candidates))
        return min(shuffled, key=lambda replica: self._load(replica.replica_id))

    def _load(self, id: ReplicaID) -> int:
        return max(self.in_flight[id], self.replica_queue_len_cache.get(id) or 0)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self.in_flight.send(replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self.in_flight.complete(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        self.in_flight.keep({replica.replica_id for replica in replicas})
        super().update_replicas(replicas)
        self._note_running()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._note_running()

    def _note_running(self) -> None:
        _RUNNING[self._deployment_id] = tuple(self.curr_replicas.values())


def use_cost_router() -> None:
    """All handles of this process choose replicas as `CostRouter` does, whatever their deployment says.

    Serve 2.60 takes no request router of one's own for the root deployment of an application where HAProxy is on
    (CUSTOM_INGRESS_REQUEST_ROUTER_UNSUPPORTED_ERROR in ray/serve/_private/build_app.py), since HAProxy would pass it
    by. A model's application has no route, so HAProxy never comes there.
    """
    RequestRouterConfig.get_request_router_class = lambda config: CostRouter
