from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cluster.checkpoints.weights import SINGLE_FILE
from cluster.conversion.plan import plan_conversion
from cluster.conversion.shard import convert_shard
from cluster.errors import CheckpointError
from tests.random_checkpoint import SHAPES, Shape, write_random_checkpoint

BAD = {
    "F16": [b"\x00\x7c", b"\x00\xfc", b"\x01\x7e"],
    "BF16": [b"\x80\x7f", b"\xc0\x7f", b"\x80\x47"],  # infinity, NaN, 65536
    "F32": [struct.pack("<f", x) for x in (float("inf"), float("nan"), -65520.0)],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, number) for kind, numbers in BAD.items() for number in numbers])
@pytest.mark.parametrize("name", ["h.0.mlp.dense_h_to_4h.weight", "ln_f.bias"])
def test_a_weight_that_is_not_finite_in_fp16_is_refused(kind: str, number: bytes, name: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", Shape("bloom", layers=1, type=kind))
    plan = plan_conversion(checkpoint, "bloom")
    source = next(t.source for t in plan.tensors if t.source.name.endswith(name))
    with (checkpoint / SINGLE_FILE).open("r+b") as file:
        file.seek(source.offset + 40 * len(number))
        file.write(number)
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: tensor transformer\.{name} holds NaN, infinity"):
        convert_shard(plan, 0)


def test_llamas_norms_keep_float32(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["llama-fp32"])
    plan = plan_conversion(checkpoint, "llama")
    norm = next(t for t in plan.tensors if t.name == "norm.weight")
    with (checkpoint / SINGLE_FILE).open("r+b") as file:
        file.seek(norm.source.offset)
        file.write(struct.pack("<f", 1e6))  # beyond fp16, and allowed here
    data = convert_shard(plan, 0)[norm.offset : norm.offset + norm.bytes]
    assert data.view(np.float32)[0] == np.float32(1e6)


def test_a_file_that_shrank_after_planning_is_refused(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    plan = plan_conversion(checkpoint, "bloom")
    path = checkpoint / SINGLE_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="has changed since the conversion was planned"):
        convert_shard(plan, 0)


def test_memory_is_bounded_by_the_result_and_a_slab(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", Shape("bloom", width=512, layers=2, type="F32"))
    plan = plan_conversion(checkpoint, "bloom")
    convert_shard(plan, 0)
    tracemalloc.start()
    convert_shard(plan, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (checkpoint / SINGLE_FILE).stat().st_size > 25e6
    assert peak < plan.bytes + 6e6
