"""What is asked for when an artifact is wanted. Needs no Ray: a conversion on one machine asks as a cluster does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cluster.artifacts.manifest import Manifest, Quantization, Record
from cluster.checkpoints.folder import CONFIG_FILE
from cluster.checkpoints.hyperparameters import read_hyperparameters, require_engine
from cluster.conversion.plan import CONVERTER_VERSION
from cluster.families import EngineName, FamilyName
from cluster.model_config import ModelConfig


class Wanted(Record):
    """What is looked for: an artifact by its content address, or, while that is unknown, what it was made from; and the
    engine that is to run it, where it is not any."""

    source: str
    family: FamilyName
    quantization: Quantization
    artifact_id: str | None = None
    engine: EngineName | None = None

    def is_met_by(self, manifest: Manifest) -> bool:
        if self.artifact_id is not None:
            return manifest.artifact_id == self.artifact_id
        made = (manifest.source, manifest.family, manifest.quantization, manifest.converter_version)
        return made == (self.source, self.family, self.quantization, CONVERTER_VERSION)

    def runs(self, manifest: Manifest) -> bool:
        """Whether the wanted engine can run this artifact."""
        return self.engine is None or self.engine in manifest.engines

    def refuse(self, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        """Raises CheckpointError, saying why the wanted engine cannot run this artifact."""
        config = json.loads(files[CONFIG_FILE])
        made = read_hyperparameters(Path(manifest.source), config, manifest.family, manifest.quantization)
        require_engine(self.engine, made.obstacles)


def wanted_artifacts(model: ModelConfig) -> list[Wanted]:
    """The model's own, and that of its draft model, where it has one."""
    own = Wanted(source=model.checkpoint, family=model.family, quantization=model.ggml_type, engine=model.engine)
    draft = model.openvino.draft if model.openvino else None
    if draft is None:
        return [own]
    return [own, own.model_copy(update={"source": draft.checkpoint, "family": draft.family or model.family})]
