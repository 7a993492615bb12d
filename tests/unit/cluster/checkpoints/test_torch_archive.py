from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

import cluster.checkpoints.torch_archive
from cluster.checkpoints.torch_archive import DamagedEntryError, MalformedError, archive_entries, checked_sha256
from tests.torch_files import write_archive

REFERENCE = Path(__file__).parents[3] / "reference"
STORAGES = [bytes(range(256)) * 40, b"", b"abc", b"x" * 5000]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    write_archive(tmp_path / "archive.bin", b"no pickle", STORAGES)
    return tmp_path / "archive.bin"


def test_entries_are_where_their_bytes_are(archive: Path) -> None:
    content = archive.read_bytes()
    with archive.open("rb") as file:
        entries = archive_entries(file)
    for i, storage in enumerate(STORAGES):
        entry = entries[f"archive/data/{i}"]
        assert content[entry.begin : entry.end] == storage
    assert list(entries) == sorted(entries, key=lambda name: entries[name].begin)


@pytest.mark.parametrize("block", [1, 7, 4096, 1 << 20])
def test_the_sum_is_of_the_whole_file(archive: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.checkpoints.torch_archive, "_READ_BYTES", block)
    for path in (archive, REFERENCE / "torch_zip.bin"):
        with path.open("rb") as file:
            assert checked_sha256(file) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_byte_of_an_entry_counts(archive: Path) -> None:
    content = archive.read_bytes()
    with archive.open("rb") as file:
        entries = archive_entries(file)
    for entry in entries.values():
        for position in {entry.begin, (entry.begin + entry.end) // 2, entry.end - 1} if entry.bytes else ():
            damaged = bytearray(content)
            damaged[position] ^= 128
            archive.write_bytes(damaged)
            with archive.open("rb") as file, pytest.raises(DamagedEntryError) as error:
                checked_sha256(file)
            assert error.value.entry == entry


def test_an_archive_without_sums_is_read_all_the_same(archive: Path) -> None:
    """torch.serialization.set_crc32_options(False) writes 0 in the place of each sum."""
    content = archive.read_bytes()
    with zipfile.ZipFile(archive) as directory:
        for info in directory.infolist():
            if info.file_size:
                content = content.replace(info.CRC.to_bytes(4, "little"), bytes(4))
    archive.write_bytes(content)
    with archive.open("rb") as file:
        assert checked_sha256(file) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("length", [len(STORAGES[0]) + 50, 1 << 30])
def test_entries_that_overlap_or_end_behind_the_file_are_refused(length: int, archive: Path) -> None:
    content, right = archive.read_bytes(), len(STORAGES[0]).to_bytes(4, "little")
    archive.write_bytes(content.replace(2 * right, 2 * length.to_bytes(4, "little")))
    with archive.open("rb") as file, pytest.raises(MalformedError, match=r"entry archive/\S+ does not lie in the file"):
        archive_entries(file)
