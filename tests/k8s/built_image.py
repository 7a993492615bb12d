"""The image, built by buildah from its own Dockerfile on a base made of Debian's packages, and its root file system.

No registry of images is needed: a minimal Debian with Python stands in the place of python-slim, which is Debian too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "k8s/image/Dockerfile"
BASE = "docker.io/library/python:3.11-slim-bookworm"
DEBIAN = "bookworm"  # its Python is the base's
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
IMAGE = "localhost/nibble-serve:test"
NEEDED = ("mmdebstrap", "buildah", "unshare", "ip")
WRITABLE = ("/tmp", "/dev/shm", "/var/cache/nibble")
# What a build may know of this machine: where pip finds packages.
PIP_KEYS = ("index-url", "extra-index-url", "trusted-host", "proxy")

# ROOT read-only, with tmpfs where the pods have volumes, in a network of its own. Everything in it ends with `unshare`.
ENTER = """
set -eu
root=$1; shift
ip link set lo up
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
for folder in {writable}; do mount -t tmpfs -o mode=1777 tmpfs "$root$folder"; done
echo '127.0.0.1 localhost' > "$root/tmp/hosts"
mount --bind "$root/tmp/hosts" "$root/etc/hosts"
mount -o remount,bind,ro "$root"
exec chroot --userspec="$NIBBLE_USER" "$root" env --ignore-environment "$@"
"""


def missing() -> str | None:
    """Why the image cannot be built here; None where it can be."""
    if os.geteuid() != 0:
        return "needs root, for mounts and namespaces"
    absent = [program for program in NEEDED if shutil.which(program) is None]
    return f"needs {', '.join(absent)}: apt-get install mmdebstrap buildah iproute2" if absent else None


def run(command: Sequence[str | Path], **options: Any) -> str:
    """Its output. Raises AssertionError with what it said where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


class Builder:
    """Keeps what it makes in `folder`; `close` unmounts it, so that the folder can be removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # No option of the driver: on most machines the defaults of containers-storage are those of another user.
        storage = f"[storage]\ndriver = 'overlay'\ngraphroot = '{folder}/images'\nrunroot = '{folder}/run'\n"
        (folder / "storage.conf").write_text(storage)
        (folder / "pip.conf").write_text(pip_configuration())
        self.environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "TMPDIR": str(folder)}

    def buildah(self, *arguments: str | Path) -> str:
        return run(["buildah", *arguments], env=self.environment).strip()

    def make_base(self) -> None:
        archive = self.folder / "base.tar"
        run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, archive])
        container = self.buildah("from", "scratch")
        self.buildah("add", container, archive, "/")
        archive.unlink()
        self.buildah("run", "--isolation=chroot", container, "ln", "-s", "/usr/bin/python3.11", "/usr/local/bin/python")
        self.buildah("commit", "--quiet", "--rm", container, BASE)

    def build(self, dockerfile: Path, context: Path, tag: str) -> None:
        """With this machine's way to the registries, which is mounted and not copied."""
        mounts = ["--volume=/etc/ssl/certs:/etc/ssl/certs:ro", f"--volume={self.folder}/pip.conf:/etc/pip.conf:ro"]
        options = ["--isolation=chroot", "--network=host", "--pull-never", "--layers=false", "--quiet", *mounts]
        self.buildah("build", *options, f"--file={dockerfile}", f"--tag={tag}", context)

    def configuration(self, tag: str) -> dict[str, Any]:
        """The `config` of the OCI image: User, Env, Labels, Cmd."""
        inspected: dict[str, Any] = json.loads(self.buildah("inspect", "--type=image", tag))
        return inspected["OCIv1"]["config"]  # type: ignore[no-any-return]

    def root(self, tag: str) -> Path:
        """The image's root file system, mounted."""
        return Path(self.buildah("mount", self.buildah("from", "--pull-never", tag)))

    def close(self) -> None:
        self.buildah("rm", "--all")


def pip_configuration() -> str:
    """pip's, of this machine, as far as it says where packages come from."""
    lines = run([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    found = dict(line.split("=", 1) for line in lines)
    values = {name.rpartition(".")[2]: value.strip("'") for name, value in found.items()}
    kept = [f"{key} = {values[key]}" for key in PIP_KEYS if key in values and "file:" not in values[key]]
    return "\n".join(["[global]", *kept, ""])


def run_read_only(root: Path, config: dict[str, Any], command: Sequence[str], program: str | None = None) -> str:
    """What `command` prints in the image, as its user, with nothing writable but `WRITABLE`. `program`: its input."""
    enter = ENTER.format(writable=" ".join(WRITABLE))
    namespaces = ["unshare", "--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child"]
    environment = {**os.environ, "NIBBLE_USER": config["User"]}
    arguments = [str(root), *config["Env"], *command]
    return run([*namespaces, "sh", "-c", enter, "sh", *arguments], env=environment, input=program)
