"""What the tasks of restoring.py do, called here: no Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import restoring
from cluster.artifacts.durable import DurableCopy
from cluster.artifacts.manifest import Manifest
from cluster.artifacts.node_cache import NodeCache
from cluster.config import ArtifactsConfig
from cluster.conversion.plan import CONVERTER_VERSION
from cluster.conversion.wanted import Wanted
from cluster.errors import ArtifactError
from tests.made_artifact import CHUNKS, FILES, fetch_and_release, made_manifest


def call(task: Any, *arguments: object) -> Any:
    """The function that a Ray task was made of."""
    return task._function(*arguments)


@pytest.fixture
def manifest() -> Manifest:
    return made_manifest().model_copy(update={"converter_version": CONVERTER_VERSION})


@pytest.fixture
def config(tmp_path: Path, manifest: Manifest) -> ArtifactsConfig:
    """A node's cache with the artifact in it."""
    fetch_and_release(NodeCache(tmp_path / "cache"), manifest)
    return ArtifactsConfig(cache_dir=tmp_path / "cache")


@pytest.fixture
def durable(tmp_path: Path, manifest: Manifest) -> str:
    """A durable copy with the artifact in it."""
    uri = f"file://{tmp_path}/durable"
    DurableCopy(uri).write(manifest, FILES, lambda index: memoryview(CHUNKS[index]))
    return uri


def wanted(manifest: Manifest, **fields: Any) -> Wanted:
    made = {"source": manifest.source, "family": manifest.family, "quantization": manifest.quantization}
    return Wanted(**made | fields)


def binary(config: ArtifactsConfig, manifest: Manifest) -> Path:
    return restoring.cache_folder(config, manifest) / manifest.binary


def test_an_artifact_is_found_by_its_id_or_by_what_it_was_made_from(
    config: ArtifactsConfig, durable: str, manifest: Manifest
) -> None:
    for fields in ({}, {"artifact_id": "a1"}, {"artifact_id": "a1", "source": "renamed"}):
        assert call(restoring.find_cached, config, wanted(manifest, **fields)) == manifest
        assert call(restoring.find_durable, durable, wanted(manifest, **fields)) == manifest
    for fields in ({"artifact_id": "a2"}, {"source": "renamed"}, {"quantization": "q8_0"}, {"family": "bloom"}):
        assert call(restoring.find_cached, config, wanted(manifest, **fields)) is None
        assert call(restoring.find_durable, durable, wanted(manifest, **fields)) is None


def test_chunks_and_files_are_read_from_either_place(config: ArtifactsConfig, durable: str, manifest: Manifest) -> None:
    for index, chunk in enumerate(CHUNKS):
        for task, place in ((restoring.cached_chunk, config), (restoring.durable_chunk, durable)):
            data, entry = call(task, place, manifest, index)
            assert (data.tobytes(), entry) == (chunk, manifest.chunks[index])
    assert call(restoring.cached_files, config, manifest) == FILES
    assert call(restoring.durable_files, durable, manifest) == FILES


def test_a_damaged_copy_is_not_found(config: ArtifactsConfig, manifest: Manifest) -> None:
    binary(config, manifest).write_bytes(bytes(manifest.bytes))
    assert call(restoring.find_cached, config, wanted(manifest)) is None


def test_a_damaged_chunk_is_refused_and_the_copy_is_doubted(config: ArtifactsConfig, manifest: Manifest) -> None:
    path = binary(config, manifest)
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="chunk 1 of a1 in"):
        call(restoring.cached_chunk, config, manifest, 1)
    assert stat.st_size == path.stat().st_size
    assert not NodeCache(config.cache_dir).holds(manifest)
    whole, _ = call(restoring.cached_chunk, config, manifest, 0)  # what is whole can still be read
    assert whole.tobytes() == CHUNKS[0]


def test_a_durable_copy_is_known_by_its_whole_manifest_until_it_is_removed(durable: str, manifest: Manifest) -> None:
    assert call(restoring.has_durable, durable, manifest)
    assert not call(restoring.has_durable, durable, manifest.model_copy(update={"source": "renamed"}))
    call(restoring.remove_durable, durable, manifest.artifact_id)
    assert not call(restoring.has_durable, durable, manifest)
    assert call(restoring.find_durable, durable, wanted(manifest)) is None
