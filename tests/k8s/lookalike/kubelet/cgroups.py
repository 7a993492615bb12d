"""CPU and memory limits of a pod's container, where this machine lets us make cgroups."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tests.k8s.lookalike.network import PREFIX

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 100_000


class Cgroup:
    """Of one container. `folders`: by the controller's folder below /sys/fs/cgroup (v1), or one for all (v2)."""

    def __init__(self, name: str, folders: dict[Path, Path]) -> None:
        self.name = name
        self.folders = folders

    @classmethod
    def make(cls, name: str, cpus: float | None, memory: int | None) -> Cgroup:
        """Without folders where the kernel does not let us."""
        try:
            folders = version_2(name, cpus, memory) if is_version_2() else version_1(name, cpus, memory)
        except OSError:
            folders = {}
        return cls(name, folders)

    def joining(self) -> list[str]:
        """The prefix of a command that is to run in it."""
        files = " ".join(f"{folder}/cgroup.procs" for folder in self.folders.values())
        return ["sh", "-c", f'for f in {files}; do echo $$ > "$f"; done; exec "$@"', "sh"] if files else []

    def mounts(self) -> list[tuple[str, str]]:
        """What a container sees of it: source and target."""
        return [(str(folder), str(shown)) for shown, folder in self.folders.items()]

    def remove(self) -> None:
        """Once its processes have ended."""
        for folder in self.folders.values():
            with suppress(OSError):
                folder.rmdir()


def is_version_2() -> bool:
    return (ROOT / "cgroup.controllers").exists()


def parent(folder: Path) -> Path:
    return folder / f"{PREFIX}{os.getpid()}"


def version_1(name: str, cpus: float | None, memory: int | None) -> dict[Path, Path]:
    cpu, ram = ROOT / "cpu", ROOT / "memory"
    folders = {shown: parent(shown) / name for shown in (cpu, ram)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    if cpus is not None:
        (folders[cpu] / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (folders[cpu] / "cpu.cfs_quota_us").write_text(str(int(cpus * PERIOD_US)))
    if memory is not None:
        (folders[ram] / "memory.limit_in_bytes").write_text(str(memory))
    return folders


def version_2(name: str, cpus: float | None, memory: int | None) -> dict[Path, Path]:
    above = parent(ROOT)
    above.mkdir(exist_ok=True)
    (above / "cgroup.subtree_control").write_text("+cpu +memory")
    folder = above / name
    folder.mkdir()
    if cpus is not None:
        (folder / "cpu.max").write_text(f"{int(cpus * PERIOD_US)} {PERIOD_US}")
    if memory is not None:
        (folder / "memory.max").write_text(str(memory))
    return {ROOT: folder}


def of(pid: int) -> list[Path]:
    """The folders of a run of that process."""
    return [*ROOT.glob(f"{PREFIX}{pid}"), *ROOT.glob(f"*/{PREFIX}{pid}")]


def remove_all(pid: int) -> None:
    """What a run of that process left, as far as no process is in it."""
    for above in of(pid):
        for folder in (*above.glob("*/"), above):
            with suppress(OSError):
                folder.rmdir()
