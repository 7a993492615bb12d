"""The durable copy of artifacts: a folder of any fsspec file system, which outlives the cluster and its nodes.

    <durable_uri>/<artifact_id>/{bigdl_llm_<family>_q4_0.bin, manifest.json, config.json, tokenizer files}

The manifest is written last and removed first: a folder that has one is whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec

from cluster.artifacts.digests import bytes_sha256, check_digest
from cluster.artifacts.manifest import MANIFEST_FILE, Manifest
from cluster.artifacts.node_cache import ReadChunk
from cluster.errors import ArtifactError, ConfigError


class DurableCopy:
    def __init__(self, uri: str) -> None:
        """Raises ConfigError for a URI of a file system that is unknown here."""
        self.uri = uri
        try:
            self._files, self._root = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"artifacts.durable_uri: found {uri!r}: {error}") from None

    def manifests(self) -> list[Manifest]:
        """Of the artifacts that are whole."""
        with self._translated("read"):
            names = self._files.ls(self._root, detail=False) if self._files.isdir(self._root) else []
        found = (self.manifest(name.rstrip("/").rpartition("/")[2]) for name in sorted(names))
        return [manifest for manifest in found if manifest is not None]

    def manifest(self, artifact_id: str) -> Manifest | None:
        """None where there is no whole copy of the artifact."""
        path = self._path(artifact_id, MANIFEST_FILE)
        with self._translated("read"):
            if not self._files.isfile(path):
                return None
            content = self._files.cat_file(path)
        try:
            return Manifest.model_validate_json(content)
        except ValueError:
            return None  # cut off while it was written, or of another version of nibble

    def read_chunk(self, manifest: Manifest, index: int) -> bytes:
        """Raises ArtifactError where the bytes are not those of the manifest."""
        chunk = manifest.chunks[index]
        with (
            self._translated("read"),
            self._files.open(self._path(manifest.artifact_id, manifest.binary), "rb") as file,
        ):
            file.seek(chunk.offset)
            data = bytes(file.read(chunk.bytes))
        check_digest(f"chunk {index} of {manifest.artifact_id} at {self.uri}", bytes_sha256(data), chunk.sha256)
        return data

    def read_files(self, manifest: Manifest) -> dict[str, bytes]:
        with self._translated("read"):
            files = {name: self._files.cat_file(self._path(manifest.artifact_id, name)) for name in manifest.files}
        for name, content in files.items():
            check_digest(f"{name} of {manifest.artifact_id} at {self.uri}", bytes_sha256(content), manifest.files[name])
        return files

    def write(self, manifest: Manifest, files: Mapping[str, bytes], read_chunk: ReadChunk) -> None:
        """Writes a copy where there is none. Raises ArtifactError, and leaves none, where it cannot be written."""
        if self.manifest(manifest.artifact_id) == manifest:
            return
        try:
            with self._translated("written"):
                self._files.makedirs(self._path(manifest.artifact_id), exist_ok=True)
                with self._files.open(self._path(manifest.artifact_id, manifest.binary), "wb") as file:
                    for index in range(len(manifest.chunks)):
                        file.write(read_chunk(index))
                for name, content in files.items():
                    path = self._path(manifest.artifact_id, name)
                    self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                    self._files.pipe_file(path, content)
                content = manifest.model_dump_json(indent=1).encode()
                self._files.pipe_file(self._path(manifest.artifact_id, MANIFEST_FILE), content)
        except ArtifactError:
            with contextlib.suppress(ArtifactError):  # the first error is the one to tell
                self.remove(manifest.artifact_id)
            raise

    def remove(self, artifact_id: str) -> bool:
        """Whether there was anything to remove."""
        with self._translated("removed"):
            if not self._files.exists(self._path(artifact_id)):
                return False
            if self._files.exists(self._path(artifact_id, MANIFEST_FILE)):
                self._files.rm_file(self._path(artifact_id, MANIFEST_FILE))
            self._files.rm(self._path(artifact_id), recursive=True)
        return True

    def verify(self, manifest: Manifest) -> None:
        """Reads the copy whole. Raises ArtifactError where something differs from the manifest."""
        self.read_files(manifest)
        for index in range(len(manifest.chunks)):
            self.read_chunk(manifest, index)

    def _path(self, *parts: str) -> str:
        return "/".join((self._root.rstrip("/"), *parts))

    @contextlib.contextmanager
    def _translated(self, done: str) -> Iterator[Any]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(f"artifacts.durable_uri: {self.uri} cannot be {done}: {error}") from error
