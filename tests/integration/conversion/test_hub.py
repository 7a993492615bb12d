"""`nibble convert org/repo@revision`, with the Hub's settings in the environment as users have them, and nodes that
ask the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.artifacts.manifest import Manifest
from cluster.conversion.plan import ConversionPlan, plan_conversion
from cluster.conversion.shard import convert_shard
from cluster.conversion_tasks import shard_task
from tests.hub_lookalike import HubLookalike
from tests.integration.conversion.converting import ensure
from tests.integration.processes import sandbox
from tests.random_checkpoint import Shape, write_random_checkpoint


def convert(source: str, output: Path, **environment: str) -> Manifest:
    """On this machine, with an empty node cache."""
    with sandbox(**environment) as home:
        result = home.run("convert", source, "--family", "bloom", "--output", str(output), timeout=180)
        assert result.returncode == 0, result.stdout + result.stderr
    return Manifest.read(output)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", Shape("bloom", width=192, heads=6, layers=2, seed=31), shards=3)


def test_a_repository_converts_to_the_artifact_of_its_folder_also_when_the_hub_is_down(
    model: Path, tmp_path: Path
) -> None:
    with HubLookalike(token="hf_secret") as hub:
        hub.add("org/model", model, revision="v1")
        weights = [path.name for path in model.glob("*.safetensors")]
        hub.cut(max(weights, key=lambda name: (model / name).stat().st_size), after=100_000, times=2)
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        online = convert("org/model@v1", tmp_path / "online", **settings, HF_TOKEN="hf_secret")
        asked = {request.file for request in hub.requests if "/resolve/" in request.path}
        assert asked == {path.name for path in model.iterdir()}
    down = convert("org/model@v1", tmp_path / "down", **settings)
    folder = convert(str(model), tmp_path / "folder")
    assert online.artifact_id == down.artifact_id == folder.artifact_id
    assert online.sha256 == down.sha256 == folder.sha256
    assert online.files == down.files == folder.files


def test_a_gated_repository_is_one_line_of_what_to_do(model: Path, tmp_path: Path) -> None:
    with HubLookalike() as hub:
        hub.add("org/model", model)
        hub.repositories["org/model"].gated = True
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        with sandbox(**settings) as home:
            result = home.run("convert", "org/model", "--family", "bloom", "--output", str(tmp_path / "out"))
    assert result.returncode != 0
    assert "is gated (403): accept its conditions" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_each_node_downloads_only_the_files_that_its_shards_need(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubLookalike() as hub, sandbox() as home:
        source = f"org/model@{hub.add('org/model', model)}"
        monkeypatch.setenv("RAY_TMPDIR", str(home.ray_tmpdir))
        with two_nodes(hub.url, tmp_path / "first", tmp_path / "second") as nodes:
            plan = plan_conversion(model, "bloom", shard_bytes=1).model_copy(update={"checkpoint": source})
            files = [plan.tensors[shard.first].source.file for shard in plan.shards]
            first = [index for index, file in enumerate(files) if file == min(files)]
            second = [index for index, file in enumerate(files) if file == max(files)]
            for node, shards in zip(nodes, (first, second), strict=True):
                affinity = NodeAffinitySchedulingStrategy(node, soft=False)
                task = shard_task.options(scheduling_strategy=affinity)
                made = ray.get([task.remote(plan, index)[0] for index in shards])
                assert [data.tobytes() for data in made] == [convert_here(plan, model, index) for index in shards]
    assert weights_in(tmp_path / "first") == {min(files)}
    assert weights_in(tmp_path / "second") == {max(files)}
    asked = [name for name in set(files) if hub.asked(name)]
    assert sorted(asked) == [min(files), max(files)]


def test_a_cluster_converts_a_repository_to_the_artifact_of_its_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubLookalike() as hub, sandbox() as home:
        hub.add("org/model", model, revision="v1")
        monkeypatch.setenv("RAY_TMPDIR", str(home.ray_tmpdir))
        with two_nodes(hub.url, tmp_path / "first", tmp_path / "second"):
            published = ensure("org/model@v1", tmp_path / "cache")
    assert published.manifest.source == "org/model@v1"
    folder = convert(str(model), tmp_path / "folder")
    assert (published.manifest.artifact_id, published.manifest.sha256) == (folder.artifact_id, folder.sha256)
    assert published.manifest.chunks == folder.chunks


@contextmanager
def two_nodes(endpoint: str, *hub_homes: Path) -> Iterator[list[str]]:
    """The ids of two Ray nodes on this machine, each with a Hub cache of its own."""
    cluster = Cluster()
    try:
        for hub_home in hub_homes:
            settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "0"}
            cluster.add_node(num_cpus=1, env_vars=settings, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        yield [node.node_id for node in cluster.list_all_nodes()]
    finally:
        ray.shutdown()
        cluster.shutdown()


def convert_here(plan: ConversionPlan, folder: Path, index: int) -> bytes:
    return convert_shard(plan.model_copy(update={"checkpoint": str(folder)}), index).tobytes()


def weights_in(hub_home: Path) -> set[str]:
    return {path.name for path in hub_home.glob("**/snapshots/**/*.safetensors")}
