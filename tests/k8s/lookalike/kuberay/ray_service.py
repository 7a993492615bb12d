"""The RayService controller: clusters, Serve's configuration, Services, the switch of an upgrade.

After KubeRay 1.7's ray-operator/controllers/ray/rayservice_controller.go, with upgrade strategies NewCluster and None.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from tests.k8s.lookalike.documents import Document
from tests.k8s.lookalike.kubelet.pods import Pod
from tests.k8s.lookalike.kuberay.ray_cluster import RayCluster, fingerprint, only_appends
from tests.k8s.lookalike.services import Service, target_port

if TYPE_CHECKING:
    from tests.k8s.lookalike.cluster import LookAlike

PERIOD_S = 2  # between two reconciliations
APPLICATIONS = "/api/serve/applications/"
TIMEOUT_S = 10


class RayService:
    """`document` is replaced when it is applied again. `statuses`: of the Serve applications, as seen last."""

    def __init__(self, node: LookAlike, document: Document) -> None:
        self.node = node
        self.document = document
        self.active: RayCluster | None = None
        self.pending: RayCluster | None = None
        self.statuses: dict[str, str] = {}
        self._old: list[RayCluster] = []
        self._service: Service | None = None

    @property
    def name(self) -> str:
        return str(self.document["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.document["metadata"].get("namespace", "default"))

    @property
    def spec(self) -> Document:
        return self.document["spec"]  # type: ignore[no-any-return]

    @property
    def serve_service(self) -> Service:
        assert self._service is not None, "the Service is made once the applications run"
        return self._service

    @property
    def upgrading(self) -> bool:
        return self.pending is not None or bool(self._old)

    @property
    def settled(self) -> bool:
        """Whether the cluster that serves has what was applied, and its applications run."""
        cluster = self.active
        if cluster is None or self.pending is not None:
            return False
        same = fingerprint(cluster.spec) == fingerprint(self.spec["rayClusterConfig"])
        running = bool(self.statuses) and set(self.statuses.values()) == {"RUNNING"}
        return same and running and cluster.submitted == self.spec["serveConfigV2"]

    async def watch(self) -> None:
        async with httpx.AsyncClient(
            timeout=TIMEOUT_S,
            trust_env=False,
            transport=httpx.AsyncHTTPTransport(local_address=self.node.network.operator),
        ) as client:
            while True:
                try:
                    await self._reconcile(client)
                except httpx.HTTPError as error:  # the dashboard is not there yet, or not any more
                    self.node.event(f"{self.name}: {type(error).__name__} {error}", once=True)
                await asyncio.sleep(PERIOD_S)

    async def _reconcile(self, client: httpx.AsyncClient) -> None:
        self._reconcile_clusters()
        for cluster in [*self._old, self.active, self.pending]:
            if cluster is not None:
                await cluster.reconcile()
        await self._clean_up()
        for cluster in (self.active, self.pending):
            if cluster is not None and cluster.head is not None:
                await self._label_head(client, cluster.head)
        chosen = self.pending or self.active
        if chosen is not None and await self._reconcile_serve(client, chosen):
            await self._point_to(chosen)

    def _reconcile_clusters(self) -> None:
        wanted = self.spec["rayClusterConfig"]
        newest = self.pending or self.active
        if newest is not None and only_appends(newest.spec, wanted):
            newest.spec = wanted
        elif newest is None or self.spec.get("upgradeStrategy", {}).get("type", "NewCluster") == "NewCluster":
            if self.pending is not None:
                self._dispose(self.pending)
            self.pending = RayCluster(self.node, self.name, self.namespace, wanted)
            self.node.event(f"{self.name}: new cluster {self.pending.name}")

    def _dispose(self, cluster: RayCluster) -> None:
        delay = self.spec.get("rayClusterDeletionDelaySeconds", 60)
        cluster.delete_at = asyncio.get_running_loop().time() + delay
        self._old.append(cluster)

    async def _clean_up(self) -> None:
        now = asyncio.get_running_loop().time()
        for cluster in tuple(self._old):
            if cluster.delete_at is not None and now >= cluster.delete_at:
                cluster.deleted = True
                if not cluster.pods():
                    await cluster.reconcile()
                    self._old.remove(cluster)

    async def _label_head(self, client: httpx.AsyncClient, head: Pod) -> None:
        """The head takes requests where its proxy is healthy, and the RayService does not exclude it."""
        healthy = False
        if not self.spec.get("excludeHeadPodFromServeSvc") and head.address:
            try:
                answer = await client.get(f"http://{head.address}:{target_port({'port': 'serve'}, head)}/-/healthz")
                healthy = answer.status_code == 200
            except httpx.HTTPError:
                healthy = False
        head.labels["ray.io/serve"] = "true" if healthy else "false"

    async def _reconcile_serve(self, client: httpx.AsyncClient, cluster: RayCluster) -> bool:
        """Whether all applications run."""
        head = cluster.head
        if head is None or not head.ready:
            return False
        dashboard = f"http://{head.address}:8265{APPLICATIONS}"
        answer = await client.get(dashboard)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()["applications"]
        self.statuses = {name: each["status"] for name, each in found.items()}
        for name, each in found.items():
            if each["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
                self.node.event(f"{name}: {each['status']}: {each['message'][-300:]}", once=True)
        wanted = self.spec["serveConfigV2"]
        if cluster.submitted != wanted or not found:
            answer = await client.put(dashboard, json=yaml.safe_load(wanted))
            if answer.is_error:
                self.node.fail(f"serveConfigV2: {answer.status_code} {answer.text[-3000:]}")
            answer.raise_for_status()
            cluster.submitted, self.statuses = wanted, {}
            self.node.event(f"{cluster.name}: serveConfigV2 submitted")
            return False
        return bool(found) and set(self.statuses.values()) == {"RUNNING"}

    async def _point_to(self, cluster: RayCluster) -> None:
        selector = {"ray.io/cluster": cluster.name, "ray.io/serve": "true"}
        if self._service is None:
            self._service = await self.node.create_service(self._service_document(selector))
        elif self._service.spec["selector"] != selector:
            self._service.spec["selector"] = selector
            self.node.event(f"{self._service.name}: selects {cluster.name}")
        if cluster is self.pending:
            if self.active is not None:
                self._dispose(self.active)
            self.active, self.pending = cluster, None

    def _service_document(self, selector: dict[str, str]) -> Document:
        """Ports of the head's container that are named serve or serve-…; serveService may say more of each."""
        head = self.spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        chosen = self.spec.get("serveService", {})
        own = {port["name"]: port for port in chosen.get("spec", {}).get("ports", [])}
        named = [port for port in head["ports"] if port["name"] == "serve" or port["name"].startswith("serve-")]
        ports = [own.get(p["name"], {"name": p["name"], "port": p["containerPort"]}) for p in named]
        name = chosen.get("metadata", {}).get("name", f"{self.name}-serve-svc")
        spec = {**chosen.get("spec", {}), "ports": ports, "selector": selector}
        return {"metadata": {"name": name, "namespace": self.namespace}, "spec": spec}
