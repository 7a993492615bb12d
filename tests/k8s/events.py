"""What happens to a cluster on the look-alike, under load, and what is measured of it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.config import parse_config
from deployments.app import rendered
from tests.chaos.load import Client, Counts, Load
from tests.k8s.cluster_table import ClusterTable, summed
from tests.k8s.lookalike.cluster import LookAlike, lookalike
from tests.k8s.lookalike.documents import Document, Manifests
from tests.k8s.lookalike.kubelet.pods import Pod
from tests.k8s.rules.manifests import K8S, kustomize, overlay
from tests.ray_titles import replica_of

MODELS = ("llama", "gptneox", "bloom", "starcoder")
TOKENS = 150
READY_S = 480  # a bound, not a figure: two shared cores may be slow


def dev_overlay(workers: int = 1, components: Sequence[str] = (), deletion_delay_s: int = 20) -> Manifests:
    """The overlay `dev` with components; the number of workers, and how long an old cluster is kept, are the test's."""
    manifests = Manifests(with_components("dev", components))
    spec = manifests.only("RayService")["spec"]
    spec["rayClusterDeletionDelaySeconds"] = deletion_delay_s
    scale(manifests, workers)
    return manifests


def with_components(name: str, components: Sequence[str]) -> list[Document]:
    if not components:
        return overlay(name)
    resources = {"resources": [f"../{name}"], "components": [f"../../components/{each}" for each in components]}
    # A copy: kustomize reads nothing by an absolute path.
    with tempfile.TemporaryDirectory(prefix="nibble-k8s-") as scratch:
        folder = Path(scratch) / "k8s" / "overlays" / "with-components"
        shutil.copytree(K8S, Path(scratch) / "k8s")
        folder.mkdir()
        kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **resources}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(folder)


def scale(manifests: Manifests, workers: int) -> None:
    (group,) = manifests.only("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    group |= {"replicas": workers, "minReplicas": workers, "maxReplicas": workers}


def configure(manifests: Manifests, model: str, **fields: Any) -> None:
    """Changes a model in nibble.yaml, and renders serveConfigV2 of it, as `make k8s` does."""
    data = manifests.get("ConfigMap", "nibble-config", "nibble")
    assert data is not None
    config = yaml.safe_load(data["data"]["nibble.yaml"])
    config["models"] = [{**each, **fields} if each["name"] == model else each for each in config["models"]]
    data["data"]["nibble.yaml"] = yaml.safe_dump(config)
    text = yaml.safe_dump(rendered(parse_config(config, "nibble.yaml")), sort_keys=False)
    manifests.only("RayService")["spec"]["serveConfigV2"] = text


def replicas(node: LookAlike, model: str) -> set[int]:
    """Processes of a model's replicas, in all pods."""
    containers = [pod.container for pod in node.pods if pod.container is not None]
    found = [process for container in containers for process in container.processes()]
    return {pid for pid, title in found if replica_of(title) == model}


@dataclass
class ServedCluster:
    """A RayService that serves on a look-alike. `manifests`: as applied last."""

    node: LookAlike
    manifests: Manifests
    table: ClusterTable

    @property
    def http(self) -> str:
        return f"http://{self.node.operator.serve_service.address}:8000"

    @property
    def grpc(self) -> str:
        return f"{self.node.operator.serve_service.address}:9000"

    @property
    def workers(self) -> list[Pod]:
        active = self.node.operator.active
        assert active is not None
        return [pod for pod in active.workers() if not pod.deleting]

    @property
    def serves(self) -> bool:
        """What was applied runs, and each worker with a replica is in the Service; one at least."""
        if not self.node.operator.settled or not self.workers:
            return False
        return bool(self.node.operator.serve_service.pods()) and all(
            pod.ready or not proxies(pod) for pod in self.workers
        )

    def clients(self, *models: str, tokens: int = TOKENS) -> list[Client]:
        protocols: tuple[Any, ...] = ("http", "grpc")
        return [
            Client(self.http, self.grpc, model, protocol, tokens, 0.1) for model in models for protocol in protocols
        ]

    async def step(
        self, load: Load, event: str, act: Callable[[], Awaitable[Any]], done: Callable[[], bool], more: int = 3
    ) -> Counts:
        """Does something under load, until `done` and a few requests longer: a row of the table."""
        load.take()
        await load.more(2)
        began = time.monotonic()
        await act()
        await self.node.until(done, event, READY_S)
        seconds = time.monotonic() - began
        await load.more(more)
        counts = summed(each for each, _ in load.take().values())
        self.table.row(event, counts, seconds)
        return counts

    async def ready(self) -> bool:
        """Whether /readyz, through the Service, says that every model has a replica."""
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
                return (await client.get(f"{self.http}/readyz")).status_code == 200
        except httpx.HTTPError:
            return False


def proxies(pod: Pod) -> bool:
    """Whether a HAProxy runs in it."""
    return pod.container is not None and any("haproxy" in words for _, words in pod.container.processes())


@asynccontextmanager
async def created(manifests: Manifests, enforce_policies: bool = False) -> AsyncIterator[ServedCluster]:
    """The first row: from the manifests to the first tokens over HTTP and gRPC of every model."""
    async with lookalike(enforce_policies) as node:
        cluster = ServedCluster(node, manifests, ClusterTable())
        began = time.monotonic()
        await node.apply(manifests)
        await node.until(lambda: cluster.serves, "created", READY_S)
        seconds = time.monotonic() - began
        counts = Counts()
        for http, grpc in zip(*[iter(cluster.clients(*MODELS, tokens=16))] * 2, strict=True):
            first = await http.ask(None)
            counts.add(first)
            counts.add(await grpc.ask(first.text))
        cluster.table.row("created, first tokens of four models", counts, seconds)
        assert counts.bad == 0, f"{counts}\n{node.told()}"
        yield cluster
