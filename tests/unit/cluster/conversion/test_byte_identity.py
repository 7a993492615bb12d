"""nibble's binaries are, byte for byte, those of bigdl-llm's llm_convert: tests/reference/make_digests.py ran it."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import pytest

import cluster.conversion.shard
from cluster.artifacts.manifest import Quantization
from cluster.conversion.plan import plan_conversion
from cluster.conversion.shard import convert_shard
from cluster.families import FAMILY_NAMES, FamilyName
from tests.random_checkpoint import SHAPES, write_random_checkpoint
from tests.torch_files import write_torch_weights

ROOT = Path(__file__).parents[4]
DIGESTS = json.loads((ROOT / "tests" / "reference" / "digests.json").read_text())


def assert_like_llm_convert(
    name: str, checkpoint: Path, family: FamilyName, shard_bytes: int, quantization: Quantization = "q4_0"
) -> None:
    source = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert source == DIGESTS[name]["source_sha256"], f"{name} has changed: run tests/reference/make_digests.py again"
    found = sha256_of_binary(checkpoint, family, shard_bytes, quantization)
    assert found == (DIGESTS[name]["bytes"], DIGESTS[name]["sha256"])


def sha256_of_binary(
    checkpoint: Path, family: FamilyName, shard_bytes: int, quantization: Quantization = "q4_0"
) -> tuple[int, str]:
    plan = plan_conversion(checkpoint, family, quantization, shard_bytes)
    binary = b"".join(convert_shard(plan, shard.index).tobytes() for shard in plan.shards)
    assert len(binary) == plan.bytes
    return len(binary), hashlib.sha256(binary).hexdigest()


@pytest.mark.parametrize("name", SHAPES)
def test_random_checkpoint_converts_as_llm_convert_does(name: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES[name])
    assert_like_llm_convert(name, checkpoint, SHAPES[name].family, shard_bytes=100_000)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_demo_checkpoint_converts_as_llm_convert_does(family: FamilyName) -> None:
    assert_like_llm_convert(f"builtin:{family}", ROOT / "cluster" / "demos" / family, family, shard_bytes=1 << 20)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.family != "bloom"])
def test_int8_is_as_llm_convert_writes_it(name: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES[name])
    assert_like_llm_convert(f"int8:{name}", checkpoint, SHAPES[name].family, 100_000, "q8_0")


@pytest.mark.parametrize("family", ["llama", "gptneox", "starcoder"])
def test_int8_of_a_demo_checkpoint_is_as_llm_convert_writes_it(family: FamilyName) -> None:
    demo = ROOT / "cluster" / "demos" / family
    assert_like_llm_convert(f"int8:builtin:{family}", demo, family, 1 << 20, "q8_0")


@pytest.mark.parametrize("shard_bytes", [1, 7_777, 1 << 30])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_shard_borders_do_not_matter(name: FamilyName, shard_bytes: int, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES[name])
    assert_like_llm_convert(name, checkpoint, name, shard_bytes)


@pytest.mark.parametrize("slab_weights", [1, 64 * 7, 1 << 13])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_slab_borders_do_not_matter(
    name: FamilyName, slab_weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.conversion.shard, "SLAB_WEIGHTS", slab_weights)
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES[name])
    assert_like_llm_convert(name, checkpoint, name, shard_bytes=1 << 20)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_sharded_safetensors_convert_to_the_same_binary(name: FamilyName, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES[name], shards=3)
    assert not (checkpoint / "model.safetensors").exists()
    assert sha256_of_binary(checkpoint, name, 1 << 20) == (DIGESTS[name]["bytes"], DIGESTS[name]["sha256"])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_names_without_the_base_models_prefix_convert_to_the_same_binary(name: FamilyName, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES[name], base_names=True)
    assert sha256_of_binary(checkpoint, name, 1 << 20) == (DIGESTS[name]["bytes"], DIGESTS[name]["sha256"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", [*FAMILY_NAMES, "llama-bf16", "bloom-wide"])
def test_pytorch_model_bin_converts_to_the_same_binary(name: str, shards: int, legacy: bool, tmp_path: Path) -> None:
    write = partial(write_torch_weights, legacy=legacy)
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES[name], shards=shards, write=write)
    assert not list(checkpoint.glob("*.safetensors*"))
    family = SHAPES[name].family
    assert sha256_of_binary(checkpoint, family, 1 << 18) == (DIGESTS[name]["bytes"], DIGESTS[name]["sha256"])
