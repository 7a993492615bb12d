"""`nibble convert` on one machine: the artifact whole or not at all, and no Ray."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster.artifacts.digests import file_sha256
from cluster.artifacts.manifest import MANIFEST_FILE, Manifest
from cluster.artifacts.node_cache import NodeCache
from cluster.checkpoints.weights import weight_sources
from cluster.config import ArtifactsConfig
from cluster.conversion.local import convert_to_cache, convert_to_folder
from cluster.conversion.wanted import Wanted
from cluster.display import ConversionDisplay
from cluster.errors import CheckpointError, ConversionError
from cluster.families import FAMILY_NAMES, FamilyName
from tests.hub_lookalike import HubLookalike
from tests.integration.conversion.converting import artifacts, small_bloom, wanted
from tests.integration.processes import NIBBLE, ROOT, Sandbox, sandbox
from tests.random_checkpoint import Shape, write_random_checkpoint
from tests.torch_files import write_torch_weights

DIGESTS = json.loads((ROOT / "tests" / "reference" / "digests.json").read_text())
SLOW_BLOOM = Shape("bloom", width=1024, heads=16, layers=10)  # 250 MB of fp16: long enough to be hit in its middle


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("slow") / "model", SLOW_BLOOM)


def to_folder(request: Wanted, config: ArtifactsConfig, output: Path) -> tuple[Manifest, str]:
    """The manifest, and what was said."""
    said = io.StringIO()
    with ConversionDisplay(Console(file=said, width=500, emoji=False)) as display:
        manifest = convert_to_folder(request, config, output, display)
    return manifest, said.getvalue()


def to_cache(request: Wanted, config: ArtifactsConfig) -> Path:
    with ConversionDisplay(None) as display:
        cached = convert_to_cache(request, config, display)
    cached.release()
    return cached.folder


def assert_whole(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert {path.name for path in folder.iterdir()} == {manifest.binary, MANIFEST_FILE, *manifest.files}
    for name, sha256 in {**manifest.files, manifest.binary: manifest.sha256}.items():
        assert file_sha256(folder / name) == sha256
    data = (folder / manifest.binary).read_bytes()
    for chunk in manifest.chunks:
        assert hashlib.sha256(data[chunk.offset : chunk.offset + chunk.bytes]).hexdigest() == chunk.sha256
    assert sum(chunk.bytes for chunk in manifest.chunks) == len(data) == manifest.bytes


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_artifact_is_the_one_that_llm_convert_writes(family: FamilyName, tmp_path: Path) -> None:
    request = Wanted(source=f"builtin:{family}", family=family, quantization="q4_0")
    manifest, said = to_folder(request, artifacts(tmp_path / "cache"), tmp_path / "int4")
    assert manifest == Manifest.read(tmp_path / "int4")
    assert manifest.sha256 == DIGESTS[f"builtin:{family}"]["sha256"]
    assert f"converted builtin:{family}: {family} q4_0" in said
    assert_whole(tmp_path / "int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4"]  # written once, nowhere else


def test_int8_is_converted_as_well(tmp_path: Path) -> None:
    request = Wanted(source="builtin:llama", family="llama", quantization="q8_0")
    manifest, _ = to_folder(request, artifacts(tmp_path / "cache"), tmp_path / "int8")
    assert manifest.sha256 == DIGESTS["int8:builtin:llama"]["sha256"]


def test_a_damaged_bin_is_refused_by_file_and_tensor_and_nothing_is_published(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=40), write=write_torch_weights)
    config = artifacts(tmp_path / "cache")
    source = weight_sources(checkpoint)["transformer.h.1.mlp.dense_4h_to_h.weight"]
    data = bytearray((checkpoint / source.file).read_bytes())
    data[source.offset + 999] ^= 1
    (checkpoint / source.file).write_bytes(data)
    for publish in (
        lambda: to_cache(wanted(checkpoint), config),
        lambda: to_folder(wanted(checkpoint), config, tmp_path / "int4"),
    ):
        with pytest.raises(CheckpointError, match=rf"{source.file}: tensor {source.name} is damaged: .* CRC-32"):
            publish()
    assert not (tmp_path / "int4").exists()
    assert list(NodeCache(config.cache_dir).manifests()) == []


def test_what_the_node_cache_has_is_copied_out_and_not_converted(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=41))
    config = artifacts(tmp_path / "cache")
    cached = to_cache(wanted(checkpoint), config)
    written = (cached / MANIFEST_FILE).stat().st_mtime_ns
    assert to_cache(wanted(checkpoint), config) == cached
    assert (cached / MANIFEST_FILE).stat().st_mtime_ns == written
    manifest, said = to_folder(wanted(checkpoint), config, tmp_path / "int4")
    assert "found in the node cache" in said
    assert "converted" not in said
    assert manifest == Manifest.read(cached)
    assert_whole(tmp_path / "int4")
    NodeCache(config.cache_dir).check_integrity()


def test_a_damaged_copy_in_the_node_cache_is_not_used(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=42))
    config = artifacts(tmp_path / "cache")
    cached = to_cache(wanted(checkpoint), config)
    binary = cached / Manifest.read(cached).binary
    data = bytearray(binary.read_bytes())
    data[len(data) // 2] ^= 1
    binary.write_bytes(data)
    _, said = to_folder(wanted(checkpoint), config, tmp_path / "int4")
    assert "converted" in said
    assert_whole(tmp_path / "int4")
    to_cache(wanted(checkpoint), config)
    NodeCache(config.cache_dir).check_integrity()  # and there it is replaced


def test_a_hub_repository_is_found_by_its_name_when_the_hub_is_gone(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=43))
    with HubLookalike() as hub, sandbox() as home:
        hub.add("org/model", checkpoint)
        online = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        arguments = ("pipeline", "--thread-num", "1", "--model-family", "bloom", "--repo-id-or-model-path", "org/model")
        first = Sandbox(home.home, home.ray_tmpdir, online).run(*arguments)
        assert first.returncode == 0, first.stderr
        asked = len(hub.requests)
        shutil.rmtree(tmp_path / "hub")
        again = Sandbox(home.home, home.ray_tmpdir, online).run(*arguments)
        assert again.returncode == 0, again.stderr
        assert "found in the node cache" in again.stdout
        assert len(hub.requests) == asked


def test_a_damaged_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=44))
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-2:] = b"\x00\x7e"  # an fp16 NaN as the last weight
    (checkpoint / "model.safetensors").write_bytes(weights)
    config = artifacts(tmp_path / "cache")
    with pytest.raises(CheckpointError, match="NaN"):
        to_folder(wanted(checkpoint), config, tmp_path / "out" / "int4")
    with pytest.raises(CheckpointError, match="NaN"):
        to_cache(wanted(checkpoint), config)
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "cache" / "artifacts").iterdir()) == []


def test_an_artifact_that_the_check_refuses_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "model", small_bloom(seed=45))
    refusing = (sys.executable, "-c", "import sys; sys.exit('no good')")
    monkeypatch.setattr("cluster.conversion.steps.CHECK_COMMAND", refusing)
    with pytest.raises(ConversionError, match="ended with 1 and said: no good"):
        to_folder(wanted(checkpoint), artifacts(tmp_path / "cache"), tmp_path / "out" / "int4")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def home() -> Iterator[Sandbox]:
    with sandbox() as home:
        yield home


def started(
    home: Sandbox, checkpoint: Path, output: Path, limit: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    command = [*NIBBLE, "convert", str(checkpoint), "--family", "bloom", "--output", str(output)]
    return subprocess.Popen(
        command, env=home.environment, cwd=ROOT, text=True, start_new_session=True, preexec_fn=limit,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until_it_writes(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob(".*/*.bin")):
        assert time.monotonic() < deadline, "nothing was written within 60 s"
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_no_output_and_another_run_makes_it(
    number: signal.Signals, home: Sandbox, slow_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "int4"
    process = started(home, slow_checkpoint, output)
    wait_until_it_writes(output.parent)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert not output.exists()
    if number == signal.SIGINT:
        assert (process.returncode, said) == (130, "")
        assert list(output.parent.iterdir()) == []
    again = home.run("convert", str(slow_checkpoint), "--family", "bloom", "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert_whole(output)
    assert list(output.parent.iterdir()) == [output]  # what the killed run had left is gone, too


def test_a_full_disk_is_one_line_and_leaves_nothing(home: Sandbox, slow_checkpoint: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))  # as a quota, for one file

    process = started(home, slow_checkpoint, tmp_path / "out" / "int4", limit)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said == f"nibble: {tmp_path / 'out'}: cannot be written: File too large; free some space there\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_that_cannot_be_made_is_one_line(home: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "int4"
    result = home.run("convert", "builtin:bloom", "--family", "bloom", "--output", str(output))
    assert result.returncode == 1
    assert result.stderr.startswith(f"nibble: {tmp_path / 'file'}: cannot be written: ")
    assert len(result.stderr.splitlines()) == 1


def test_no_ray_and_no_other_heavy_package_is_imported(home: Sandbox, tmp_path: Path) -> None:
    code = (
        "import sys; from cluster.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'ray', 'transformers', 'fastapi', 'torch', 'grpc', 'huggingface_hub'}\n"
        "print('imported', sorted(heavy & set(sys.modules)))"
    )
    arguments = ["convert", "builtin:bloom", "--family", "bloom", "--output", str(tmp_path / "int4")]
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=home.environment, cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1] == "imported []"
