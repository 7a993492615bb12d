"""From config.json to a model's hyperparameters, and which engines can run such a model. What a family reads is in its
file in `cluster/families/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.artifacts.ggml import file_type
from cluster.artifacts.manifest import Manifest, Quantization
from cluster.checkpoints.folder import CONFIG_FILE, read_config
from cluster.errors import CheckpointError
from cluster.families import FAMILIES, EngineName, FamilyName
from cluster.families.architecture import Hyperparameters
from cluster.families.config_fields import Config


def require_engine(engine: EngineName | None, obstacles: tuple[tuple[EngineName, str], ...]) -> None:
    """Raises CheckpointError, with the obstacle, where `engine` has one; None: any engine will do."""
    for hindered, obstacle in obstacles:
        if hindered == engine:
            raise CheckpointError(obstacle)


def read_hyperparameters(
    checkpoint: Path, config: dict[str, Any], family: FamilyName, quantization: Quantization = "q4_0"
) -> Hyperparameters:
    """Of a checkpoint or an artifact, whose folder is only named in messages. Raises CheckpointError, naming the field,
    for a model that no engine can compute."""
    fields, row = Config(checkpoint / CONFIG_FILE, config), FAMILIES[family]
    if config.get("quantization_config") is not None:
        raise fields.refuse("quantization_config", config["quantization_config"], "a checkpoint that is not quantized")
    model = row.hyperparameters(fields, file_type(row.container, quantization))
    return model._replace(obstacles=fields.obstacles)


def artifact_hyperparameters(folder: Path, manifest: Manifest) -> Hyperparameters:
    """Of the artifact in `folder`, which has its checkpoint's config.json. Raises as read_hyperparameters does."""
    return read_hyperparameters(folder, read_config(folder), manifest.family, manifest.quantization)
