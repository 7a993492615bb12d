"""A conversion as Ray tasks: plan, convert each shard, assemble and check. Nothing of it runs in a driver or a replica.

The artifact store's actor submits the tasks and so owns what they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from cluster.artifacts.digests import bytes_sha256
from cluster.artifacts.manifest import ChunkEntry, Manifest, Record
from cluster.artifacts.node_cache import NodeCache, Staging, write_binary
from cluster.config import ArtifactsConfig
from cluster.conversion.plan import ConversionPlan
from cluster.conversion.shard import convert_shard
from cluster.conversion.steps import PlannedConversion, complete, plan_wanted, with_weights
from cluster.conversion.wanted import Wanted

# A resource of a local node, its cores: its CPUs are counted for replicas, which may be more than it has cores.
CONVERSION_CORES = "nibble_conversion_cores"
TASK_RETRIES = 3  # on the loss of a worker or a node; an error the task raised itself is final


def own_core() -> dict[str, Any]:
    """Options of a task that computes on one core."""
    if CONVERSION_CORES in ray.cluster_resources():
        return {"num_cpus": 0, "resources": {CONVERSION_CORES: 1}}
    return {"num_cpus": 1}


class ShardReport(Record):
    """What a shard's task says beside the bytes: their entry in the manifest, and the node that made them."""

    entry: ChunkEntry
    node: str


@ray.remote(num_cpus=0, max_retries=TASK_RETRIES)
def plan_task(wanted: Wanted, config: ArtifactsConfig) -> PlannedConversion:
    return plan_wanted(wanted, config)


@ray.remote(max_retries=TASK_RETRIES, num_returns=2, scheduling_strategy="SPREAD")
def shard_task(plan: ConversionPlan, index: int) -> tuple[Any, ShardReport]:
    """One shard's bytes, a uint8 array, which goes to the object store as it is."""
    shard = plan.shards[index]
    data = convert_shard(with_weights(plan, index, index + 1), index)
    entry = ChunkEntry(offset=shard.offset, bytes=shard.bytes, sha256=bytes_sha256(data))
    return data, ShardReport(entry=entry, node=ray.util.get_node_ip_address())


@ray.remote(max_retries=TASK_RETRIES)
def check_task(draft: Manifest, files: dict[str, bytes], chunks: Sequence[Any], config: ArtifactsConfig) -> Manifest:
    """Assembles the artifact on this node, runs it in a child process and keeps it in the node cache if it is sound.

    `draft` lacks only the binary's sha256; `chunks` are object references, got one at a time. Raises ConversionError
    where the check refuses the artifact; nothing stays then.
    """
    cache = NodeCache(config.cache_dir, config.cache_size)
    with Staging(cache.folder, draft.artifact_id) as staging:
        sha256 = write_binary(staging / draft.binary, draft, lambda index: memoryview(ray.get(chunks[index])))
        manifest = draft.model_copy(update={"sha256": sha256})
        complete(staging, manifest, files)
        with cache.locked(manifest.artifact_id):
            cache.admit(staging, manifest).release()
    return manifest
