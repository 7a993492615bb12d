"""`nibble drain`: ends what runs on a Ray node without cutting a request. A pod's preStop hook runs it.

It talks to the GCS alone: a driver would need the node's raylet, which may end before this does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import ray
from ray._private.services import get_node_ip_address
from ray._private.state import GlobalState
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from cluster.commands.serve import is_loopback
from cluster.config import LimitsConfig
from cluster.errors import ConfigError, NibbleError
from deployments.app import DRAIN_MARGIN_S

# Seconds in which what runs on a node may start elsewhere, before Serve ends it here in any case.
REPLACEMENT_S = 180
# Seconds until the workers of a cluster that is deleted as a whole have asked to be drained.
SETTLE_S = 10
POLL_S = 1.0
# Serve names its actors so: SERVE_REPLICA::…, SERVE_PROXY_ACTOR….
SERVE_ACTORS = ("SERVE_REPLICA", "SERVE_PROXY")
# In the GCS' key-value store: the id of a head that ends, as its drain has noted it.
ENDING_HEAD = b"nibble_ending_head"


class RayNode(NamedTuple):
    node_id: str
    address: str
    head: bool


class Cluster(Protocol):
    """What the GCS knows of a cluster, and does for one that drains."""

    def alive(self) -> Sequence[RayNode]: ...

    def draining(self) -> set[str]:
        """Ids of nodes."""
        ...

    def serving(self, node_id: str) -> int:
        """How many replicas and proxies run on a node."""
        ...

    def drain(self, node_id: str, deadline_s: float) -> None:
        """Serve ends the replicas on the node when they run elsewhere, and early enough before the deadline in any
        case. A second call gives another deadline. Raises NibbleError where it is refused."""
        ...

    def note_ending(self, head_id: str) -> None: ...

    def ending(self) -> str | None:
        """The head that ends, if one was noted."""
        ...


def node_drain_s(limits: LimitsConfig) -> float:
    """Seconds that a node may take: its replicas start elsewhere, then the requests in them end."""
    return REPLACEMENT_S + limits.drain + DRAIN_MARGIN_S


def head_drain_s(limits: LimitsConfig) -> float:
    """Seconds that a head may wait for nodes that drain: a pod's grace period must be longer."""
    return SETTLE_S + node_drain_s(limits)


def drain(cluster: Cluster, address: str, limits: LimitsConfig, say: Callable[[str], None]) -> None:
    """Returns when no replica and no proxy runs on the node at `address`, and no node drains where that is the head.
    Raises NibbleError for an address that no node has, and where the time is up."""
    node = node_at(cluster.alive(), address)
    if node.head:
        cluster.note_ending(node.node_id)
        time.sleep(SETTLE_S)
        wait(lambda: still_draining(cluster, node), node_drain_s(limits), say)
        return
    cluster.drain(node.node_id, node_drain_s(limits))
    alone = False

    def waits_for() -> str | None:
        nonlocal alone
        if not alone and cluster_ends(cluster):  # nothing will run elsewhere: only the requests here count
            alone = True
            cluster.drain(node.node_id, limits.drain + DRAIN_MARGIN_S)
        return still_serving(cluster, node)

    wait(waits_for, node_drain_s(limits), say)


def cluster_ends(cluster: Cluster) -> bool:
    """Whether the head ends and every worker drains, as when a cluster is deleted. The note may be an old head's."""
    alive, drains = cluster.alive(), cluster.draining()
    heads = {node.node_id for node in alive if node.head}
    return cluster.ending() in heads and all(node.head or node.node_id in drains for node in alive)


def node_at(nodes: Sequence[RayNode], address: str) -> RayNode:
    for node in nodes:
        if node.address == address:
            return node
    raise NibbleError(
        f"no Ray node at {address}; the cluster has {', '.join(node.address for node in nodes) or 'none'}"
    )


def still_serving(cluster: Cluster, node: RayNode) -> str | None:
    """What the node is waited for; None where it may end."""
    if node.node_id not in {each.node_id for each in cluster.alive()}:
        return None
    count = cluster.serving(node.node_id)
    return f"{node.address}: {count} of Serve's actors still run" if count else None


def still_draining(cluster: Cluster, head: RayNode) -> str | None:
    """Which nodes the head is waited for; None where it may end."""
    drains = cluster.draining()
    others = [each.address for each in cluster.alive() if each.node_id in drains and each.node_id != head.node_id]
    return f"{', '.join(sorted(others))}: drained still" if others else None


def wait(waits_for: Callable[[], str | None], within_s: float, say: Callable[[str], None]) -> None:
    """Raises NibbleError where it still waits for something at the end."""
    deadline, told = time.monotonic() + within_s, None
    while (now := waits_for()) is not None:
        if now != told:
            say(now)
        told = now
        if time.monotonic() > deadline:
            raise NibbleError(f"{now} after {within_s:g} s")
        time.sleep(POLL_S)


class GcsCluster:
    """The cluster whose GCS is at `address` (host:port)."""

    def __init__(self, address: str) -> None:
        self._gcs = ray._raylet.GcsClient(address=address)
        self._state = GlobalState()
        options = ray._raylet.GcsClientOptions.create(
            address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
        )
        self._state._initialize_global_state(options)

    def alive(self) -> list[RayNode]:
        return [
            RayNode(node["NodeID"], node["NodeManagerAddress"], "node:__internal_head__" in node["Resources"])
            for node in self._state.node_table()
            if node["Alive"]
        ]

    def draining(self) -> set[str]:
        return set(self._gcs.get_draining_nodes())

    def serving(self, node_id: str) -> int:
        actors = self._state.actor_table(None, actor_state_name="ALIVE").values()
        return sum(a["Address"]["NodeID"] == node_id and a["Name"].startswith(SERVE_ACTORS) for a in actors)

    def drain(self, node_id: str, deadline_s: float) -> None:
        deadline_ms = int((time.time() + deadline_s) * 1000)
        # Ray never refuses this reason, and counts no restart or retry for it.
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, refusal = self._gcs.drain_node(node_id, reason, "nibble drain", deadline_ms)
        if not accepted:
            raise NibbleError(f"{node_id}: Ray does not drain it: {refusal}")

    def note_ending(self, head_id: str) -> None:
        self._gcs.internal_kv_put(ENDING_HEAD, head_id.encode(), True, None)

    def ending(self) -> str | None:
        noted = self._gcs.internal_kv_get(ENDING_HEAD, None)
        return noted.decode() if noted else None


def ray_address(given: str | None) -> str:
    """As KubeRay has it in every pod's environment, unless one is given. Raises ConfigError where there is none."""
    address = given or os.environ.get("RAY_ADDRESS")
    if not address or ":" not in address:
        raise ConfigError(f"address: found {address!r}, expected HOST:PORT, as --address or in RAY_ADDRESS")
    return address


def this_address(nodes: Sequence[RayNode], gcs_address: str) -> str:
    """Of this machine's node. KubeRay gives a head the loopback's address for its GCS, by which no node is known."""
    if is_loopback(gcs_address.rpartition(":")[0]):
        return next(node.address for node in nodes if node.head)
    address: str = get_node_ip_address(gcs_address)
    return address
