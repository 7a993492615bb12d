"""How much memory a replica needs at least, from what planning knows: so that what cannot fit on a node is refused with
figures before anything is converted or loaded, and not killed by the kernel afterwards.

The figures are lower bounds. A refusal is therefore always right; a model that passes may still be slow where the page
cache has no room for its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.artifacts.ggml import data_bytes
from cluster.artifacts.manifest import Manifest, TensorEntry
from cluster.checkpoints.hyperparameters import artifact_hyperparameters
from cluster.errors import ConfigError
from cluster.families import FAMILIES
from cluster.families.architecture import Hyperparameters
from cluster.model_config import ModelConfig, OpenvinoConfig
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS
from deployments.engines.products.layout import wants_tiles

GIB = 1 << 30
PROCESS_BYTES = 200 << 20  # of a replica's interpreter and libraries: the least seen with the demo models
NUMBER_BYTES = 2  # of a key or a value: fp16 in both engines
# Its rows are looked up, not multiplied: no engine packs it.
LOOKED_UP = frozenset(family.container.embedding for family in FAMILIES.values())

ADVICE = "a shorter context, a smaller kv_cache or model, fewer replicas, or a node with more memory"


class ReplicaNeeds(NamedTuple):
    """Bytes. `shared`: files that all replicas of a node map; `packed`: a replica's own copy of weights, in an order
    that its engine multiplies faster; `cache`: its KV cache; `process`: everything else."""

    shared: int
    packed: int
    cache: int
    process: int = PROCESS_BYTES

    @property
    def own(self) -> int:
        return self.packed + self.cache + self.process

    @property
    def total(self) -> int:
        return self.shared + self.own

    def __str__(self) -> str:
        packed = f" + {gib(self.packed)} packed" if self.packed else ""
        return (
            f"{gib(self.total)} GiB ({gib(self.shared)} weights, shared by the replicas of a node{packed}"
            f" + {gib(self.cache)} KV cache + {gib(self.process)})"
        )


def gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def replica_needs(
    config: ModelConfig, artifacts: Sequence[tuple[Hyperparameters, Sequence[TensorEntry]]], flags: frozenset[str]
) -> ReplicaNeeds:
    """Of a replica of `config` on a CPU with these flags. `artifacts`: the model's and, where there is one, its draft
    model's, each with its tensors."""
    shared = packed = cache = 0
    for model, tensors in artifacts:
        size = sum(tensor.bytes for tensor in tensors)
        if config.engine == "bigdl":
            shared, cache = shared + size, cache + _bigdl_cache_bytes(config, model)
        else:
            repeated = _repeated_bytes(config, model)
            shared, cache = shared + size - repeated, cache + least_cache_bytes(model, config.context)
            if not in_tiles(config, flags):
                matrices = (each for each in tensors if each.type != "f32" and each.name not in LOOKED_UP)
                packed += sum(tensor.bytes for tensor in matrices) - repeated
    if config.openvino is not None and config.openvino.kv_cache is not None:
        cache = max(cache, int(config.openvino.kv_cache))
    return ReplicaNeeds(shared, packed, cache)


def read_artifact(folder: Path) -> tuple[Hyperparameters, Sequence[TensorEntry]]:
    """What `replica_needs` wants to know of an artifact. Raises OSError or ValueError for a folder that is none."""
    manifest = Manifest.read(folder)
    return artifact_hyperparameters(folder, manifest), manifest.tensors


def in_tiles(config: ModelConfig, flags: frozenset[str]) -> bool:
    """Whether the openvino engine multiplies with the mapped file itself, and packs nothing."""
    return config.quantization == "int4" and wants_tiles((config.openvino or OpenvinoConfig()).tune, flags)


def _bigdl_cache_bytes(config: ModelConfig, model: Hyperparameters) -> int:
    """A key and a value head for every query head; a library takes all positions that the file has."""
    tokens = model.context if _has_positions(config) else config.context
    return 2 * model.layers * model.width * tokens * NUMBER_BYTES


def _has_positions(config: ModelConfig) -> bool:
    return FAMILIES[config.family].container.positions is not None


def _repeated_bytes(config: ModelConfig, model: Hyperparameters) -> int:
    """Of key and value heads beyond the first copy: the artifact has one for each query head, the openvino engine's own
    file each of them once."""
    rows = (model.heads - model.key_value_heads) * model.head_width
    return 2 * model.layers * data_bytes(config.ggml_type, (rows, model.width)) if rows else 0


def block_bytes(model: Hyperparameters) -> int:
    """Of one block of the openvino engine's KV cache in all layers, keys and values."""
    return 2 * model.layers * model.key_value_heads * model.head_width * BLOCK_TOKENS * NUMBER_BYTES


def least_cache_bytes(model: Hyperparameters, context: int) -> int:
    """What one sequence of `context` tokens needs of the openvino engine's KV cache."""
    return -(-context // BLOCK_TOKENS) * block_bytes(model)


def check_planned(config: ModelConfig, model: Hyperparameters, field: str) -> None:
    """Raises ConfigError, naming the key below `field`, for what the engine would refuse once it is loaded: a context
    that the model has not, a KV cache too small for one sequence."""
    limited = config.engine == "openvino" or _has_positions(config)
    if limited and model.context and config.context > model.context:
        raise ConfigError(
            f"{field}.context: found {config.context}, allowed for this {config.family} model is 1 to {model.context}"
        )
    given = config.openvino.kv_cache if config.openvino else None
    least = least_cache_bytes(model, config.context)
    if given is not None and given < least:
        raise ConfigError(
            f"{field}.openvino.kv_cache: found {int(given)} bytes, allowed are {least} and more: what one sequence of"
            f" {config.context} tokens needs"
        )
