from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_cluster import free_ports, local_cluster
from tests.integration.processes import Sandbox, Served, sandbox, serving

RAY = Path(sys.executable).parent / "ray"

# The four demos, and a model whose queue fills at once.
CONFIG = """
models:
- {name: llama, family: llama, checkpoint: 'builtin:llama'}
- {name: gptneox, family: gptneox, checkpoint: 'builtin:gptneox'}
- {name: bloom, family: bloom, checkpoint: 'builtin:bloom'}
- {name: starcoder, family: starcoder, checkpoint: 'builtin:starcoder'}
- {name: narrow, family: llama, checkpoint: 'builtin:llama', threads: 1, queue: {max_ongoing: 1, max_queued: 1}}
"""


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One `nibble serve` of four families for all tests that only ask it."""
    http_port, grpc_port = free_ports(2)
    with sandbox() as home, serving(home, CONFIG, http_port, grpc_port) as served:
        yield served


@pytest.fixture(scope="module")
def ray_node() -> Iterator[None]:
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
