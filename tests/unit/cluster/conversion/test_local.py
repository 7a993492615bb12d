"""The threads of a conversion on one machine: the same bytes, whatever the shards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from cluster.checkpoints.weights import SINGLE_FILE
from cluster.conversion.local import write_shards
from cluster.conversion.plan import plan_conversion
from cluster.errors import ArtifactError, CheckpointError
from tests.random_checkpoint import SHAPES, write_random_checkpoint

DIGESTS = json.loads((Path(__file__).parents[3] / "reference" / "digests.json").read_text())


@pytest.mark.parametrize("shard_bytes", [7_777, 1 << 30])
@pytest.mark.parametrize("name", SHAPES)
def test_the_file_is_the_one_that_llm_convert_writes(name: str, shard_bytes: int, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES[name])
    plan = plan_conversion(checkpoint, SHAPES[name].family, shard_bytes=shard_bytes)
    reported: list[int] = []
    chunks, sha256 = write_shards(plan, tmp_path / "binary", reported.append)
    data = (tmp_path / "binary").read_bytes()
    assert sha256 == hashlib.sha256(data).hexdigest() == DIGESTS[name]["sha256"]
    for chunk, shard in zip(chunks, plan.shards, strict=True):
        assert (chunk.offset, chunk.bytes) == (shard.offset, shard.bytes)
        piece = data[chunk.offset : chunk.offset + chunk.bytes]
        assert chunk.sha256 == hashlib.sha256(piece).hexdigest()
    assert reported == [shard.offset + shard.bytes for shard in plan.shards]


def test_a_disk_that_takes_a_part_is_asked_again_and_a_full_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    plan = plan_conversion(checkpoint, "bloom", shard_bytes=20_000)
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:1000], offset))
    assert write_shards(plan, tmp_path / "binary", print)[1] == DIGESTS["bloom"]["sha256"]

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(ArtifactError, match="cannot be written: No space left on device; free some space there"):
        write_shards(plan, tmp_path / "other", print)


def test_weights_that_shrank_after_planning_are_refused(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    plan = plan_conversion(checkpoint, "bloom", shard_bytes=20_000)
    weights = checkpoint / SINGLE_FILE
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="has changed since the conversion was planned"):
        write_shards(plan, tmp_path / "binary", print)
