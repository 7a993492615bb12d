"""The CPU and memory limits of the control groups that this process is in, version 1 and 2, as cgroups(7) describes
them. A limit holds for all groups below it: what counts is the smallest one from the process's own group to the root.

Files are looked for below `root`, so that tests can make them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
V2 = "cgroup2"
# Version 1 writes the largest multiple of a page below 2^63 where there is no limit.
V1_UNLIMITED = 1 << 62


class Group(NamedTuple):
    folder: Path
    v2: bool


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that this process may use at a time; None: no limit."""
    quotas = [quota for group in groups("cpu", root) if (quota := group_quota(group)) is not None]
    return min(quotas, default=None)


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes that this process may still take; None: no limit. Pages of files count as free, the active ones too
    (weights that a replica maps): the kernel drops them where memory is short."""
    left = [left for group in groups("memory", root) if (left := group_left(group)) is not None]
    return max(0, min(left)) if left else None


def groups(controller: str, root: Path) -> Iterator[Group]:
    """Those that a process is in, its own first, then what is above it as far as it is mounted. Where both versions are
    mounted a controller belongs to one of them, and the other has no files of it."""
    paths = own_paths(root)
    for v2, mount_root, mount_point, controllers in mounts(root):
        path = paths.get("" if v2 else controller)
        if path is None or not (v2 or controller in controllers):
            continue
        top = root / mount_point.lstrip("/")
        # A container may see its path in the host's terms and have only its own group mounted.
        inside = Path(path).relative_to(mount_root) if Path(path).is_relative_to(mount_root) else Path()
        if ".." in inside.parts:  # outside of this process's namespace
            inside = Path()
        own = top / inside
        yield from (Group(folder, v2) for folder in (own, *own.parents) if folder.is_relative_to(top))


def own_paths(root: Path) -> dict[str, str]:
    """The path of this process's group by controller of version 1; by the empty name that of version 2."""
    paths = {}
    for line in lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def mounts(root: Path) -> Iterator[tuple[bool, str, str, list[str]]]:
    """Whether it is of version 2, which group is mounted where, and the controllers of version 1 (proc(5),
    mountinfo)."""
    for line in lines(root / "proc/self/mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        if kind in (V2, "cgroup"):
            mount_root, mount_point = mount.split()[3:5]
            yield kind == V2, unescaped(mount_root), unescaped(mount_point), options.split(",")


def unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def group_quota(group: Group) -> float | None:
    try:
        if group.v2:
            quota, period = (group.folder / "cpu.max").read_text().split()
        else:
            quota = (group.folder / "cpu.cfs_quota_us").read_text()
            period = (group.folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None  # version 1: -1 is no limit
    except (OSError, ValueError, ZeroDivisionError):  # not there; or "max"
        return None


def group_left(group: Group) -> int | None:
    # Above memory.high a group is slowed down until it has given memory back.
    names = ["memory.max", "memory.high"] if group.v2 else ["memory.limit_in_bytes"]
    found = [limit for name in names if (limit := number(group.folder / name)) is not None and limit < V1_UNLIMITED]
    used = number(group.folder / ("memory.current" if group.v2 else "memory.usage_in_bytes"))
    if not found or used is None:
        return None
    stat, total = named_numbers(group.folder / "memory.stat"), "" if group.v2 else "total_"
    return min(found) - used + stat.get(f"{total}active_file", 0) + stat.get(f"{total}inactive_file", 0)


def number(path: Path) -> int | None:
    """None where there is none: no such file, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def named_numbers(path: Path) -> dict[str, int]:
    """Of a file whose lines have a name, with a colon or without, a number, and perhaps a unit."""
    words = (line.split() for line in lines(path))
    return {each[0].rstrip(":"): int(each[1]) for each in words if len(each) > 1}


def lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
