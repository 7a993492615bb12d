"""The zip file in which torch.save keeps a state dict since torch 1.6: where its entries lie, and whether their bytes
are those that were written.

Entries are stored without compression, each with its CRC-32 in the directory at the end, which torch.load itself does
not look at. A CRC of 0 says that there is none: torch.serialization.set_crc32_options(False) writes it.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from typing import BinaryIO, NamedTuple

ZIP_START, _LOCAL_HEADER_BYTES = b"PK\x03\x04", 30
_READ_BYTES = 1 << 20  # for a core's cache, as two sums are made of each block


class MalformedError(ValueError):
    """What is wrong with a file of torch.save, for the message that names the file."""


class ArchiveEntry(NamedTuple):
    name: str
    begin: int  # of its bytes in the file
    bytes: int
    crc32: int

    @property
    def end(self) -> int:
        return self.begin + self.bytes


class DamagedEntryError(Exception):
    def __init__(self, entry: ArchiveEntry, found: int) -> None:
        super().__init__(entry, found)
        self.entry, self.found = entry, found


def archive_entries(file: BinaryIO) -> dict[str, ArchiveEntry]:
    """By name, in the order of the file. Raises MalformedError for what torch.save does not write, and what zipfile
    raises for what is no zip file."""
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    entries: dict[str, ArchiveEntry] = {}
    free, size = 0, file.seek(0, 2)
    for info in infos:
        entry = ArchiveEntry(info.filename, _begin(file, info), info.file_size, info.CRC)
        if info.header_offset < free or entry.end > size:
            raise MalformedError(
                f"entry {entry.name} does not lie in the file behind the one before: download it again"
            )
        entries[entry.name], free = entry, entry.end
    return entries


def _begin(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """What precedes an entry's bytes is as long as its local header says; torch pads there."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise MalformedError(f"entry {info.filename} is compressed or encrypted, torch.save does neither")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if not header.startswith(ZIP_START):
        raise MalformedError(f"entry {info.filename} is not where the zip file's directory says")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + _LOCAL_HEADER_BYTES + lengths


def checked_sha256(file: BinaryIO) -> str:
    """sha256 of the whole file, every entry of which is compared with its CRC-32 in the same pass. Raises
    DamagedEntryError for the first that differs."""
    digest = hashlib.sha256()
    entries = list(archive_entries(file).values())
    file.seek(0)
    for entry in entries:
        _read(file, entry.begin - file.tell(), digest)
        found = _read(file, entry.bytes, digest)
        if entry.crc32 not in (0, found):
            raise DamagedEntryError(entry, found)
    while block := file.read(_READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _read(file: BinaryIO, count: int, digest: hashlib._Hash) -> int:
    """The CRC-32 of the next `count` bytes, which `digest` is updated by."""
    crc32 = 0
    while count > 0 and (block := file.read(min(count, _READ_BYTES))):
        digest.update(block)
        crc32, count = zlib.crc32(block, crc32), count - len(block)
    return crc32
