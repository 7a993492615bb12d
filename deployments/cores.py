"""Which cores a replica runs on: disjoint ones for the replicas of a node, as long as there are enough.

A replica holds one locked file for each of its cores, `core-<core>.<share>`; the kernel frees them when it ends,
however it ends. Share 0 is a core's first user, share 1 the second, and so on: where replicas ask for more threads
than the node has cores (only a local node is overcommitted), the cores are shared evenly.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EngineError
from cluster.isa import available_cores

MAX_SHARES = 64


@dataclass
class CoreClaim:
    """The cores of one replica, its own until `release` or the end of the process."""

    cores: tuple[int, ...]
    files: list[int]

    def release(self) -> None:
        while self.files:
            os.close(self.files.pop())


def claim_cores(folder: Path, threads: int, cores: Iterable[int]) -> CoreClaim:
    """`threads` of `cores`, the least used first. `folder` must be the same for all replicas of the node.

    Raises EngineError where there are fewer cores than threads.
    """
    usable = sorted(cores)
    if threads > len(usable):
        raise EngineError(
            f"threads: {threads} asked for, this node has {len(usable)} cores; set threads to 1..{len(usable)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    claim = CoreClaim((), [])
    for share in range(MAX_SHARES):
        for core in usable:
            if core in claim.cores:
                continue
            file = try_lock(folder / f"core-{core}.{share}")
            if file is not None:
                claim.files.append(file)
                claim.cores = (*claim.cores, core)
            if len(claim.cores) == threads:
                return claim
    claim.release()
    raise EngineError(f"threads: every core of this node already serves {MAX_SHARES} replicas; remove some")


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
