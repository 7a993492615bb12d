"""A bridge of this machine's kernel, to which every pod's namespace is joined by a veth pair.

Nothing is routed beyond it: the bridge forwards no packet to another interface.

    .1        the node: kubelet's probes and the Services' connections where no gateway asks
    .2        clients that come through a gateway: connections of Services
    .3        KubeRay's operator
    .10 …     pods
    .200 …    Services
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
from pathlib import Path

from tests.k8s.lookalike.commands import CommandError, run

PREFIX = "nblk"
SUBNETS = [
    ipaddress.ip_network(f"10.{second}.{third}.0/24") for second in range(201, 240) for third in range(0, 256, 5)
]


class Network:
    """`hosts` is the file that pods have as /etc/hosts: names of Services and pods."""

    def __init__(self, hosts: Path) -> None:
        self.hosts = hosts
        self.bridge = f"{PREFIX}{os.getpid()}"
        self._names: dict[str, str] = {}
        self._veths = 0

    async def start(self) -> None:
        self.subnet = await free_subnet()
        self.node, self.gateway, self.operator = (str(self.subnet[number]) for number in (1, 2, 3))
        self._pods = [str(self.subnet[number]) for number in range(10, 200)]
        self._services = [str(self.subnet[number]) for number in range(200, 250)]
        await run("ip", "link", "add", self.bridge, "type", "bridge")
        for address in (self.node, self.gateway, self.operator):
            await self._hold(address)
        await run("ip", "link", "set", self.bridge, "up")
        Path(f"/proc/sys/net/ipv4/conf/{self.bridge}/forwarding").write_text("0")
        self.name("localhost", "127.0.0.1")

    async def close(self) -> None:
        try:
            await run("ip", "link", "del", self.bridge)
        except CommandError:
            if Path(f"/sys/class/net/{self.bridge}").exists():
                raise

    async def _hold(self, address: str) -> None:
        await run("ip", "address", "add", f"{address}/{self.subnet.prefixlen}", "dev", self.bridge)

    async def join(self, pid: int) -> str:
        """The address that the network namespace of the process has now."""
        address = self._pods.pop(0)
        self._veths += 1
        host = f"nk{os.getpid()}_{self._veths}"
        await run("ip", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        await run("ip", "link", "set", host, "master", self.bridge, "up")
        inside = ("nsenter", "-t", str(pid), "-n", "ip")
        await run(*inside, "link", "set", "lo", "up")
        await run(*inside, "address", "add", f"{address}/{self.subnet.prefixlen}", "dev", "eth0")
        await run(*inside, "link", "set", "eth0", "up")
        await run(*inside, "route", "add", "default", "via", self.node)
        return address

    async def service_address(self) -> str:
        address = self._services.pop(0)
        await self._hold(address)
        return address

    def name(self, name: str, address: str | None) -> None:
        """None: the name is known no more."""
        if self._names.get(name) == address:
            return
        if address is None:
            self._names.pop(name, None)
        else:
            self._names[name] = address
        # In place: the file is mounted in running pods.
        content = "".join(f"{address}\t{name}\n" for name, address in self._names.items())
        with self.hosts.open("r+" if self.hosts.exists() else "w") as file:
            file.write(content)
            file.truncate()


async def free_subnet() -> ipaddress.IPv4Network:
    """One that no interface and no route of this machine has. Raises RuntimeError where there is none."""
    taken = [
        ipaddress.ip_network(route["dst"], strict=False)
        for route in json.loads(await run("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
        if route["dst"] != "default"
    ]
    for subnet in random.sample(SUBNETS, len(SUBNETS)):
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise RuntimeError("found no free subnet in 10.201.0.0 to 10.239.255.0")
