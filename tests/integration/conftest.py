from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_cluster import free_ports, local_cluster
from tests.integration.processes import Sandbox, sandbox

RAY = Path(sys.executable).parent / "ray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the modules that use `ray_node` last: this process can have one Ray cluster at a time, and others start
    their own."""
    on_node = {item.path for item in items if "ray_node" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path in on_node)


@pytest.fixture(scope="session")
def ray_node() -> Iterator[None]:
    """One Ray node for all tests that need this process to be a driver."""
    with sandbox() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(home.ray_tmpdir))
        with local_cluster(2):
            yield


@pytest.fixture
def one_cpu_head() -> Iterator[tuple[Sandbox, str]]:
    """A Ray head with one CPU, as an operator would start it; its address."""
    with sandbox(RAY_USAGE_STATS_ENABLED="0") as home:
        (port,) = free_ports(1)
        head = [
            str(RAY), "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=1",
            "--include-dashboard=false", f"--temp-dir={home.ray_tmpdir}", "--block",
        ]  # fmt: skip
        process = subprocess.Popen(
            head, env=home.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield home, f"127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert home.wait_no_processes() == []
