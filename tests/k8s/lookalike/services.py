"""Services: addresses whose connections go to ready pods."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.k8s.lookalike.documents import Document

if TYPE_CHECKING:
    from tests.k8s.lookalike.cluster import LookAlike
    from tests.k8s.lookalike.kubelet.pods import Pod

CHUNK = 65_536


class Service:
    """A new connection goes to one of the pods that are ready then, in turn; one that is established lives on, whatever
    becomes of its pod's readiness. Where no pod is ready, those that are being deleted and still serve take it, as
    kube-proxy has it (KEP-1669); where there are none either it is reset.

    A headless Service (clusterIP: None) is the name of its first pod's address.
    """

    def __init__(self, node: LookAlike, document: Document) -> None:
        self.node = node
        self.document = document
        self.name: str = document["metadata"]["name"]
        self.namespace: str = document["metadata"].get("namespace", "default")
        self.address = ""
        self.spec: Document = document["spec"]
        self._servers: list[asyncio.Server] = []
        self._turn = itertools.count()
        self._connections: set[asyncio.Task[Any]] = set()
        self._open: Counter[str] = Counter()

    @property
    def headless(self) -> bool:
        return self.spec.get("clusterIP") == "None"

    @property
    def names(self) -> list[str]:
        host = f"{self.name}.{self.namespace}"
        return [self.name, host, f"{host}.svc", f"{host}.svc.cluster.local"]

    def pods(self) -> list[Pod]:
        """Its endpoints."""
        selector = self.spec.get("selector", {}).items()
        chosen = [p for p in self.node.pods if p.namespace == self.namespace and selector <= p.labels.items()]
        if self.spec.get("publishNotReadyAddresses"):
            return [pod for pod in chosen if pod.address]
        return [pod for pod in chosen if pod.ready] or [pod for pod in chosen if pod.serving]

    def connections(self, pod: Pod) -> int:
        """Open ones to that pod."""
        return self._open[pod.name]

    async def start(self) -> None:
        if not self.headless:
            self.address = await self.node.network.service_address()
            for port in self.spec["ports"]:
                self._servers.append(await asyncio.start_server(self._handler(port), self.address, port["port"]))
        self.refresh()

    def refresh(self) -> None:
        """Its names, where its pods have changed."""
        pods = self.pods() if self.headless else []
        address = (pods[-1].address if pods else None) if self.headless else self.address
        for name in self.names:
            self.node.network.name(name, address)

    def _handler(self, port: Document) -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._connections.add(task)
            try:
                await self._forward(port, reader, writer)
            except (OSError, asyncio.CancelledError):
                writer.transport.abort()
            finally:
                self._connections.discard(task)

        return handle

    async def _forward(self, port: Document, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pods = self.pods()
        if not pods:
            writer.transport.abort()
            return
        pod = pods[next(self._turn) % len(pods)]
        there_reader, there = await asyncio.open_connection(
            pod.address, target_port(port, pod), local_addr=(self.node.network.gateway, 0)
        )
        self._open[pod.name] += 1
        try:
            await asyncio.gather(copy(reader, there), copy(there_reader, writer))
        finally:
            self._open[pod.name] -= 1
            for each in (there, writer):
                each.close()

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Until the end, which is passed on; a reset is passed on as one."""
    try:
        while data := await source.read(CHUNK):
            target.write(data)
            await target.drain()
        with suppress(OSError):
            target.write_eof()
    except OSError:
        target.transport.abort()


def target_port(port: Document, pod: Pod) -> int:
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target
    return next(each["containerPort"] for each in pod.main["ports"] if each.get("name") == target)
