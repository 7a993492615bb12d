"""Fixtures that tests of several folders share."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import is_hypothesis_test, settings

import cluster.demos
from cluster.artifacts.manifest import MANIFEST_FILE, Manifest, Quantization, binary_name
from cluster.conversion.plan import CONVERTER_VERSION, plan_conversion
from cluster.conversion.shard import convert_shard
from cluster.families import FamilyName
from cluster.ray_cluster import free_ports
from tests.examples import LONG, LONG_EXAMPLES, USUAL_EXAMPLES
from tests.integration.processes import Served, assert_ends_cleanly, sandbox, serving

DEMOS = Path(cluster.demos.__file__).parent

# The four demos, and a model whose queue fills at once.
CONFIG = """
models:
- {name: llama, family: llama, checkpoint: 'builtin:llama'}
- {name: gptneox, family: gptneox, checkpoint: 'builtin:gptneox'}
- {name: bloom, family: bloom, checkpoint: 'builtin:bloom'}
- {name: starcoder, family: starcoder, checkpoint: 'builtin:starcoder'}
- {name: narrow, family: llama, checkpoint: 'builtin:llama', threads: 1, queue: {max_ongoing: 1, max_queued: 1}}
"""

# A shell's background job ignores SIGINT, and so would the processes that tests start there and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline would tell how busy the machine is. CI draws the same examples each time, so that what it says is about the
# change; elsewhere every run draws others.
for _name, _examples in (("usual", USUAL_EXAMPLES), ("long", LONG_EXAMPLES)):
    settings.register_profile(_name, max_examples=_examples, deadline=None, derandomize="CI" in os.environ)
settings.load_profile("long" if LONG else "usual")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what draws examples, so that `make test-long` runs it with more of them."""
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker("generated")


def convert_here(checkpoint: Path, family: FamilyName, folder: Path, quantization: Quantization = "q4_0") -> Path:
    """Converts a checkpoint into `folder`, in this process, as Ray tasks and the node cache do otherwise."""
    plan = plan_conversion(checkpoint, family, quantization)
    data = b"".join(convert_shard(plan, shard.index).tobytes() for shard in plan.shards)
    folder.mkdir(parents=True, exist_ok=True)
    binary = binary_name(family, plan.quantization)
    (folder / binary).write_bytes(data)
    for name in plan.files:
        (folder / name).parent.mkdir(exist_ok=True)
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


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One `nibble serve` of four families for all tests that only ask it."""
    http_port, grpc_port = free_ports(2)
    with sandbox() as home, serving(home, CONFIG, http_port, grpc_port) as served:
        yield served
        assert_ends_cleanly(served, signal.SIGINT)
