"""A cluster of two Ray nodes that an operator started, as docs/how-to/operate.md says: `nibble serve` joins it, and
`nibble apply` changes it from elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.config import LimitsConfig
from cluster.ray_cluster import free_ports, serve_environment
from tests.integration.conftest import RAY
from tests.integration.processes import Sandbox, sandbox, serving

MODEL = {"name": "one", "family": "llama", "checkpoint": "builtin:llama", "threads": 1}
ADDED = {"name": "two", "family": "bloom", "checkpoint": "builtin:bloom", "threads": 1}


@pytest.fixture
def two_nodes() -> Iterator[tuple[Sandbox, str, list[int]]]:
    """Each with a CPU, so that two models need both, and with files and ports of its own, as on machines of their own;
    the address; and ports for HTTP and gRPC."""
    with sandbox() as home, ExitStack() as stack:
        port, *listens = free_ports(3)
        reserved = {port, *listens}
        address, common = f"127.0.0.1:{port}", ["--num-cpus=1", "--block"]
        head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
        nodes = {"head": [*head, f"--temp-dir={home.ray_tmpdir}"], "joined": ["--address", address]}
        for name, arguments in nodes.items():
            # HAProxy takes no long path of a socket.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", prefix="nb")))
            settings = serve_environment(folder, LimitsConfig(), reserved)
            reserved |= {int(value) for name, value in settings.items() if name.endswith("_PORT")}
            process = subprocess.Popen(
                [str(RAY), "start", *arguments, *common],
                env=home.environment | settings,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(process.wait)
            stack.callback(os.killpg, process.pid, signal.SIGKILL)
            wait_for_head(home, address)
            home.extra |= settings if name == "head" else {}
        yield home, address, listens
        stack.close()
        assert home.wait_no_processes() == []


def wait_for_head(home: Sandbox, address: str) -> None:
    command = [str(RAY), "status", "--address", address]
    for _ in range(60):
        if subprocess.run(command, env=home.environment, capture_output=True, check=False).returncode == 0:
            return
    raise AssertionError("the head did not start")


def ready(url: str) -> dict[str, bool]:
    cards = httpx.get(f"{url}/v1/models", timeout=60, trust_env=False).json()["data"]
    return {card["id"]: card["ready"] for card in cards}


@pytest.mark.long
def test_a_joined_cluster_of_two_nodes_serves_and_changes(
    two_nodes: tuple[Sandbox, str, list[int]], tmp_path: Path
) -> None:
    home, address, (http_port, grpc_port) = two_nodes
    config = yaml.safe_dump({"models": [MODEL]})
    with serving(home, config, http_port, grpc_port, "--address", address) as served:
        assert set(ready(served.http)) == {"one"}
        path = tmp_path / "new.yaml"
        ports = {"http": {"port": http_port}, "grpc": {"port": grpc_port}}
        path.write_text(yaml.safe_dump({**ports, "models": [MODEL, ADDED]}))
        told = home.run("apply", str(path), "--address", address, "--dry-run")
        assert (told.returncode, "two: added" in told.stdout) == (0, True), told.stderr
        changed = home.run("apply", str(path), "--address", address)
        assert changed.returncode == 0, changed.stderr
        assert set(ready(served.http)) == {"one", "two"}
        body = {"prompt": "Q: What is CPU? A:", "max_tokens": 4}
        for model in ("one", "two"):
            url = f"{served.http}/v1/completions"
            answer = httpx.post(url, json={"model": model, **body}, timeout=60, trust_env=False)
            assert answer.status_code == 200, answer.text
        status = home.run("status", "--address", address)
        assert status.returncode == 0, status.stderr
        assert served.stop(signal.SIGTERM) == 0
