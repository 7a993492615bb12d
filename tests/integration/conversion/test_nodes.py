"""Conversion on several logical nodes of a test cluster."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.artifact_store import store_handle
from cluster.artifacts.node_cache import NodeCache
from cluster.config import ArtifactsConfig
from cluster.conversion.plan import plan_conversion
from cluster.conversion.shard import convert_shard
from cluster.conversion.wanted import Wanted
from cluster.restoring import on_node
from tests.integration.conversion.converting import wanted
from tests.integration.processes import sandbox
from tests.random_checkpoint import Shape, write_random_checkpoint

# A node that refuses five health checks in a row is lost: after 15 s as Ray has it, after one here.
NOTICED_SOON = {"health_check_period_ms": 200}


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A test cluster of so many logical nodes with one CPU each; all but the head's have an address of their own."""
    count: int = request.param
    with sandbox() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(home.ray_tmpdir))
        # A copy: Ray adds to it where this cluster spills objects, and would let the next one spill there, too.
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": dict(NOTICED_SOON)}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for number in range(2, count + 1):
                cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}")
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, namespace="nibble", log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.long), 4], indirect=True)
def test_shards_of_any_number_of_nodes_make_the_same_artifact(nodes: Cluster, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", Shape("bloom", width=1024, heads=16, layers=4))
    config = ArtifactsConfig(cache_dir=tmp_path / "cache", shard_size=4 << 20)
    published = ray.get(store_handle().ensure.remote(wanted(checkpoint), config))
    assert published.manifest.sha256 == expected_sha256(checkpoint)
    places = ray.experimental.get_object_locations(published.chunks)
    used = {node for place in places.values() for node in place["node_ids"]}
    # The workers of a busy machine's fourth node may come when the others have made everything.
    assert len(used) >= min(3, len(nodes.list_all_nodes()))


@pytest.mark.parametrize("nodes", [4], indirect=True)
def test_a_node_lost_in_the_middle_of_a_conversion_is_made_good(nodes: Cluster, tmp_path: Path) -> None:
    config = ArtifactsConfig(cache_dir=tmp_path / "cache", shard_size=1 << 20)
    store = store_handle()
    store_address, store_node = ray.get(
        store.__ray_call__.remote(
            lambda self: (ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())
        )
    )
    may_be_lost = {node.node_ip_address: node for node in nodes.worker_nodes if node.node_ip_address != store_address}

    @ray.remote(num_cpus=0)
    def ask_and_read(request: Wanted) -> tuple[str, str]:
        """The artifact's digest as it was published, and that of its chunks. In a worker, as a replica asks: in a test
        run's process, which has had several clusters, Ray 2.60 may take the driver for dead when a node is lost, and
        with it what the driver asked for (OwnerDiedError)."""
        published = ray.get(store_handle().ensure.remote(request, config))
        data = b"".join(bytes(ray.get(chunk)) for chunk in published.chunks)
        return published.manifest.sha256, hashlib.sha256(data).hexdigest()

    for seed in range(3):  # a node's worker may come when the others have made everything; the next time it is there
        shape = Shape("bloom", width=1024, heads=16, layers=10, seed=seed)
        checkpoint = write_random_checkpoint(tmp_path / f"model-{seed}", shape)
        asked = on_node(ask_and_read, store_node).remote(wanted(checkpoint))
        lost = first_to_make_a_shard(asked, set(may_be_lost))
        if lost is not None:
            break
    else:
        pytest.fail("three conversions ended before a node that may be lost had made a shard")
    nodes.remove_node(may_be_lost[lost], allow_graceful=False)
    assert ray.get(asked) == (expected_sha256(checkpoint),) * 2
    NodeCache(config.cache_dir).check_integrity()
    deadline = time.monotonic() + 30
    while lost in {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}:
        assert time.monotonic() < deadline, f"{lost} was not lost"
        time.sleep(0.1)


def first_to_make_a_shard(asked: Any, addresses: set[str]) -> str | None:
    """The first of the nodes that has made a shard while there is more to make; None where the conversion, which
    `asked` waits for, ended before."""
    while not ray.wait([asked], timeout=0.01)[0]:
        for progress in ray.get(store_handle().progress.remote()):
            made = addresses & set(progress.nodes)
            if made and progress.bytes_done < progress.bytes:
                return min(made)
    return None


def expected_sha256(checkpoint: Path) -> str:
    """Of the same conversion in this process, without Ray."""
    plan = plan_conversion(checkpoint, "bloom")
    digest = hashlib.sha256()
    for shard in plan.shards:
        digest.update(convert_shard(plan, shard.index).data)
    return digest.hexdigest()
