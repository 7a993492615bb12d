"""sha256 of bytes and streams, and comparing it with what a manifest says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

from cluster.errors import ArtifactError

_READ_BYTES = 8 << 20


def bytes_sha256(data: Any) -> str:
    """`data`: bytes, or anything else that lies in memory in one piece."""
    return hashlib.sha256(data).hexdigest()


def stream_sha256(file: BinaryIO) -> str:
    """Of what is left to read."""
    digest = hashlib.sha256()
    while block := file.read(_READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return stream_sha256(file)


def check_digest(what: str, found: str, expected: str) -> None:
    """Raises ArtifactError where the two differ."""
    if found != expected:
        raise ArtifactError(f"{what}: sha256 is {found}, the manifest says {expected}; it was damaged on its way")
