"""The RayCluster controller: pods and the head's Service, after KubeRay 1.7's reconcilePods."""

from __future__ import annotations

import copy
import uuid
from typing import TYPE_CHECKING, Any

from tests.k8s.lookalike.documents import Document
from tests.k8s.lookalike.kubelet.pods import Pod
from tests.k8s.lookalike.kuberay import ray_pods
from tests.k8s.lookalike.services import Service

if TYPE_CHECKING:
    from tests.k8s.lookalike.cluster import LookAlike

SCALED = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")


class RayCluster:
    """One RayCluster object of a RayService."""

    def __init__(self, node: LookAlike, service_name: str, namespace: str, spec: Document) -> None:
        self.node = node
        self.name = f"{service_name}-{ray_pods.suffix()}"
        self.namespace = namespace
        self.spec = copy.deepcopy(spec)
        self.uid = str(uuid.uuid4())
        self.submitted: str | None = None  # the serveConfigV2 that its head took
        self.delete_at: float | None = None
        self.deleted = False
        self._service: Service | None = None

    def document(self) -> Document:
        return {"name": self.name, "namespace": self.namespace, "spec": self.spec, "uid": self.uid}

    def pods(self, group: str | None = None) -> list[Pod]:
        """Those that still exist, also while they are being deleted."""
        wanted = {"ray.io/cluster": self.name, **({"ray.io/group": group} if group else {})}
        return [pod for pod in self.node.pods if wanted.items() <= pod.labels.items()]

    @property
    def head(self) -> Pod | None:
        return next(iter(self.pods("headgroup")), None)

    def workers(self) -> list[Pod]:
        return [pod for pod in self.pods() if pod.labels["ray.io/node-type"] == "worker"]

    async def reconcile(self) -> None:
        if self.deleted:
            for pod in self.pods():
                pod.delete()
            if not self.pods() and self._service is not None:
                await self.node.remove_service(self._service)
                self._service = None
            return
        await self._reconcile_head_service()
        if self._replaces_ended(self.pods("headgroup")):
            return
        if self.head is None:
            self.node.create_pod(ray_pods.pod_document(self.document(), self.spec["headGroupSpec"], head=True))
        for group in self.spec.get("workerGroupSpecs", []):
            self._reconcile_group(group)

    async def _reconcile_head_service(self) -> None:
        if self._service is None:
            selector = {
                "ray.io/cluster": self.name,
                "ray.io/node-type": "head",
                "ray.io/identifier": f"{self.name}-head",
                "app.kubernetes.io/name": "kuberay",
                "app.kubernetes.io/created-by": "kuberay-operator",
            }
            spec = {"selector": selector, "clusterIP": "None", "publishNotReadyAddresses": True, "ports": []}
            metadata = {"name": f"{self.name}-head-svc", "namespace": self.namespace}
            self._service = await self.node.create_service({"metadata": metadata, "spec": spec})

    def _replaces_ended(self, pods: list[Pod]) -> bool:
        """Whether pods that will not start again are being deleted; new ones are made once they are gone."""
        ended = [pod for pod in pods if pod.phase in ("Failed", "Succeeded")]
        for pod in ended:
            pod.delete(0)
        return bool(ended)

    def _reconcile_group(self, group: Document) -> None:
        pods = self.pods(group["groupName"])
        if self._replaces_ended(pods):
            return
        lowest, highest = group.get("minReplicas", 0), group.get("maxReplicas", 2**31)
        wanted = min(max(group.get("replicas", 0), lowest), highest)
        for _ in range(wanted - len(pods)):
            self.node.create_pod(ray_pods.pod_document(self.document(), group, head=False))
        for pod in pods[: max(0, len(pods) - wanted)]:
            pod.delete()


def fingerprint(spec: Document) -> Any:
    """What of a cluster's specification makes a new cluster when it changes: all but the numbers of replicas."""
    kept = copy.deepcopy(spec)
    for group in kept.get("workerGroupSpecs", []):
        for name in SCALED:
            group.pop(name, None)
    return kept


def only_appends(before: Document, after: Document) -> bool:
    """Whether the clusters are the same but for replicas, and worker groups behind those of before."""
    kept = copy.deepcopy(after)
    groups = before.get("workerGroupSpecs", [])
    if len(kept.get("workerGroupSpecs", [])) < len(groups):
        return False
    kept["workerGroupSpecs"] = kept.get("workerGroupSpecs", [])[: len(groups)]
    return bool(fingerprint(before) == fingerprint(kept))
