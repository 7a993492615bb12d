"""The artifact store: a named detached actor that converts checkpoints once, knows which artifacts there are, and owns
their chunks in the object store.

An artifact that a node holds in its cache needs no object store, as long as only replicas of that node want it. Its
chunks are read into the object store when another node asks for them.

Ray ties an object's life to the process that owns it. The actor submits the conversion's tasks, so it owns the chunks:
they outlive the driver that asked for them and the worker that made them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from cluster.artifacts.counters import StoreCounters
from cluster.artifacts.manifest import ChunkEntry, Manifest
from cluster.artifacts.node_cache import CachedArtifact, NodeCache, ReadChunk
from cluster.checkpoints.sources import is_repository
from cluster.config import ArtifactsConfig
from cluster.conversion.steps import PlannedConversion, draft_manifest
from cluster.conversion.wanted import Wanted
from cluster.conversion_tasks import ShardReport, check_task, own_core, plan_task, shard_task
from cluster.display import ConversionProgress
from cluster.errors import ArtifactError
from cluster.ray_errors import nibble_cause, raised_here
from cluster.restoring import (
    alive_nodes,
    cached_chunk,
    cached_files,
    durable_chunk,
    durable_files,
    find_cached,
    find_durable,
    has_durable,
    keep_durable,
    on_node,
    remove_durable,
)
from cluster.serve_settings import ARTIFACT_STORE, NAMESPACE

# At most so many tasks that reserve no CPU, and so run on a node full of replicas, keep a place busy at once. Each is a
# worker process of 100 MB, and twice a chunk while it reads one.
TASKS_AT_ONCE = 4


class Published(NamedTuple):
    """A published artifact: `chunks` are references to its bytes, `files` one to the files beside the binary. Without
    chunks, it lies in the cache of at least one node, and nowhere in the object store."""

    manifest: Manifest
    chunks: list[Any] | None
    files: Any


class ArtifactStore:
    """Runs as a Ray actor; `store_handle` finds or starts it. It keeps nothing that it could not find again: after its
    own death it restores an artifact when somebody asks for it."""

    def __init__(self) -> None:
        self._published: dict[str, Published] = {}  # with their chunks
        self._held: dict[str, Manifest] = {}  # found in the cache of a node
        self._running: dict[tuple[str, str], asyncio.Task[Published]] = {}
        self._progress: dict[str, ConversionProgress] = {}
        self._counters = StoreCounters()
        self._turns: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(TASKS_AT_ONCE))

    async def ensure(self, wanted: Wanted, config: ArtifactsConfig, with_chunks: bool = False) -> Published:
        """The artifact of a checkpoint: as published before, else from a node's cache, else from the durable copy, else
        converted now. Who asks meanwhile waits for the same. `with_chunks`: in the object store; else it is enough that
        a node has it in its cache.

        Raises CheckpointError, also before anything is read for what the wanted engine cannot run; ConversionError; or,
        where the durable copy cannot be written, ArtifactError."""
        with raised_here():
            published = await self._from_anywhere(wanted, config, with_chunks)
            uri, manifest = config.durable_uri, published.manifest
            if uri is not None and not await self._in_turn(uri, lambda: has_durable.remote(uri, manifest)):
                addressed = wanted.model_copy(update={"artifact_id": manifest.artifact_id})
                published = await self._from_anywhere(addressed, config, with_chunks=True)
                _, chunks, files = published
                await self._in_turn(uri, lambda: keep_durable.remote(uri, manifest, files, chunks))
        return published

    async def _from_anywhere(self, wanted: Wanted, config: ArtifactsConfig, with_chunks: bool) -> Published:
        # By its address, or by the name of a Hub repository, an artifact is found without its checkpoint, which may lie
        # on a Hub that is down; but a folder's content may have changed under its name.
        known = wanted.artifact_id is not None or is_repository(wanted.source)
        published = await self._found(wanted, config, with_chunks) if known else None
        if published is not None:
            return published
        planned: PlannedConversion = await self._in_turn("plan", lambda: plan_task.remote(wanted, config))
        artifact_id = planned.artifact_id
        addressed = wanted.model_copy(update={"artifact_id": artifact_id})
        convert = partial(self._convert, wanted.source, planned, config)
        return await self._found(addressed, config, with_chunks) or await self._once(artifact_id, "convert", convert)

    async def _in_turn(self, place: str, submit: Callable[[], Any]) -> Any:
        """The result of a task that reserves no CPU. `place`: the node, or the service, that it keeps busy."""
        async with self._turns[place]:
            return await submit()

    async def _once(
        self, artifact_id: str, place: str, make: Callable[[], Coroutine[Any, Any, Published]]
    ) -> Published:
        """With chunks. What is published meanwhile, or is being made from the same place for another caller, is not
        made again."""
        if artifact_id in self._published:
            return self._published[artifact_id]
        key = artifact_id, place
        if key not in self._running:
            making = asyncio.create_task(make())
            making.add_done_callback(lambda _: self._running.pop(key))
            self._running[key] = making
        return await asyncio.shield(self._running[key])

    async def _found(self, wanted: Wanted, config: ArtifactsConfig, with_chunks: bool) -> Published | None:
        """Without a conversion; None where nobody has it whole."""
        for published in self._published.values():
            if wanted.is_met_by(published.manifest):
                await require_runs(wanted, published.manifest, published.files)
                return published
        return await self._from_nodes(wanted, config, with_chunks) or await self._from_durable(wanted, config)

    async def _from_nodes(self, wanted: Wanted, config: ArtifactsConfig, with_chunks: bool) -> Published | None:
        """From the first node that can give it. A node that dies or evicts meanwhile never had it."""
        for answer in asyncio.as_completed([self._held_by(node, wanted, config) for node in alive_nodes()]):
            node, held = await answer
            if held is None:
                continue
            with contextlib.suppress(RayError):
                await require_runs(wanted, held.manifest, held.files)
                self._held[held.manifest.artifact_id] = held.manifest
                if not with_chunks:
                    return held
                chunk = partial(on_node(cached_chunk, node).remote, config, held.manifest)
                read = partial(self._read, "node_cache", node, held.manifest, chunk, held.files)
                return await self._once(held.manifest.artifact_id, node, read)
        return None

    async def _held_by(self, node: str, wanted: Wanted, config: ArtifactsConfig) -> tuple[str, Published | None]:
        """Without chunks; None where the node has no undamaged copy."""
        with contextlib.suppress(RayError):
            manifest = await self._in_turn(node, lambda: on_node(find_cached, node).remote(config, wanted))
            if manifest is not None:
                return node, Published(manifest, None, on_node(cached_files, node).remote(config, manifest))
        return node, None

    async def _from_durable(self, wanted: Wanted, config: ArtifactsConfig) -> Published | None:
        uri = config.durable_uri
        if uri is None:
            return None
        manifest = await self._in_turn(uri, lambda: find_durable.remote(uri, wanted))
        if manifest is None:
            return None
        files = durable_files.remote(uri, manifest)
        read = partial(self._read, "durable", uri, manifest, partial(durable_chunk.remote, uri, manifest), files)
        try:
            await require_runs(wanted, manifest, files)
            return await self._once(manifest.artifact_id, uri, read)
        except RayTaskError as error:
            if not isinstance(nibble_cause(error), ArtifactError):
                raise
            await remove_durable.remote(uri, manifest.artifact_id)  # damaged: a good one is written in its place
            return None

    async def _read(
        self, source: str, place: str, manifest: Manifest, chunk: Callable[[int], Any], files: Any
    ) -> Published:
        """Published once all of it was read, a few chunks at a time. `source`: for the counters. `chunk(i)` begins to
        read one, and gives it and its entry as a pair. Raises what a task raised."""

        async def read_one(index: int) -> Any:
            async with self._turns[place]:
                data, entry = chunk(index)
                await entry
                return data

        reads = [asyncio.create_task(read_one(index)) for index in range(len(manifest.chunks))]
        try:
            _, *chunks = await asyncio.gather(files, *reads)
        finally:
            for each in reads:
                each.cancel()  # where one failed, the others that have not begun
        self._counters.reads[source] += 1
        return self._publish(Published(manifest, chunks, files))

    def _publish(self, published: Published) -> Published:
        self._published[published.manifest.artifact_id] = published
        return published

    def forget(self, artifact_id: str) -> None:
        """For who found a chunk lost or damaged: the next `ensure` restores the artifact or converts again."""
        self._published.pop(artifact_id, None)
        self._held.pop(artifact_id, None)

    async def _convert(self, source: str, planned: PlannedConversion, config: ArtifactsConfig) -> Published:
        artifact_id, plan = planned.artifact_id, planned.plan
        self._progress[artifact_id] = ConversionProgress(source=source, stage="convert", bytes=plan.bytes, nodes={})
        plan_ref, files_ref = ray.put(plan), ray.put(planned.files)
        shards = [shard_task.options(**own_core()).remote(plan_ref, index) for index in range(len(plan.shards))]
        chunks = [chunk for chunk, _ in shards]
        started, result = time.monotonic(), "failed"
        try:
            entries = await asyncio.gather(*(self._count(artifact_id, report) for _, report in shards))
            self._advance(artifact_id, stage="check")
            draft = draft_manifest(source, planned, entries)
            manifest = await check_task.options(**own_core()).remote(draft, files_ref, chunks, config)
            result = "done"
            self._counters.conversion_bytes += manifest.bytes
            self._counters.conversion_s += time.monotonic() - started
        finally:
            self._counters.conversions[result] += 1
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

    def fetched(self, source: str) -> None:
        """For who took an artifact: from its node's cache, or the object store."""
        self._counters.fetches[source] += 1

    def counters(self) -> dict[str, Any]:
        """The fields of StoreCounters."""
        return asdict(self._counters)

    def manifests(self) -> list[Manifest]:
        published = {artifact_id: published.manifest for artifact_id, published in self._published.items()}
        return list((self._held | published).values())

    def progress(self) -> list[ConversionProgress]:
        """Of the conversions under way."""
        return list(self._progress.values())


