"""A conversion as Ray tasks: plan, convert each shard, assemble and check. Nothing of it runs in a driver or a replica.

The artifact store's actor submits the tasks and so owns what they return.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ray

from cluster.checkpoint import checkpoint_digest
from cluster.config import ArtifactsConfig
from cluster.digests import bytes_sha256
from cluster.errors import ConversionError
from cluster.families import EngineName, FamilyName
from cluster.hyperparameters import require_engine
from cluster.isa import available_cores
from cluster.manifest import MANIFEST_FILE, ChunkEntry, Manifest, Quantization, Record, binary_name
from cluster.node_cache import NodeCache, Staging, flush, write_binary, write_files
from cluster.plan import CONVERTER_VERSION, ConversionPlan, plan_conversion
from cluster.shard import convert_shard
from cluster.sources import open_source

# The check loads the artifact into bigdl-llm's library, which aborts its process on files it does not like: a child.
# A program of `deployments`, not an import: `cluster` stands below it.
CHECK_COMMAND = (sys.executable, "-m", "deployments.engines.check")
CHECK_TIMEOUT_S = 900
CHECK_THREADS = 2  # for a second or two more than the CPU its task reserves

TASK_RETRIES = 3  # on the loss of a worker or a node; an error the task raised itself is final


class ShardReport(Record):
    """What a shard's task says beside the bytes: their entry in the manifest, and the node that made them."""

    entry: ChunkEntry
    node: str


class PlannedConversion(NamedTuple):
    artifact_id: str
    plan: ConversionPlan
    files: dict[str, bytes]


@ray.remote(num_cpus=0, max_retries=TASK_RETRIES)
def plan_task(
    source: str, family: FamilyName, quantization: Quantization, config: ArtifactsConfig, engine: EngineName | None
) -> PlannedConversion:
    """Every refusal of a checkpoint happens here, before a weight is read; also of one that `engine` cannot run."""
    opened = open_source(source)
    with opened.planning() as (checkpoint, sha256):
        plan = plan_conversion(checkpoint, family, quantization, config.shard_size)
        require_engine(engine, plan.obstacles)
        files = {name: (checkpoint / name).read_bytes() for name in plan.files}
        address = f"{checkpoint_digest(checkpoint, sha256)} {family} {quantization} {CONVERTER_VERSION}"
    plan = plan.model_copy(update={"checkpoint": opened.pinned})
    return PlannedConversion(bytes_sha256(address.encode())[:32], plan, files)


@ray.remote(num_cpus=1, max_retries=TASK_RETRIES, num_returns=2, scheduling_strategy="SPREAD")
def shard_task(plan: ConversionPlan, index: int) -> tuple[Any, ShardReport]:
    """One shard's bytes, a uint8 array, which goes to the object store as it is."""
    shard = plan.shards[index]
    needed = sorted({tensor.source.file for tensor in plan.tensors[shard.first : shard.stop]})
    folder = open_source(plan.checkpoint).files(needed)
    data = convert_shard(plan.model_copy(update={"checkpoint": str(folder)}), index)
    entry = ChunkEntry(offset=shard.offset, bytes=shard.bytes, sha256=bytes_sha256(data))
    return data, ShardReport(entry=entry, node=ray.util.get_node_ip_address())


@ray.remote(num_cpus=1, max_retries=TASK_RETRIES)
def check_task(draft: Manifest, files: dict[str, bytes], chunks: Sequence[Any], config: ArtifactsConfig) -> Manifest:
    """Assembles the artifact on this node, runs it in a child process and keeps it in the node cache if it is sound.

    `draft` lacks only the binary's sha256; `chunks` are object references, got one at a time. Raises ConversionError
    where the check refuses the artifact; nothing stays then.
    """
    cache = NodeCache(config.cache_dir, config.cache_size)
    with Staging(cache.folder, draft.artifact_id) as staging, ThreadPoolExecutor(1) as beside:
        sha256 = write_binary(staging / draft.binary, draft, lambda index: memoryview(ray.get(chunks[index])))
        manifest = draft.model_copy(update={"sha256": sha256})
        write_files(staging, files)
        (staging / MANIFEST_FILE).write_text(manifest.model_dump_json())
        flushed = beside.submit(flush, staging / manifest.binary)  # the check leaves the disk idle
        run_check(staging, manifest)
        flushed.result()
        with cache.locked(manifest.artifact_id):
            cache.admit(staging, manifest)
    return manifest


def run_check(folder: Path, manifest: Manifest) -> None:
    """Raises ConversionError with what the child said, or the signal it died of."""
    threads = min(CHECK_THREADS, available_cores())
    command = [*CHECK_COMMAND, str(folder), f"--threads={threads}"]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConversionError(f"{manifest.source}: the check did not end within {CHECK_TIMEOUT_S} s") from None
    if child.returncode == 0:
        return
    how = f"was ended by signal {-child.returncode}" if child.returncode < 0 else f"ended with {child.returncode}"
    said = " | ".join(child.stderr.strip().splitlines()[-3:]) or "nothing"
    raise ConversionError(
        f"{manifest.source}: converted to {manifest.family} {manifest.quantization}, but a child process that loaded"
        f" the result {how} and said: {said}. The artifact was not published"
    )


def draft_manifest(source: str, planned: PlannedConversion, chunks: Sequence[ChunkEntry]) -> Manifest:
    plan = planned.plan
    return Manifest(
        artifact_id=planned.artifact_id,
        converter_version=CONVERTER_VERSION,
        family=plan.family,
        quantization=plan.quantization,
        engines=plan.engines,
        source=source,
        binary=binary_name(plan.family, plan.quantization),
        bytes=plan.bytes,
        sha256="",
        chunks=tuple(chunks),
        tensors=plan.entries,
        files={name: bytes_sha256(content) for name, content in planned.files.items()},
    )
