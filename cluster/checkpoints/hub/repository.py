"""Checkpoints on the Hugging Face Hub, through huggingface_hub and its cache.

To plan, only the configuration, the tokenizer and the headers of the weights are fetched (`planning_folder`); then each
node fetches the files its shards need (`download`). All of it is pinned to one commit (`resolve_revision`). Files of
other kinds, and code, are never asked for.

Weights that a repository has only as pytorch_model*.bin are downloaded whole to plan: their table of tensors lies at no
known place.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    WeakFileLock,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from cluster.artifacts.digests import file_sha256
from cluster.checkpoints.folder import COMPANION_FILES, CONFIG_FILE, PlanningFolder
from cluster.checkpoints.hub.download import fetch_blob
from cluster.checkpoints.hub.requests import ATTEMPTS, DamagedDownloadError, ask
from cluster.checkpoints.weights import FORMS
from cluster.errors import CheckpointError, HubUnavailableError, NoRepositoryError
from cluster.families import FAMILIES
from cluster.machine.owned_folders import owned_folder

logger = logging.getLogger(__name__)

HEADER_GUESS_BYTES = 64 << 10  # what most headers fit in; a longer one takes a second request
_MAX_HEADER_BYTES = 100 << 20
_CONNECTIONS = 8
_WEIGHTS = tuple({form.suffix for form in FORMS})
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubFile(NamedTuple):
    """`sha256` is of the content, None for a small file that git holds itself (weights are never such)."""

    name: str
    bytes: int
    sha256: str | None


def resolve_revision(repo: str, revision: str | None) -> str:
    """The commit a revision stands for: a full commit is itself, for another the Hub is asked. Where it cannot be, the
    commit that it was last in this node's Hub cache goes, with a warning.

    Raises HubUnavailableError where the cache has none, CheckpointError where there is no such repository or revision;
    of a family's default repository, the message names others that fit.
    """
    if constants.HF_HUB_CACHE.startswith("~"):
        raise CheckpointError(
            f"{_label(repo, revision)}: there is no place for the Hub's cache, since no home folder is known: set"
            " HF_HOME or HOME"
        )
    if revision and _COMMIT.fullmatch(revision):
        return revision
    name = _label(repo, revision)
    cached = _cached_commit(repo, revision)

    def asked() -> str:
        found = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
        if not found or not _COMMIT.fullmatch(found):
            raise ValueError(f"found commit {found!r}")
        return found

    try:
        commit = ask(name, asked, attempts=1 if cached else ATTEMPTS)
    except HubUnavailableError as error:
        if cached is None:
            raise
        logger.warning("%s. Going on with commit %s, the last that this node knows", error, cached)
        return cached
    except NoRepositoryError as error:
        raise NoRepositoryError(f"{error}{_instead_of(repo)}") from error
    if commit != cached:
        _cache_commit(repo, revision, commit)
    return commit


def _instead_of(repo: str) -> str:
    """What to take where a family's default is gone; empty for another repository."""
    family = next((family for family in FAMILIES.values() if family.default_repo == repo), None)
    if family is None:
        return ""
    return (
        f". It is the default of family {family.name}; others that fit: {', '.join(family.alternatives)}. Name one as"
        f" checkpoint, for instance: nibble pipeline --model-family {family.name} --repo-id-or-model-path"
        f" {family.alternatives[0]}"
    )


@contextmanager
def planning_folder(repo: str, commit: str) -> Iterator[PlanningFolder]:
    """A folder that looks as the checkpoint does to who reads no weights: of the safetensors files only the headers
    were fetched, the rest of their length is a hole. Gone at the end. A CheckpointError that names the folder on its
    way out names the repository instead.

    Raises CheckpointError where the Hub refuses, or cannot be asked and the local cache does not hold the checkpoint.
    """
    listing, label = list_files(repo, commit)
    with owned_folder(tempfile.gettempdir()) as temporary:
        folder = temporary / "checkpoint"
        folder.mkdir()
        whole = [name for name in COMPANION_FILES if name in listing and name != CONFIG_FILE]
        whole += [form.index_file for form in FORMS if form.index_file in listing]
        _link(repo, commit, whole, folder)
        # Last: a cached configuration says that the files before it are cached as well.
        _link(repo, commit, [name for name in (CONFIG_FILE,) if name in listing], folder)
        weights = [listing[name] for name in _weights_of(listing, folder)]
        holes = [file for file in weights if _needs_header_only(repo, commit, file)]
        _link(repo, commit, [file.name for file in weights if file not in holes], folder)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(lambda file: _write_header(repo, commit, file, folder / file.name), holes))
        try:
            yield PlanningFolder(folder, {file.name: file.sha256 for file in weights if file.sha256})
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), label)) from error


def list_files(repo: str, commit: str) -> tuple[dict[str, HubFile], str]:
    """The files in the repository's top folder by name, with the companions that are in another, and what to call the
    place in a message: the Hub's listing, or the local cache's where the Hub cannot be asked."""
    label = _label(repo, commit)

    def listed() -> dict[str, HubFile]:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(repo, revision=commit, files_metadata=True, timeout=timeout)
        return {
            file.rfilename: HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
            if _may_be_wanted(file.rfilename)
        }

    cached = _cached_files(repo, commit)
    try:
        return ask(label, listed, attempts=1 if CONFIG_FILE in cached else ATTEMPTS), label
    except HubUnavailableError as error:
        if CONFIG_FILE not in cached:
            raise
        logger.warning("%s. Going on with the files in this node's Hub cache", error)
        return cached, f"{label} in the Hub cache of this node"


