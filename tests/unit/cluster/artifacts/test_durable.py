from __future__ import annotations

from pathlib import Path

import pytest

from cluster.artifacts.durable import DurableCopy
from cluster.artifacts.manifest import Manifest
from cluster.errors import ArtifactError, ConfigError
from tests.unit.cluster.artifacts.test_node_cache import CHUNKS, FILES, Chunks, manifest

__all__ = ["manifest"]


@pytest.fixture
def copy(tmp_path: Path) -> DurableCopy:
    return DurableCopy(f"file://{tmp_path}/kept")


def test_what_was_written_is_read_back(copy: DurableCopy, manifest: Manifest) -> None:
    assert copy.manifests() == []
    copy.write(manifest, FILES, Chunks())
    assert copy.manifests() == [manifest]
    assert [copy.read_chunk(manifest, index) for index in (0, 1)] == CHUNKS
    assert copy.read_files(manifest) == FILES
    copy.verify(manifest)


def test_a_copy_is_written_once(copy: DurableCopy, manifest: Manifest) -> None:
    copy.write(manifest, FILES, Chunks())
    chunks = Chunks()
    copy.write(manifest, FILES, chunks)
    assert chunks.reads == []


def test_a_write_that_fails_leaves_no_copy(copy: DurableCopy, manifest: Manifest, tmp_path: Path) -> None:
    def full_disk(index: int) -> bytes:
        if index == 1:
            raise OSError(28, "No space left on device")
        return CHUNKS[index]

    with pytest.raises(ArtifactError, match=r"artifacts\.durable_uri: .* cannot be written: .*No space left"):
        copy.write(manifest, FILES, full_disk)
    assert copy.manifests() == []
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_copy_without_whole_manifest_does_not_count(copy: DurableCopy, manifest: Manifest, tmp_path: Path) -> None:
    copy.write(manifest, FILES, Chunks())
    path = tmp_path / "kept" / "a1" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-5])
    assert copy.manifest("a1") is None
    copy.write(manifest, FILES, Chunks())
    assert copy.manifest("a1") == manifest


def test_a_flipped_bit_is_told(copy: DurableCopy, manifest: Manifest, tmp_path: Path) -> None:
    copy.write(manifest, FILES, Chunks())
    path = tmp_path / "kept" / "a1" / manifest.binary
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert copy.read_chunk(manifest, 0) == CHUNKS[0]
    with pytest.raises(ArtifactError, match="chunk 1 of a1 at file://"):
        copy.verify(manifest)


def test_remove(copy: DurableCopy, manifest: Manifest) -> None:
    copy.write(manifest, FILES, Chunks())
    assert copy.remove("a1")
    assert not copy.remove("a1")
    assert copy.manifests() == []


def test_an_unknown_file_system_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"artifacts\.durable_uri: found 'nosuch://x'"):
        DurableCopy("nosuch://x")
