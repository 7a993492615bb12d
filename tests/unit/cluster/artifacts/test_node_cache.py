from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import node_cache, verified
from cluster.artifacts.manifest import Manifest
from cluster.artifacts.node_cache import NodeCache, folder_bytes, publish_folder
from cluster.artifacts.verified import mark_verified, stamp_file
from cluster.errors import ArtifactError
from tests.made_artifact import CHUNKS, FILES, Chunks, fetch_and_release, made_manifest


@pytest.fixture
def manifest() -> Manifest:
    return made_manifest()


def test_fetch_writes_the_artifact_once(tmp_path: Path, manifest: Manifest) -> None:
    cache, chunks = NodeCache(tmp_path), Chunks()
    folder = cache.fetch(manifest, FILES, chunks).folder
    assert (folder / manifest.binary).read_bytes() == b"".join(CHUNKS)
    assert (folder / "config.json").read_bytes() == FILES["config.json"]
    assert Manifest.read(folder) == manifest
    assert cache.fetch(manifest, FILES, chunks).folder == folder
    assert chunks.reads == [0, 1]
    cache.check_integrity()


def test_a_node_may_begin_with_any_chunk(tmp_path: Path, manifest: Manifest) -> None:
    cache, chunks = NodeCache(tmp_path), Chunks()
    folder = cache.fetch(manifest, FILES, chunks, first=1).folder
    assert chunks.reads == [1, 0]
    assert (folder / manifest.binary).read_bytes() == b"".join(CHUNKS)
    cache.check_integrity()


