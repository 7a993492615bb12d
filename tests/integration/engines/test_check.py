"""The check that every new artifact has to pass, on sound and on damaged ones; each runs in its own process."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts.manifest import MANIFEST_FILE, Manifest, TensorEntry
from cluster.families import FAMILY_NAMES, FamilyName

Artifact = Callable[[FamilyName], Path]


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployments.engines.check", str(folder), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def refusal(folder: Path) -> str:
    child = check(folder)
    assert child.returncode == 1, child
    assert "Traceback" not in child.stderr
    return child.stderr.splitlines()[-1]


@pytest.fixture
def copy(demo_artifact: Artifact, tmp_path: Path) -> Callable[[FamilyName], tuple[Path, bytearray, Manifest]]:
    """An artifact's folder that a test may change, its binary and its manifest."""

    def copied(family: FamilyName) -> tuple[Path, bytearray, Manifest]:
        folder = shutil.copytree(demo_artifact(family), tmp_path / family)
        manifest = Manifest.read(folder)
        return folder, bytearray((folder / manifest.binary).read_bytes()), manifest

    return copied


Copy = Callable[[FamilyName], tuple[Path, bytearray, Manifest]]


def largest(manifest: Manifest) -> TensorEntry:
    return max((tensor for tensor in manifest.tensors if tensor.type == "q4_0"), key=lambda tensor: tensor.bytes)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_sound_artifact_passes(family: FamilyName, demo_artifact: Artifact) -> None:
    child = check(demo_artifact(family))
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_shifted_tensor_is_found(family: FamilyName, copy: Copy) -> None:
    folder, data, manifest = copy(family)
    tensor = largest(manifest)
    span = slice(tensor.offset, tensor.offset + tensor.bytes)
    data[span] = np.roll(np.frombuffer(bytes(data[span]), np.uint8), 7).tobytes()
    (folder / manifest.binary).write_bytes(data)
    assert tensor.name in refusal(folder)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_nan_in_the_weights_is_found(family: FamilyName, copy: Copy) -> None:
    folder, data, manifest = copy(family)
    tensor = next(tensor for tensor in manifest.tensors if tensor.type == "f32")
    data[tensor.offset : tensor.offset + 4] = struct.pack("<f", float("nan"))
    (folder / manifest.binary).write_bytes(data)
    assert tensor.name in refusal(folder)


def test_weights_that_are_all_zero_are_found(copy: Copy) -> None:
    folder, data, manifest = copy("starcoder")
    tensor = manifest.tensors[-1]
    data[tensor.offset : tensor.offset + tensor.bytes] = bytes(tensor.bytes)
    (folder / manifest.binary).write_bytes(data)
    assert "logits" in refusal(folder)


def test_numbers_that_overflow_in_the_model_are_found(copy: Copy) -> None:
    folder, data, manifest = copy("bloom")
    for tensor in manifest.tensors:
        if tensor.type == "f32":
            data[tensor.offset : tensor.offset + tensor.bytes] = np.full(tensor.bytes // 4, 6e4, "<f4").tobytes()
        else:
            blocks = np.frombuffer(bytes(data[tensor.offset : tensor.offset + tensor.bytes]), np.uint8).copy()
            blocks.reshape(-1, 34)[:, :2] = np.frombuffer(np.float16(8000).tobytes(), np.uint8)
            data[tensor.offset : tensor.offset + tensor.bytes] = blocks.tobytes()
    (folder / manifest.binary).write_bytes(data)
    assert "not finite" in refusal(folder) or "NaN" in refusal(folder)


def test_a_truncated_file_is_found(copy: Copy) -> None:
    folder, data, manifest = copy("llama")
    (folder / manifest.binary).write_bytes(data[:-100])
    assert "manifest" in refusal(folder)


def test_rows_that_are_no_multiple_of_64_are_found(copy: Copy) -> None:
    folder, _, _ = copy("llama")
    tensors = json.loads((folder / MANIFEST_FILE).read_text())
    changed = next(tensor for tensor in tensors["tensors"] if tensor["type"] == "q4_0")
    changed["shape"] = [changed["shape"][0] * 2, changed["shape"][1] // 2]
    (folder / MANIFEST_FILE).write_text(json.dumps(tensors))
    assert "multiples of 64" in refusal(folder)


@pytest.mark.parametrize("family", ["llama", "gptneox"])
def test_a_layer_count_on_which_the_library_aborts_kills_only_the_child(family: FamilyName, copy: Copy) -> None:
    folder, data, manifest = copy(family)
    data[24:28] = struct.pack("<i", 3)  # magic, version, then n_layer is the fifth number
    (folder / manifest.binary).write_bytes(data)
    child = check(folder)
    assert child.returncode != 0
    assert child.stderr.strip()


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    assert MANIFEST_FILE in refusal(tmp_path)
