"""Files as the kernel shows them, made below a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.machine.cgroups import cpu_quota, memory_left

GiB = 1 << 30
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
# As Debian and RHEL mount version 1: both controllers at one place, and a link for each.
CPU_MOUNT = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:11 - cgroup cgroup rw,cpu,cpuacct"
MEMORY_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
OTHER_MOUNTS = [
    "22 28 0:21 / /sys rw - sysfs sysfs rw",
    "28 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw",
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
]
UNLIMITED = {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "5", "memory.stat": ""}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def process(root: Path, groups: list[str], mounts: list[str]) -> None:
    """What the process sees of itself."""
    folder = root / "proc/self"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    (folder / "mountinfo").write_text("".join(f"{line}\n" for line in [*OTHER_MOUNTS, *mounts]))


def group(root: Path, path: str, files: dict[str, str]) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_without_any_limit_there_is_none(root: Path) -> None:
    assert (cpu_quota(root), memory_left(root)) == (None, None), "no cgroups at all"
    process(root, ["0::/user.slice"], [V2_MOUNT])
    assert (cpu_quota(root), memory_left(root)) == (None, None), "no controller there"
    group(root, "user.slice", {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "5", "memory.stat": ""})
    assert (cpu_quota(root), memory_left(root)) == (None, None)


def test_the_smallest_limit_on_the_path_of_version_2_counts(root: Path) -> None:
    """A service with CPUQuota in a slice with another one, as systemd makes them."""
    process(root, ["0::/system.slice/nibble.service"], [V2_MOUNT])
    group(root, "", {"cgroup.procs": ""})
    group(root, "system.slice", {"cpu.max": "150000 100000"})
    group(root, "system.slice/nibble.service", {"cpu.max": "400000 100000"})
    group(root, "system.slice/other.service", {"cpu.max": "1000 100000"})
    assert cpu_quota(root) == 1.5
    group(root, "system.slice/nibble.service", {"cpu.max": "50000 100000"})
    assert cpu_quota(root) == 0.5
    group(root, "", {"cpu.max": "20000 200000"})
    assert cpu_quota(root) == 0.1


def test_the_least_memory_that_a_limit_on_the_path_leaves_counts(root: Path) -> None:
    """Not the smallest limit: a larger one may be fuller, by what others in its group take."""
    process(root, ["0::/a/b"], [V2_MOUNT])
    group(root, "a", {"memory.max": str(4 * GiB), "memory.current": str(3 * GiB), "memory.stat": "anon 1"})
    group(root, "a/b", {"memory.max": str(2 * GiB), "memory.current": str(GiB // 2), "memory.stat": "anon 1"})
    assert memory_left(root) == GiB
    group(root, "a", {"memory.current": str(GiB)})
    assert memory_left(root) == 2 * GiB - GiB // 2
    group(root, "a/b", {"memory.high": str(GiB)})
    assert memory_left(root) == GiB // 2, "above memory.high a group is slowed down"
    group(root, "a/b", {"memory.high": "max", "memory.current": str(3 * GiB)})
    assert memory_left(root) == 0


def test_pages_of_files_count_as_free(root: Path) -> None:
    stat = "anon 500000\nfile 3000000\nactive_file 1000000\ninactive_file 1500000"
    process(root, ["0::/"], [V2_MOUNT])
    group(root, "", {"memory.max": "4000000", "memory.current": "3500000", "memory.stat": stat})
    assert memory_left(root) == 4_000_000 - 3_500_000 + 2_500_000


def test_version_1(root: Path) -> None:
    process(root, ["4:memory:/box", "2:cpu,cpuacct:/box/inner", "0::/"], [CPU_MOUNT, MEMORY_MOUNT])
    group(root, "cpu,cpuacct", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
    group(root, "cpu,cpuacct/box", {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"})
    group(root, "cpu,cpuacct/box/inner", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
    group(root, "memory", UNLIMITED)
    group(root, "memory/box", UNLIMITED)
    assert (cpu_quota(root), memory_left(root)) == (0.5, None)
    # Of the group and those below it are the names with total_.
    stat = "active_file 7\ninactive_file 8\nhierarchical_memory_limit 1073741824\ntotal_active_file 20\n"
    limit = {"memory.limit_in_bytes": str(GiB), "memory.usage_in_bytes": "1000", "memory.stat": stat}
    group(root, "memory/box", limit | {"memory.stat": f"{stat}total_inactive_file 30"})
    assert memory_left(root) == GiB - 1000 + 50


def test_both_versions_beside_each_other(root: Path) -> None:
    """The controllers are of version 1, and version 2 is mounted without one (systemd's hybrid), or the other way."""
    hybrid = V2_MOUNT.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    process(root, ["4:memory:/box", "0::/session"], [MEMORY_MOUNT, hybrid])
    group(root, "memory/box", UNLIMITED | {"memory.limit_in_bytes": "1005"})
    group(root, "unified/session", {"cpu.max": "300000 100000"})
    assert (cpu_quota(root), memory_left(root)) == (3.0, 1000)


def test_a_container_that_has_only_its_own_group_mounted_sees_its_path_in_the_host_s_terms(root: Path) -> None:
    """Docker without a namespace of groups."""
    mounted = CPU_MOUNT.replace("0:29 / ", "0:29 /docker/4f2e ")
    process(root, ["2:cpu,cpuacct:/docker/4f2e/worker"], [mounted])
    group(root, "cpu,cpuacct", {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"})
    assert cpu_quota(root) == 2.0
    group(root, "cpu,cpuacct/worker", {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"})
    assert cpu_quota(root) == 1.0


def test_a_group_outside_of_what_is_mounted(root: Path) -> None:
    """A process that was moved out of its namespace, or into a container from outside: what is mounted still counts."""
    group(root, "", {"cpu.max": "100000 100000"})
    group(root.parent, "elsewhere", {"cpu.max": "1 100000"})
    for path in ("/../elsewhere", "/host.slice"):
        process(root, [f"0::{path}"], [V2_MOUNT])
        assert cpu_quota(root) == 1.0
    process(root, ["0::/host.slice"], [V2_MOUNT.replace("0:26 / ", "0:26 /docker/4f2e ")])
    assert cpu_quota(root) == 1.0


def test_names_with_spaces_and_colons(root: Path) -> None:
    moved = V2_MOUNT.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/with\\040space ")
    process(root, ["0::/unit:x"], [moved])
    group(root, "with space/unit:x", {"cpu.max": "100000 100000"})
    assert cpu_quota(root) == 1.0
