from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from cluster.commands import drain as module
from cluster.commands.drain import RayNode, drain, node_drain_s, ray_address, this_address
from cluster.config import LimitsConfig
from cluster.errors import ConfigError, NibbleError

HEAD, WORKER, OTHER = RayNode("h", "10.0.0.1", True), RayNode("w", "10.0.0.2", False), RayNode("o", "10.0.0.3", False)


class FakeCluster:
    """`steps`: what happens between one look and the next."""

    def __init__(self, *steps: Callable[[FakeCluster], None]) -> None:
        self.nodes = [HEAD, WORKER, OTHER]
        self.drains: dict[str, float] = {}
        self.actors = {"w": 2, "o": 1}
        self.noted: str | None = None
        self.steps: Iterator[Callable[[FakeCluster], None]] = iter(steps)

    def alive(self) -> list[RayNode]:
        return self.nodes

    def draining(self) -> set[str]:
        return set(self.drains)

    def serving(self, node_id: str) -> int:
        return self.actors[node_id]

    def drain(self, node_id: str, deadline_s: float) -> None:
        self.drains[node_id] = deadline_s

    def note_ending(self, head_id: str) -> None:
        self.noted = head_id

    def ending(self) -> str | None:
        return self.noted


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Drains the node at an address. Time passes only where it waits, and the cluster's next step happens then."""

    def drained(cluster: FakeCluster, address: str, limits: LimitsConfig | None = None) -> list[str]:
        now = 0.0

        def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds
            next(cluster.steps, lambda _: None)(cluster)

        monkeypatch.setattr(module.time, "sleep", sleep)
        monkeypatch.setattr(module.time, "monotonic", lambda: now)
        said: list[str] = []
        drain(cluster, address, limits or LimitsConfig(), said.append)
        return said

    return drained


def ends(node_id: str, actors: int) -> Callable[[FakeCluster], None]:
    return lambda cluster: cluster.actors.update({node_id: actors})


def test_a_worker_is_drained_and_waited_for_until_nothing_of_serve_runs_on_it(run: Callable[..., list[str]]) -> None:
    cluster = FakeCluster(ends("w", 2), ends("w", 1), ends("w", 0))
    said = run(cluster, "10.0.0.2")
    assert cluster.drains == {"w": node_drain_s(LimitsConfig())}, "and no other"
    assert said == ["10.0.0.2: 2 of Serve's actors still run", "10.0.0.2: 1 of Serve's actors still run"]


def test_a_node_that_is_gone_is_not_waited_for(run: Callable[..., list[str]]) -> None:
    cluster = FakeCluster(lambda cluster: cluster.nodes.remove(WORKER))
    assert run(cluster, "10.0.0.2") == ["10.0.0.2: 2 of Serve's actors still run"]


def test_a_worker_that_does_not_end_fails_when_the_time_is_up(run: Callable[..., list[str]]) -> None:
    limits = LimitsConfig(drain_s=20)
    with pytest.raises(NibbleError, match=f"still run after {node_drain_s(limits):g} s"):
        run(FakeCluster(), "10.0.0.2", limits)


def test_a_head_is_not_drained_itself_and_waits_for_the_nodes_that_are(run: Callable[..., list[str]]) -> None:
    def begins(cluster: FakeCluster) -> None:
        cluster.drain("w", 30)

    cluster = FakeCluster(begins, lambda cluster: cluster.nodes.remove(WORKER))
    assert run(cluster, "10.0.0.1") == ["10.0.0.2: drained still"]
    assert "h" not in cluster.drains
    assert run(FakeCluster(), "10.0.0.1") == [], "where none drains, it ends"


def test_replicas_of_a_cluster_that_is_deleted_do_not_wait_for_others_to_start(run: Callable[..., list[str]]) -> None:
    limits = LimitsConfig(drain_s=20)

    def deleted(cluster: FakeCluster) -> None:
        cluster.note_ending("h")
        cluster.drain("o", 1)

    cluster = FakeCluster(deleted, ends("w", 0))
    run(cluster, "10.0.0.2", limits)
    assert cluster.drains["w"] == 25, "its requests alone"


@pytest.mark.parametrize(("noted", "drains"), [("h", {}), ("an old head", {"o": 1.0}), (None, {"o": 1.0})])
def test_where_the_cluster_goes_on_replicas_may_start_elsewhere_first(
    run: Callable[..., list[str]], noted: str | None, drains: dict[str, float]
) -> None:
    limits, cluster = LimitsConfig(drain_s=20), FakeCluster(lambda _: None, ends("w", 0))
    cluster.noted, cluster.drains = noted, drains
    run(cluster, "10.0.0.2", limits)
    assert cluster.drains["w"] == node_drain_s(limits)


def test_a_head_notes_that_it_ends(run: Callable[..., list[str]]) -> None:
    cluster = FakeCluster()
    run(cluster, "10.0.0.1")
    assert cluster.noted == "h"


def test_an_address_that_no_node_has_is_refused_with_those_there_are(run: Callable[..., list[str]]) -> None:
    with pytest.raises(NibbleError, match=r"no Ray node at 10\.0\.0\.9; the cluster has 10\.0\.0\.1, 10\.0\.0\.2"):
        run(FakeCluster(), "10.0.0.9")


def test_the_longer_requests_may_take_the_longer_a_node_may() -> None:
    assert node_drain_s(LimitsConfig(timeout_s=1000)) - node_drain_s(LimitsConfig(timeout_s=100)) == 900


def test_the_cluster_s_address_is_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nibble-head-svc:6379")
    assert ray_address(None) == "nibble-head-svc:6379"
    assert ray_address("10.0.0.1:6379") == "10.0.0.1:6379"
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError, match="address: found None, expected HOST:PORT"):
        ray_address(None)


def test_a_head_knows_its_gcs_by_the_loopback_and_itself_by_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FakeCluster().alive()
    assert this_address(nodes, "127.0.0.1:6379") == this_address(nodes, "localhost:6379") == HEAD.address
    monkeypatch.setattr(module, "get_node_ip_address", {"10.0.0.1:6379": "10.0.0.2"}.get)
    assert this_address(nodes, "10.0.0.1:6379") == "10.0.0.2"
