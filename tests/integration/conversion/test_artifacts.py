"""`nibble artifacts` on this machine's cache, a durable copy and a cluster."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import httpx

from cluster.artifacts.manifest import Manifest
from cluster.artifacts.node_cache import folder_bytes
from cluster.ray_cluster import free_ports
from tests.integration.processes import Sandbox, assert_ends_cleanly, sandbox, serving

MODELS = "models:\n- {name: bloom, family: bloom, checkpoint: 'builtin:bloom', threads: 1}\n"


def cached(home: Sandbox) -> Path:
    """The folder of the only artifact in the node cache."""
    (manifest,) = (home.home / ".cache" / "nibble" / "artifacts").glob("*/manifest.json")
    return manifest.parent


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_list_verify_and_remove() -> None:
    with sandbox() as home:
        home.run("pipeline", "--thread-num", "1", "--model-family", "bloom", "--repo-id-or-model-path", "builtin:bloom")
        artifact_id = cached(home).name
        listed = home.run("artifacts", "list")
        assert artifact_id in listed.stdout
        assert "this machine" in listed.stdout
        assert home.run("artifacts", "verify").returncode == 0
        flip_bit(cached(home) / "bigdl_llm_bloom_q4_0.bin")
        verified = home.run("artifacts", "verify")
        assert verified.returncode == 1
        assert f"damaged: {artifact_id} (this machine)" in verified.stderr
        assert home.run("artifacts", "remove", artifact_id).returncode == 0
        assert artifact_id not in home.run("artifacts", "list").stdout
        again = home.run("artifacts", "remove", artifact_id)
        assert again.returncode == 1
        assert "no such artifact" in again.stderr


def test_a_served_artifact_is_kept_durably_and_survives_damage_and_a_restart(tmp_path: Path) -> None:
    config = f"artifacts: {{durable_uri: 'file://{tmp_path}/durable'}}\n{MODELS}"
    with sandbox() as home:
        with serving(home, config, *free_ports(2)) as served:
            artifact_id = cached(home).name
            (kept,) = (tmp_path / "durable").iterdir()
            assert kept.name == artifact_id
            removed = home.run("artifacts", "remove", artifact_id)
            assert removed.returncode == 1
            assert "a replica uses it" in removed.stderr
            assert httpx.get(f"{served.http}/readyz", timeout=60).status_code == 200
            assert_ends_cleanly(served, signal.SIGTERM)
        flip_bit(cached(home) / "bigdl_llm_bloom_q4_0.bin")
        made = json.loads((kept / "manifest.json").read_text())["sha256"]
        written = (kept / "manifest.json").stat().st_mtime_ns
        with serving(home, config, *free_ports(2)) as served:
            answer = httpx.post(
                f"{served.http}/v1/completions", json={"model": "bloom", "prompt": "Q:", "max_tokens": 4}, timeout=60
            )
            assert answer.status_code == 200
            listed = home.run("artifacts", "list", "--config", str(home.home / "nibble.yaml"))
            assert "kept" in listed.stdout
        verified = home.run("artifacts", "verify", "--config", str(home.home / "nibble.yaml"))
        assert verified.returncode == 0, verified.stderr  # the damaged copy in the cache was replaced
        assert json.loads((cached(home) / "manifest.json").read_text())["sha256"] == made
        assert (kept / "manifest.json").stat().st_mtime_ns == written  # nor was the durable copy written again


def test_what_an_engine_derives_beside_its_artifact_counts_against_the_cache_size() -> None:
    with sandbox() as home:
        for family in ("bloom", "llama"):
            home.run("pipeline", "--model-family", family, "--repo-id-or-model-path", f"builtin:{family}")
        folders = [manifest.parent for manifest in home.home.glob(".cache/nibble/artifacts/*/manifest.json")]
        both = sum(map(folder_bytes, folders))  # they fit; with what the engine derives from one of them they do not
        model = "{name: llama, family: llama, checkpoint: 'builtin:llama', engine: openvino, threads: 1}"
        config = f"artifacts: {{cache_size: {both + 1000}}}\nmodels:\n- {model}\n"
        with serving(home, config, *free_ports(2)):
            assert Manifest.read(cached(home)).family == "llama"
            assert list(cached(home).glob("openvino-*.bin"))


def test_a_durable_uri_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with sandbox() as home:
        path = home.home / "nibble.yaml"
        path.write_text(f"artifacts: {{durable_uri: 'file://{tmp_path}/file/x'}}\n{MODELS}")
        result = home.run("serve", str(path))
        assert result.returncode == 1
        assert "artifacts.durable_uri" in result.stderr
        assert "cannot be written" in result.stderr
        assert home.wait_no_processes() == []


def test_an_artifact_of_the_cluster_is_listed_and_removed_by_node(
    one_cpu_head: tuple[Sandbox, str], tmp_path: Path
) -> None:
    home, address = one_cpu_head
    arguments = ("--address", address)
    home.run("convert", "builtin:bloom", "--family", "bloom", "--output", str(tmp_path / "int4"), *arguments)
    artifact_id = cached(home).name
    assert "node " in home.run("artifacts", "list", *arguments).stdout
    assert artifact_id in home.run("status", *arguments).stdout
    removed = home.run("artifacts", "remove", artifact_id, *arguments)
    assert removed.returncode == 0, removed.stderr
    assert artifact_id not in home.run("status", *arguments).stdout
    shutil.rmtree(tmp_path / "int4")
    again = home.run("convert", "builtin:bloom", "--family", "bloom", "--output", str(tmp_path / "int4"), *arguments)
    assert again.returncode == 0, again.stderr
