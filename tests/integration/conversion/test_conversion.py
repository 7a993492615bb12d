"""Conversion on a real Ray node: tasks, ownership of the chunks, the check before publishing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

from cluster.artifact_store import fetch_published, store_handle
from cluster.artifacts.manifest import MANIFEST_FILE, Manifest
from cluster.artifacts.node_cache import NodeCache
from cluster.conversion.steps import run_check
from cluster.errors import CheckpointError, ConversionError
from tests.integration.conversion.converting import artifacts, ensure, small_bloom, wanted
from tests.random_checkpoint import write_random_checkpoint


def test_an_artifact_is_converted_once_by_tasks_and_fetched_by_any_process(ray_node: None, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", small_bloom(seed=1))
    published, again = ensure(folder, tmp_path / "first"), ensure(folder, tmp_path / "first")
    assert again.manifest == published.manifest
    assert [chunk.hex() for chunk in again.chunks] == [chunk.hex() for chunk in published.chunks]
    other_node = tmp_path / "second"
    path = fetch_published(published, artifacts(other_node)).folder
    assert (path / published.manifest.binary).stat().st_size == published.manifest.bytes
    NodeCache(tmp_path / "first").check_integrity()
    NodeCache(other_node).check_integrity()


def test_who_asks_at_once_shares_one_conversion(ray_node: None, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", small_bloom(seed=2))
    store = store_handle()
    before = ray.get(store.counters.remote())["conversions"]["done"]
    refs = [store.ensure.remote(wanted(folder), artifacts(tmp_path / "cache")) for _ in range(4)]
    answers = ray.get(refs)
    assert len({answer.manifest.artifact_id for answer in answers}) == 1
    # Who was planned late may have found it in the node's cache already, and has it without chunks.
    assert len({answer.chunks[0].hex() for answer in answers if answer.chunks}) == 1
    assert ray.get(store.counters.remote())["conversions"]["done"] == before + 1


def test_a_refused_checkpoint_is_nibble_s_own_error_and_publishes_nothing(ray_node: None, tmp_path: Path) -> None:
    before = ray.get(store_handle().manifests.remote())
    with pytest.raises(CheckpointError, match="no folder on this node"):
        ensure(tmp_path / "missing", tmp_path / "cache")
    assert ray.get(store_handle().manifests.remote()) == before


def test_nan_weights_are_refused_by_the_task_that_reads_them(ray_node: None, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", small_bloom(seed=3))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-2:] = b"\x00\x7e"  # an fp16 NaN as the last weight
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="NaN"):
        ensure(folder, tmp_path / "cache")
    assert not (tmp_path / "cache" / "artifacts").exists() or os.listdir(tmp_path / "cache" / "artifacts") == []
    assert ray.get(store_handle().progress.remote()) == []


def test_the_check_refuses_what_the_library_cannot_run(ray_node: None, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", small_bloom(seed=4))
    artifact = fetch_published(ensure(folder, tmp_path / "cache"), artifacts(tmp_path / "other")).folder
    manifest = Manifest.read(artifact)
    run_check(artifact, manifest)
    binary = artifact / manifest.binary
    binary.write_bytes(binary.read_bytes()[: manifest.bytes // 2])
    with pytest.raises(ConversionError, match="The artifact was not published"):
        run_check(artifact, manifest)
    assert (artifact / MANIFEST_FILE).is_file()


def test_the_store_forgets_a_failed_conversion_and_can_try_again(ray_node: None, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", small_bloom(seed=5))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError):
        ensure(folder, tmp_path / "cache")
    weights.write_bytes(whole)
    assert ensure(folder, tmp_path / "cache").manifest.family == "bloom"