async def require_runs(wanted: Wanted, manifest: Manifest, files: Any) -> None:
    """Raises CheckpointError where the wanted engine cannot run the artifact. `files`: as `Published` has it."""
    if not wanted.runs(manifest):
        wanted.refuse(manifest, await files)


def store_handle() -> Any:
    """The cluster's artifact store; the first who asks starts it. Needs a connection to Ray."""
    return (
        ray.remote(ArtifactStore)
        .options(
            name=ARTIFACT_STORE,
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
    """An artifact in this node's cache; what is there already costs no look at the object store. Otherwise converted
    and fetched where it must be. A chunk that was lost or damaged in the object store is made once again before this
    gives up with ArtifactError."""
    store, cache = store_handle(), NodeCache(config.cache_dir, config.cache_size)
    artifact_id = wanted.artifact_id
    if artifact_id is None:
        with raised_here():
            artifact_id = (await store.ensure.remote(wanted, config)).manifest.artifact_id
    cached = await asyncio.to_thread(cache.cached, artifact_id)
    if cached is not None:
        store.fetched.remote("node_cache")
        return cached
    addressed = wanted.model_copy(update={"artifact_id": artifact_id})
    for attempt in range(2):
        with raised_here():
            published: Published = await store.ensure.remote(addressed, config, with_chunks=True)
        try:
            artifact = await asyncio.to_thread(fetch_published, published, config)
            store.fetched.remote("object_store")
            return artifact
        except (ArtifactError, ObjectLostError):
            if attempt:
                raise
            await store.forget.remote(published.manifest.artifact_id)
    raise AssertionError("unreachable")


def fetch_published(published: Published, config: ArtifactsConfig) -> CachedArtifact:
    """As NodeCache.fetch, of an artifact with chunks; raises ObjectLostError where a chunk can neither be read nor made
    again. Nodes that begin together begin with different chunks, and then have them for each other: in one order, all
    would get each chunk from the one node that has it (docs/scaling.md)."""
    cache = NodeCache(config.cache_dir, config.cache_size)
    first = random.randrange(max(1, len(published.manifest.chunks)))
    return cache.fetch(published.manifest, ray.get(published.files), chunk_reader(published), first)


def chunk_reader(published: Published) -> ReadChunk:
    """Gets the chunks of an artifact in the object store, one at a time."""
    chunks = published.chunks
    if chunks is None:
        raise ArtifactError(f"{published.manifest.artifact_id}: it was asked for without its chunks")
    return lambda index: memoryview(ray.get(chunks[index]))
