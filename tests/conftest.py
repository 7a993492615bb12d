"""Fixtures for unit and integration tests alike."""

from __future__ import annotations

import hashlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import cluster.demos
from cluster.artifacts.manifest import MANIFEST_FILE, Manifest, Quantization, binary_name
from cluster.conversion.plan import CONVERTER_VERSION, plan_conversion
from cluster.conversion.shard import convert_shard
from cluster.families import FamilyName

DEMOS = Path(cluster.demos.__file__).parent

# A shell's background job ignores SIGINT, and so would the processes that tests start there and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def convert_here(checkpoint: Path, family: FamilyName, folder: Path, quantization: Quantization = "q4_0") -> Path:
    """Converts a checkpoint into `folder`, in this process, as Ray tasks and the node cache do otherwise."""
    plan = plan_conversion(checkpoint, family, quantization)
    data = b"".join(convert_shard(plan, shard.index).tobytes() for shard in plan.shards)
    folder.mkdir(parents=True, exist_ok=True)
    binary = binary_name(family, plan.quantization)
    (folder / binary).write_bytes(data)
    for name in plan.files:
        shutil.copyfile(checkpoint / name, folder / name)
    digest = hashlib.sha256(data).hexdigest()
    manifest = Manifest(
        artifact_id=f"test-{digest[:16]}",
        converter_version=CONVERTER_VERSION,
        family=family,
        quantization=plan.quantization,
        engines=plan.engines,
        source=str(checkpoint),
        binary=binary,
        bytes=len(data),
        sha256=digest,
        chunks=(),
        tensors=plan.entries,
        files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in plan.files},
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FamilyName], Path]:
    """Called with a family, gives the folder of its converted demo checkpoint; tests must not change what is in it."""
    folders: dict[FamilyName, Path] = {}

    def artifact(family: FamilyName) -> Path:
        if family not in folders:
            folders[family] = convert_here(DEMOS / family, family, tmp_path_factory.mktemp(f"artifact-{family}"))
        return folders[family]

    return artifact
