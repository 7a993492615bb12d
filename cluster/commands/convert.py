"""`nibble convert`: a checkpoint to INT4, on this machine or on a cluster, and the artifact as files."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from cluster.artifacts.digests import check_digest
from cluster.artifacts.manifest import Manifest, Quantization
from cluster.artifacts.node_cache import Staging, publish_folder, write_binary, write_files
from cluster.commands.preflight import describe_outline
from cluster.config import ArtifactsConfig
from cluster.conversion.local import convert_to_folder
from cluster.conversion.outline import read_outline
from cluster.conversion.wanted import Wanted
from cluster.display import ConversionDisplay
from cluster.errors import ConfigError
from cluster.families import FamilyName


def convert(
    source: str,
    family: FamilyName,
    quantization: Quantization,
    output: Path,
    address: str | None,
    console: Console,
    dry_run: bool = False,
) -> None:
    """On the cluster at `address`, else on this machine. Raises ConfigError where `output` holds something already,
    CheckpointError, ConversionError, or ArtifactError where it cannot be written. `dry_run`: plans it here, says what
    would be written, and writes nothing."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output: {output} is there already and not an empty folder; name a new one")
    if dry_run:
        outline = read_outline(Wanted(source=source, family=family, quantization=quantization), ArtifactsConfig())
        console.print(describe_outline(outline))
        for _, obstacle in outline.model.obstacles:
            console.print(obstacle)
        return
    wanted, target = Wanted(source=source, family=family, quantization=quantization), output.absolute()
    if address is not None:
        manifest = convert_on_cluster(wanted, target, address, console)
    else:
        with ConversionDisplay(console) as display:
            manifest = convert_to_folder(wanted, ArtifactsConfig(), target, display)
    console.print(f"wrote {output / manifest.binary}")


def convert_on_cluster(wanted: Wanted, output: Path, address: str, console: Console) -> Manifest:
    """Writes the artifact to the folder `output`, whole or not at all."""
    import ray  # a second and 60 MB, which only this way costs

    from cluster.artifact_store import chunk_reader
    from cluster.progress import ensure_artifacts
    from cluster.ray_cluster import joined_cluster

    with joined_cluster(address):
        (published,) = ensure_artifacts([wanted], ArtifactsConfig(), console, with_chunks=True)
        manifest = published.manifest
        with Staging(output.parent, manifest.artifact_id) as staging:
            sha256 = write_binary(staging / manifest.binary, manifest, chunk_reader(published))
            check_digest(manifest.binary, sha256, manifest.sha256)
            write_files(staging, ray.get(published.files))
            publish_folder(staging, output, manifest)
    return manifest
