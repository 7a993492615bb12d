"""What planning reads of a checkpoint whose artifact may be there already."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.checkpoints import folder
from cluster.config import ArtifactsConfig
from cluster.conversion.steps import plan_wanted
from cluster.conversion.wanted import Wanted
from tests.random_checkpoint import SHAPES, write_random_checkpoint


def test_unchanged_weights_are_read_for_their_digest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_random_checkpoint(checkpoint, SHAPES["gptneox"])
    time.sleep(0.02)  # more than a tick of the file system's clock
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return content_sha256(path)

    content_sha256 = folder.content_sha256
    monkeypatch.setattr(folder, "content_sha256", counted)
    config = ArtifactsConfig(cache_dir=tmp_path / "cache")
    config.cache_dir.mkdir()
    wanted = Wanted(source=str(checkpoint), family="gptneox", quantization="q4_0")
    first = plan_wanted(wanted, config)
    weights = [name for name in read if name.endswith((".safetensors", ".bin"))]
    assert weights
    read.clear()
    assert plan_wanted(wanted, config).artifact_id == first.artifact_id
    assert not [name for name in read if name in weights]

    path = checkpoint / weights[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert plan_wanted(wanted, config).artifact_id != first.artifact_id
