"""Topologies as sysfs shows them, made below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster.machine import isa
from cluster.machine.topology import Cpu, ThreadRoom, cpu_list, thread_room, topology


def make_sysfs(root: Path, cores: Iterable[Iterable[int]], nodes: Iterable[str]) -> None:
    """`cores`: the CPUs of each physical core; `nodes`: of each NUMA node, as its cpulist says."""
    for core in cores:
        for cpu in core:
            folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(",".join(map(str, core)) + "\n")
    for number, cpus in enumerate(nodes):
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """Two NUMA nodes of two cores with two hardware threads each, numbered as Linux does on servers."""
    make_sysfs(tmp_path, [(0, 4), (1, 5), (2, 6), (3, 7)], ["0-1,4-5", "2-3,6-7"])
    return tmp_path


def test_siblings_and_nodes_are_read(two_sockets: Path) -> None:
    assert topology({0, 1, 2, 5, 6, 7}, two_sockets) == [
        Cpu(0, 0, 0), Cpu(1, 1, 0), Cpu(2, 2, 1), Cpu(5, 1, 0), Cpu(6, 2, 1), Cpu(7, 3, 1)
    ]  # fmt: skip


def test_without_sysfs_each_cpu_is_a_core_of_one_node(tmp_path: Path) -> None:
    assert topology({3, 1}, tmp_path) == [Cpu(1, 1, 0), Cpu(3, 3, 0)]


def test_memory_without_cpus_is_a_node_of_none(tmp_path: Path) -> None:
    make_sysfs(tmp_path, [(0,)], ["0", ""])
    assert topology({0}, tmp_path) == [Cpu(0, 0, 0)]


def test_a_list_of_cpus(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("0-2,8,10-11\n")
    assert cpu_list(path) == [0, 1, 2, 8, 10, 11]


@pytest.mark.parametrize(
    ("allowed", "quota", "room"),
    [
        (range(8), None, ThreadRoom(8, 4, 2)),
        ((0, 1, 4, 5), None, ThreadRoom(4, 2, 2)),  # a cpuset of one socket
        ((0, 2, 3, 7), None, ThreadRoom(4, 3, 2)),
        (range(8), 1.5, ThreadRoom(1, 1, 1)),
        (range(8), 3.0, ThreadRoom(3, 3, 2)),
    ],
)
def test_threads_fit_within_affinity_quota_cores_and_node(
    two_sockets: Path, monkeypatch: pytest.MonkeyPatch, allowed: Iterable[int], quota: float | None, room: ThreadRoom
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(allowed))
    monkeypatch.setattr(isa, "cpu_quota", lambda: quota)
    assert thread_room(two_sockets) == room


def test_this_machine_has_room_for_a_thread() -> None:
    room = thread_room()
    assert room.cpus >= room.cores >= room.numa_cores >= 1
