"""What nibble relies on in Ray: every variable that it sets, with its reason, and the names that it reads.

Ray 2.60 ignores a variable that it does not know. `check_ray_reads` finds one that another version has renamed,
before a cluster runs without it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from cluster.config import LimitsConfig
from cluster.errors import ConfigError

# Of Ray: what has a name in it is found by nibble alone.
NAMESPACE = "nibble"
ARTIFACT_STORE = "artifact-store"  # the actor, there
# The logger whose handlers write to the log file of a Serve process, and what is below it.
SERVE_LOGGER = "ray.serve"
# The states, in Serve's status, of a replica that takes requests; in the second one it gets new settings.
SERVING_STATES = ("RUNNING", "UPDATING")
# From these the router's replicas take their ports; one that ended keeps its port for a while.
REPLICA_PORTS = 32
# Answers with many log probabilities are larger than any request, and Serve has one bound for both.
ANSWER_BYTES = 32 << 20
# Seconds beyond the time to drain: what drains is to end by itself first.
HARD_STOP_MARGIN_S = 30


class LocalPorts(NamedTuple):
    """Free ones of this machine; `first_grpc` begins a block of REPLICA_PORTS."""

    metrics: int
    stats: int
    fallback_http: int
    fallback_grpc: int
    first_grpc: int


# Where Ray 2.60 reads each variable, below the package's folder.
READ_IN: dict[str, tuple[str, ...]] = {
    "serve/_private/constants.py": ("RAY_SERVE_",),
    "serve/_private/haproxy.py": ("SERVE_SOCKET_",),
    "_private/log_monitor.py": ("LOG_NAME_UPDATE_INTERVAL_S", "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD"),
    "_common/usage/usage_constants.py": ("RAY_USAGE_STATS_ENABLED",),
}


def serve_settings(limits: LimitsConfig) -> dict[str, str]:
    """What every process of any cluster that serves nibble has in its environment, on one machine as on Kubernetes."""
    return {
        # Both together cut a streamed token's cost from 0.70 to 0.20 ms.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # That mode would keep up to 1000 lines of the request log in memory, and lose them with the process.
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        # Seconds. An old HAProxy process that still has connections after a reload is ended then, and they with it.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(limits.drain) + HARD_STOP_MARGIN_S),
        # A larger message is refused before it is parsed: three of 300 MB took 2 GB of the router's memory.
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(ANSWER_BYTES, 2 * limits.body_bytes)),
        # Serve's own code fails at a header that is not UTF-8, before a request comes to the router's.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.api.http.http_headers.middlewares",
        # gRPC's own, read by every channel; empty: none. Traffic inside the cluster never goes to a proxy, whatever
        # http_proxy and no_proxy say.
        "grpc_proxy": "",
        # Seconds. HAProxy, or the actor that started it, is started again after three failed checks; until then
        # another process stands in (haproxy_stand_in.py).
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        # The port is the stand-in's until that next one listens: without this, Serve starts HAProxy with `-dR`, and it
        # fails where another process has the port.
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",
        # Seconds that HAProxy goes on for at least on a node that drains, or has no replica any more: longer than a
        # readiness probe takes to fail (k8s/base/rayservice.yaml), and than another node's takes to be ready.
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "60",
        # A replica that fails its health checks is ended at once: it cannot end the requests in it.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Seconds. A replica that is needed waits for two or three turns of the controller's loop, and would start 0.6 s
        # later at 0.5. The controller takes about 0.05 of a core at 0.2, 0.04 at 0.5 (docs/performance.md).
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2",
        # Seconds. Ray's log monitor looks for new log files ten times a second where there are not more than so many.
        "LOG_NAME_UPDATE_INTERVAL_S": "5",
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    }


def local_settings(folder: Path, ports: LocalPorts) -> dict[str, str]:
    """What a cluster on one machine has beside it: HAProxy's files stay in `folder`, and all ports behind it are free
    ones, so that clusters on one machine do not meet.

    They would: Ray 2.60 passes gRPC's option so_reuseport as a string, which gRPC ignores, so that the replicas of two
    clusters can listen on the same port, 40000, and the kernel gives each some of the other's requests, whatever keys
    they ask for.
    """
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.first_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.first_grpc + REPLICA_PORTS),
        # Nothing stands behind a local node to move its traffic to: replicas need not linger at the end.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def haproxy_script(folder: Path, binary: str) -> Path:
    """A program in `folder` that Serve starts in the place of HAProxy's `binary`: `haproxy_run.py`."""
    script = folder / "haproxy"
    program = shlex.join([sys.executable, "-IS", str(Path(__file__).parent / "haproxy" / "haproxy_run.py"), binary])
    script.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    script.chmod(0o700)
    return script


def check_ray_reads(names: Iterable[str]) -> None:
    """Raises ConfigError for a variable that the installed Ray does not read where 2.60 does."""
    spec = find_spec("ray")
    assert spec is not None, "ray is a dependency"
    package = Path(next(iter(spec.submodule_search_locations or ())))
    for name in names:
        module = next((module for module, read in READ_IN.items() if name.startswith(read)), None)
        if module is None:
            continue  # it is none of Ray's
        file = package / module
        if not file.exists() or f'"{name}"' not in file.read_text():
            raise ConfigError(
                f"{name}: Ray {version('ray')} does not read it in ray/{module}, as Ray 2.60 does; nibble relies on it"
                " (cluster/serve_settings.py): install the range of ray that pyproject.toml names"
            )
