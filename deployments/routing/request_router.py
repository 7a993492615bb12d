"""Which replica a request goes to: the one with the fewest requests in flight. Ray Serve runs it inside each process
that holds a handle of the deployment, which is nibble's router.

Serve 2.60's own request router (the power of two choices) splits four requests on two idle replicas 3 to 1 at times. It
forgets how long a replica's queue is after 10 s (RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S), counts from zero at the next
request, and prefers a busy replica whose queue it knows to an idle one whose queue it forgot; and requests that come at
the same time all choose before the first one counts.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import FIFOMixin, RequestRouter

# Serve names the class of a request router by its import path.
LEAST_BUSY = "deployments.routing.request_router:LeastBusyRouter"

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


class LeastBusyRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray has no types
    """What a replica reports counts too, so that requests of other processes are seen. Serve asks again, after a pause,
    while the chosen replica is full; requests then wait in the order in which they came."""

    def initialize_state(self) -> None:
        self.in_flight = InFlight()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        # In a random order: `min` takes the first one of equals.
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))
        chosen = min(shuffled, key=lambda replica: self._load(replica.replica_id))
        id = chosen.replica_id
        if self.replica_queue_len_cache.get(id) is None:
            # Else Serve would first ask the replica, and again after every 10 s without a request.
            self.on_new_queue_len_info(id, self.in_flight[id])
        self.in_flight.choose(id)
        return [[chosen]]

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
