"""Which of a machine's CPUs share a physical core, and to which NUMA node they belong, as the kernel's sysfs says.

Files are looked for below `root`, so that tests can make them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cluster.machine.cgroups import ROOT
from cluster.machine.isa import available_cores

CPUS = "sys/devices/system/cpu"
NODES = "sys/devices/system/node"


class Cpu(NamedTuple):
    """`core`: its physical core, by that core's first CPU. `node`: of NUMA."""

    number: int
    core: int
    node: int


class ThreadRoom(NamedTuple):
    """How many threads of one replica fit: on the CPUs that this process may use (its affinity mask, a cpuset included,
    and its CPU quota), on their physical cores, and on those of the NUMA node that has most of them."""

    cpus: int
    cores: int
    numa_cores: int


def topology(cpus: Iterable[int], root: Path = ROOT) -> list[Cpu]:
    """In order of their numbers. Where sysfs does not tell, each CPU is a core of its own and all are of one node."""
    nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in (root / NODES).glob("node[0-9]*")
        for cpu in cpu_list(folder / "cpulist")
    }
    found = []
    for cpu in sorted(cpus):
        siblings = cpu_list(root / CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        found.append(Cpu(cpu, min(siblings, default=cpu), nodes.get(cpu, 0)))
    return found


def cpu_list(path: Path) -> list[int]:
    """Of a file such as `0-3,8`; empty where there is none."""
    try:
        parts = path.read_text().strip().split(",")
    except OSError:
        return []
    ranges = (part.partition("-") for part in parts if part)
    return [cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)]


def thread_room(root: Path = ROOT) -> ThreadRoom:
    allowed = available_cores()
    cores = {(cpu.core, cpu.node) for cpu in topology(os.sched_getaffinity(0), root)}
    largest = max(Counter(node for _, node in cores).values())
    return ThreadRoom(allowed, min(allowed, len(cores)), min(allowed, largest))
