"""The artifact store gives no artifact to an engine that cannot run it: planned, remembered or restored."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import pytest
import ray

from cluster.artifact_store import Published, store_handle
from cluster.artifacts.durable import DurableCopy
from cluster.artifacts.manifest import MANIFEST_FILE, ChunkEntry, Manifest
from cluster.conversion.wanted import Wanted, wanted_artifacts
from cluster.display import describe
from cluster.errors import CheckpointError
from cluster.families import EngineName
from cluster.model_config import ModelConfig
from cluster.ray_errors import raised_here
from tests.conftest import convert_here
from tests.integration.conversion.converting import artifacts
from tests.random_checkpoint import OPENVINO_SHAPES, write_lively_weights, write_random_checkpoint

REPOSITORY = "org/shallow"
OBSTACLE = r"config\.json: num_hidden_layers: found 3, allowed is one of 16, .*; engine openvino runs it"


def ensure(source: str, engine: EngineName | None, cache: Path, durable: Path | None = None) -> Published:
    wanted = Wanted(source=source, family="gptneox", quantization="q4_0", engine=engine)
    with raised_here():
        return ray.get(store_handle().ensure.remote(wanted, artifacts(cache, durable), with_chunks=True))


def shallow_checkpoint(folder: Path, seed: int) -> Path:
    shape = OPENVINO_SHAPES["gptneox-shallow"]._replace(seed=seed, config=())
    return write_random_checkpoint(folder, shape._replace(feed_forward=None))


def artifact_of_repository(folder: Path, seed: int) -> tuple[Path, Manifest]:
    """What an earlier conversion of a Hub repository left, in `folder`/ID."""
    converted = convert_here(shallow_checkpoint(folder / "checkpoint", seed), "gptneox", folder / "converted")
    manifest = Manifest.read(converted)
    chunk = ChunkEntry(offset=0, bytes=manifest.bytes, sha256=manifest.sha256)
    manifest = manifest.model_copy(update={"source": REPOSITORY, "chunks": (chunk,)})
    (converted / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return converted.rename(folder / manifest.artifact_id), manifest


def test_the_engine_that_a_model_names_is_wanted() -> None:
    model = ModelConfig(name="a", family="llama", checkpoint="org/repo", engine="openvino")
    assert [wanted.engine for wanted in wanted_artifacts(model)] == ["openvino"]


def test_the_artifact_of_a_draft_model_is_wanted_too() -> None:
    draft = {"checkpoint": "org/small", "tokens": 2}
    model = ModelConfig(name="a", family="llama", checkpoint="org/repo", engine="openvino", openvino={"draft": draft})
    own, of_draft = wanted_artifacts(model)
    assert (own.source, of_draft.source) == ("org/repo", "org/small")
    assert (of_draft.family, of_draft.engine, of_draft.quantization) == ("llama", "openvino", own.quantization)


def test_a_checkpoint_that_the_engine_cannot_run_is_refused_before_its_weights_are_read(
    ray_node: None, tmp_path: Path
) -> None:
    checkpoint = shallow_checkpoint(tmp_path / "model", seed=61)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x00\x7e")  # a NaN at the end, which who reads it refuses
    with pytest.raises(CheckpointError, match=OBSTACLE) as refused:
        ensure(str(checkpoint), "bigdl", tmp_path / "cache")
    assert str(refused.value).startswith(str(checkpoint))
    for engine in (None, "openvino"):
        with pytest.raises(CheckpointError, match="NaN"):
            ensure(str(checkpoint), engine, tmp_path / "cache")


@pytest.mark.parametrize("place", ["cache", "durable"])
def test_an_artifact_that_the_engine_cannot_run_is_neither_restored_nor_given_from_memory(
    ray_node: None, tmp_path: Path, place: Literal["cache", "durable"]
) -> None:
    """Known by the repository's name: the Hub is not asked."""
    folder, manifest = artifact_of_repository(tmp_path / "made", seed=62 if place == "cache" else 63)
    cache, durable = tmp_path / "cache", None
    if place == "cache":
        (cache / "artifacts").mkdir(parents=True)
        folder.rename(cache / "artifacts" / folder.name)
    else:
        durable = tmp_path / "durable"
        files = {name: (folder / name).read_bytes() for name in manifest.files}
        binary = (folder / manifest.binary).read_bytes()
        DurableCopy(f"file://{durable}").write(manifest, files, lambda _: memoryview(binary))
    before = [m.artifact_id for m in ray.get(store_handle().manifests.remote())]
    with pytest.raises(CheckpointError, match=f"^{REPOSITORY}/{OBSTACLE}"):
        ensure(REPOSITORY, "bigdl", cache, durable)
    assert [m.artifact_id for m in ray.get(store_handle().manifests.remote())] == before
    published = ensure(REPOSITORY, "openvino", cache, durable)
    assert published.manifest == manifest
    assert hashlib.sha256(bytes(ray.get(published.chunks[0]))).hexdigest() == manifest.sha256
    with pytest.raises(CheckpointError, match=f"^{REPOSITORY}/{OBSTACLE}"):
        ensure(REPOSITORY, "bigdl", cache, durable)
    assert ensure(REPOSITORY, None, cache, durable).manifest == manifest
    ray.get(store_handle().forget.remote(manifest.artifact_id))


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2"])
def test_such_a_checkpoint_is_converted_checked_and_published_for_openvino(
    ray_node: None, tmp_path: Path, name: str
) -> None:
    folder = write_random_checkpoint(tmp_path / "model", OPENVINO_SHAPES[name], write=write_lively_weights)
    wanted = Wanted(source=str(folder), family="llama", quantization="q4_0", engine="openvino")
    with raised_here():
        published = ray.get(store_handle().ensure.remote(wanted, artifacts(tmp_path / "cache")))
    assert published.manifest.engines == ("openvino",)
    assert describe(published.manifest).endswith(f"artifact {published.manifest.artifact_id}, for engine openvino")
