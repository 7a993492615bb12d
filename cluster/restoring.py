"""Artifacts that were made before, as Ray tasks: found and read in the durable copy or in the nodes' caches, kept in
the durable copy. The artifact store's actor submits them and owns what they return.

A chunk's task returns the chunk and, apart from it, its entry: who waits for the entry does not copy the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.artifacts.digests import bytes_sha256, check_digest
from cluster.artifacts.durable import DurableCopy
from cluster.artifacts.manifest import ChunkEntry, Manifest
from cluster.artifacts.node_cache import NodeCache
from cluster.config import ArtifactsConfig
from cluster.conversion.wanted import Wanted
from cluster.conversion_tasks import TASK_RETRIES


@ray.remote(num_cpus=0, max_retries=TASK_RETRIES)
def find_durable(uri: str, wanted: Wanted) -> Manifest | None:
    copy = DurableCopy(uri)
    manifests = copy.manifests() if wanted.artifact_id is None else [copy.manifest(wanted.artifact_id)]
    return next((manifest for manifest in manifests if manifest and wanted.is_met_by(manifest)), None)


@ray.remote(num_cpus=0, max_retries=TASK_RETRIES)
def has_durable(uri: str, manifest: Manifest) -> bool:
    return DurableCopy(uri).manifest(manifest.artifact_id) == manifest


@ray.remote(num_cpus=0, max_retries=TASK_RETRIES, num_returns=2, scheduling_strategy="SPREAD")
def durable_chunk(uri: str, manifest: Manifest, index: int) -> tuple[Any, ChunkEntry]:
    return np.frombuffer(DurableCopy(uri).read_chunk(manifest, index), np.uint8), manifest.chunks[index]


@ray.remote(num_cpus=0, max_retries=TASK_RETRIES)
def durable_files(uri: str, manifest: Manifest) -> dict[str, bytes]:
    return DurableCopy(uri).read_files(manifest)


@ray.remote(num_cpus=0, max_retries=TASK_RETRIES)
def keep_durable(uri: str, manifest: Manifest, files: dict[str, bytes], chunks: Sequence[Any]) -> None:
    """`chunks` are object references, got one at a time."""
    DurableCopy(uri).write(manifest, files, lambda index: memoryview(ray.get(chunks[index])))


@ray.remote(num_cpus=0, max_retries=TASK_RETRIES)
def remove_durable(uri: str, artifact_id: str) -> None:
    DurableCopy(uri).remove(artifact_id)


@ray.remote(num_cpus=0, max_retries=0)
def find_cached(config: ArtifactsConfig, wanted: Wanted) -> Manifest | None:
    """On the node whose cache is meant, as the next two. Only an undamaged copy counts."""
    cache = NodeCache(config.cache_dir)
    return next((m for m in cache.manifests() if wanted.is_met_by(m) and cache.holds(m)), None)


@ray.remote(num_cpus=0, max_retries=0, num_returns=2)
def cached_chunk(config: ArtifactsConfig, manifest: Manifest, index: int) -> tuple[Any, ChunkEntry]:
    chunk = manifest.chunks[index]
    with (cache_folder(config, manifest) / manifest.binary).open("rb") as file:
        file.seek(chunk.offset)
        data = file.read(chunk.bytes)
    sha256 = bytes_sha256(data)
    if sha256 != chunk.sha256:
        NodeCache(config.cache_dir).doubt(manifest)
    check_digest(f"chunk {index} of {manifest.artifact_id} in {config.cache_dir}", sha256, chunk.sha256)
    return np.frombuffer(data, np.uint8), chunk


@ray.remote(num_cpus=0, max_retries=0)
def cached_files(config: ArtifactsConfig, manifest: Manifest) -> dict[str, bytes]:
    folder = cache_folder(config, manifest)
    return {name: (folder / name).read_bytes() for name in manifest.files}


def cache_folder(config: ArtifactsConfig, manifest: Manifest) -> Path:
    return NodeCache(config.cache_dir).folder / manifest.artifact_id


def on_node(task: Any, node_id: str) -> Any:
    """The task, to be run on this node and no other."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
    return task.options(scheduling_strategy=strategy)


def alive_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]
