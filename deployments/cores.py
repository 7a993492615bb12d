"""Which cores a replica runs on: those that no other replica of the node has, as long as there are enough.

A replica holds one locked file for each of its CPUs, `core-<cpu>.<share>`; the kernel frees them when it ends,
however it ends. Share 0 is a CPU's first user, share 1 the second, and so on: where replicas ask for more threads
than the node has CPUs (only a local node is overcommitted), the CPUs are shared evenly.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EngineError
from cluster.machine.isa import available_cores
from cluster.machine.topology import Cpu

MAX_SHARES = 64


@dataclass
class CoreClaim:
    """The CPUs of one replica, its own until `release` or the end of the process. `unmet`: what they are short of."""

    cores: tuple[int, ...]
    files: list[int]
    unmet: tuple[str, ...] = ()

    def release(self) -> None:
        while self.files:
            os.close(self.files.pop())


def claim_cores(folder: Path, threads: int, cpus: Sequence[Cpu]) -> CoreClaim:
    """`threads` of `cpus`: on physical cores of their own in one NUMA node, else across the nodes, else on what is used
    least. `folder` must be the same for all replicas of the node.

    Raises EngineError where there are fewer CPUs than threads.
    """
    if threads > len(cpus):
        raise EngineError(
            f"threads: {threads} asked for, this node has {len(cpus)} cores; set threads to 1..{len(cpus)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder / "claiming"):
        claim = first_claim(folder, threads, cpus)
        claim.unmet = (*claim.unmet, *shortcomings(folder, claim, cpus))
        return claim


def first_claim(folder: Path, threads: int, cpus: Sequence[Cpu]) -> CoreClaim:
    first_of_core = {cpu.core: cpu for cpu in reversed(cpus)}
    one_each = sorted(first_of_core.values())
    for node in sorted({cpu.node for cpu in cpus}):
        claim = take(folder, threads, [cpu for cpu in one_each if cpu.node == node], shares=1)
        if claim is not None:
            return claim
    # Physical cores before second hardware threads, and these before CPUs that another replica has.
    claim = take(folder, threads, [*one_each, *(cpu for cpu in cpus if cpu not in one_each)], MAX_SHARES)
    if claim is None:
        raise EngineError(f"threads: every core of this node already serves {MAX_SHARES} replicas; remove some")
    return claim


def take(folder: Path, threads: int, cpus: Sequence[Cpu], shares: int) -> CoreClaim | None:
    """The first of `cpus` that are free, in their order; None, and nothing is taken, where there are not enough."""
    claim = CoreClaim((), [])
    for share in range(shares):
        for cpu in cpus:
            if len(claim.cores) == threads:
                return claim
            if cpu.number in claim.cores:
                continue
            file = try_lock(folder / f"core-{cpu.number}.{share}")
            if file is not None:
                claim.files.append(file)
                claim.cores = (*claim.cores, cpu.number)
                if share:
                    claim.unmet = ("other replicas run on the same CPUs",)
    if len(claim.cores) == threads:
        return claim
    claim.release()
    return None


def shortcomings(folder: Path, claim: CoreClaim, cpus: Sequence[Cpu]) -> Iterator[str]:
    """Of its physical cores and NUMA nodes."""
    claimed = [cpu for cpu in cpus if cpu.number in claim.cores]
    cores, nodes = {cpu.core for cpu in claimed}, sorted({cpu.node for cpu in claimed})
    siblings = [cpu for cpu in cpus if cpu.core in cores and cpu not in claimed]
    if len(cores) < len(claimed) or any(in_use(folder, cpu) for cpu in siblings):
        yield "threads share physical cores (SMT)"
    if len(nodes) > 1:
        yield f"they are of NUMA nodes {', '.join(map(str, nodes))}"


def in_use(folder: Path, cpu: Cpu) -> bool:
    file = try_lock(folder / f"core-{cpu.number}.0")
    if file is not None:
        os.close(file)
    return file is None


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Two replicas that start together must not take halves of the same NUMA node."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def try_lock(path: Path) -> int | None:
    """The descriptor of the locked file, None where another process holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def check_cores(threads: int, cores: Sequence[int] | None) -> tuple[int, ...]:
    """The cores that the engine's threads run on. Raises EngineError, naming the limit, for what this node has not."""
    limit = available_cores()
    if not 1 <= threads <= limit:
        raise EngineError(f"threads: found {threads}, allowed on this node are 1 to {limit} (its cores or CPU quota)")
    usable = os.sched_getaffinity(0)
    chosen = tuple(sorted(set(cores))) if cores is not None else tuple(sorted(usable))
    if not chosen or not set(chosen) <= usable:
        raise EngineError(f"cores: found {list(chosen)}, allowed are some of {sorted(usable)}")
    return chosen
