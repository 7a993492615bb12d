"""The manifests on the look-alike, as an operator and clients see them: four demo models, real Ray, real requests."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal

import pytest

from tests.chaos.load import Load
from tests.k8s.events import MODELS, ServedCluster, configure, created, dev_overlay, replicas, scale
from tests.k8s.lookalike.commands import NEEDED, missing
from tests.k8s.lookalike.kubelet.pods import Pod

pytestmark = [
    pytest.mark.skipif(missing(*NEEDED) is not None, reason=f"the look-alike {missing(*NEEDED)}"),
    pytest.mark.timeout(2400),
]


async def nothing() -> None:
    pass


def busiest(cluster: ServedCluster) -> Pod:
    """The worker to which most connections of clients are open."""
    service = cluster.node.operator.serve_service
    return max(cluster.workers, key=service.connections)


@pytest.mark.long
async def test_a_worker_is_deleted_and_no_stream_is_cut() -> None:
    """The short form: created, and a pod deleted that has streams open."""
    async with created(dev_overlay(workers=2)) as cluster:
        await delete_a_worker(cluster)


async def delete_a_worker(cluster: ServedCluster) -> None:
    service = cluster.node.operator.serve_service
    async with Load(cluster.clients("llama", "bloom", tokens=300)).running() as load:
        await cluster.node.until(lambda: service.connections(busiest(cluster)) > 0, "streams are open")
        pod = busiest(cluster)
        deletions: list[asyncio.Task[None]] = []

        async def delete() -> None:
            await cluster.node.until(lambda: service.connections(pod) > 0, "streams are open")
            deletions.append(pod.delete())

        def replaced() -> bool:
            return deletions[0].done() and all_run(cluster, 2)

        counts = await cluster.step(load, "a worker deleted with streams open", delete, replaced)
        assert counts.bad == 0, f"{counts}\n{cluster.node.told()}"


@pytest.mark.cluster
async def test_planned_changes_fail_no_request() -> None:
    manifests = dev_overlay()
    async with created(manifests) as cluster:
        node = cluster.node

        async def apply() -> None:
            await node.apply(manifests)

        before = {model: replicas(node, model) for model in (*MODELS, "router")}
        async with Load(cluster.clients(*MODELS)).running() as load:
            load.forget("bloom")
            configure(manifests, "bloom", context=448)
            counts = await cluster.step(load, "one model's setting changed", apply, lambda: cluster.serves)
            after = {model: replicas(node, model) for model in before}
            assert {model for model in before if after[model] != before[model]} == {"bloom"}
            assert counts.bad == 0, f"{counts}\n{node.told()}"

        async with Load(cluster.clients("llama", "bloom")).running() as load:
            scale(manifests, 2)
            counts = await cluster.step(load, "a worker more", apply, lambda: all_run(cluster, 2))
            assert counts.bad == 0, f"{counts}\n{node.told()}"
            scale(manifests, 1)
            counts = await cluster.step(load, "a worker less", apply, lambda: all_run(cluster, 1))
            assert counts.bad == 0, f"{counts}\n{node.told()}"

            (group,) = manifests.only("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
            group["template"]["spec"]["containers"][0]["env"].append({"name": "GENERATION", "value": "2"})
            first = node.operator.active

            def upgraded() -> bool:
                return cluster.serves and node.operator.active is not first and not node.operator.upgrading

            counts = await cluster.step(load, "upgrade: a new cluster", apply, upgraded)
            assert counts.bad == 0, f"{counts}\n{node.told()}"


def all_run(cluster: ServedCluster, workers: int) -> bool:
    """So many workers, none that is being deleted, and all serve."""
    active = cluster.node.operator.active
    assert active is not None
    there = active.workers()
    return (
        len(there) == workers and all(pod.phase == "Running" and not pod.deleting for pod in there) and cluster.serves
    )


@pytest.mark.cluster
async def test_what_dies_is_replaced() -> None:
    """Requests in what is killed end with an error; no answer is wrong, and all is as before afterwards."""
    async with created(dev_overlay(workers=2)) as cluster:
        async with Load(cluster.clients("llama", "bloom")).running() as load:
            pod = busiest(cluster)

            async def kill() -> None:
                assert pod.container is not None
                for pid, words in pod.container.processes():
                    if "raylet" in words or "ray::" in words:
                        os.kill(pid, signal.SIGKILL)

            def healed() -> bool:
                return pod.restarts == 1 and all_run(cluster, 2)

            counts = await cluster.step(load, "a worker's Ray processes killed", kill, healed)
            assert counts.wrong == counts.lost == 0, f"{counts}\n{cluster.node.told()}"
        async with Load(cluster.clients("llama", "bloom")).running() as load:
            counts = await cluster.step(load, "afterwards", nothing, lambda: True)
            assert counts.bad == 0, f"{counts}\n{cluster.node.told()}"


PASSWORD = {
    "kind": "Secret",
    "metadata": {"name": "nibble-redis", "namespace": "nibble"},
    "stringData": {"password": "for-a-test"},
}


@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server, not found on PATH")
async def test_serving_goes_on_without_a_head_and_it_comes_back() -> None:
    """Its pod is lost at once, as with its machine: with GCS fault tolerance the next head, at another address, goes
    on from what Redis has."""
    manifests = dev_overlay(components=["gcs-fault-tolerance", "redis"])
    manifests.documents.append(PASSWORD)
    async with created(manifests) as cluster:
        active = cluster.node.operator.active
        assert active is not None
        head = active.head
        assert head is not None
        before = {model: replicas(cluster.node, model) for model in MODELS}

        async def lose() -> None:
            await head.end()

        def back() -> bool:
            return active.head is not None and active.head is not head and active.head.ready and cluster.serves

        async with Load(cluster.clients("llama", "bloom")).running() as load:
            counts = await cluster.step(load, "the head lost, GCS fault tolerance", lose, back, more=5)
            assert counts.bad == 0, f"{counts}\n{cluster.node.told()}"
        assert {model: replicas(cluster.node, model) for model in MODELS} == before, "no replica was restarted"


STRANGER = {
    "kind": "Pod",
    "metadata": {"name": "stranger", "namespace": "other", "labels": {}},
    "spec": {"containers": [{"name": "main", "command": ["sleep", "infinity"]}]},
}
RAY_PORTS = (6379, 8265, 10001, 52365, 8080)
CONNECT = """
import socket, sys
for address in sys.argv[1:]:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        print(address)
    except OSError:
        pass
