"""Whether a file is what its sha256 says, without reading it again as long as nobody has changed it.

    <folder>/.<file name>.verified    JSON: the sha256, and what the file system said of the file when it was computed
    <cache_dir>/digests/<name>        the same of a file that lies elsewhere; the name is the sha256 of its path

A write changes the file's ctime, which no program can set back, and a file put in its place has another inode. Bytes
that change below the file system (a failing disk) are not found: remove the stamps to have all files read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from cluster.artifacts.digests import bytes_sha256, file_sha256

Stamp = dict[str, str | int]


def is_verified(path: Path, sha256: str) -> bool:
    """Whether the file's content has this sha256. Reads the file only where it has changed since that was found the
    last time. Raises OSError where it cannot be read."""
    before = _stamp(path, sha256)
    if _read(stamp_file(path), path) == before:
        return True
    if file_sha256(path) != sha256:
        return False
    if _stamp(path, sha256) == before:
        _write(stamp_file(path), before)
    return True


def mark_verified(path: Path, sha256: str) -> None:
    """Says so of a file that this process has just written and hashed, under a lock that keeps others from it."""
    _write(stamp_file(path), _stamp(path, sha256))


def remembered_sha256(path: Path, folder: Path, compute: Callable[[Path], str]) -> str:
    """The file's sha256, which `compute` reads it for; where the file has not changed since that was done, `folder`
    tells. Raises OSError where the file cannot be read, and what `compute` raises."""
    before, remembered = _stamp(path, ""), folder / bytes_sha256(str(path.absolute()).encode())
    known = _read(remembered, path)
    if known is not None and known | {"sha256": ""} == before:
        return str(known["sha256"])
    sha256 = compute(path)
    if _stamp(path, "") == before:
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)  # in a cache that is there: a conversion that needs none makes none
        _write(remembered, before | {"sha256": sha256})
    return sha256


def stamp_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _stamp(path: Path, sha256: str) -> Stamp:
    found = path.stat()
    return {
        "sha256": sha256,
        "inode": found.st_ino,
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _read(stamp: Path, path: Path) -> Stamp | None:
    """What the stamp of `path` says, None without one, and for one as old as the file's last change: the file system's
    clock ticks every few milliseconds, and a change in the same tick would not show."""
    try:
        content: Stamp = json.loads(stamp.read_bytes())
        return content if path.stat().st_ctime_ns < stamp.stat().st_mtime_ns else None
    except (OSError, ValueError):
        return None


def _write(stamp: Path, content: Stamp) -> None:
    """Whole or not at all. Where the folder cannot be written, the file is read again the next time."""
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(dir=stamp.parent, prefix=f".{stamp.name}.", suffix=".stamp")
        try:
            with open(descriptor, "w") as file:
                json.dump(content, file)
            os.chmod(name, 0o644)  # processes of another user trust it too
            os.replace(name, stamp)
        except BaseException:
            os.unlink(name)
            raise
