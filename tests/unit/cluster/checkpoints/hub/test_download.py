"""The file that a download is written to: whatever becomes of it, its sha256 is that of what it holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.artifacts.digests import bytes_sha256
from cluster.checkpoints.hub.download import HashingFile, fetch_blob
from cluster.checkpoints.hub.requests import DamagedDownloadError
from tests.hub_lookalike import HubLookalike


def digest_and_content(file: HashingFile, path: Path) -> tuple[str, bytes]:
    return file.sha256.hexdigest(), path.read_bytes()


def test_what_was_there_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"begun, ")
    with HashingFile(path) as file:
        assert file.seek(0, os.SEEK_END) == 7
        assert file.write(b"and ended") == 9
        assert digest_and_content(file, path) == (bytes_sha256(b"begun, and ended"), b"begun, and ended")


def test_going_back_forgets_what_came_after(tmp_path: Path) -> None:
    """As http_get does where a server sends the whole file instead of the rest."""
    path = tmp_path / "file"
    with HashingFile(path) as file:
        file.write(b"begun, and lost")
        file.seek(5)
        file.truncate()
        file.write(b" again")
        assert digest_and_content(file, path) == (bytes_sha256(b"begun again"), b"begun again")


def blobs_with(tmp_path: Path, hub: HubLookalike, begun: bytes, content: bytes) -> tuple[Path, str, Path]:
    """A repository of one file, and a folder of blobs where a download of it has begun; the commit; the file begun."""
    folder, blobs = tmp_path / "model", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    partial = blobs / f"{bytes_sha256(content)}.model.safetensors.incomplete"
    partial.write_bytes(begun)
    return blobs, hub.add("org/model", folder), partial


CONTENT = bytes(range(256)) * 40


@pytest.mark.parametrize("begun", [0, 1, 5000, len(CONTENT)])
def test_only_the_rest_is_asked_for(hub: HubLookalike, tmp_path: Path, begun: int) -> None:
    blobs, commit, partial = blobs_with(tmp_path, hub, CONTENT[:begun], CONTENT)
    assert fetch_blob("org/model", commit, "model.safetensors", blobs)
    assert (blobs / bytes_sha256(CONTENT)).read_bytes() == CONTENT
    assert not partial.exists()
    assert hub.served("model.safetensors") == len(CONTENT) - begun


def test_a_damaged_beginning_is_thrown_away(hub: HubLookalike, tmp_path: Path) -> None:
    blobs, commit, _ = blobs_with(tmp_path, hub, b"damaged", CONTENT)
    with pytest.raises(DamagedDownloadError, match="another sha256"):
        fetch_blob("org/model", commit, "model.safetensors", blobs)
    assert list(blobs.iterdir()) == []
    assert fetch_blob("org/model", commit, "model.safetensors", blobs)


def test_a_file_that_git_holds_is_left_to_the_library(hub: HubLookalike, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    commit = hub.add("org/model", tmp_path / "model")
    assert not fetch_blob("org/model", commit, "config.json", tmp_path / "blobs")
    assert not (tmp_path / "blobs").exists()
