"""How much memory a replica needs, by engine, family and CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts.ggml import data_bytes
from cluster.artifacts.manifest import Manifest
from cluster.config import parse_config
from cluster.errors import ConfigError, EngineError
from cluster.families import FamilyName
from cluster.model_config import ModelConfig
from deployments import replica
from deployments.engines.needs import (
    PROCESS_BYTES,
    block_bytes,
    check_planned,
    least_cache_bytes,
    read_artifact,
    replica_needs,
)
from deployments.engines.products.layout import PRODUCT_FLAGS
from tests.conftest import convert_here
from tests.random_checkpoint import SHAPES, write_random_checkpoint

VNNI = PRODUCT_FLAGS | {"avx512_vnni"}


def configured(family: FamilyName, engine: str, **values: Any) -> ModelConfig:
    given = {"name": "m", "family": family, "checkpoint": f"builtin:{family}", "engine": engine, **values}
    return parse_config({"models": [given]}, "test").models[0]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 query heads of 16, 2 key and value heads, 26 layers."""
    folder = tmp_path_factory.mktemp("grouped")
    write_random_checkpoint(folder / "checkpoint", SHAPES["llama-grouped"])
    return convert_here(folder / "checkpoint", "llama", folder / "artifact")


def test_bigdl_maps_the_binary_and_repeats_keys_and_values_for_every_query_head(grouped: Path) -> None:
    artifact, binary = read_artifact(grouped), Manifest.read(grouped)
    needs = replica_needs(configured("llama", "bigdl", context=100), [artifact], VNNI)
    assert needs.shared == sum(tensor.bytes for tensor in binary.tensors)
    assert needs.packed == 0
    assert needs.cache == 2 * 26 * 100 * 128 * 2
    assert needs.total == needs.shared + needs.own == needs.shared + needs.cache + PROCESS_BYTES


def test_openvino_holds_each_key_and_value_head_once_and_packs_where_its_own_products_run(grouped: Path) -> None:
    artifact = read_artifact(grouped)
    model, tensors = artifact
    config = configured("llama", "openvino", context=100)
    mapped = replica_needs(config, [artifact], PRODUCT_FLAGS)
    once = sum(tensor.bytes for tensor in tensors) - 26 * 2 * data_bytes("q4_0", (6 * 16, 128))
    assert (mapped.shared, mapped.packed) == (once, 0)
    assert mapped.cache == least_cache_bytes(model, 100) == 4 * block_bytes(model) == 4 * (2 * 26 * 2 * 16 * 32 * 2)

    packed = replica_needs(config, [artifact], VNNI)
    embedding = next(tensor.bytes for tensor in tensors if tensor.name == "tok_embeddings.weight")
    vectors = sum(tensor.bytes for tensor in tensors if tensor.type == "f32")
    assert packed.packed == once - embedding - vectors
    exact = configured("llama", "openvino", context=100, openvino={"tune": "precision"})
    assert replica_needs(exact, [artifact], PRODUCT_FLAGS).packed == packed.packed


def test_a_configured_cache_counts_and_a_draft_model_has_one_too(grouped: Path) -> None:
    artifact = read_artifact(grouped)
    given = configured("llama", "openvino", context=100, openvino={"kv_cache": "1GB"})
    assert replica_needs(given, [artifact], PRODUCT_FLAGS).cache == 10**9
    plain = configured("llama", "openvino", context=100)
    alone, drafted = (replica_needs(plain, [artifact] * count, PRODUCT_FLAGS) for count in (1, 2))
    assert (drafted.shared, drafted.cache) == (2 * alone.shared, 2 * alone.cache)
    assert drafted.process == alone.process


def test_starcoder_on_bigdl_has_a_cache_of_all_positions(demo_artifact: Any) -> None:
    artifact = read_artifact(demo_artifact("starcoder"))
    model, _ = artifact
    needs = [replica_needs(configured("starcoder", "bigdl", context=c), [artifact], VNNI) for c in (64, 128)]
    assert needs[0].cache == needs[1].cache == 2 * model.layers * model.width * model.context * 2


def test_what_only_loading_told_is_told_by_planning(grouped: Path, demo_artifact: Any) -> None:
    model, _ = read_artifact(grouped)
    least = least_cache_bytes(model, 512)
    check_planned(configured("llama", "openvino", openvino={"kv_cache": least}), model, "models[0]")
    with pytest.raises(ConfigError, match=rf"models\[0\]\.openvino\.kv_cache: found {least - 1} .* {least} and more"):
        check_planned(configured("llama", "openvino", openvino={"kv_cache": least - 1}), model, "models[0]")
    starcoder, _ = read_artifact(demo_artifact("starcoder"))
    for engine in ("bigdl", "openvino"):
        check_planned(configured("starcoder", engine, context=starcoder.context), starcoder, "models[2]")
        with pytest.raises(ConfigError, match=rf"models\[2\]\.context: found .* 1 to {starcoder.context}"):
            check_planned(configured("starcoder", engine, context=starcoder.context + 1), starcoder, "models[2]")


def test_a_replica_refuses_what_its_node_has_no_memory_for(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("llama", "bigdl")
    needs = replica_needs(config, [read_artifact(grouped)], frozenset())
    monkeypatch.setattr(replica, "available_memory", lambda: needs.total)
    replica.require_memory(config, [grouped])
    monkeypatch.setattr(replica, "available_memory", lambda: needs.total - 1)
    with pytest.raises(
        EngineError, match=r"m: a replica needs at least 0\.2 GiB \(.* this node has 0\.2 GiB free; use"
    ):
        replica.require_memory(config, [grouped])
