"""The first program of a container, in its mount and PID namespaces: builds its root, then becomes its command as the
container's user.

    python -IS container_init.py SPEC.json

A program of its own, of the standard library alone; `containers.py` writes the specification.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def bind(source: str, target: Path, read_only: bool = False) -> None:
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount("--bind", source, str(target))
    if read_only:
        mount("-o", "remount,bind,ro", str(target))


def open_to_all(root: Path, paths: list[str]) -> None:
    """Paths on other file systems than the root, which the overlay has not. Where a folder above a path is closed to
    other users, an empty one with such paths alone stands in its place."""
    covered: set[Path] = set()
    for path in map(Path, paths):
        closed = next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001), None)
        if closed is None and (root / path.relative_to("/")).exists():
            continue
        if closed is not None and closed not in covered:
            mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / closed.relative_to("/")))
            covered.add(closed)
        bind(str(path), root / path.relative_to("/"), read_only=True)


def make_root(spec: dict) -> Path:
    layers = Path(spec["layers"])
    root = layers / "root"
    options = f"lowerdir=/,upperdir={layers / 'upper'},workdir={layers / 'work'}"
    for name in ("upper", "work", "root"):
        (layers / name).mkdir(parents=True, exist_ok=True)
    mount("-t", "overlay", "-o", options, "overlay", str(root))
    open_to_all(root, spec["read"])
    mount("-t", "proc", "proc", str(root / "proc"))
    mount("--rbind", "/sys", str(root / "sys"))
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "dev"))
    for name in DEVICES:
        bind(f"/dev/{name}", root / "dev" / name)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (root / "dev" / name).symlink_to(f"/proc/self/{target}")
    for source, target, read_only in spec["binds"]:
        bind(source, root / target.lstrip("/"), read_only)
    for path in map(Path, spec["read"]):  # what a volume has covered: this checkout may lie in /tmp
        if any(path.is_relative_to(target) for _, target, _ in spec["binds"]):
            bind(str(path), root / path.relative_to("/"), read_only=True)
    (root / ".old").mkdir(exist_ok=True)
    return root


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    os.umask(0o022)
    root = make_root(spec)
    os.chdir(root)
    subprocess.run(["pivot_root", ".", ".old"], check=True)
    os.chdir("/")
    subprocess.run(["umount", "-l", "/.old"], check=True)
    if spec["read_only_root"]:
        mount("-o", "remount,bind,ro", "/")
    # As many files as this machine allows: containerd's bound is higher than most machines' own.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.chdir(spec["directory"])
    os.execve("/usr/bin/setpriv", ["setpriv", *spec["privileges"], *spec["command"]], spec["environment"])


if __name__ == "__main__":
    main()