def _may_be_wanted(name: str) -> bool:
    return "/" not in name or name in COMPANION_FILES


def download(repo: str, commit: str, names: Iterable[str]) -> Path:
    """A folder on this node that has these files of a commit: a snapshot of huggingface_hub's cache, which also keeps
    processes from downloading the same file at once. What is cached is not asked for. A download of weights that was
    cut is taken up where it broke, and what arrives is compared with the Hub's sha256.

    Raises CheckpointError where the Hub refuses or cannot be asked.
    """
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(lambda name: _download_file(repo, commit, name), names))
    return _snapshot(repo, commit)


def _download_file(repo: str, commit: str, name: str) -> Path:
    """Under a lock, so that no process takes a file that another has not yet compared."""

    def downloaded() -> Path:
        if name.endswith(_WEIGHTS) and fetch_blob(repo, commit, name, _cache_folder(repo) / "blobs"):
            return Path(hf_hub_download(repo, name, revision=commit))
        path = Path(hf_hub_download(repo, name, revision=commit))
        sha256 = _linked_sha256(path)
        if sha256 and file_sha256(path) != sha256:
            blob = path.parent / os.readlink(path)
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise DamagedDownloadError("arrived with another sha256 than the Hub names")
        return path

    with _locked(repo, name):
        return _cached_file(repo, commit, name) or ask(f"{_label(repo, commit)}: {name}", downloaded)


@contextmanager
def _locked(repo: str, name: str) -> Iterator[None]:
    """No lock in a cache that cannot be written: nothing arrives there."""
    lock = Path(constants.HF_HUB_CACHE, ".locks", _cache_folder(repo).name, f"{name}.nibble.lock")
    with suppress(OSError):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock) if os.access(lock.parent, os.W_OK) else nullcontext():
        yield


def _link(repo: str, commit: str, names: Iterable[str], folder: Path) -> None:
    wanted = list(names)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for name, path in zip(wanted, pool.map(lambda name: _download_file(repo, commit, name), wanted), strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(path.resolve())


def _weights_of(listing: Mapping[str, HubFile], folder: Path) -> list[str]:
    """The weights files, of the first form there is; what an index does not name is not among them."""
    for form in FORMS:
        if form.single in listing:
            return [form.single]
        if form.index_file in listing:
            text = (folder / form.index_file).read_text(errors="replace")
            return [name for name in listing if name.endswith(form.suffix) and json.dumps(name) in text]
    return []


def _needs_header_only(repo: str, commit: str, file: HubFile) -> bool:
    return file.name.endswith(".safetensors") and file.sha256 is not None and not _cached_file(repo, commit, file.name)


def _write_header(repo: str, commit: str, file: HubFile, path: Path) -> None:
    data = _first_bytes(repo, commit, file, HEADER_GUESS_BYTES)
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < end <= min(file.bytes, _MAX_HEADER_BYTES):
        data = _first_bytes(repo, commit, file, end)
    with path.open("wb") as target:
        target.write(data)
        target.truncate(file.bytes)


def _first_bytes(repo: str, commit: str, file: HubFile, count: int) -> bytes:
    url = hf_hub_url(repo, file.name, revision=commit)
    count = min(count, file.bytes)

    def fetched() -> bytes:
        headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            data = b""
            for piece in response.iter_bytes():  # a server that ignores ranges would send the whole file
                data += piece
                if len(data) >= count:
                    break
        if len(data) < count:
            raise ValueError(f"found {len(data)} bytes of the first {count}")
        return data[:count]

    return ask(f"{_label(repo, commit)}: {file.name}", fetched) if count else b""


def _label(repo: str, revision: str | None) -> str:
    return f"checkpoint: {repo}" + (f"@{revision}" if revision else "")


def _cache_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _snapshot(repo: str, commit: str) -> Path:
    return _cache_folder(repo) / "snapshots" / commit


def _cached_commit(repo: str, revision: str | None) -> str | None:
    try:
        commit = (_cache_folder(repo) / "refs" / (revision or constants.DEFAULT_REVISION)).read_text().strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _cache_commit(repo: str, revision: str | None, commit: str) -> None:
    """As hf_hub_download does for a branch; it is asked for commits only. In one step, for readers meanwhile."""
    path = _cache_folder(repo) / "refs" / (revision or constants.DEFAULT_REVISION)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        staging.write_text(commit)
        os.replace(staging, path)
    except OSError as error:
        logger.warning("%s cannot be written (%s): without the Hub, nothing is known of this revision", path, error)


def _cached_file(repo: str, commit: str, name: str) -> Path | None:
    path = try_to_load_from_cache(repo, name, revision=commit)
    return Path(path) if isinstance(path, str) else None


def _cached_files(repo: str, commit: str) -> dict[str, HubFile]:
    snapshot = _snapshot(repo, commit)
    files = {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*")) if path.is_file()}
    return {
        name: HubFile(name, path.stat().st_size, _linked_sha256(path))
        for name, path in files.items()
        if _may_be_wanted(name)
    }


def _linked_sha256(path: Path) -> str | None:
    """Of a snapshot's file that LFS holds: the cache links it to a blob that has its etag, the sha256, as name. (The
    blob may be a link again, to content that several repositories share.)"""
    etag = Path(os.readlink(path)).name if path.is_symlink() else ""
    return etag if _SHA256.fullmatch(etag) else None