def test_processes_that_ask_at_once_fetch_once(tmp_path: Path, manifest: Manifest) -> None:
    chunks = Chunks()
    threads = [threading.Thread(target=NodeCache(tmp_path).fetch, args=(manifest, FILES, chunks)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chunks.reads == [0, 1]
    NodeCache(tmp_path).check_integrity()


@pytest.mark.parametrize("first", [0, 1])
def test_a_damaged_chunk_is_refused_and_leaves_nothing(tmp_path: Path, manifest: Manifest, first: int) -> None:
    cache = NodeCache(tmp_path)
    with pytest.raises(ArtifactError, match="chunk 1 of a1: sha256 is"):
        cache.fetch(manifest, FILES, Chunks(damaged=1), first)
    assert [path for path in cache.folder.iterdir() if path.is_dir()] == []
    cache.check_integrity()


def test_a_damaged_companion_file_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json of a1"):
        NodeCache(tmp_path).fetch(manifest, {"config.json": b"{ }"}, Chunks())


@pytest.mark.parametrize("first", [0, 1])
def test_the_whole_is_what_the_manifest_says_and_not_each_chunk_alone(
    tmp_path: Path, manifest: Manifest, first: int
) -> None:
    other = manifest.model_copy(update={"sha256": manifest.chunks[0].sha256})
    with pytest.raises(ArtifactError, match=r"bigdl_llm_llama_q4_0\.bin of a1: sha256 is"):
        NodeCache(tmp_path).fetch(other, FILES, Chunks(), first)


@pytest.mark.parametrize("name", ["bigdl_llm_llama_q4_0.bin", "config.json", "manifest.json"])
def test_a_damaged_copy_is_fetched_again(tmp_path: Path, manifest: Manifest, name: str) -> None:
    cache, chunks = NodeCache(tmp_path), Chunks()
    folder = cache.fetch(manifest, FILES, chunks).folder
    damaged = bytearray((folder / name).read_bytes())
    damaged[1] ^= 1
    (folder / name).write_bytes(damaged)
    cache.fetch(manifest, FILES, chunks)
    assert chunks.reads == [0, 1, 0, 1]
    cache.check_integrity()


def test_the_binary_is_hashed_once_by_who_writes_it(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = NodeCache(tmp_path)
    binary = cache.fetch(manifest, FILES, Chunks()).folder / manifest.binary
    age(binary)
    monkeypatch.setattr(verified, "file_sha256", lambda path: pytest.fail(f"{path} is read again"))
    assert cache.holds(manifest)
    assert cache.cached("a1") is not None
    cache.fetch(manifest, FILES, Chunks()).release()


def test_damage_that_the_file_system_does_not_show_is_found_by_verify_and_then_by_all(
    tmp_path: Path, manifest: Manifest
) -> None:
    cache = NodeCache(tmp_path)
    binary = cache.fetch(manifest, FILES, Chunks()).folder / manifest.binary
    binary.write_bytes(bytes(manifest.bytes))
    mark_verified(binary, manifest.sha256)  # as if the disk, not a program, had changed it
    age(binary)
    assert cache.holds(manifest)
    assert not cache.verify(manifest)
    assert not cache.holds(manifest)
    with pytest.raises(ArtifactError, match="does not fit its manifest"):
        cache.check_integrity()


def age(binary: Path) -> None:
    """Sets the stamp's time well after the binary's last change: a stamp of the same tick is not trusted."""
    stamp = stamp_file(binary)
    os.utime(stamp, ns=(binary.stat().st_ctime_ns + 10**9,) * 2)


def test_what_a_dead_fetch_left_behind_is_told(tmp_path: Path, manifest: Manifest) -> None:
    cache = NodeCache(tmp_path)
    cache.fetch(manifest, FILES, Chunks())
    (cache.folder / ".a1.left").mkdir()
    with pytest.raises(ArtifactError, match="left behind"):
        cache.check_integrity()


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    cache = NodeCache(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be written: No space left on device; free some space there"):
        cache.fetch(manifest, FILES, Chunks())
    cache.check_integrity()
    assert cache.manifests() == []


def other(manifest: Manifest, artifact_id: str) -> Manifest:
    return manifest.model_copy(update={"artifact_id": artifact_id})


def names(cache: NodeCache) -> list[str]:
    return [manifest.artifact_id for manifest in cache.manifests()]


def test_the_least_recently_used_artifact_makes_room(tmp_path: Path, manifest: Manifest) -> None:
    fetch_and_release(NodeCache(tmp_path), manifest)
    size = folder_bytes(tmp_path / "artifacts" / "a1")
    cache = NodeCache(tmp_path, max_bytes=2 * size + 10)
    fetch_and_release(cache, other(manifest, "a2"))
    fetch_and_release(cache, manifest)  # used again: now a2 is the older one
    fetch_and_release(cache, other(manifest, "a3"))
    assert names(cache) == ["a1", "a3"]
    cache.check_integrity()


def test_an_artifact_in_use_is_never_evicted(tmp_path: Path, manifest: Manifest) -> None:
    cache = NodeCache(tmp_path, max_bytes=1)
    in_use = cache.fetch(manifest, FILES, Chunks())
    fetch_and_release(cache, other(manifest, "a2"))
    fetch_and_release(cache, other(manifest, "a3"))
    assert names(cache) == ["a1", "a3"]
    assert not cache.remove("a1")
    in_use.release()
    assert cache.remove("a1")
    assert names(cache) == ["a3"]


def test_what_an_engine_has_derived_from_an_artifact_counts(tmp_path: Path, manifest: Manifest) -> None:
    fetch_and_release(NodeCache(tmp_path), manifest)
    size = folder_bytes(tmp_path / "artifacts" / "a1")
    cache = NodeCache(tmp_path, max_bytes=2 * size + 100)
    in_use = cache.fetch(other(manifest, "a2"), FILES, Chunks())
    assert names(cache) == ["a1", "a2"]
    (in_use.folder / "openvino-1.bin").write_bytes(bytes(200))
    cache.evict()
    assert names(cache) == ["a2"]


def test_an_artifact_is_in_use_before_it_has_its_name(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(*arguments: Any) -> None:
        publish_folder(*arguments)
        NodeCache(tmp_path, max_bytes=1).evict()  # as another process might at this instant

    monkeypatch.setattr(node_cache, "publish_folder", publish)
    assert (NodeCache(tmp_path).fetch(manifest, FILES, Chunks()).folder / "config.json").is_file()


def test_processes_that_evict_at_once_do_each_other_no_harm(tmp_path: Path, manifest: Manifest) -> None:
    """Threads here; what they share is the folder and its locks alone."""

    def fetch(number: int) -> None:
        for turn in range(60):
            cache = NodeCache(tmp_path, max_bytes=3000)
            artifact = cache.fetch(other(manifest, f"a{(number + turn) % 6}"), FILES, Chunks())
            (artifact.folder / f"{number}.new").write_bytes(b"derived")
            (artifact.folder / f"{number}.new").rename(artifact.folder / f"{number}.bin")
            cache.evict()
            assert Manifest.read(artifact.folder).artifact_id == artifact.folder.name
            artifact.release()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(fetch, range(4)))
    NodeCache(tmp_path, max_bytes=1).evict()
    NodeCache(tmp_path).check_integrity()
    assert names(NodeCache(tmp_path)) == []
