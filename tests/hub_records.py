"""What a Hub holds and is told to do wrong: the records of hub_lookalike.py."""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".h5", ".gguf")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    status: int
    bytes: int
    authorization: str | None
    range: str | None = None

    @property
    def file(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def begins(self) -> int:
        """The first byte that was asked for."""
        assert self.range is not None
        return int(self.range.removeprefix("bytes=").removesuffix("-"))


@dataclass
class Failure:
    """Answers `status` to the next `times` requests whose path contains `path`."""

    status: int
    times: int
    path: str
    headers: dict[str, str]


@dataclass
class Cut:
    """Ends the next `times` connections that send `file` after `after` bytes of the body; with `reset`, by RST."""

    file: str
    after: int
    times: int
    reset: bool


@dataclass
class Content:
    path: Path
    sha256: str
    blob_id: str
    size: int
    lfs: bool

    @staticmethod
    def of(path: Path) -> Content:
        data = mapped(path)
        blob_id, sha256 = hashlib.sha1(f"blob {len(data)}\0".encode()), hashlib.sha256(data)
        blob_id.update(data)
        return Content(path, sha256.hexdigest(), blob_id.hexdigest(), len(data), path.name.endswith(LFS_SUFFIXES))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


def mapped(path: Path) -> memoryview:
    """A file's bytes, which may be more than fit into memory."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")


@dataclass
class Repository:
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    gated: bool = False


def sibling(name: str, content: Content) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": content.size, "blobId": content.blob_id}
    if content.lfs:
        entry["lfs"] = {"sha256": content.sha256, "size": content.size, "pointerSize": 134}
    return entry


def tree_entry(name: str, content: Content) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": content.size, "oid": content.blob_id}
    if content.lfs:
        entry["lfs"] = {"oid": content.sha256, "size": content.size, "pointerSize": 134}
    return entry
