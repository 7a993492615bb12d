"""What is asked for when an artifact is wanted. Needs no Ray: a conversion on one machine asks as a cluster does."""

from __future__ import annotations

from cluster.families import FamilyName
from cluster.manifest import Manifest, Quantization, Record
from cluster.plan import CONVERTER_VERSION


class Wanted(Record):
    """What is looked for: an artifact by its content address, or, while that is unknown, what it was made from."""

    source: str
    family: FamilyName
    quantization: Quantization
    artifact_id: str | None = None

    def is_met_by(self, manifest: Manifest) -> bool:
        if self.artifact_id is not None:
            return manifest.artifact_id == self.artifact_id
        made = (manifest.source, manifest.family, manifest.quantization, manifest.converter_version)
        return made == (self.source, self.family, self.quantization, CONVERTER_VERSION)
