"""Nothing is lost: artifacts after the death of the store, of a worker, of the driver, and after damage."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.artifact_store import TASKS_AT_ONCE, Published, fetch_artifact, fetch_published, store_handle
from cluster.artifacts.digests import file_sha256
from cluster.artifacts.node_cache import NodeCache
from cluster.artifacts.verified import mark_verified, stamp_file
from cluster.config import ArtifactsConfig
from tests.integration.conversion.converting import artifacts, ensure, small_bloom, wanted
from tests.integration.processes import NIBBLE, ROOT, Sandbox
from tests.random_checkpoint import Shape, write_random_checkpoint

SLOW_BLOOM = Shape("bloom", width=1024, heads=16, layers=10)  # 250 MB of fp16: long enough to be hit in its middle


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("slow") / "model", SLOW_BLOOM)


def forget_all() -> None:
    """The next `ensure` with another cache folder converts."""
    for manifest in ray.get(store_handle().manifests.remote()):
        ray.get(store_handle().forget.remote(manifest.artifact_id))


def store_pid() -> int:
    return int(ray.get(store_handle().__ray_call__.remote(lambda self: os.getpid())))


def kill_store() -> None:
    """As by the kernel; Ray starts the actor again, empty."""
    pid = store_pid()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: store_pid() != pid)
    assert ray.get(store_handle().manifests.remote()) == []


def wait_for(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.02)


def binary_inode(cache: Path, published: Published) -> int:
    return (cache / "artifacts" / published.manifest.artifact_id / published.manifest.binary).stat().st_ino


def assert_whole(published: Published, folder: Path) -> None:
    """The chunks can be read, and make the artifact of the manifest."""
    fetched = fetch_published(published, artifacts(folder)).folder
    assert file_sha256(fetched / published.manifest.binary) == published.manifest.sha256
    NodeCache(folder).check_integrity()


def test_a_store_that_died_restores_from_the_durable_copy(ray_node: None, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=21))
    first = ensure(checkpoint, tmp_path / "cache", tmp_path / "durable")
    kill_store()
    shutil.rmtree(tmp_path / "cache")
    again = ensure(checkpoint, tmp_path / "cache", tmp_path / "durable")
    assert again.manifest == first.manifest
    assert not (tmp_path / "cache" / "artifacts").exists()  # where a conversion would have left its result
    assert_whole(again, tmp_path / "other")


def test_a_store_that_died_restores_from_a_node_s_cache(ray_node: None, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=22))
    first = ensure(checkpoint, tmp_path / "cache")
    inode = binary_inode(tmp_path / "cache", first)
    kill_store()
    again = ensure(checkpoint, tmp_path / "cache")
    assert again.manifest == first.manifest
    assert binary_inode(tmp_path / "cache", again) == inode  # a conversion would have replaced it
    assert_whole(again, tmp_path / "other")


def test_an_artifact_in_the_node_s_cache_needs_no_object_store(ray_node: None, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=25))
    inode = binary_inode(tmp_path / "cache", ensure(checkpoint, tmp_path / "cache"))
    kill_store()
    found = ensure(checkpoint, tmp_path / "cache", with_chunks=False)
    assert found.chunks is None
    asyncio.run(fetch_artifact(wanted(checkpoint), artifacts(tmp_path / "cache")))
    assert ensure(checkpoint, tmp_path / "cache", with_chunks=False).chunks is None  # nor did the fetch ask for any
    assert binary_inode(tmp_path / "cache", found) == inode


def test_chunks_are_read_back_by_a_few_workers(ray_node: None, tmp_path: Path, slow_checkpoint: Path) -> None:
    config = small_shards(tmp_path / "cache")
    forget_all()
    first = ray.get(store_handle().ensure.remote(wanted(slow_checkpoint), config))
    assert len(first.manifest.chunks) > 4 * TASKS_AT_ONCE
    kill_store()
    before = workers()
    asked = store_handle().ensure.remote(wanted(slow_checkpoint), config, with_chunks=True)
    at_once = 0
    while not ray.wait([asked], timeout=0.01)[0]:
        at_once = max(at_once, len(workers() - before))
    assert at_once <= TASKS_AT_ONCE + 1  # and one that reads the files beside the binary
    assert_whole(ray.get(asked), tmp_path / "other")


def workers() -> set[int]:
    """The processes of this test's cluster that run tasks, or wait for some."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::") and own(process):
                found.add(int(process.name))
    return found


