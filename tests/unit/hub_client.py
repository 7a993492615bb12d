"""What the tests of checkpoints from the Hub do with one."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.utils import close_session

from cluster.checkpoints.folder import checkpoint_digest
from cluster.checkpoints.sources import open_source
from cluster.conversion.plan import ConversionPlan, plan_conversion
from cluster.conversion.shard import convert_shard
from tests.hub_lookalike import HubLookalike
from tests.random_checkpoint import Shape

SINGLE = "model.safetensors"
# Wide enough for weights that are much longer than their headers.
WIDE = Shape("bloom", width=256, heads=8, layers=4, vocabulary=1000, seed=1)


def point_at(hub: HubLookalike, monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def plan(source: str, family: str = "bloom") -> tuple[ConversionPlan, str]:
    with open_source(source).planning() as (folder, sha256):
        return plan_conversion(folder, family, shard_bytes=1 << 18), checkpoint_digest(folder, sha256)


def convert(source: str, plan: ConversionPlan) -> bytes:
    data = b""
    for shard in plan.shards:
        files = {tensor.source.file for tensor in plan.tensors[shard.first : shard.stop]}
        folder = open_source(source).files(files)
        data += convert_shard(plan.model_copy(update={"checkpoint": str(folder)}), shard.index).tobytes()
    return data


def here(folder: Path, family: str = "bloom") -> tuple[ConversionPlan, str, bytes]:
    """Plan, digest and binary of a local folder."""
    planned, digest = plan(str(folder), family)
    return planned, digest, convert(str(folder), planned)
