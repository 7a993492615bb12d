from __future__ import annotations

from pathlib import Path

import pytest

from cluster.checkpoints.checkpoint_files import open_binary, read_json_object, read_without_mark
from cluster.checkpoints.weights import weight_sources
from cluster.errors import CheckpointError
from tests.random_checkpoint import LFS_POINTER


def test_a_file_is_opened_at_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"version 3")
    with open_binary(tmp_path / "file") as file:
        assert file.read() == b"version 3"


@pytest.mark.parametrize("name", ["nothing", "folder"])
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for read in (open_binary, read_json_object):
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: \w+"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_weights_that_git_lfs_only_points_to_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: found a Git LFS pointer, not the file that it stands for"):
        weight_sources(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value"),
        (b'{"a": 1', "not JSON: "),
        (b"\xef\xbb\xbf", "not JSON: Expecting value"),
        ('{"a": 1}'.encode("utf-16"), "found UTF-16, allowed is UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON: "),
        (b'{"a": "\xff"}', "not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not JSON: "),
        (b"null", "found a JSON NoneType, allowed is an object"),
    ],
)
def test_what_is_no_json_object_in_utf_8_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}") as refusal:
        read_json_object(tmp_path / "config.json")
    assert "\n" not in str(refusal.value)


def test_a_byte_order_mark_before_utf_8_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json_object(tmp_path / "config.json") == {"a": "\u00e9"}
    assert read_without_mark(tmp_path / "config.json") == b'{"a": "\xc3\xa9"}'