def test_damage_that_nobody_noticed_is_found_by_who_reads_the_chunk(ray_node: None, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=26))
    first = ensure(checkpoint, tmp_path / "cache")
    binary = tmp_path / "cache" / "artifacts" / first.manifest.artifact_id / first.manifest.binary
    data = bytearray(binary.read_bytes())
    data[len(data) // 2] ^= 1
    binary.write_bytes(data)
    mark_verified(binary, first.manifest.sha256)  # as if the disk, not a program, had changed it
    os.utime(stamp_file(binary), ns=(binary.stat().st_ctime_ns + 10**9,) * 2)
    kill_store()
    assert ensure(checkpoint, tmp_path / "cache", with_chunks=False).chunks is None
    assert_whole(ensure(checkpoint, tmp_path / "cache"), tmp_path / "other")  # converted again
    assert file_sha256(binary) == first.manifest.sha256


def test_a_store_that_died_converts_again_where_nothing_is_left(ray_node: None, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=23))
    first = ensure(checkpoint, tmp_path / "cache")
    kill_store()
    shutil.rmtree(tmp_path / "cache")
    again = ensure(checkpoint, tmp_path / "cache")
    assert again.manifest == first.manifest
    assert_whole(again, tmp_path / "other")


def test_a_damaged_durable_copy_is_not_used(ray_node: None, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=24))
    first = ensure(checkpoint, tmp_path / "cache", tmp_path / "durable")
    binary = tmp_path / "durable" / first.manifest.artifact_id / first.manifest.binary
    data = bytearray(binary.read_bytes())
    data[len(data) // 2] ^= 1
    binary.write_bytes(data)
    kill_store()
    shutil.rmtree(tmp_path / "cache")
    assert_whole(ensure(checkpoint, tmp_path / "cache", tmp_path / "durable"), tmp_path / "other")


def test_a_flipped_bit_in_a_chunk_is_noticed_and_made_good(
    ray_node: None, tmp_path: Path, slow_checkpoint: Path
) -> None:
    published = ensure(slow_checkpoint, tmp_path / "cache")
    chunk = np.asarray(ray.get(published.chunks[0]))
    # The object store is shared memory: what is written here, every process of the node reads.
    ctypes.c_uint8.from_address(chunk.ctypes.data + chunk.size // 2).value ^= 1
    shutil.rmtree(tmp_path / "cache")
    config = artifacts(tmp_path / "other")
    artifact = asyncio.run(fetch_artifact(wanted(slow_checkpoint), config))
    assert file_sha256(artifact.folder / published.manifest.binary) == published.manifest.sha256
    NodeCache(config.cache_dir).check_integrity()


def test_a_killed_conversion_worker_is_replaced(ray_node: None, tmp_path: Path, slow_checkpoint: Path) -> None:
    forget_all()
    config = small_shards(tmp_path / "cache")
    asked = store_handle().ensure.remote(wanted(slow_checkpoint), config)
    killed = kill_first_process(b"ray::shard_task")
    published = ray.get(asked)
    assert killed
    assert len(published.manifest.chunks) > 4
    assert_whole(published, tmp_path / "other")


def test_a_store_killed_during_a_conversion_ends_it_all_the_same(
    ray_node: None, tmp_path: Path, slow_checkpoint: Path
) -> None:
    forget_all()
    pid = store_pid()
    config = small_shards(tmp_path / "cache")
    asked = store_handle().ensure.remote(wanted(slow_checkpoint), config)
    wait_for(lambda: bool(ray.get(store_handle().progress.remote())))
    os.kill(pid, signal.SIGKILL)
    published = ray.get(asked)
    assert store_pid() != pid
    assert_whole(published, tmp_path / "other")
    NodeCache(config.cache_dir).check_integrity()


def small_shards(cache: Path) -> ArtifactsConfig:
    return ArtifactsConfig(cache_dir=cache, shard_size=4 << 20)


def kill_first_process(name: bytes) -> bool:
    """Kills the first process with this title that appears."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cmdline").read_bytes().startswith(name) and own(process):
                    os.kill(int(process.name), signal.SIGKILL)
                    return True
    return False


def own(process: Path) -> bool:
    """Of this test's cluster, not of another one on the machine."""
    return f"RAY_TMPDIR={os.environ['RAY_TMPDIR']}\0".encode() in (process / "environ").read_bytes()


def test_a_killed_driver_leaves_nothing_half_written(one_cpu_head: tuple[Sandbox, str], slow_checkpoint: Path) -> None:
    home, address = one_cpu_head
    output = home.home / "int4"
    arguments = ["convert", str(slow_checkpoint), "--family", "bloom", "--output", str(output), "--address", address]
    driver = subprocess.Popen(
        [*NIBBLE, *arguments], env=home.environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: any("ray::" in line and "task" in line for line in home.processes()))
    driver.kill()
    driver.wait()
    assert not output.exists()
    again = home.run(*arguments)
    assert again.returncode == 0, again.stderr
    assert (output / "bigdl_llm_bloom_q4_0.bin").is_file()
    wait_for(lambda: not list((home.home / ".cache" / "nibble" / "artifacts").glob(".*")))
    NodeCache(home.home / ".cache" / "nibble").check_integrity()
