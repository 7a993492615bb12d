"""Temporary folders that end with their process, or at the next start where it was killed.

The process holds a lock on a file in each; the kernel frees it however the process ends. What such a process has
started is known by a variable in its environment, or by a file below the folder that it has open to write: two of Ray's
processes (2.60: its agents) overwrite the beginning of their environment with their title. Needs no Ray.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "nibble-"
LOCK = "owner.lock"
# The folders of the server that a process belongs to, with colons between them.
FOLDERS_VARIABLE = "NIBBLE_FOLDERS"
END_S = 10  # for processes to end that were killed


@contextmanager
def owned_folder(parent: str | Path) -> Iterator[Path]:
    """This user's alone; removed at the end, whatever still writes to it."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    # Under its name only once it is locked: until then nobody takes the folder for one that is left.
    new = folder / f"{LOCK}.new"
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new.rename(folder / LOCK)
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def remove(folder: Path) -> None:
    """Ray's workers outlive their raylet for a moment, and what they write meanwhile would keep the folder."""
    deadline = time.monotonic() + END_S
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists() or time.monotonic() > deadline:
            return
        time.sleep(0.02)


def sweep(parents: Iterable[str | Path]) -> None:
    """Ends what belongs to folders of this user whose process was killed, and removes them. Folders without a lock
    file, and those of others, stay."""
    for folder in (folder for parent in parents for folder in Path(parent).glob(f"{PREFIX}*")):
        with suppress(OSError):  # it goes meanwhile, or another start has it
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                sweep_folder(folder)


def sweep_folder(folder: Path) -> None:
    """Raises OSError where a process holds it, or it has no owner."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kill_processes(folder)
        remove(folder)
    finally:
        os.close(lock)


def kill_processes(folder: Path) -> None:
    deadline = time.monotonic() + END_S
    while sum(kill_member(int(process.name), folder) for process in Path("/proc").glob("[0-9]*")):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def kill_member(pid: int, folder: Path) -> bool:
    """Whether the process belongs to the folder's server. By a descriptor, since the id may be another's meanwhile."""
    with suppress(OSError):  # it has ended, or is another user's
        descriptor = os.pidfd_open(pid)
        try:
            if folder in folders_of(Path(f"/proc/{pid}/environ").read_bytes()) or writes_below(pid, folder):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def writes_below(pid: int, folder: Path) -> bool:
    """Whether it has a file below the folder open to write, but for the lock, which each start has that looks for what
    is left; somebody who only reads a log there has none."""
    folder = folder.resolve()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # it is closed meanwhile
            target = Path(os.readlink(descriptor))
            writes = descriptor.lstat().st_mode & stat.S_IWUSR
            if writes and folder in target.parents and target != folder / LOCK:
                return True
    return False


def folders_of(environment: bytes) -> list[Path]:
    prefix = f"{FOLDERS_VARIABLE}=".encode()
    found = next((line for line in environment.split(b"\0") if line.startswith(prefix)), b"")
    return [Path(os.fsdecode(part)) for part in found.removeprefix(prefix).split(b":") if part]
