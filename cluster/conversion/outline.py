"""What planning knows of an artifact before it is made: its tensors, its size, and the model that they are.

An outline reads no weights and needs no Ray: a configuration can be refused, or `--dry-run` answered, in a moment.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.artifacts.manifest import Manifest, TensorEntry
from cluster.artifacts.node_cache import NodeCache
from cluster.checkpoints.folder import read_config
from cluster.checkpoints.hyperparameters import artifact_hyperparameters, read_hyperparameters, require_engine
from cluster.checkpoints.sources import is_repository, open_source
from cluster.config import ArtifactsConfig
from cluster.conversion.plan import plan_conversion
from cluster.conversion.wanted import Wanted
from cluster.families.architecture import Hyperparameters


class Outline(NamedTuple):
    """`bytes` of the binary; `shards`: tasks that its conversion takes; `cached`: this node's cache has it."""

    wanted: Wanted
    model: Hyperparameters
    tensors: tuple[TensorEntry, ...]
    bytes: int
    shards: int
    cached: bool


def read_outline(wanted: Wanted, config: ArtifactsConfig) -> Outline:
    """Raises CheckpointError, before a weight is read, for what cannot be converted and for what the wanted engine
    cannot run. A Hub repository whose artifact this node's cache has is not asked for."""
    if is_repository(wanted.source):
        cache = NodeCache(config.cache_dir)
        for manifest in cache.manifests():
            if wanted.is_met_by(manifest):
                return _cached_outline(wanted, manifest, cache)
    with open_source(wanted.source).planning() as (checkpoint, _):
        plan = plan_conversion(checkpoint, wanted.family, wanted.quantization, config.shard_size)
        require_engine(wanted.engine, plan.obstacles)
        model = read_hyperparameters(checkpoint, read_config(checkpoint), wanted.family, wanted.quantization)
    return Outline(wanted, model, plan.entries, plan.bytes, len(plan.shards), cached=False)


def _cached_outline(wanted: Wanted, manifest: Manifest, cache: NodeCache) -> Outline:
    model = artifact_hyperparameters(cache.folder / manifest.artifact_id, manifest)
    require_engine(wanted.engine, model.obstacles)
    return Outline(wanted, model, manifest.tensors, manifest.bytes, len(manifest.chunks), cached=True)
