"""The ports that a cluster takes, and the fault of Ray that makes them matter."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.serve._private.grpc_util import start_grpc_server
from ray.serve.config import gRPCOptions

from cluster import ray_cluster
from cluster.errors import ConfigError
from cluster.ray_cluster import (
    REPLICA_PORTS,
    UNCLAIMED_PORTS,
    free_block,
    free_ports,
    haproxy_script,
    serve_environment,
)


async def test_two_of_serves_grpc_servers_listen_on_one_port() -> None:
    """Ray's fault, seen in 2.60: when this fails, clusters no longer need ranges of their own for replicas' ports."""
    (port,) = free_ports(1)
    loop = asyncio.get_running_loop()
    servers = []
    for _ in range(2):
        _, server = await start_grpc_server(lambda **_: None, gRPCOptions(port=port), event_loop=loop)
        servers.append(server)
    for server in servers:
        await server.stop(None)


def test_a_cluster_s_replicas_have_ports_of_their_own(tmp_path: Path) -> None:
    environment = serve_environment(tmp_path)
    first = int(environment["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"])
    assert int(environment["RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT"]) == first + REPLICA_PORTS
    assert {first, first + REPLICA_PORTS - 1} <= set(UNCLAIMED_PORTS)
    fallback = [int(environment[f"RAY_SERVE_FALLBACK_PROXY_{name}_PORT"]) for name in ("HTTP", "GRPC")]
    assert len({*fallback, first}) == 3


def test_rays_log_monitor_does_not_look_for_files_all_the_time(tmp_path: Path) -> None:
    """It reads the settings when it is imported."""
    program = (
        "import time; from ray._private.log_monitor import LogMonitor; monitor = LogMonitor.__new__(LogMonitor);"
        " monitor.log_filenames = set(); print([monitor.should_update_filenames(time.time() - s) for s in (1, 6)])"
    )
    for settings, looks in ({}, [True, True]), (serve_environment(tmp_path), [False, True]):
        command, variables = [sys.executable, "-c", program], {**os.environ, **settings}
        assert subprocess.run(command, env=variables, capture_output=True, text=True).stdout == f"{looks}\n"


def test_a_block_with_a_port_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_block(8)
    monkeypatch.setattr(ray_cluster, "UNCLAIMED_PORTS", range(first, first + 12))
    with socket.socket(socket.AF_INET6) as taken:
        assert free_block(4) in (first, first + 4)
        taken.bind(("::", first + 1))
        assert free_block(4) == first + 4
        monkeypatch.setattr(ray_cluster, "UNCLAIMED_PORTS", range(first, first + 8))
        with pytest.raises(ConfigError, match="no 4 consecutive free ports"):
            free_block(4)


HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout client 1s
    timeout server 1s
frontend main
    bind 127.0.0.1:{port}
"""
STARTER = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"


def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    config = tmp_path / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port))
    command = [sys.executable, "-c", STARTER, str(haproxy_script(tmp_path)), "-db", "-f", str(config)]
    with subprocess.Popen(command) as parent:
        wait_until_listening(port, True)
        parent.kill()
    wait_until_listening(port, False)


def wait_until_listening(port: int, wanted: bool, timeout: float = 30) -> None:
    ends = time.monotonic() + timeout
    while listens(port) != wanted:
        assert time.monotonic() < ends, f"wanted: {wanted}"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
