"""What the tests of conversion share: small checkpoints, and asking the artifact store."""

from __future__ import annotations

from pathlib import Path

import ray

from cluster.artifact_store import Published, store_handle
from cluster.config import ArtifactsConfig
from cluster.conversion.wanted import Wanted
from cluster.ray_errors import raised_here
from tests.random_checkpoint import Shape


def small_bloom(seed: int) -> Shape:
    """As small as the library loads: of smaller ones it miscounts the memory, and dies (which the check tells)."""
    return Shape("bloom", width=192, heads=6, layers=2, seed=seed)


def ensure(source: Path | str, cache: Path, durable: Path | None = None, with_chunks: bool = True) -> Published:
    with raised_here():
        return ray.get(store_handle().ensure.remote(wanted(source), artifacts(cache, durable), with_chunks))


def wanted(source: Path | str) -> Wanted:
    return Wanted(source=str(source), family="bloom", quantization="q4_0")


def artifacts(cache: Path, durable: Path | None = None) -> ArtifactsConfig:
    return ArtifactsConfig(cache_dir=cache, durable_uri=f"file://{durable}" if durable else None)
