"""What a run that was killed left: its bridge, its cgroups and its folder. Its processes, their namespaces and mounts
end with it."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.k8s.lookalike.commands import CommandError, run
from tests.k8s.lookalike.kubelet import cgroups
from tests.k8s.lookalike.network import PREFIX


async def sweep() -> None:
    """Of processes that run no more."""
    folders = [*Path("/sys/class/net").iterdir(), *Path(tempfile.gettempdir()).glob(f"{PREFIX}*")]
    folders += [*cgroups.ROOT.glob(f"{PREFIX}*"), *cgroups.ROOT.glob(f"*/{PREFIX}*")]
    found = {int(match[1]) for folder in folders if (match := re.match(rf"{PREFIX}(\d+)", folder.name))}
    for pid in found:
        if not Path(f"/proc/{pid}").exists():
            await remove(pid)


async def remove(pid: int) -> None:
    """All of the run of that process."""
    if Path(f"/sys/class/net/{PREFIX}{pid}").exists():
        await run("ip", "link", "del", f"{PREFIX}{pid}")
    for veth in Path("/sys/class/net").glob(f"nk{pid}_*"):  # the kernel ends it with its namespace, a moment later
        with suppress(CommandError):
            await run("ip", "link", "del", veth.name)
    for _ in range(50):  # a process that was killed is in its cgroup until the kernel has ended it
        cgroups.remove_all(pid)
        if not cgroups.of(pid):
            break
        await asyncio.sleep(0.1)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}{pid}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def left(pid: int) -> list[str]:
    """What of that run is still there."""
    there = [*Path("/sys/class/net").glob(f"{PREFIX}{pid}"), *Path(tempfile.gettempdir()).glob(f"{PREFIX}{pid}-*")]
    there += [*Path("/sys/class/net").glob(f"nk{pid}_*")]
    there += cgroups.of(pid)
    return [str(each) for each in there]
