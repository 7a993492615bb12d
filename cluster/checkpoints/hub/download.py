"""Downloading weights from the Hub so that nothing arrives twice: a download that was cut, by a broken connection or a
killed process, is taken up where it ended.

    <cache of the repository>/blobs/<sha256>.<file name>.incomplete    until it is whole and its sha256 is right

huggingface_hub 1.33 begins a file again after a connection was reset (its `http_get` goes on after other errors only),
and after its process was killed (each process writes a file of its own, which the next one cannot know:
https://github.com/huggingface/huggingface_hub/pull/4228). That holds for its transfer by hf_xet too, so weights come
by plain HTTP. Once a blob is there under its name, `hf_hub_download` links it without a download.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, or httpx2's by its version
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from cluster.artifacts.digests import update_sha256
from cluster.checkpoints.hub.requests import DamagedDownloadError

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")


class HashingFile(io.FileIO):
    """A file that bytes are added to, and the sha256 of all it holds: what it held before is read once, here."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "a+")
        self.sha256 = hashlib.sha256()
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """To `offset`, with all before it hashed again: `http_get` goes back where a server sends the whole file."""
        super().seek(0)
        self.sha256 = hashlib.sha256()
        size = os.fstat(self.fileno()).st_size
        update_sha256(self.sha256, self, size if whence == os.SEEK_END else offset)
        return self.tell()

    def write(self, data: Any, /) -> int:
        """All of it; a disk that is almost full takes a part, and refuses the rest with OSError."""
        left = memoryview(data)
        while left:
            count = super().write(left)
            self.sha256.update(left[:count])
            left = left[count:]
        return len(data)


def fetch_blob(repo: str, commit: str, name: str, blobs: Path) -> bool:
    """Whether a file's content is under its sha256 in the folder `blobs` now, compared with the Hub's sha256; False for
    a file that git holds itself, and for one that plain HTTP does not give. Call under a lock of the file's name.

    Raises DamagedDownloadError, OSError, or what huggingface_hub raises. What arrived until then is kept, unless it was
    damaged.
    """
    url = hf_hub_url(repo, name, revision=commit)
    metadata = get_hf_file_metadata(url)
    sha256, size = metadata.etag, metadata.size
    if not sha256 or not _SHA256.fullmatch(sha256) or size is None or size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return False
    if (blobs / sha256).exists():
        return True
    blobs.mkdir(parents=True, exist_ok=True)
    partial = blobs / f"{sha256}.{name}.incomplete"
    with HashingFile(partial) as file:
        file.seek(0, os.SEEK_END)
        _receive(url, file, size)
        arrived = file.sha256.hexdigest()
    if arrived != sha256:
        partial.unlink()
        raise DamagedDownloadError("arrived with another sha256 than the Hub names")
    os.replace(partial, blobs / sha256)
    return True


def _receive(url: str, file: HashingFile, size: int) -> None:
    """The rest of the content. A broken connection counts as a failure only where nothing arrived by it."""
    while True:
        before = file.tell()
        try:
            return http_get(url, file, resume_size=before, headers=build_hf_headers(), expected_size=size)
        except HTTPError as error:
            if file.tell() <= before:
                raise
            logger.warning("%s: %s after %d of %d bytes; going on from there", url, error, file.tell(), size)
