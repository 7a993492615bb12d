"""A conversion on this machine alone, by threads of this process: the same plan, shards and check as in a cluster,
without Ray. Each thread writes its shard to its place in the binary a slab at a time, so that memory stays small.

What the node cache holds is not converted again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from cluster.artifacts.digests import check_digest, update_sha256
from cluster.artifacts.manifest import ChunkEntry, Manifest, binary_name
from cluster.artifacts.node_cache import (
    CachedArtifact,
    NodeCache,
    Staging,
    publish_folder,
    write_binary,
    write_files,
    written,
)
from cluster.checkpoints.folder import CONFIG_FILE
from cluster.checkpoints.sources import is_repository
from cluster.config import ArtifactsConfig
from cluster.conversion.plan import ConversionPlan
from cluster.conversion.quantize import quantizer
from cluster.conversion.shard import shard_pieces
from cluster.conversion.steps import PlannedConversion, complete, draft_manifest, plan_wanted, with_weights
from cluster.conversion.wanted import Wanted
from cluster.display import ConversionDisplay, ConversionProgress, describe
from cluster.machine.isa import available_cores

NODE = "this machine"  # in the place of a node's address


def convert_to_folder(wanted: Wanted, config: ArtifactsConfig, output: Path, display: ConversionDisplay) -> Manifest:
    """Writes the artifact to the folder `output`, whole or not at all, and nowhere else. Raises CheckpointError,
    ConversionError, or ArtifactError where it cannot be written."""
    found = find_or_plan(wanted, config, display)
    if isinstance(found, CachedArtifact):
        try:
            return copy_out(found.folder, output)
        finally:
            found.release()
    with Staging(output.parent, found.artifact_id) as staging:
        manifest = make_artifact(staging, wanted.source, found, display)
        publish_folder(staging, output, manifest)
    return manifest


def convert_to_cache(wanted: Wanted, config: ArtifactsConfig, display: ConversionDisplay) -> CachedArtifact:
    """The artifact in this node's cache; raises as convert_to_folder does."""
    found = find_or_plan(wanted, config, display)
    if isinstance(found, CachedArtifact):
        return found
    cache = NodeCache(config.cache_dir, config.cache_size)
    with Staging(cache.folder, found.artifact_id) as staging:
        manifest = make_artifact(staging, wanted.source, found, display)
        with cache.locked(found.artifact_id):
            return cache.admit(staging, manifest)


def find_or_plan(
    wanted: Wanted, config: ArtifactsConfig, display: ConversionDisplay
) -> CachedArtifact | PlannedConversion:
    """What the node cache has undamaged, else the plan to make it. A Hub repository is known there by its name, so
    that a Hub that is down does not matter; but a folder's content may have changed under its name."""
    cache = NodeCache(config.cache_dir)
    cached = find_cached(cache, wanted, display) if is_repository(wanted.source) else None
    if cached is not None:
        return cached
    planned = plan_wanted(wanted, config)
    addressed = wanted.model_copy(update={"artifact_id": planned.artifact_id})
    return find_cached(cache, addressed, display) or planned


def find_cached(cache: NodeCache, wanted: Wanted, display: ConversionDisplay) -> CachedArtifact | None:
    for manifest in cache.manifests():
        if wanted.is_met_by(manifest) and (cached := cache.cached(manifest.artifact_id)):
            if not wanted.runs(manifest):
                files = {CONFIG_FILE: (cached.folder / CONFIG_FILE).read_bytes()}
                cached.release()
                wanted.refuse(manifest, files)
            display.say(f"found in the node cache {describe(manifest)}")
            return cached
    return None


def copy_out(folder: Path, output: Path) -> Manifest:
    """Verifies every chunk on its way."""
    manifest = Manifest.read(folder)
    with Staging(output.parent, manifest.artifact_id) as staging:
        with (folder / manifest.binary).open("rb") as file:
            sha256 = write_binary(staging / manifest.binary, manifest, lambda i: file.read(manifest.chunks[i].bytes))
        check_digest(manifest.binary, sha256, manifest.sha256)
        write_files(staging, {name: (folder / name).read_bytes() for name in manifest.files})
        publish_folder(staging, output, manifest)
    return manifest


def make_artifact(staging: Path, source: str, planned: PlannedConversion, display: ConversionDisplay) -> Manifest:
    """A complete artifact in `staging` that has passed the check."""
    plan = with_weights(planned.plan, 0, len(planned.plan.shards))
    progress = ConversionProgress(source=source, stage="convert", bytes=plan.bytes, nodes={NODE: 0})

    def report(done: int) -> None:
        display.update([progress.model_copy(update={"nodes": {NODE: done}})])

    chunks, sha256 = write_shards(plan, staging / binary_name(plan.family, plan.quantization), report)
    manifest = draft_manifest(source, planned, chunks).model_copy(update={"sha256": sha256})
    display.update([progress.model_copy(update={"stage": "check", "nodes": {NODE: plan.bytes}})])
    complete(staging, manifest, planned.files)
    display.say(f"converted {describe(manifest)}")
    return manifest


def write_shards(plan: ConversionPlan, binary: Path, report: Callable[[int], None]) -> tuple[list[ChunkEntry], str]:
    """Converts all shards into the file `binary`; their entries and the file's sha256. On an error, or Ctrl-C, it ends
    once the shards under way are done."""
    native = quantizer(plan.family)  # the threads find it loaded
    whole, entries = hashlib.sha256(), []
    pool = ThreadPoolExecutor(available_cores(), initializer=native.use_one_thread)
    try:
        with written(binary), binary.open("wb+", buffering=0) as file:
            for shard in [pool.submit(write_shard, plan, shard.index, file) for shard in plan.shards]:
                entries.append(shard.result())
                # Follows in the order of the file, from the pages that were written a moment ago.
                update_sha256(whole, file, entries[-1].bytes)
                report(entries[-1].offset + entries[-1].bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    return entries, whole.hexdigest()


def write_shard(plan: ConversionPlan, index: int, file: FileIO) -> ChunkEntry:
    """Its position in `file` stays what it was. Raises OSError where the file cannot be written."""
    shard, sha256 = plan.shards[index], hashlib.sha256()
    offset = shard.offset
    for piece in shard_pieces(plan, index):
        left = piece.data
        sha256.update(left)
        while left:  # a disk that is almost full takes only a part
            count = os.pwrite(file.fileno(), left, offset)
            left, offset = left[count:], offset + count
    return ChunkEntry(offset=shard.offset, bytes=shard.bytes, sha256=sha256.hexdigest())
