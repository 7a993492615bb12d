"""The image: built by a real builder from its Dockerfile, then run with a read-only root as its own user.

Takes about five minutes, network for apt and pip, and 4 GB in the temporary folder, which are given back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.k8s.built_image import DOCKERFILE, IMAGE, REPOSITORY, Builder, missing, run, run_read_only
from tests.ray_titles import replica_of

reason = missing()
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(reason is not None, reason=f"the image cannot be built here: {reason}"),
]

MAX_BYTES = 1_000_000_000  # of what nibble adds to the base; 0.96 GB when this was written
LIST_INSTALLED = """
import importlib.metadata, json
print(json.dumps({found.name: found.version for found in importlib.metadata.distributions()}))
"""


class Image(NamedTuple):
    root: Path
    config: dict[str, Any]

    def run(self, *command: str, program: str | None = None) -> str:
        return run_read_only(self.root, self.config, command, program)


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    folder = Path(tempfile.mkdtemp(prefix="nibble-image-"))
    made = Builder(folder)
    try:
        made.make_base()
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(builder: Builder, tmp_path_factory: pytest.TempPathFactory) -> Image:
    builder.build(DOCKERFILE, source_copy(tmp_path_factory.mktemp("context")), IMAGE)
    return Image(builder.root(IMAGE), builder.configuration(IMAGE))


def source_copy(folder: Path) -> Path:
    """The files of the repository, and what a developer's folder has beside them."""
    names = run(["git", "ls-files", "-z"], cwd=REPOSITORY).split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    for secret in ("api-keys.json", ".env", "k8s/base/keys.yaml", "k8s/image/token", ".venv/bin/python"):
        (folder / secret).parent.mkdir(parents=True, exist_ok=True)
        (folder / secret).write_text("a secret")
    return folder


def test_only_what_the_image_is_made_of_is_copied(builder: Builder, tmp_path: Path) -> None:
    context = source_copy(tmp_path / "context")
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM scratch\nCOPY . /\n")
    builder.build(dockerfile, context, "localhost/context:test")
    root = builder.root("localhost/context:test")
    copied = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    folders = ("cluster/", "deployments/", "protos/")
    files = {"pyproject.toml", "README.md", "requirements.lock", "k8s/image/install.sh"}
    assert {name for name in copied if not name.startswith(folders)} == files
    assert {name for name in source_names(context) if name.startswith(folders)} == copied - files


def source_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_user_is_a_number_and_not_root(image: Image) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.config["User"])
    assert image.run("id", "-u").strip() == image.config["User"].partition(":")[0]


def test_labels_name_the_version(image: Image) -> None:
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.title"] == "nibble-serve"
    assert labels["org.opencontainers.image.version"] == version("nibble-serve")


def test_commands_are_found_with_and_without_a_login_shell(image: Image) -> None:
    """KubeRay may start Ray in either."""
    expected = [f"/opt/nibble/bin/{name}" for name in ("ray", "nibble", "serve", "python")]
    for shell in ("-c", "-lc"):
        assert image.run("bash", shell, "command -v ray nibble serve python").split() == expected
    assert "render" in image.run("nibble", "--help")


def test_its_packages_import_and_there_is_no_torch(image: Image) -> None:
    imports = "import ray, openvino, llvmlite.binding, s3fs, cluster, deployments, deployments.app"
    torch = "from importlib.util import find_spec; print(find_spec('torch'))"
    assert image.run("python", "-W", "error::ImportWarning", "-c", f"{imports}; {torch}").split() == ["None"]


def test_it_has_what_kuberay_starts_beside_ray(image: Image) -> None:
    """The autoscaler's container, and the job that clears Redis after a cluster with GCS fault tolerance."""
    assert "--cluster-namespace" in image.run("ray", "kuberay-autoscaler", "--help")
    image.run("python", "-c", "from ray._private.gcs_utils import cleanup_redis_storage")
    image.run("python", "-c", "import ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider")


def test_every_package_is_the_locked_one(image: Image) -> None:
    lock = [Requirement(line) for line in (REPOSITORY / "requirements.lock").read_text().splitlines()]
    pinned = {
        canonicalize_name(entry.name): str(entry.specifier)
        for entry in lock
        if entry.marker is None or entry.marker.evaluate({"python_version": "3.11", "python_full_version": "3.11.2"})
    }
    installed = json.loads(image.run("python", "-c", LIST_INSTALLED))
    installed.pop("nibble-serve")
    assert {name: f"=={found}" for name, found in installed.items()} == {
        name: pinned.get(canonicalize_name(name), "not in requirements.lock") for name in installed
    }


def test_nothing_is_writable_but_the_declared_folders(image: Image) -> None:
    """The user owns nothing either: the root need not be read-only for that."""
    with pytest.raises(AssertionError, match="Read-only file system"):
        image.run("sh", "-c", "echo >> /etc/passwd || touch /opt/nibble/file")
    image.run("touch", "/tmp/file", "/dev/shm/file", "/var/cache/nibble/file")
    owned = run(["find", image.root, "-xdev", "-user", image.config["User"].partition(":")[0]]).split()
    assert owned == [f"{image.root}/var/cache/nibble"]


def test_byte_code_is_there_and_not_asked_for_its_source(image: Image) -> None:
    """Or a read-only root would compile it at each start."""
    compiled = [*image.root.glob("opt/nibble/lib/python3*/site-packages/**/*.pyc")]
    assert any(path.match("cluster/__pycache__/errors.*") for path in compiled)
    unchecked = (1).to_bytes(4, "little")  # PEP 552: hash-based, source unchecked
    assert [path for path in compiled if path.read_bytes()[4:8] != unchecked] == []


def test_it_serves_both_engines_with_a_read_only_root(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    """As KubeRay starts it: `ray start`, then the rendered configuration over the head's REST API."""
    program = (Path(__file__).parent / "serve_in_image.py").read_text()
    said = json.loads(image.run("python", "-", program=program).splitlines()[-1])
    answers = said["answers"]
    overhead = sum(memory for title, memory in said["processes"] if replica_of(title) not in answers)
    with capsys.disabled():
        print(f"\nimage: a head with a router takes {overhead / 1e6:.0f} MB beside the models' replicas")
    for answer in answers.values():
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["text"].startswith(" A CPU")
    assert answers.keys() == {"one", "two"}


def test_size(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    added = size_of(image.root / "opt/nibble")
    with capsys.disabled():
        print(f"\nimage: /opt/nibble {added / 1e6:.0f} MB, with the base {size_of(image.root) / 1e6:.0f} MB")
    assert added < MAX_BYTES


def size_of(folder: Path) -> int:
    return int(subprocess.check_output(["du", "-sb", "-x", folder]).split()[0])


def test_what_it_is_made_with_stays_out(image: Image) -> None:
    """No package index's address, no compiler, no pip of its own."""
    values = " ".join(image.config["Env"])
    assert "PIP" not in values
    assert "://" not in values
    assert not [name for name in os.listdir(image.root / "opt/nibble/bin") if name.startswith("pip")]
    assert not (image.root / "src").exists()
