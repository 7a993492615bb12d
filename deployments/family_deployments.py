"""The family deployments: one class a family, so that each scales, is observed and can grow on its own."""

from __future__ import annotations

from cluster.families import FamilyName
from deployments.replica import Replica


class Llama(Replica):
    family = "llama"


class GptNeoX(Replica):
    family = "gptneox"


class Bloom(Replica):
    family = "bloom"


class StarCoder(Replica):
    family = "starcoder"


FAMILY_DEPLOYMENTS: dict[FamilyName, type[Replica]] = {
    deployment.family: deployment for deployment in (Llama, GptNeoX, Bloom, StarCoder)
}
