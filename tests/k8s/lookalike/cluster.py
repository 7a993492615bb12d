"""The look-alike itself: what tests apply manifests to."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.k8s.lookalike import leftovers, policies, workloads
from tests.k8s.lookalike.documents import Document, Manifests
from tests.k8s.lookalike.kubelet import image
from tests.k8s.lookalike.kubelet.pods import Pod
from tests.k8s.lookalike.kuberay.ray_service import RayService
from tests.k8s.lookalike.network import PREFIX, Network
from tests.k8s.lookalike.services import Service

OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


class LookAlike:
    """One node and its operator. `keep`: folders of pods that are gone stay, for whoever looks for a fault."""

    def __init__(self, folder: Path, enforce_policies: bool = False) -> None:
        self.folder = folder
        self.keep = bool(os.environ.get("NIBBLE_K8S_KEEP"))
        self.network = Network(folder / "hosts")
        self.manifests = Manifests([])
        self.pods: list[Pod] = []
        self.services: list[Service] = []
        self.ray_service: RayService | None = None
        self.image = image.make(folder)
        self._enforce = enforce_policies
        self._policies_changing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self._failure: str | None = None
        self.events: list[str] = []

    # What tests do.

    async def apply(self, manifests: Manifests) -> None:
        """As `kubectl apply` does; what is not in it stays. ConfigMaps and Secrets change in running pods."""
        given = set(map(identity, manifests.documents))
        kept = [document for document in self.manifests.documents if identity(document) not in given]
        self.manifests = Manifests([*kept, *manifests.copy().documents])
        for pod in self.pods:
            pod.refresh_volumes()
        await self._create_workloads()
        await self.network_changed()
        for document in self.manifests.of_kind("RayService"):
            if self.ray_service is None:
                self.ray_service = RayService(self, document)
                self._task = asyncio.create_task(self.ray_service.watch())
            self.ray_service.document = document

    async def _create_workloads(self) -> None:
        """Services and pods, those of Deployments and StatefulSets too, that are not there yet."""
        for document in self.manifests.of_kind("Service"):
            if all(identity({"kind": "Service", **each.document}) != identity(document) for each in self.services):
                await self.create_service(document)
        there = {pod.name for pod in self.pods}
        for document in workloads.pods(self.manifests):
            if document["metadata"]["name"] not in there:
                self.create_pod(document)

    async def until(self, condition: Callable[[], bool], what: str, timeout: float = 240) -> float:
        """Seconds that it took. Raises AssertionError with the events where it does not come true."""
        began = time.monotonic()
        while not condition():
            assert self._failure is None, f"{self._failure}\n{self.told()}"
            assert self._task is None or not self._task.done(), f"the operator ended: {self._task}\n{self.told()}"
            assert time.monotonic() - began < timeout, f"not within {timeout} s: {what}\n{self.told()}"
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    @property
    def operator(self) -> RayService:
        assert self.ray_service is not None, "no RayService was applied"
        return self.ray_service

    def told(self) -> str:
        """Events, and the ends of the pods' logs."""
        logs = []
        for pod in self.pods:
            for log in sorted(pod.folder.glob("*.log")):
                logs.append(f"--- {log.name} of {pod.name}, {pod.phase}\n{log.read_text(errors='replace')[-1500:]}")
        return "\n".join([*self.events, *logs])

    # What the parts ask for.

    def event(self, text: str, once: bool = False) -> None:
        """`once`: not where it is the last one already."""
        if not once or not self.events or not self.events[-1].endswith(text):
            self.events.append(f"{time.monotonic() - self._began:7.1f} s  {text}")

    def fail(self, reason: str) -> None:
        """Whoever waits is told."""
        self.event(reason)
        self._failure = reason

    def create_pod(self, document: Document) -> Pod:
        pod = Pod(self, document)
        self.pods.append(pod)
        pod.start()
        return pod

    def forget(self, pod: Pod) -> None:
        if pod in self.pods:
            self.pods.remove(pod)

    async def create_service(self, document: Document) -> Service:
        service = Service(self, document)
        self.services.append(service)
        await service.start()
        return service

    async def remove_service(self, service: Service) -> None:
        self.services.remove(service)
        await service.close()
        for name in service.names:
            self.network.name(name, None)

    def service_variables(self, namespace: str) -> dict[str, str]:
        """That Kubernetes gives to each container."""
        found = {}
        for service in self.services:
            if service.namespace == namespace and not service.headless:
                name = service.name.upper().replace("-", "_")
                found[f"{name}_SERVICE_HOST"] = service.address
                found[f"{name}_SERVICE_PORT"] = str(service.spec["ports"][0]["port"])
                found[f"{name}_PORT"] = f"tcp://{service.address}:{service.spec['ports'][0]['port']}"
        return found

    async def network_changed(self) -> None:
        """Pods came or went, or other documents were applied."""
        for service in self.services:
            service.refresh()
        if not self._enforce:
            return
        async with self._policies_changing:
            found = self.manifests.of_kind("NetworkPolicy")
            peers = [policies.Peer(pod.address, pod.namespace, pod.labels) for pod in self.pods if pod.address]
            peers.append(policies.Peer(self.network.operator, "kuberay-operator", OPERATOR))
            peers.append(policies.Peer(self.network.gateway, "gateway", {}))
            known = {
                each["metadata"]["name"]: each["metadata"].get("labels", {})
                for each in self.manifests.of_kind("Namespace")
            }
            for pod in [pod for pod in self.pods if pod.address]:
                peer = policies.Peer(pod.address, pod.namespace, pod.labels)
                await policies.apply(pod.sandbox.pid, policies.rules(peer, found, peers, self.network.node, known))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._task
        for service in tuple(self.services):
            await self.remove_service(service)
        for pod in tuple(self.pods):
            if pod._deletion is not None:
                pod._deletion.cancel()
        await asyncio.gather(*(pod.end() for pod in tuple(self.pods)))
        await self.network.close()


def identity(document: Document) -> tuple[str, str, str]:
    metadata = document["metadata"]
    return document["kind"], metadata["name"], metadata.get("namespace", "default")


@asynccontextmanager
async def lookalike(enforce_policies: bool = False) -> AsyncIterator[LookAlike]:
    """At its end everything that it made is gone, and so is what an interrupted run left."""
    await leftovers.sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    folder.chmod(0o755)
    made = LookAlike(folder, enforce_policies)
    try:
        await made.network.start()
        yield made
    finally:
        try:
            await made.close()
        finally:
            if made.keep:
                print(f"kept: {folder}\n" + made.told())
            else:
                await leftovers.remove(os.getpid())
