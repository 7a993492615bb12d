"""A running cluster that wants an API key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.ray_cluster import free_ports
from tests.integration.processes import Served, sandbox, serving


@contextmanager
def serving_with_key(config: str) -> Iterator[tuple[Served, Path, str]]:
    """`nibble serve` with KEYS of `config` replaced by a keys file; and that file, and the key of alice in it."""
    with sandbox() as home:
        keys = home.home / "keys.yaml"
        key = home.run("keys", "add", str(keys), "alice").stdout.strip()
        with serving(home, config.replace("KEYS", str(keys)), *free_ports(2)) as served:
            yield served, keys, key
