"""A file is read once and not again until it changes; whatever changes it, the change is found."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.artifacts import verified
from cluster.artifacts.digests import bytes_sha256, file_sha256
from cluster.artifacts.verified import is_verified, mark_verified, stamp_file

CONTENT = b"weights" * 100
SHA256 = bytes_sha256(CONTENT)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were hashed."""
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    monkeypatch.setattr(verified, "file_sha256", counted)
    return hashed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that was changed for the last time a while ago."""
    path = tmp_path / "model.bin"
    path.write_bytes(CONTENT)
    wait_for_the_clock(path)
    return path


def wait_for_the_clock(path: Path) -> None:
    """Until what is written now has a later time than the file."""
    probe = path.with_name("probe")
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return probe.unlink()
        time.sleep(0.001)


def test_an_unchanged_file_is_read_once(path: Path, reads: list[Path]) -> None:
    assert [is_verified(path, SHA256) for _ in range(3)] == [True] * 3
    assert reads == [path]


def test_another_content_is_found_and_not_stamped(path: Path, reads: list[Path]) -> None:
    assert [is_verified(path, bytes_sha256(b"other")) for _ in range(2)] == [False] * 2
    assert reads == [path] * 2
    assert not stamp_file(path).exists()


def test_a_stamp_is_of_one_sha256_only(path: Path, reads: list[Path]) -> None:
    assert is_verified(path, SHA256)
    assert not is_verified(path, bytes_sha256(b"other"))
    assert reads == [path] * 2


def write_in_place(path: Path) -> None:
    """One byte, with the old size and modification time."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(300)
        file.write(b"X")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by_another(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(b"W" + CONTENT[1:])
    os.replace(new, path)


def cut(path: Path) -> None:
    os.truncate(path, len(CONTENT) - 1)


@pytest.mark.parametrize("change", [write_in_place, replace_by_another, cut])
def test_a_change_is_found(path: Path, change: Callable[[Path], None]) -> None:
    assert is_verified(path, SHA256)
    wait_for_the_clock(path)
    change(path)
    assert not is_verified(path, SHA256)


def test_a_change_in_the_tick_of_the_stamp_is_found(path: Path, reads: list[Path]) -> None:
    """The stamp is not newer than the file's last change: it is not trusted, and written anew."""
    assert is_verified(path, SHA256)
    changed = path.stat().st_ctime_ns
    os.utime(stamp_file(path), ns=(changed, changed))
    assert [is_verified(path, SHA256) for _ in range(2)] == [True] * 2
    assert reads == [path] * 2


def test_who_has_just_hashed_it_says_so(path: Path, reads: list[Path]) -> None:
    mark_verified(path, SHA256)
    assert is_verified(path, SHA256)
    assert reads == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sha256": 1}'])
def test_a_damaged_stamp_is_none(path: Path, content: bytes, reads: list[Path]) -> None:
    stamp_file(path).write_bytes(content)
    assert [is_verified(path, SHA256) for _ in range(2)] == [True] * 2
    assert reads == [path]


def test_a_stamp_that_cannot_be_written_costs_a_second_reading(
    path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError

    monkeypatch.setattr(verified.tempfile, "mkstemp", refuse)
    assert [is_verified(path, SHA256) for _ in range(2)] == [True] * 2
    assert reads == [path] * 2


def test_nothing_else_is_left_in_the_folder(path: Path) -> None:
    is_verified(path, SHA256)
    assert sorted(each.name for each in path.parent.iterdir()) == [".model.bin.verified", "model.bin"]


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        is_verified(tmp_path / "missing.bin", SHA256)


def remembered(path: Path, folder: Path) -> str:
    return verified.remembered_sha256(path, folder, verified.file_sha256)


def test_the_digest_of_a_file_elsewhere_is_remembered_until_it_changes(
    path: Path, reads: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "digests"
    assert remembered(path, folder) == SHA256
    assert not folder.parent.exists(), "no cache is made for it"
    reads.clear()
    folder.parent.mkdir()
    assert {remembered(path, folder) for _ in range(3)} == {SHA256}
    assert reads == [path]

    os.utime(path, ns=(0, 0))  # the same content; but who knows
    assert remembered(path, folder) == SHA256
    assert len(reads) == 2

    kept = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert remembered(path, folder) == bytes_sha256(CONTENT[::-1])

    other = tmp_path / "other"
    other.write_bytes(CONTENT)
    os.replace(other, path)
    assert remembered(path, folder) == SHA256
    assert not stamp_file(path).exists(), "nothing is left beside a file that is not ours"


def test_a_digest_that_cannot_be_remembered_is_computed(path: Path, reads: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("no folder")
    assert [remembered(path, folder) for _ in range(2)] == [SHA256] * 2
    assert len(reads) == 2


def test_a_digest_remembered_in_the_tick_of_a_change_is_not_trusted(reads: list[Path], tmp_path: Path) -> None:
    path, folder = tmp_path / "model.bin", tmp_path / "digests"
    path.write_bytes(CONTENT)
    assert remembered(path, folder) == SHA256
    os.utime(next(folder.iterdir()), ns=(path.stat().st_ctime_ns,) * 2)
    assert remembered(path, folder) == SHA256
    assert len(reads) == 2
