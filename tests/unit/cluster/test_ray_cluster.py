"""The ports that a cluster takes, and the fault of Ray that makes them matter."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import ByteSize
from ray.serve._private.grpc_util import start_grpc_server
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from ray.serve.config import gRPCOptions

from cluster import ray_cluster
from cluster.config import LimitsConfig
from cluster.errors import ConfigError
from cluster.haproxy.haproxy_run import amend, amended
from cluster.ray_cluster import UNCLAIMED_PORTS, free_block, free_ports, local_cluster, serve_environment
from cluster.serve_settings import REPLICA_PORTS, check_ray_reads


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
    environment = serve_environment(tmp_path, LimitsConfig())
    first = int(environment["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"])
    assert int(environment["RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT"]) == first + REPLICA_PORTS
    assert {first, first + REPLICA_PORTS - 1} <= set(UNCLAIMED_PORTS)
    fallback = [int(environment[f"RAY_SERVE_FALLBACK_PROXY_{name}_PORT"]) for name in ("HTTP", "GRPC")]
    assert len({*fallback, first}) == 3


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


def test_ports_that_the_servers_will_listen_on_are_left_to_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = free_block(16)
    monkeypatch.setattr(ray_cluster, "UNCLAIMED_PORTS", range(first, first + 16))
    assert set(free_ports(16, {first, first + 9})) == set(range(first, first + 16)) - {first, first + 9}
    assert free_block(4, {first, first + 9}) == first + 4
    asked = []

    def block(count: int, reserved: set[int]) -> int:
        asked.append((count, reserved))
        return first

    monkeypatch.setattr(ray_cluster, "free_block", block)
    settings = serve_environment(tmp_path, LimitsConfig(), reserved=(first, first + 9))
    ((count, reserved),) = asked
    single = {int(value) for name, value in settings.items() if name.endswith("_PORT") and "DIRECT" not in name}
    assert (count, reserved) == (REPLICA_PORTS, single | {first, first + 9})
    assert not single & {first, first + 9}


def test_what_starts_for_a_dead_haproxy_knows_the_routers(tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    alone = "defaults\nbackend b\n    server fallback 127.0.0.1:1 check backup\n"
    known = alone + "    server router 127.0.0.1:2 check\n"

    def started(config: str, reload: bool) -> bool:
        """Whether HAProxy knows a router."""
        file.write_text(config)
        amend(file, reload)
        return "server router" in file.read_text()

    assert not started(alone, reload=False)
    assert started(known, reload=True)
    assert started(alone, reload=False)
    assert not started(alone, reload=True), "there is none any more"
    assert not started(alone, reload=False)


def test_what_serve_writes_for_haproxy_is_amended(tmp_path: Path) -> None:
    """With Serve's own template: what is changed must be there."""
    written = HAPROXY_CONFIG_TEMPLATE
    found = amended(written, tmp_path / "503.http", 1000)
    assert found.count("timeout http-request 10s") == 1
    assert found.count("conn_cur gt 500") == written.count("\nfrontend http_frontend") + written.count(
        "\nfrontend grpc_frontend"
    )
    assert "status 404" not in found
    assert "grpc-status 5" not in found
    assert found.count("no replica of the router answers") == 3
    assert "conn_cur" in amended("defaults\nfrontend grpc_frontend\n", tmp_path)
    assert amended("defaults\n    errorfile 503 /tmp/500.http\n", tmp_path).endswith(f"errorfile 503 {tmp_path}\n")
    assert amended("global\n    maxconn 4096\ndefaults\n", tmp_path, 7).startswith("global\n    maxconn 7\n")
    with pytest.raises(ValueError, match="sections `defaults`"):
        amended("global\n", tmp_path)


def test_a_variable_that_ray_no_longer_reads_is_an_error_with_its_name(tmp_path: Path) -> None:
    check_ray_reads(serve_environment(tmp_path, LimitsConfig()))
    for name in ("RAY_SERVE_RENAMED", "RAY_SERVE_HAPROXY_NBTHREADS"):
        with pytest.raises(ConfigError, match=rf"^{name}: Ray .* does not read it"):
            check_ray_reads([name])
    check_ray_reads(["HOME"])


def test_limits_reach_rays_settings(tmp_path: Path) -> None:
    settings = serve_environment(tmp_path, LimitsConfig(timeout_s=900, body_bytes=ByteSize(100 << 20)))
    assert settings["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "930"
    assert int(settings["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"]) == 200 << 20
    assert LimitsConfig(timeout_s=5).drain == 5
    assert LimitsConfig(timeout_s=5, drain_s=0).drain == 0
    assert LimitsConfig(timeout_s=None).drain > 0


def test_ray_keeps_its_store_of_objects_within_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees no limit of a nested control group itself."""
    given: dict[str, Any] = {}

    def init(**arguments: Any) -> None:
        given.update(arguments)
        raise InterruptedError

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray_cluster, "available_memory", lambda: 10**9)
    with pytest.raises(InterruptedError), local_cluster(None):
        pass
    assert given["object_store_memory"] == 300_000_000
