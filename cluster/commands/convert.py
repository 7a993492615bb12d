"""`nibble convert`: a checkpoint to INT4 on the cluster, and the artifact as files."""

from __future__ import annotations

from pathlib import Path

import ray
from rich.console import Console

from cluster.artifact_store import Published
from cluster.config import ArtifactsConfig
from cluster.digests import check_digest
from cluster.errors import ConfigError
from cluster.families import FamilyName
from cluster.manifest import Quantization
from cluster.node_cache import Staging, publish_folder, write_binary, write_files
from cluster.progress import ensure_artifacts
from cluster.ray_cluster import joined_cluster, local_cluster
from cluster.restoring import Wanted


def convert(
    source: str, family: FamilyName, quantization: Quantization, output: Path, address: str | None, console: Console
) -> None:
    """Raises ConfigError where `output` holds something already, CheckpointError or ConversionError."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output: {output} is there already and not an empty folder; name a new one")
    cluster = joined_cluster(address) if address else local_cluster(None)
    with cluster:
        (published,) = ensure_artifacts(
            [Wanted(source=source, family=family, quantization=quantization)], ArtifactsConfig(), console
        )
        export(published, output.absolute())
    console.print(f"wrote {output / published.manifest.binary}")


def export(published: Published, output: Path) -> None:
    """Writes the artifact to the folder `output`, whole or not at all."""
    manifest = published.manifest
    with Staging(output.parent, manifest.artifact_id) as staging:
        sha256 = write_binary(staging / manifest.binary, manifest, lambda i: memoryview(ray.get(published.chunks[i])))
        check_digest(manifest.binary, sha256, manifest.sha256)
        write_files(staging, ray.get(published.files))
        publish_folder(staging, output, manifest)
