"""Ways to choose a replica. `Cheapest` and `LeastBusy` are the product's request router, with the calls that Serve
makes of it; `PowerOfTwo` is what it is compared with."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from deployments.records import GenerationChunk, GenerationRequest
from deployments.routing.prefix import ReplicaCosts, Routed, prefix_of
from deployments.routing.request_router import CostRouter, InFlight, RoutedRequest

if TYPE_CHECKING:
    from tests.bench.simulation.cell import Cell

DEPLOYMENT = DeploymentID(name="model", app_name="simulation")


class ReplicaRecord:
    """What a request router sees of a replica, under the names of Serve's `RunningReplica`."""

    def __init__(self, number: int, max_ongoing: int) -> None:
        self.number = number
        self.replica_id = ReplicaID(unique_id=f"r{number}", deployment_id=DEPLOYMENT)
        self.max_ongoing_requests = max_ongoing


class Choice(Protocol):
    """Of one router. `routed` begins a request's way, and its result is handed to all that follows."""

    def update(self, replicas: Sequence[ReplicaRecord]) -> None:
        """These take requests now."""

    def routed(self, request: GenerationRequest, prompt_tokens: int, work: int) -> Any: ...

    async def choose(self, routed: Any) -> ReplicaRecord: ...

    def sent(self, routed: Any, replica: ReplicaRecord, ongoing: int) -> None:
        """The replica took it, and told how many it has now."""

    def refused(self, routed: Any, replica: ReplicaRecord, ongoing: int) -> None:
        """The replica was full."""

    def came(self, routed: Any, chunk: GenerationChunk) -> None: ...

    def ended(self, routed: Any, replica: ReplicaRecord) -> None: ...


class SimulatedRouter(CostRouter):
    """Its choices expire by the simulation's clock."""

    def initialize_state(self) -> None:
        super().initialize_state()
        self.in_flight = InFlight(asyncio.get_running_loop().time)


class LeastBusy:
    """The product's request router for what is no completion: the fewest requests in flight."""

    def __init__(self) -> None:
        self._router = SimulatedRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        self._router.initialize_state()
        self._replicas: list[ReplicaRecord] = []

    def update(self, replicas: Sequence[ReplicaRecord]) -> None:
        # Not `update_replicas`, with which Serve asks new replicas for their queues, over Ray.
        self._replicas = list(replicas)
        self._router.in_flight.keep({each.replica_id for each in replicas})

    def routed(self, request: GenerationRequest, prompt_tokens: int, work: int) -> Any:
        return None

    async def choose(self, routed: Any) -> ReplicaRecord:
        ((chosen,),) = await self._router.choose_replicas(self._replicas)
        return chosen

    def sent(self, routed: Any, replica: ReplicaRecord, ongoing: int) -> None:
        self._router.on_send_request(replica.replica_id)
        self._router.on_new_queue_len_info(replica.replica_id, ongoing)

    def refused(self, routed: Any, replica: ReplicaRecord, ongoing: int) -> None:
        self._router.on_new_queue_len_info(replica.replica_id, ongoing)

    def came(self, routed: Any, chunk: GenerationChunk) -> None:
        pass

    def ended(self, routed: Any, replica: ReplicaRecord) -> None:
        self._router.on_request_completed(replica.replica_id, "")
        self._router.decrement_queue_len_cache(replica.replica_id)


class Cheapest(LeastBusy):
    """The product's request router for completions: by cost (`deployments/routing/prefix.py`)."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        # As `costs_of` in serve_model.py, by the simulation's clock.
        clock = asyncio.get_running_loop().time
        self._costs = ReplicaCosts(cell.config.context * cell.config.max_ongoing, clock=clock)
        self._only_router = cell.routers == 1

    def routed(self, request: GenerationRequest, prompt_tokens: int, work: int) -> Any:
        routed = Routed(prefix_of(request), request.session, prompt_tokens, work - prompt_tokens)
        return RoutedRequest(request, routed, self._costs, self._only_router)

    async def choose(self, routed: Any) -> ReplicaRecord:
        pending: Any = SimpleNamespace(args=(routed,), routing_context=SimpleNamespace())
        ((chosen,),) = await self._router.choose_replicas(self._replicas, pending)
        return chosen

    def came(self, routed: Any, chunk: GenerationChunk) -> None:
        self._costs.came(routed.routed, chunk)

    def ended(self, routed: Any, replica: ReplicaRecord) -> None:
        self._costs.end(routed.routed)
        super().ended(routed, replica)


class PowerOfTwo:
    """Serve's default, at its best: it knows the two queues that it compares."""

    def __init__(self) -> None:
        self._replicas: list[ReplicaRecord] = []
        self._ongoing: Counter[int] = Counter()

    def update(self, replicas: Sequence[ReplicaRecord]) -> None:
        self._replicas = list(replicas)

    def routed(self, request: GenerationRequest, prompt_tokens: int, work: int) -> Any:
        return None

    async def choose(self, routed: Any) -> ReplicaRecord:
        two = random.sample(self._replicas, min(2, len(self._replicas)))
        return min(two, key=lambda each: self._ongoing[each.number])

    def sent(self, routed: Any, replica: ReplicaRecord, ongoing: int) -> None:
        self._ongoing[replica.number] = ongoing

    def refused(self, routed: Any, replica: ReplicaRecord, ongoing: int) -> None:
        self._ongoing[replica.number] = ongoing

    def came(self, routed: Any, chunk: GenerationChunk) -> None:
        pass

    def ended(self, routed: Any, replica: ReplicaRecord) -> None:
        self._ongoing[replica.number] -= 1
