"""An artifact of a few bytes, as the object store would give it to a node cache."""

from __future__ import annotations

import hashlib

from cluster.artifacts.manifest import ChunkEntry, Manifest
from cluster.artifacts.node_cache import NodeCache

CHUNKS = [b"head and first tensors", b"the other tensors"]
FILES = {"config.json": b"{}", "additional_chat_templates/tool_use.jinja": b"{{ tools }}"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def made_manifest() -> Manifest:
    """Of an artifact of two chunks and two files beside, one in a folder of its own."""
    offsets = [0, len(CHUNKS[0])]
    return Manifest(
        artifact_id="a1",
        converter_version=1,
        family="llama",
        quantization="q4_0",
        engines=("bigdl",),
        source="somewhere",
        binary="bigdl_llm_llama_q4_0.bin",
        bytes=sum(map(len, CHUNKS)),
        sha256=sha256(b"".join(CHUNKS)),
        chunks=tuple(
            ChunkEntry(offset=offset, bytes=len(chunk), sha256=sha256(chunk))
            for offset, chunk in zip(offsets, CHUNKS, strict=True)
        ),
        tensors=(),
        files={name: sha256(content) for name, content in FILES.items()},
    )


class Chunks:
    """The object store's side: counts what is read, and can give damaged bytes."""

    def __init__(self, damaged: int | None = None) -> None:
        self.damaged = damaged
        self.reads: list[int] = []

    def __call__(self, index: int) -> bytes:
        self.reads.append(index)
        return CHUNKS[index][:-1] + b"!" if index == self.damaged else CHUNKS[index]


def fetch_and_release(cache: NodeCache, manifest: Manifest) -> None:
    cache.fetch(manifest, FILES, Chunks()).release()
