"""The node cache: one folder an artifact, shared by all replicas of the node through mmap.

    <cache_dir>/artifacts/<artifact_id>/{bigdl_llm_<family>_q4_0.bin, manifest.json, config.json, tokenizer files}

A folder under its final name is whole: it is written beside it, verified, flushed and renamed in one step. A file
lock lets one process of the node do that while the others wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from cluster.artifacts.digests import bytes_sha256, check_digest, file_sha256
from cluster.artifacts.manifest import MANIFEST_FILE, Manifest
from cluster.artifacts.verified import is_verified, mark_verified, stamp_file
from cluster.errors import ArtifactError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ReadChunk = Callable[[int], bytes | memoryview]


class CachedArtifact:
    """An artifact in the node cache, not evicted before `release` or the end of this process."""

    def __init__(self, folder: Path, use_lock: int) -> None:
        self.folder = folder
        self._use_lock: int | None = use_lock

    def release(self) -> None:
        if self._use_lock is not None:
            os.close(self._use_lock)
            self._use_lock = None


class NodeCache:
    """`max_bytes`: what the artifacts of the node may take together; None is no bound. An artifact in use is never
    evicted, so that a cache which is all in use exceeds it."""

    def __init__(self, cache_dir: Path, max_bytes: int | None = None) -> None:
        self.folder = cache_dir / "artifacts"
        self._max_bytes = max_bytes

    def fetch(
        self, manifest: Manifest, files: Mapping[str, bytes], read_chunk: ReadChunk, first: int = 0
    ) -> CachedArtifact:
        """The artifact on this node, which is exactly what the manifest says.

        `files`: content of the files beside the binary; `read_chunk(i)`: the bytes of chunk i, called only where this
        node lacks the artifact or its copy is damaged (which is then replaced), from chunk `first` on and then from
        chunk 0 on. Raises ArtifactError where the content does not fit the manifest or cannot be written, and leaves
        nothing behind then.
        """
        with self.locked(manifest.artifact_id):
            artifact = self._held(manifest)
            if artifact is None:
                with Staging(self.folder, manifest.artifact_id) as staging:
                    binary_sha256 = write_binary(staging / manifest.binary, manifest, read_chunk, first)
                    write_files(staging, files)
                    check_digest(f"{manifest.binary} of {manifest.artifact_id}", binary_sha256, manifest.sha256)
                    artifact = self.admit(staging, manifest)
            return artifact

    def cached(self, artifact_id: str) -> CachedArtifact | None:
        """The artifact if this node has it undamaged, without anybody else being asked."""
        with self.locked(artifact_id):
            manifest = next((each for each in self.manifests() if each.artifact_id == artifact_id), None)
            return None if manifest is None else self._held(manifest)

    def locked(self, artifact_id: str) -> FileLock:
        """One process of the node at a time changes what is under an artifact's name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"{artifact_id}.lock")

    def admit(self, staging: Path, manifest: Manifest) -> CachedArtifact:
        """Renames a complete staging folder to the artifact's name and makes room for it. It is in use before it has
        that name, so that no other process evicts it. Call under the lock."""
        artifact = self.use(manifest.artifact_id)
        try:
            publish_folder(staging, artifact.folder, manifest)
            mark_verified(artifact.folder / manifest.binary, manifest.sha256)
            touch(artifact.folder)
            self.evict()
        except BaseException:
            artifact.release()
            raise
        return artifact

    def use(self, artifact_id: str) -> CachedArtifact:
        """Marks the artifact as used now, and as in use until the result is released. Call under the lock."""
        folder = self.folder / artifact_id
        use_lock = os.open(self.folder / f"{artifact_id}.use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(use_lock, fcntl.LOCK_SH)
        touch(folder)
        return CachedArtifact(folder, use_lock)

    def evict(self) -> None:
        """Removes the least recently used artifacts, those in use excepted, until the bound is kept. Call it, too, once
        an engine has derived files of its own in an artifact's folder."""
        if self._max_bytes is None:
            return
        found = []
        for manifest in self.manifests():
            folder = self.folder / manifest.artifact_id
            with contextlib.suppress(FileNotFoundError):  # another process has just evicted it
                found.append((folder.stat().st_mtime_ns, manifest.artifact_id, folder_bytes(folder)))
        total = sum(size for *_, size in found)
        for _, artifact_id, size in sorted(found):
            if total > self._max_bytes and self.remove(artifact_id):
                total -= size

    def remove(self, artifact_id: str) -> bool:
        """Whether the artifact is gone; not while a process of the node uses it."""
        use_lock = os.open(self.folder / f"{artifact_id}.use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(use_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Under another name first: a folder under its final name is whole.
            with Staging(self.folder, artifact_id) as staging, contextlib.suppress(FileNotFoundError):
                (self.folder / artifact_id).rename(staging / "removed")
        except BlockingIOError:
            return False
        finally:
            os.close(use_lock)
        return True

    def manifests(self) -> list[Manifest]:
        """Of the artifacts of this node; their bytes are not verified."""
        found = []
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if folder.is_dir() and not folder.name.startswith("."):
                # What cannot be read was damaged, or written by another version of nibble: fetched anew when needed.
                with contextlib.suppress(OSError, ValueError):
                    found.append(Manifest.read(folder))
        return found

    def holds(self, manifest: Manifest) -> bool:
        """Whether this node has the artifact, undamaged. Reads the binary only where it changed since it was last found
        so (`cluster.artifacts.verified`)."""
        return self._compare(manifest, is_verified)

    def verify(self, manifest: Manifest) -> bool:
        """As `holds`, but reads the binary in any case."""
        sound = self._compare(manifest, lambda path, sha256: file_sha256(path) == sha256)
        if not sound:
            self.doubt(manifest)
        return sound

    def doubt(self, manifest: Manifest) -> None:
        """For whoever read damaged bytes: `holds` reads the binary again before it says yes."""
        with contextlib.suppress(OSError):
            stamp_file(self.folder / manifest.artifact_id / manifest.binary).unlink()

    def _compare(self, manifest: Manifest, matches: Callable[[Path, str], bool]) -> bool:
        target = self.folder / manifest.artifact_id
        try:
            if Manifest.read(target) != manifest:
                return False
            files = all(file_sha256(target / name) == sha256 for name, sha256 in manifest.files.items())
            return files and matches(target / manifest.binary, manifest.sha256)
        except (OSError, ValueError):
            return False

    def _held(self, manifest: Manifest) -> CachedArtifact | None:
        """In use before its bytes are looked at. None where this node has it not, or damaged."""
        artifact = self.use(manifest.artifact_id)
        if self.holds(manifest):
            return artifact
        artifact.release()
        return None

    def check_integrity(self) -> None:
        """Raises ArtifactError where a folder under a final name is not whole, or a staging folder was left behind."""
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if folder.name.startswith("."):
                raise ArtifactError(f"{folder}: left behind by a fetch that did not end")
            if folder.is_dir() and not self.verify(Manifest.read(folder)):
                raise ArtifactError(f"{folder}: does not fit its manifest; remove the folder, it is fetched again")


class Staging:
    """A folder to write an artifact in, on the file system of its final place; removed at the end if still there. One
    whose process was killed is removed by the next for the same artifact. Raises ArtifactError where there can be
    none."""

    def __init__(self, parent: Path, artifact_id: str) -> None:
        with written(parent / artifact_id / MANIFEST_FILE):
            parent.mkdir(parents=True, exist_ok=True)
            self.path, self._lock = _locked_folder(parent, artifact_id)
        remove_abandoned(parent, artifact_id)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _locked_folder(parent: Path, artifact_id: str) -> tuple[Path, int]:
    """A new folder, and the lock that says that its process lives: the kernel lets go of it when the process ends."""
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=f".{artifact_id}."))
        # Another process may take it for abandoned before it is locked: then once more.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # NFS locks no folders: there, none is taken for abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def remove_abandoned(parent: Path, artifact_id: str) -> None:
    for path in parent.glob(f".{artifact_id}.*"):
        with contextlib.suppress(OSError):  # its process is at work (no lock is to be had), or has just removed it
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def write_binary(path: Path, manifest: Manifest, read_chunk: ReadChunk, first: int = 0) -> str:
    """Writes the chunks, from chunk `first` on and then from chunk 0 on, and verifies each; the file's sha256. Raises
    ArtifactError where a chunk is not what the manifest says, or the file cannot be written (a full disk): what was
    written till then is of no use."""
    whole, chunks = hashlib.sha256(), manifest.chunks
    in_order = first or len(chunks)  # so many from chunk 0 on come in order, and are hashed as they come
    with written(path), path.open("w+b") as file, ThreadPoolExecutor(2) as beside:
        for index in (*range(first, len(chunks)), *range(first)):
            data = read_chunk(index)
            file.seek(chunks[index].offset)
            # The three passes over a chunk at once: together they are all of the time this takes.
            passes: list[Future[object]] = [beside.submit(file.write, data)]
            if index < in_order:
                passes.append(beside.submit(whole.update, data))
            check_digest(f"chunk {index} of {manifest.artifact_id}", bytes_sha256(data), chunks[index].sha256)
            for each in passes:
                each.result()
        for chunk in chunks[in_order:]:
            file.seek(chunk.offset)
            whole.update(file.read(chunk.bytes))
    return whole.hexdigest()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        with written(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "free some space there" if error.errno in NO_ROOM else "make it writable or name another folder"
        raise ArtifactError(f"{path.parent.parent}: cannot be written: {error.strerror}; {advice}") from error


def flush(path: Path) -> None:
    """To the disk. Raises ArtifactError where there is no room for it."""
    with written(path), path.open("rb") as file:
        os.fsync(file.fileno())


def publish_folder(staging: Path, target: Path, manifest: Manifest) -> None:
    """Flushes a complete staging folder and renames it to its final name; a damaged older one gives way. Call under
    the lock."""
    for name, sha256 in manifest.files.items():
        check_digest(f"{name} of {manifest.artifact_id}", file_sha256(staging / name), sha256)
    flush(staging / manifest.binary)
    (staging / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1))
    staging.chmod(0o755)  # mkdtemp's 0700 would shut out replicas of another user
    if target.exists():
        # A replica that has the old files mapped keeps them: removing a name does not remove a mapping.
        shutil.rmtree(target)
    os.replace(staging, target)


def touch(folder: Path) -> None:
    """By the nanosecond; the kernel's own clock for it ticks every few milliseconds."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(folder, ns=(time.time_ns(),) * 2)


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # one that was being written has its final name now
            total += path.stat().st_size
    return total
