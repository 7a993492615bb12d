"""The kubelet's probes: from the node, at their periods, with their thresholds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.k8s.lookalike.documents import Document

if TYPE_CHECKING:
    from tests.k8s.lookalike.kubelet.containers import Container


class Probe:
    """`result`: None until a threshold was reached."""

    def __init__(self, container: Container, document: Document, kind: str) -> None:
        self.container = container
        self.document = document
        self.kind = kind
        self.result: bool | None = None
        self.said = ""

    async def watch(self, changed: asyncio.Queue[tuple[str, bool]]) -> None:
        """Puts (kind, result) into the queue whenever the result changes."""
        await asyncio.sleep(self.document.get("initialDelaySeconds", 0))
        thresholds = {
            True: self.document.get("successThreshold", 1),
            False: self.document.get("failureThreshold", 3),
        }
        last, count = None, 0
        while True:
            succeeded = await self.check()
            count = count + 1 if succeeded == last else 1
            last = succeeded
            if count >= thresholds[succeeded] and succeeded != self.result:
                self.result = succeeded
                changed.put_nowait((self.kind, succeeded))
            await asyncio.sleep(self.document.get("periodSeconds", 10))

    async def check(self) -> bool:
        timeout = self.document.get("timeoutSeconds", 1)
        if "exec" in self.document:
            code, self.said = await self.container.execute(self.document["exec"]["command"], timeout)
            return code == 0
        try:
            return await asyncio.wait_for(self._connect(), timeout)
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            self.said = f"{type(error).__name__} {error}"
            return False

    async def _connect(self) -> bool:
        action = self.document.get("httpGet") or self.document.get("tcpSocket")
        if action is None:
            raise ValueError(f"probe: found {self.document}, allowed are httpGet, tcpSocket and exec")
        address = action.get("host") or self.container.pod.address
        port = self.port(action["port"])
        reader, writer = await asyncio.open_connection(address, port)
        try:
            if "tcpSocket" in self.document:
                return True
            writer.write(
                f"GET {action.get('path', '/')} HTTP/1.1\r\nHost: {address}:{port}\r\n"
                "User-Agent: kube-probe/1.34\r\nAccept: */*\r\nConnection: close\r\n\r\n".encode()
            )
            line = (await reader.readline()).decode()
            self.said = line.strip()
            return 200 <= int(line.split()[1]) < 400 if line else False
        finally:
            writer.close()

    def port(self, wanted: int | str) -> int:
        if isinstance(wanted, int):
            return wanted
        ports = self.container.document.get("ports", [])
        return next(port["containerPort"] for port in ports if port.get("name") == wanted)
