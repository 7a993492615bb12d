"""The artifact store: a named detached actor that converts checkpoints once and owns their chunks in the object store.

Ray ties an object's life to the process that owns it. The actor submits the conversion's tasks, so it owns the chunks:
they outlive the driver that asked for them and the worker that made them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from cluster.config import ArtifactsConfig
from cluster.conversion import ShardReport, check_task, plan_task, shard_task
from cluster.display import ConversionProgress
from cluster.errors import ArtifactError
from cluster.manifest import ChunkEntry, Manifest
from cluster.node_cache import CachedArtifact, NodeCache
from cluster.ray_errors import nibble_cause, raised_here
from cluster.restoring import (
    alive_nodes,
    cached_chunk,
    cached_files,
    durable_chunk,
    durable_files,
    find_cached,
    find_durable,
    keep_durable,
    on_node,
    remove_durable,
)
from cluster.sources import is_repository
from cluster.steps import PlannedConversion, draft_manifest
from cluster.wanted import Wanted

STORE_NAME = "artifact-store"
NAMESPACE = "nibble"


class Published(NamedTuple):
    """A published artifact: `chunks` are references to its bytes, `files` one to the files beside the binary."""

    manifest: Manifest
    chunks: list[Any]
    files: Any


class ArtifactStore:
    """Runs as a Ray actor; `store_handle` finds or starts it. It keeps nothing that it could not find again: after its
    own death it restores an artifact when somebody asks for it."""

    def __init__(self) -> None:
        self._published: dict[str, Published] = {}
        self._running: dict[str, asyncio.Task[Published]] = {}
        self._progress: dict[str, ConversionProgress] = {}

    async def ensure(self, wanted: Wanted, config: ArtifactsConfig) -> Published:
        """The artifact of a checkpoint: as published before, else from the durable copy, else from a node's cache, else
        converted now. Who asks meanwhile waits for the same. Raises CheckpointError, also before anything is read
        for what the wanted engine cannot run; ConversionError; or, where the durable copy cannot be written,
        ArtifactError."""
        with raised_here():
            # By its address, or by the name of a Hub repository, an artifact is found without its checkpoint, which may
            # lie on a Hub that is down; but a folder's content may have changed under its name.
            known = wanted.artifact_id is not None or is_repository(wanted.source)
            published = await self._remembered(wanted, config) if known else None
            if published is None:
                published = await self._planned(wanted, config)
            if config.durable_uri is not None:
                await keep_durable.remote(config.durable_uri, published.manifest, published.files, published.chunks)
        return published

    async def _remembered(self, wanted: Wanted, config: ArtifactsConfig) -> Published | None:
        for published in self._published.values():
            if wanted.is_met_by(published.manifest):
                if not wanted.runs(published.manifest):
                    wanted.refuse(published.manifest, await published.files)
                return published
        return await self._restored(wanted, config)

    async def _planned(self, wanted: Wanted, config: ArtifactsConfig) -> Published:
        planned: PlannedConversion = await plan_task.remote(wanted, config)
        artifact_id = planned.artifact_id
        if artifact_id in self._published:
            return self._published[artifact_id]
        if artifact_id not in self._running:
            addressed = wanted.model_copy(update={"artifact_id": artifact_id})
            making = asyncio.create_task(self._restore_or_convert(addressed, planned, config))
            making.add_done_callback(lambda _: self._running.pop(artifact_id))
            self._running[artifact_id] = making
        return await asyncio.shield(self._running[artifact_id])

    async def _restore_or_convert(
        self, wanted: Wanted, planned: PlannedConversion, config: ArtifactsConfig
    ) -> Published:
        return await self._restored(wanted, config) or await self._convert(wanted.source, planned, config)

    async def _restored(self, wanted: Wanted, config: ArtifactsConfig) -> Published | None:
        """From the durable copy, else from the first node that has it; None where nobody has it whole."""
        return await self._from_durable(wanted, config) or await self._from_nodes(wanted, config)

    async def _from_durable(self, wanted: Wanted, config: ArtifactsConfig) -> Published | None:
        uri = config.durable_uri
        manifest = await find_durable.remote(uri, wanted) if uri is not None else None
        if manifest is None:
            return None
        read = partial(durable_chunk.remote, uri, manifest)
        try:
            return await self._whole(wanted, manifest, read, durable_files.remote(uri, manifest))
        except RayTaskError as error:
            if not isinstance(nibble_cause(error), ArtifactError):
                raise
            await remove_durable.remote(uri, manifest.artifact_id)  # damaged: a good one is written in its place
            return None

    async def _from_nodes(self, wanted: Wanted, config: ArtifactsConfig) -> Published | None:
        nodes = alive_nodes()
        found = [on_node(find_cached, node).remote(config, wanted) for node in nodes]
        for node, manifest in zip(nodes, await asyncio.gather(*found, return_exceptions=True), strict=True):
            if isinstance(manifest, Manifest):
                read = partial(on_node(cached_chunk, node).remote, config, manifest)
                files = on_node(cached_files, node).remote(config, manifest)
                # A node that dies or evicts meanwhile is as good as one that never had it.
                with contextlib.suppress(RayError):
                    return await self._whole(wanted, manifest, read, files)
        return None

    async def _whole(self, wanted: Wanted, manifest: Manifest, read: Callable[[int], Any], files: Any) -> Published:
        """Published once all of it was read. `read` begins to read a chunk and gives it and its entry as a pair. Raises
        what a task raised, and CheckpointError, before it reads any, for what the wanted engine cannot run."""
        if not wanted.runs(manifest):
            wanted.refuse(manifest, await files)
        chunks = [read(index) for index in range(len(manifest.chunks))]
        await asyncio.gather(files, *(entry for _, entry in chunks))
        return self._publish(Published(manifest, [chunk for chunk, _ in chunks], files))

    def _publish(self, published: Published) -> Published:
        self._published[published.manifest.artifact_id] = published
        return published

    def forget(self, artifact_id: str) -> None:
        """For who found a chunk lost or damaged: the next `ensure` restores the artifact or converts again."""
        self._published.pop(artifact_id, None)

    async def _convert(self, source: str, planned: PlannedConversion, config: ArtifactsConfig) -> Published:
        artifact_id, plan = planned.artifact_id, planned.plan
        self._progress[artifact_id] = ConversionProgress(source=source, stage="convert", bytes=plan.bytes, nodes={})
        plan_ref, files_ref = ray.put(plan), ray.put(planned.files)
        shards = [shard_task.remote(plan_ref, index) for index in range(len(plan.shards))]
        chunks = [chunk for chunk, _ in shards]
        try:
            entries = await asyncio.gather(*(self._count(artifact_id, report) for _, report in shards))
            self._advance(artifact_id, stage="check")
            draft = draft_manifest(source, planned, entries)
            manifest = await check_task.remote(draft, files_ref, chunks, config)
        finally:
            del self._progress[artifact_id]
        return self._publish(Published(manifest, chunks, files_ref))

    async def _count(self, artifact_id: str, report_ref: Any) -> ChunkEntry:
        report: ShardReport = await report_ref
        progress = self._progress.get(artifact_id)
        if progress:  # else another shard failed: the conversion is no longer listed while the rest of it ends
            done = progress.nodes.get(report.node, 0) + report.entry.bytes
            self._advance(artifact_id, nodes={**progress.nodes, report.node: done})
        return report.entry

    def _advance(self, artifact_id: str, **changes: Any) -> None:
        self._progress[artifact_id] = self._progress[artifact_id].model_copy(update=changes)

    def manifests(self) -> list[Manifest]:
        return [published.manifest for published in self._published.values()]

    def progress(self) -> list[ConversionProgress]:
        """Of the conversions under way."""
        return list(self._progress.values())


def store_handle() -> Any:
    """The cluster's artifact store; the first who asks starts it. Needs a connection to Ray."""
    return (
        ray.remote(ArtifactStore)
        .options(
            name=STORE_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote()
    )


async def fetch_artifact(wanted: Wanted, config: ArtifactsConfig) -> CachedArtifact:
    """An artifact in this node's cache, converted and fetched where it must be. A chunk that was lost or damaged in
    the object store is made once again before this gives up with ArtifactError."""
    cache = NodeCache(config.cache_dir, config.cache_size)
    if wanted.artifact_id is not None:
        cached = await asyncio.to_thread(cache.cached, wanted.artifact_id)
        if cached is not None:
            return cached
    store = store_handle()
    for attempt in range(2):
        with raised_here():
            published: Published = await store.ensure.remote(wanted, config)
        try:
            return await asyncio.to_thread(fetch_published, published, config)
        except (ArtifactError, ObjectLostError):
            if attempt:
                raise
            await store.forget.remote(published.manifest.artifact_id)
    raise AssertionError("unreachable")


def fetch_published(published: Published, config: ArtifactsConfig) -> CachedArtifact:
    """As NodeCache.fetch; raises ObjectLostError where a chunk can neither be read nor made again."""
    files = ray.get(published.files)
    cache = NodeCache(config.cache_dir, config.cache_size)
    return cache.fetch(published.manifest, files, lambda index: memoryview(ray.get(published.chunks[index])))
