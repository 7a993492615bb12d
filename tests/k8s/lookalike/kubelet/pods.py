"""A pod, as the kubelet runs it."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.k8s.lookalike.documents import Document
from tests.k8s.lookalike.kubelet import volumes
from tests.k8s.lookalike.kubelet.containers import DIE_WITH_PARENT, Container
from tests.k8s.lookalike.kubelet.probes import Probe

if TYPE_CHECKING:
    from tests.k8s.lookalike.cluster import LookAlike

BACK_OFF_S = (0, 10, 20, 40, 80, 160, 300)  # before the first restart of a container, the second, …


class Pod:
    """`phase` is Pending, Running, Failed or Succeeded. `ready`: its readiness probe succeeds, and it is not being
    deleted. Its namespaces live as long as `sandbox`, a process that does nothing."""

    sandbox: asyncio.subprocess.Process

    def __init__(self, node: LookAlike, document: Document) -> None:
        metadata = document["metadata"]
        self.node = node
        self.name: str = metadata["name"]
        self.namespace: str = metadata.get("namespace", "default")
        self.labels: dict[str, str] = dict(metadata.get("labels", {}))
        self.spec: Document = document["spec"]
        self.folder: Path = node.folder / "pods" / self.name
        self.address = ""
        self.phase = "Pending"
        self.deleting = False
        self.restarts = 0
        self.container: Container | None = None
        self._probed_ready = False
        self._task: asyncio.Task[None] | None = None
        self._deletion: asyncio.Task[None] | None = None

    @property
    def serving(self) -> bool:
        """Its readiness probe succeeds, which goes on while it is being deleted."""
        return self.phase == "Running" and self._probed_ready

    @property
    def ready(self) -> bool:
        return self.serving and not self.deleting

    @property
    def main(self) -> Document:
        """The container that is run: the first one."""
        return self.spec["containers"][0]  # type: ignore[no-any-return]

    @property
    def hostname_file(self) -> Path:
        return self.folder / "hostname"

    def entering(self, *namespaces: str) -> list[str]:
        return ["nsenter", "-t", str(self.sandbox.pid), *namespaces]

    def start(self) -> None:
        self._task = asyncio.create_task(self._live())

    async def _live(self) -> None:
        try:
            await self._make_sandbox()
            await self._initialize()
            await self._run()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the test that waits for the pod is told
            self.phase = "Failed"
            self.node.fail(f"pod {self.name}: {type(error).__name__}: {error}")

    async def _make_sandbox(self) -> None:
        self.folder.mkdir(parents=True)
        self.hostname_file.write_text(f"{self.name}\n")
        self.volumes = volumes.prepare(self.spec, self.namespace, self.folder, self.node.folder, self.node.manifests)
        script = f"hostname {self.name}\n"
        group = self.spec.get("securityContext", {}).get("fsGroup", 0)
        for volume in self.volumes.values():
            if volume.size is not None:
                script += f"mount -t tmpfs -o size={volume.size},mode=2777,gid={group} tmpfs {volume.folder} || exit\n"
        self.sandbox = await asyncio.create_subprocess_exec(
            *DIE_WITH_PARENT, "unshare", "--mount", "--propagation", "private", "--net", "--uts", "--ipc",
            "sh", "-c", f"{script}echo made; exec sleep infinity",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self.sandbox.stdout is not None
        if not await self.sandbox.stdout.readline():
            raise RuntimeError("its namespaces or tmpfs mounts could not be made")
        self.address = await self.node.network.join(self.sandbox.pid)
        self.node.network.name(self.name, self.address)
        await self.node.network_changed()

    def refresh_volumes(self) -> None:
        """ConfigMaps and Secrets, as they are now."""
        group = self.spec.get("securityContext", {}).get("fsGroup")
        for volume in self.spec.get("volumes", []) if self.address else []:
            if self.volumes[volume["name"]].read_only:
                made = self.volumes[volume["name"]].folder
                volumes.write(volume, self.namespace, made, self.node.manifests, group)

    async def _initialize(self) -> None:
        for document in self.spec.get("initContainers", []):
            for attempt in range(len(BACK_OFF_S)):
                container = Container(self, document, attempt)
                await container.start()
                try:
                    code = await container.process.wait()
                finally:
                    await container.kill()
                    container.cgroup.remove()
                if code == 0:
                    break
                self.node.event(f"{self.name}: init container {document['name']}: exit code {code}")
                await asyncio.sleep(BACK_OFF_S[attempt])
            else:
                raise RuntimeError(f"init container {document['name']} does not succeed")

    async def _run(self) -> None:
        """Starts the container again and again, as restartPolicy says."""
        while True:
            self.container = Container(self, self.main, self.restarts)
            await self.container.start()
            self.phase = "Running"
            self.node.event(f"{self.name}: container started, {self.address}")
            try:
                code = await self._attend(self.container)
            finally:
                self._probed_ready = False
                await self.container.kill()
                self.container.cgroup.remove()
            self.node.event(f"{self.name}: container ended, exit code {code}")
            policy = self.spec.get("restartPolicy", "Always")
            if policy == "Never" or (policy == "OnFailure" and code == 0):
                self.phase = "Succeeded" if code == 0 else "Failed"
                return
            await asyncio.sleep(BACK_OFF_S[min(self.restarts, len(BACK_OFF_S) - 1)])
            self.restarts += 1

    async def _attend(self, container: Container) -> int:
        """Until it ends, by itself or since its liveness probe failed: its exit code."""
        changed: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        watched = {kind: self.main.get(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")}
        self._probed_ready = watched["readiness"] is None
        probes = {kind: Probe(container, document, kind) for kind, document in watched.items() if document}
        tasks = [asyncio.create_task(probe.watch(changed)) for probe in probes.values()]
        ended = asyncio.create_task(container.process.wait())
        try:
            while True:
                change = asyncio.create_task(changed.get())
                await asyncio.wait({ended, change}, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    change.cancel()
                    return ended.result()
                kind, succeeded = change.result()
                self.node.event(f"{self.name}: {kind} probe {'succeeds' if succeeded else 'fails'} {probes[kind].said}")
                if kind == "readiness":
                    self._probed_ready = succeeded
                elif not succeeded:
                    await container.stop(self.grace)
        finally:
            for task in tasks:
                task.cancel()

    @property
    def grace(self) -> float:
        return float(self.spec.get("terminationGracePeriodSeconds", 30))

    def delete(self, grace: float | None = None) -> asyncio.Task[None]:
        """It leaves its Services at once; the task ends when the pod is gone."""
        if self._deletion is None:
            self.deleting = True
            self.node.event(f"{self.name}: deletion begins")
            self._deletion = asyncio.create_task(self._delete(self.grace if grace is None else grace))
        return self._deletion

    async def _delete(self, grace: float) -> None:
        if self.container is not None and self.phase == "Running" and grace > 0:
            self.spec = {**self.spec, "restartPolicy": "Never"}
            await self.container.stop(grace)
        await self.end()
        self.node.event(f"{self.name}: gone")

    async def end(self) -> None:
        """At once, without preStop, and without a trace."""
        self.deleting = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if hasattr(self, "sandbox") and self.sandbox.returncode is None:
            with suppress(ProcessLookupError):
                self.sandbox.kill()
            await self.sandbox.wait()
        self.node.forget(self)
        self.node.network.name(self.name, None)
        await self.node.network_changed()
        if not self.node.keep:
            shutil.rmtree(self.folder, ignore_errors=True)
