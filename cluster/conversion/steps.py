"""The steps that a conversion takes in a cluster as on one machine, without Ray: plan and address, find the weights,
describe the result, and run it in a child process before anybody gets it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cluster.artifacts.digests import bytes_sha256
from cluster.artifacts.manifest import MANIFEST_FILE, ChunkEntry, Manifest, binary_name
from cluster.artifacts.node_cache import flush, write_files
from cluster.checkpoints.folder import checkpoint_digest, read_companion
from cluster.checkpoints.hyperparameters import require_engine
from cluster.checkpoints.sources import open_source
from cluster.config import ArtifactsConfig
from cluster.conversion.plan import CONVERTER_VERSION, ConversionPlan, plan_conversion
from cluster.conversion.wanted import Wanted
from cluster.errors import ConversionError
from cluster.machine.isa import available_cores

# The check loads the artifact into bigdl-llm's library, which aborts its process on files it does not like: a child.
# A program of `deployments`, not an import: `cluster` stands below it.
CHECK_COMMAND = (sys.executable, "-m", "deployments.engines.check")
CHECK_TIMEOUT_S = 900
DIGESTS_FOLDER = "digests"  # in the node's cache
CHECK_THREADS = 2  # for a second or two more than the CPU its task reserves


class PlannedConversion(NamedTuple):
    artifact_id: str
    plan: ConversionPlan
    files: dict[str, bytes]


def plan_wanted(wanted: Wanted, config: ArtifactsConfig) -> PlannedConversion:
    """Every refusal of a checkpoint happens here, before a weight is read; also of one that the wanted engine cannot
    run."""
    opened = open_source(wanted.source)
    with opened.planning() as (checkpoint, sha256):
        plan = plan_conversion(checkpoint, wanted.family, wanted.quantization, config.shard_size)
        require_engine(wanted.engine, plan.obstacles)
        files = {name: read_companion(checkpoint / name) for name in plan.files}
        digest = checkpoint_digest(checkpoint, sha256, config.cache_dir / DIGESTS_FOLDER)
    plan = plan.model_copy(update={"checkpoint": opened.pinned})
    address = f"{digest} {wanted.family} {wanted.quantization} {CONVERTER_VERSION}"
    return PlannedConversion(bytes_sha256(address.encode())[:32], plan, files)


def with_weights(plan: ConversionPlan, first: int, stop: int) -> ConversionPlan:
    """The plan with a folder of this machine as its checkpoint, which has what the shards [first, stop) read;
    downloaded where it is not here yet."""
    tensors = plan.tensors[plan.shards[first].first : plan.shards[stop - 1].stop]
    folder = open_source(plan.checkpoint).files(sorted({tensor.source.file for tensor in tensors}))
    return plan.model_copy(update={"checkpoint": str(folder)})


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


def complete(staging: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Puts the rest of an artifact beside its binary, and tries it. Raises ConversionError where the check refuses it,
    ArtifactError where the disk is full."""
    write_files(staging, {**files, MANIFEST_FILE: manifest.model_dump_json().encode()})
    with ThreadPoolExecutor(1) as beside:
        flushed = beside.submit(flush, staging / manifest.binary)  # the check leaves the disk idle
        run_check(staging, manifest)
        flushed.result()


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