"""


@pytest.mark.cluster
@pytest.mark.skipif(missing("nft") is not None, reason=f"policies: {missing('nft')}")
async def test_policies_let_serving_start_and_keep_strangers_from_rays_ports() -> None:
    manifests = dev_overlay()
    manifests.documents.append(STRANGER)
    async with created(manifests, enforce_policies=True) as cluster:
        pods = {pod.labels.get("ray.io/node-type", pod.name): pod for pod in cluster.node.pods}
        head, worker, stranger = pods["head"], pods["worker"], pods["stranger"]
        listening = [f"{head.address}:{port}" for port in RAY_PORTS if await reached(head, f"{head.address}:{port}")]
        assert {address.split(":")[1] for address in listening} >= {"6379", "8265", "52365"}
        listening += [f"{worker.address}:{port}" for port in (8080, 52365)]
        assert await reached(worker, *listening) == listening, "the cluster's own pods reach them"
        assert await reached(stranger, *listening) == []
        serving = [f"{worker.address}:{port}" for port in (8000, 9000)]
        assert await reached(stranger, *serving) == serving


async def reached(pod: Pod, *addresses: str) -> list[str]:
    """Those to which the pod can connect."""
    assert pod.container is not None
    code, output = await pod.container.execute(["python", "-c", CONNECT, *addresses])
    assert code == 0, output
    return output.split()
