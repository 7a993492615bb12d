"""sha256 of bytes and streams, and comparing it with what a manifest says."""

from __future__ import annotations

import hashlib
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from cluster.errors import ArtifactError

_READ_BYTES = 8 << 20
_BLOCK_BYTES = 1 << 20  # for a core's cache


def bytes_sha256(data: Any) -> str:
    """`data`: bytes, or anything else that lies in memory in one piece."""
    return hashlib.sha256(data).hexdigest()


def stream_sha256(file: BinaryIO) -> str:
    """Of what is left to read."""
    digest = hashlib.sha256()
    while block := file.read(_READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def update_sha256(digest: Any, file: FileIO, count: int) -> None:
    """By the next `count` bytes of a file, or as many as there are."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    while count > 0 and (found := file.readinto(block[:count])):
        digest.update(block[:found])
        count -= found


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return stream_sha256(file)


def check_digest(what: str, found: str, expected: str) -> None:
    """Raises ArtifactError where the two differ."""
    if found != expected:
        raise ArtifactError(f"{what}: sha256 is {found}, the manifest says {expected}; it was damaged on its way")
